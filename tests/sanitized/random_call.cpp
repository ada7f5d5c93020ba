// SPDX-License-Identifier: MIT
#include "random_call.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>

#define CONVNN_ISA call
#include "../../csrc/cpu/vector.h"

namespace sanitized {
namespace {

using namespace convnn;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The smallest sizes, multiples of tile and vector sizes, and one more and one less than those.
const std::vector<int64_t> kSizes = {1,  2,  3,  7,  8,  9,  15,  16,  17,  31,  32,  33,
                                     47, 48, 49, 63, 64, 65, 127, 128, 129, 255, 256, 257};

int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}
DType similarity_dtype(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

void set(const Floats& floats, int64_t i, double x) {
  switch (floats.dtype) {
    case DType::float64:
      static_cast<double*>(floats.data())[i] = x;
      break;
    case DType::float32:
      static_cast<float*>(floats.data())[i] = float(x);
      break;
    case DType::float16:
      call::narrow(float(x), static_cast<call::half*>(floats.data())[i]);
      break;
    case DType::bfloat16:
      call::narrow(float(x), static_cast<call::bfloat16*>(floats.data())[i]);
      break;
  }
}

double get(const Floats& floats, int64_t i) {
  switch (floats.dtype) {
    case DType::float64:
      return static_cast<const double*>(floats.data())[i];
    case DType::float32:
      return static_cast<const float*>(floats.data())[i];
    case DType::float16:
      return call::widen(static_cast<const call::half*>(floats.data())[i]);
    default:
      return call::widen(static_cast<const call::bfloat16*>(floats.data())[i]);
  }
}

// What the elements of a tensor are like.
enum class Content {
  normal,
  integers,
  duplicates,
  zero_rows,
  constant,
  near_ties,
  scales,
  special
};

double special(Draw& draw) {
  return draw.one_of({kNaN, kInfinity, -kInfinity, 0.0, -0.0, 1e-310, 1e-40, 1e155, -3e38, 6e4});
}

// Fills count rows of columns elements that lie `stride` apart.
void fill(Draw& draw, Content content, const Floats& to, int64_t first, int64_t stride,
          int64_t count, int64_t columns) {
  for (int64_t row = 0; row < count; ++row) {
    const double scale = content == Content::zero_rows ? double(draw.below(3) > 0)
                         : content == Content::scales  ? std::pow(10.0, double(draw.between(-3, 3)))
                                                       : 1;
    const int64_t same = content == Content::duplicates && row > 4 ? draw.below(5) : row;
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t at = first + row * stride + i;
      double x = draw.normal();
      if (content == Content::integers) x = double(draw.between(-3, 3));
      if (content == Content::constant) x = 0.3;
      if (content == Content::near_ties) x = 0.7 + 1e-6 * x;
      if (content == Content::special && draw.chance(0.03)) x = special(draw);
      set(to, at, same != row ? get(to, first + same * stride + i) : x * scale);
    }
  }
}

Content any_content(Draw& draw) { return Content(draw.below(8)); }

// The kinds of calls that take different ways through the library.
enum class Kind { small, screened, few_queries, long_batch, large_dense };

Kind kind_of(Draw& draw) {
  const double share = draw.uniform();
  if (share < 0.03) return Kind::screened;
  if (share < 0.11) return Kind::few_queries;
  if (share < 0.115) return Kind::long_batch;
  if (share < 0.13) return Kind::large_dense;
  return Kind::small;
}

// Sizes of a call that takes a few milliseconds. Most gather too little to be worth several tasks.
void draw_small(Draw& draw, Shape& s) {
  const int64_t most_gathered = draw.chance(0.2) ? 1 << 18 : 1 << 16;
  int64_t products, gathered;
  do {
    s.batch = draw.one_of({1, 1, 2, 3, 4, 6});
    s.n = draw.one_of(kSizes), s.m = draw.one_of(kSizes);
    s.d = draw.one_of(kSizes), s.c = draw.one_of(kSizes);
    s.o = kSizes[size_t(draw.below(12))];
    if (draw.chance(0.02)) s.m = 0;
    if (draw.chance(0.02)) s.d = 0;
    if (draw.chance(0.02)) s.c = 0;
    s.k = draw.one_of({int64_t(1), int64_t(9), draw.between(1, s.m + 1), s.m + 1});
    products = s.batch * s.n * s.m * s.d;
    gathered = s.batch * s.n * s.k * std::max(s.c, s.d);
    if (s.convolution == Convolution::dense) gathered = gathered * s.o / 4;
  } while (products > 1 << 18 || gathered > most_gathered);
}

void draw_sizes(Draw& draw, Kind kind, Shape& s) {
  draw_small(draw, s);
  switch (kind) {
    case Kind::small:
      break;
    case Kind::screened:
      s.batch = draw.between(1, 2), s.n = draw.between(384, 450), s.m = draw.between(512, 1300);
      s.d = draw.between(16, 40), s.k = draw.between(1, 12), s.c = draw.between(1, 9);
      s.dtype = draw.one_of({DType::float32, DType::float16, DType::bfloat16});
      s.metric = draw.one_of({Metric::cosine, Metric::dot});
      break;
    case Kind::few_queries:
      s.n = draw.between(1, 40), s.m = draw.between(900, 5000), s.d = draw.between(1, 30);
      s.batch = s.n * s.m * s.d > 1 << 19 ? 1 : draw.between(1, 3);
      s.k = draw.one_of({int64_t(1), int64_t(9), draw.between(1, 300)}), s.c = draw.between(1, 9);
      break;
    case Kind::long_batch:
      s.batch = draw.between(3, 5), s.n = draw.between(65, 80);
      s.d = draw.between(12, 64), s.k = draw.between(1, 4), s.c = 1, s.o = 1;
      s.m = (int64_t(24) << 20) / (s.batch * s.d * std::max<int64_t>(4, size_of(s.dtype)));
      break;
    case Kind::large_dense:
      s.batch = draw.between(1, 2), s.n = draw.between(260, 400), s.m = draw.between(3, 60);
      s.d = draw.between(1, 9), s.k = draw.between(2, 5), s.c = draw.between(60, 140);
      s.o = draw.between(30, 140);
      s.convolution = Convolution::dense;
      break;
  }
}

Shape draw_shape(Draw& draw, Kind kind) {
  const auto dtypes = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
  Shape s = {};
  s.dtype = draw.one_of(dtypes);
  s.value_dtype = draw.chance(0.6) ? s.dtype : draw.one_of(dtypes);
  s.metric = draw.one_of({Metric::cosine, Metric::dot, Metric::euclidean});
  s.rho = draw.one_of({Rho::softmax, Rho::ones, Rho::similarity});
  s.order = draw.one_of({Order::similarity, Order::similarity, Order::index});
  s.convolution = draw.one_of({Convolution::none, Convolution::depthwise, Convolution::dense});
  draw_sizes(draw, kind, s);
  return s;
}

uint64_t hash_of(const void* data, int64_t bytes, uint64_t hash = 14695981039346656037u) {
  for (int64_t i = 0; i < bytes; ++i) {
    hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  }
  return hash;
}

uint64_t hash_of(const Floats& floats) {
  uint64_t hash = hash_of(nullptr, 0);
  for (int64_t i = 0; i < floats.count; ++i) {
    const double x = get(floats, i);
    const double same = x != x ? kNaN : x;
    hash = hash_of(&same, sizeof same, hash);
  }
  return hash;
}

}  // namespace

Floats new_floats(DType dtype, int64_t count) {
  return {Array<char>(count * size_of(dtype)), dtype, count};
}

// Rows that are dense, or have other elements between them, or lie where others do; elements that
// belong to no row are NaN.
StridedRows RandomCall::rows(Draw& draw, Floats& memory, std::vector<int64_t>& offsets, DType dtype,
                             int64_t count, int64_t columns) {
  StridedRows to = {nullptr, columns, count * columns, nullptr};
  const int64_t layout = draw.below(8);
  if (layout == 1) to.row_stride += draw.between(1, 3);
  if (layout == 2) to.row_stride = draw.between(0, 1);  // rows overlap
  to.batch_stride = count * to.row_stride;
  if (layout == 3) to.batch_stride = 0;  // shared by the batch
  if (layout == 4) to.batch_stride += draw.between(1, 5);
  if (layout == 5) {  // in another order, or shared by some
    for (int64_t b = 0; b < shape_.batch; ++b) {
      offsets.push_back(draw.below(shape_.batch) * to.batch_stride);
    }
    if (draw.chance(0.5)) std::sort(offsets.begin(), offsets.end());
    to.offsets = offsets.data();
  }
  int64_t last = 0;
  for (int64_t b = 0; b < shape_.batch; ++b) last = std::max(last, to.offset(b));
  const bool empty = count == 0 || columns == 0;
  memory = new_floats(dtype, empty ? 0 : last + (count - 1) * to.row_stride + columns);
  for (int64_t i = 0; i < memory.count; ++i) set(memory, i, kNaN);
  const Content content = any_content(draw);
  for (int64_t b = 0; b < shape_.batch && !empty; ++b) {
    fill(draw, content, memory, to.offset(b), to.row_stride, count, columns);
  }
  to.data = memory.data();
  return to;
}

RandomCall::RandomCall(uint64_t seed) {
  Draw draw(seed);
  const Kind kind = kind_of(draw);
  shape_ = draw_shape(draw, kind);
  const Shape& s = shape_;
  SelectParams& p = select_;
  p.batch = s.batch, p.n = s.n, p.m = s.m, p.d = s.d, p.k = s.k;
  p.dtype = s.dtype, p.metric = s.metric, p.order = s.order;
  p.query = rows(draw, query_, query_offsets_, s.dtype, s.n, s.d);
  p.key = rows(draw, key_, key_offsets_, s.dtype, s.m, s.d);
  if (s.n == s.m && draw.chance(0.5)) p.key = p.query;
  draw_restrictions(draw);
  if (kind == Kind::long_batch && !p.key_range && draw.chance(0.9)) {
    // Without ranges, such a call takes long.
    p.range_stride = 0;
    key_range_ = Array<int64_t>(2 * s.n);
    for (int64_t i = 0; i < s.n; ++i) {
      key_range_[2 * i] = draw.below(s.m - 300), key_range_[2 * i + 1] = key_range_[2 * i] + 300;
    }
    p.key_range = key_range_.data();
  }
  AggregateParams& f = aggregate_;
  if (s.convolution != Convolution::dense) shape_.o = s.c;
  f.batch = s.batch, f.n = s.n, f.m = s.m, f.c = s.c, f.o = s.o, f.k = s.k;
  f.dtype = s.value_dtype, f.similarity_dtype = similarity_dtype(s.dtype);
  f.convolution = s.convolution, f.rho = s.rho;
  f.scale = s.rho == Rho::softmax ? draw.one_of({1.0, 0.125, 3.0, -1.0}) : 1.0;
  f.value = rows(draw, value_, value_offsets_, s.value_dtype, s.m, s.c);
  const auto dense = [&](Floats& floats, int64_t count) {
    floats = new_floats(s.value_dtype, count);
    fill(draw, draw.chance(0.1) ? Content::special : Content::normal, floats, 0, count, 1, count);
    return floats.data();
  };
  if (s.convolution != Convolution::none) {
    f.weight = dense(weight_, s.c * s.k * (s.convolution == Convolution::dense ? s.o : 1));
  }
  if (draw.chance(0.5)) f.bias = dense(bias_, s.o);
  dense(grad_output_, s.batch * s.n * s.o);
  draw_gradients(draw);
}

void RandomCall::draw_restrictions(Draw& draw) {
  SelectParams& p = select_;
  const auto count = [&](bool each) { return each ? p.batch : 1; };
  if (p.m > 0 && draw.chance(0.3)) {
    const bool each = draw.chance(0.5);
    p.r = draw.between(0, p.m), p.candidates_stride = each ? p.r : 0;
    candidates_ = Array<int64_t>(count(each) * p.r);
    std::vector<int64_t> order(size_t(p.m));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t b = 0; b < count(each); ++b) {
      for (int64_t i = 0; i < p.r; ++i) {
        std::swap(order[size_t(i)], order[size_t(draw.between(i, p.m - 1))]);
        candidates_[b * p.r + i] = order[size_t(i)];
      }
    }
    p.candidates = candidates_.data();
  }
  if (p.m > 0 && draw.chance(0.4)) {
    const bool each = draw.chance(0.5);
    p.self_stride = each ? p.n : 0, p.exclude_self = draw.chance(0.5);
    self_indices_ = Array<int64_t>(count(each) * p.n);
    for (int64_t i = 0; i < count(each) * p.n; ++i) self_indices_[i] = draw.below(p.m);
    p.self_indices = self_indices_.data();
  }
  if (draw.chance(0.4)) {
    const bool each = draw.chance(0.5);
    const double empty = draw.one_of({0.0, 0.3, 1.0});
    p.range_stride = each ? 2 * p.n : 0;
    key_range_ = Array<int64_t>(count(each) * p.n * 2);
    for (int64_t i = 0; i < count(each) * p.n; ++i) {
      const int64_t a = draw.between(0, p.m), b = draw.chance(empty) ? a : draw.between(0, p.m);
      key_range_[2 * i] = std::min(a, b), key_range_[2 * i + 1] = std::max(a, b);
    }
    p.key_range = key_range_.data();
  }
  if (draw.chance(0.3)) {
    const double allowed = draw.one_of({0.0, 0.1, 0.5, 0.95});
    const bool same = draw.chance(0.5);
    key_mask_ = Array<uint8_t>(p.batch * p.m);
    for (int64_t i = 0; i < p.batch * p.m; ++i) {
      key_mask_[i] = same && i >= p.m       ? key_mask_[i - p.m]
                     : draw.chance(allowed) ? uint8_t(draw.one_of({1, 1, 2, 255}))
                                            : 0;
    }
    p.key_mask = key_mask_.data();
  }
}

void RandomCall::draw_gradients(Draw& draw) {
  const bool most = draw.chance(0.5);
  for (bool& needed : needs_) needed = most || draw.chance(0.5);
  apart_ = draw.chance(0.3);
  if (apart_ || draw.chance(0.5)) {
    grad_similarities_ =
        new_floats(similarity_dtype(shape_.dtype), shape_.batch * shape_.n * shape_.k);
    fill(draw, Content::normal, grad_similarities_, 0, 0, 1, grad_similarities_.count);
  }
}

std::string RandomCall::description() const {
  static const char* const kDtypes[] = {"float64", "float32", "float16", "bfloat16"};
  static const char* const kMetrics[] = {"cosine", "dot", "euclidean"};
  static const char* const kRhos[] = {"softmax", "ones", "similarity"};
  static const char* const kConvolutions[] = {"none", "depthwise", "dense"};
  const Shape& s = shape_;
  std::ostringstream text;
  text << "batch " << s.batch << " n " << s.n << " m " << s.m << " d " << s.d << " c " << s.c
       << " o " << s.o << " k " << s.k << " " << kDtypes[int(s.dtype)] << " "
       << kDtypes[int(s.value_dtype)] << " " << kMetrics[int(s.metric)] << " " << kRhos[int(s.rho)]
       << " " << kConvolutions[int(s.convolution)] << (s.order == Order::index ? " by_index" : "");
  if (select_.candidates) text << " candidates " << select_.r;
  if (select_.self_indices) text << (select_.exclude_self ? " excluded" : " self");
  if (select_.key_range) text << " key_range";
  if (select_.key_mask) text << " key_mask";
  return text.str();
}

std::vector<RandomCall::Digest> RandomCall::run(cpu::ParallelFor parallel_for) const {
  const Shape& s = shape_;
  std::vector<Digest> digests;
  const auto keep = [&](const char* name, const Floats& result) {
    if (result.data()) digests.push_back({name, hash_of(result)});
  };
  const int64_t pairs = s.batch * s.n * s.k;
  const DType similarity = similarity_dtype(s.dtype);
  const Floats similarities = new_floats(similarity, pairs);
  const Array<int64_t> indices(pairs);
  SelectParams p = select_;
  p.similarities = similarities.data(), p.indices = indices.data();
  cpu::select(p, parallel_for);
  keep("similarities", similarities);
  digests.push_back({"indices", hash_of(indices.data(), pairs * 8)});

  const Floats output = new_floats(s.value_dtype, s.batch * s.n * s.o);
  AggregateParams f = aggregate_;
  f.similarities = similarities.data(), f.indices = indices.data(), f.output = output.data();
  cpu::aggregate(f, parallel_for);
  keep("output", output);

  const bool through_select = apart_ || grad_similarities_.data() || s.rho != Rho::ones;
  const auto gradient = [](bool needed, DType dtype, int64_t count) {
    return needed ? new_floats(dtype, count) : Floats{};
  };
  const Floats grad_value = gradient(needs_[0], s.value_dtype, s.batch * s.m * s.c);
  const Floats grad_weight = gradient(needs_[1] && f.weight, s.value_dtype, weight_.count);
  const Floats grad_bias = gradient(needs_[2], s.value_dtype, s.o);
  const Floats grad_query = gradient(needs_[3] && through_select, s.dtype, s.batch * s.n * s.d);
  const Floats grad_key = gradient(needs_[4] && through_select, s.dtype, s.batch * s.m * s.d);
  const Floats grad_similarities = gradient(apart_, similarity, pairs);
  f.bias = nullptr, f.output = nullptr;
  const AggregateBackwardParams backward = {f,
                                            grad_output_.data(),
                                            grad_value.data(),
                                            grad_similarities.data(),
                                            grad_weight.data(),
                                            grad_bias.data()};
  const SelectBackwardParams select_backward = {s.batch,
                                                s.n,
                                                s.m,
                                                s.d,
                                                s.k,
                                                s.dtype,
                                                s.metric,
                                                grad_similarities_.data(),
                                                p.query,
                                                p.key,
                                                similarities.data(),
                                                indices.data(),
                                                grad_query.data(),
                                                grad_key.data()};
  if (apart_) {
    cpu::aggregate_backward(backward, parallel_for);
    cpu::select_backward(select_backward, parallel_for);
  } else {
    cpu::forward_backward({backward, select_backward}, parallel_for);
  }
  keep("grad_value", grad_value), keep("grad_weight", grad_weight), keep("grad_bias", grad_bias);
  keep("grad_query", grad_query), keep("grad_key", grad_key);
  keep("grad_similarities", grad_similarities);
  return digests;
}

}  // namespace sanitized
