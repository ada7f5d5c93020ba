// SPDX-License-Identifier: MIT
#include <vector>

#include "aggregate.cuh"
#include "backward.h"
#include "key_side.cuh"
#include "query_side.cuh"

namespace convnn::cuda {
namespace {

// Shared memory of a block of query_side_kernel, at most.
constexpr int64_t kMostShared = 48 << 10;
// Multiprocessors that query_side_kernel divides its queries for, the blocks of each, and bytes of
// what all have in the workspace. On any device, so that sums of dW do not depend on it.
constexpr int64_t kProcessors = 132, kBlocksEach = 4;
constexpr int64_t kBytesOfBlocks = int64_t(16) << 20;
// Queries of a group of eight lanes: as many as its lanes, or for larger k fewer.
constexpr int kMany = kGroup, kFew = 2;

// The sizes of both operators, and what is asked of them.
struct Call {
  const AggregateBackwardParams* output;
  const SelectBackwardParams* search;
  int64_t batch, n, m, c, d, k;
  const void* similarities;
  DType similarity_dtype;
  const int64_t* indices;
  bool through_rho;  // whether ds depends on drho
  bool of_key_side;  // whether dV or dk is needed
  // A part of the batch adds to the sums of dW and db, and the last one finishes.
  bool is_first = true, is_last = true;
  int64_t* parts = nullptr;  // so many sums of each, from the first part on
};

Call make_call(const AggregateBackwardParams* output, const SelectBackwardParams* search) {
  Call call = {};
  const bool of_search = search && (search->grad_query || search->grad_key);
  call.output = output;
  call.search = of_search ? search : nullptr;
  if (output) {
    const AggregateParams& f = output->forward;
    call.batch = f.batch, call.n = f.n, call.m = f.m, call.k = f.k, call.c = f.c;
    call.similarities = f.similarities, call.similarity_dtype = f.similarity_dtype;
    call.indices = f.indices;
    call.through_rho = (output->grad_similarities || of_search) && f.rho != Rho::ones;
  } else {
    const SelectBackwardParams& s = *search;
    call.batch = s.batch, call.n = s.n, call.m = s.m, call.k = s.k;
    call.similarities = s.similarities, call.indices = s.indices;
    call.similarity_dtype = s.dtype == DType::float64 ? DType::float64 : DType::float32;
  }
  if (of_search) call.d = search->d;
  call.of_key_side = (output && output->grad_value) || (of_search && search->grad_key);
  return call;
}

bool are_aligned(std::initializer_list<const void*> pointers, int64_t row_bytes) {
  bool aligned = row_bytes % 16 == 0;
  for (const void* pointer : pointers) {
    aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  return aligned;
}

// Whether all rows consist of whole 16 bytes, and numbers fit into 32 bits.
template <class T>
bool is_fast(const Call& call, int64_t batch) {
  bool fast = fit_narrow_pairs(batch, call.n, call.m, call.k);
  if (call.output) {
    const AggregateBackwardParams& p = *call.output;
    fast = fast && are_aligned({p.grad_output, p.forward.value.data, p.grad_value},
                               call.c * int64_t(sizeof(T)));
  }
  if (call.search) {
    const SelectBackwardParams& p = *call.search;
    fast = fast && are_aligned({p.query.data, p.key.data, p.grad_query, p.grad_key},
                               call.d * int64_t(sizeof(T)));
  }
  return fast;
}

// What both sides read of a call: rows, weights and units of rows of key.
template <class T>
struct Inputs {
  const T *grad = nullptr, *value = nullptr, *weight = nullptr, *query = nullptr, *key = nullptr;
  const Accumulate<T>* key_units = nullptr;
  Metric metric = Metric::dot;
};

template <class T, bool kFast>
Inputs<T> make_inputs(const Call& call, Context& context) {
  Inputs<T> inputs;
  if (call.output) {
    const AggregateParams& f = call.output->forward;
    inputs.grad = static_cast<const T*>(call.output->grad_output);
    inputs.value = static_cast<const T*>(f.value.data);
    if (f.convolution == Convolution::depthwise) {
      AggregateParams depthwise = f;
      depthwise.o = f.c;
      depthwise.c = 1;
      inputs.weight = permute_weight<T>(depthwise, /*outputs_last=*/true, context);
    }
  }
  if (call.search) {
    const SelectBackwardParams& p = *call.search;
    inputs.query = static_cast<const T*>(p.query.data);
    inputs.key = static_cast<const T*>(p.key.data);
    inputs.metric = p.metric;
    if (p.metric == Metric::cosine) {
      const int64_t rows = p.batch * p.m;
      auto* units = allocate<Accumulate<T>>(context, rows);
      launch("units_kernel", units_kernel<T, kFast>, ceil_div(rows, kThreads), 0, context,
             inputs.key, units, rows, p.d);
      inputs.key_units = units;
    }
  }
  return inputs;
}

// Where the parts of a launch and the numbers of its pairs are, and how many blocks it has.
struct QuerySideLaunch {
  int64_t blocks, parts;
  size_t shared_bytes;
};

template <class T, bool kFast, int kRows>
QuerySideLaunch place_arrays(QuerySideWork<T>& w, Context& context) {
  using A = Accumulate<T>;
  using Arrays = TileArrays<T, kFast, kRows>;
  const int64_t size = w.size_of_part();
  const int64_t of_arrays = kWarps * Arrays::bytes(w.k);
  const int64_t of_parts = ceil_div(kWarps * size * int64_t(sizeof(A)), 16) * 16;
  w.arrays_are_shared = of_arrays <= kMostShared;
  w.parts_are_shared = size && (w.arrays_are_shared ? of_arrays : 0) + of_parts <= kMostShared;
  const int64_t of_block = (w.arrays_are_shared ? 0 : of_arrays) +
                           (w.parts_are_shared ? size * int64_t(sizeof(A)) : of_parts);
  const int64_t bytes = std::min(kBytesOfBlocks, context.most_bytes / 4);
  const int64_t tiles = ceil_div(w.rows, int64_t(Arrays::kTileRows));
  const int64_t wanted =
      std::clamp<int64_t>(ceil_div(tiles, int64_t(kWarps)), 1, kProcessors * kBlocksEach);
  const int64_t most = std::clamp<int64_t>(bytes / std::max<int64_t>(of_block, 1), 1, wanted);
  w.processors = int(std::min(most, kProcessors));
  w.each = int(most / w.processors);
  w.range = ceil_div(tiles, int64_t(w.processors));
  QuerySideLaunch launch = {};
  launch.blocks = int64_t(w.processors) * w.each;
  launch.parts = w.parts_are_shared ? launch.blocks : launch.blocks * kWarps;
  launch.shared_bytes =
      size_t((w.arrays_are_shared ? of_arrays : 0) + (w.parts_are_shared ? of_parts : 0));
  if (!w.arrays_are_shared) {
    w.arrays = allocate<unsigned char>(context, launch.blocks * of_arrays);
  }
  w.parts = allocate<A>(context, launch.parts * size);
  return launch;
}

template <class T, bool kFast, int kRows>
void launch_query_side(QuerySideWork<T> w, const Call& call, Context& context) {
  const QuerySideLaunch sizes = place_arrays<T, kFast, kRows>(w, context);
  w.adds = !call.is_first;
  if (call.is_first) *call.parts = sizes.parts;
  launch("query_side_kernel", query_side_kernel<T, kFast, kRows>, sizes.blocks, sizes.shared_bytes,
         context, w);
  const auto sum = [&](const Accumulate<T>* parts, void* result, int64_t k) {
    launch("sum_parts_kernel", sum_parts_kernel<T>, ceil_div(w.c * k, kGroup),
           kThreads * sizeof(Accumulate<T>), context, parts, static_cast<T*>(result), *call.parts,
           w.size_of_part(), w.c, k);
  };
  if (!call.is_last) return;
  if (w.of_weight) sum(w.parts, call.output->grad_weight, w.k);
  if (w.of_bias) sum(w.parts + (w.of_weight ? w.k * w.c : 0), call.output->grad_bias, 1);
}

// Returns the factors of the pairs.
template <class T, bool kFast>
const Factors<Accumulate<T>>* query_side(const Call& call, const Inputs<T>& inputs,
                                         Context& context) {
  QuerySideWork<T> w = {};
  w.rows = call.batch * call.n;
  w.n = call.n, w.m = call.m, w.c = call.c, w.d = call.d, w.k = call.k;
  w.similarities = call.similarities, w.similarity_dtype = call.similarity_dtype;
  w.indices = call.indices;
  w.metric = inputs.metric;
  w.through_rho = call.through_rho;
  if (call.of_key_side) {
    w.factors = allocate<Factors<Accumulate<T>>>(context, ceil_div(w.rows, kWarp) * kWarp * w.k);
  }
  if (call.output) {
    const AggregateBackwardParams& p = *call.output;
    w.rho = p.forward.rho;
    w.scale = Accumulate<T>(p.forward.scale);
    w.grad = inputs.grad;
    w.weight = inputs.weight;
    w.of_weight = p.grad_weight;
    w.of_bias = p.grad_bias;
    if (w.through_rho || w.of_weight) w.value = inputs.value;
    w.grad_similarities = p.grad_similarities;
  }
  if (call.search) {
    const SelectBackwardParams& p = *call.search;
    w.direct = p.grad_similarities;
    w.query = inputs.query;
    w.key = inputs.key;
    w.key_units = inputs.key_units;
    w.grad_query = static_cast<T*>(p.grad_query);
  }
  // For larger k the numbers of fewer queries fit into shared memory.
  const bool many = kFast && kWarps * TileArrays<T, kFast, kMany>::bytes(w.k) <= kMostShared;
  if constexpr (kFast) {
    if (many) launch_query_side<T, kFast, kMany>(w, call, context);
  }
  if (!many) launch_query_side<T, false, kFew>(w, call, context);
  return w.factors;
}

template <class T, bool kFast>
void key_side(const Call& call, const Inputs<T>& inputs, const Factors<Accumulate<T>>* factors,
              Context& context) {
  using A = Accumulate<T>;
  KeySideWork<T> w = {};
  w.keys = call.batch * call.m;
  w.c = call.c, w.d = call.d, w.k = call.k;
  w.metric = inputs.metric;
  w.list = sort_pairs(call.batch, call.n, call.m, call.k, kFast, call.similarities,
                      call.similarity_dtype, call.indices, context);
  w.factors = factors;
  w.weight = inputs.weight;
  w.grad = inputs.grad;
  if (call.output) w.grad_value = static_cast<T*>(call.output->grad_value);
  if (call.search) {
    w.query = inputs.query;
    w.key = inputs.key;
    w.key_units = inputs.key_units;
    w.grad_key = static_cast<T*>(call.search->grad_key);
  }
  if (w.grad_key && w.metric == Metric::cosine && w.d > kStretch<T>) {
    w.key_sums = allocate<A>(context, w.keys * w.d);
  }
  w.chunk = std::max(kPairsOfChunk, w.size_of_sum());
  w.chunks = w.keys ? w.list.count / w.chunk : 0;
  w.chunk_sums = allocate<A>(context, w.chunks * w.size_of_sum());
  launch("key_side_chunks_kernel", key_side_chunks_kernel<T, kFast>, ceil_div(w.chunks, kWarps), 0,
         context, w);
  launch("key_side_kernel", key_side_kernel<T, kFast>, ceil_div(w.keys, kWarps * kGroups), 0,
         context, w);
}

template <class T, bool kFast>
void gradients_as(const Call& call, Context& context) {
  const Inputs<T> inputs = make_inputs<T, kFast>(call, context);
  const auto* factors = query_side<T, kFast>(call, inputs, context);
  if (call.of_key_side) key_side<T, kFast>(call, inputs, factors, context);
}

// Hands out the memory that the first part of a batch took to the next ones, which need no more.
class Reused : public Context {
 public:
  explicit Reused(Context& context) : Context(context.stream), context_(context) {
    most_bytes = context.most_bytes;
  }
  void* allocate(size_t bytes) override {
    if (next_ == blocks_.size()) blocks_.push_back({context_.allocate(bytes), bytes});
    const Block& block = blocks_[next_++];
    if (bytes > block.bytes) throw std::logic_error("convnn: a later part needs more memory");
    return block.data;
  }
  void restart() { next_ = 0; }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  Context& context_;
  std::vector<Block> blocks_;
  size_t next_ = 0;
};

// How many batch elements' numbers fit into the memory that may be taken for all: 8 bytes for each
// element of [n, k], of a row per query, and of the rows of key and value; and a fixed amount.
template <class T>
int64_t elements_at_a_time(const Call& call, const Context& context) {
  const int64_t of_sum = sizeof(Accumulate<T>);
  const int64_t allowed =
      8 * call.batch * (call.n * (call.k + std::max(call.c, call.d)) + call.m * (call.c + call.d)) +
      context.most_bytes - 2 * kBytesOfBlocks;
  // Of a pair two factors, a number, a count and a sum; of a key a few numbers and sums of dk.
  const int64_t each = call.n * call.k * (3 * of_sum + 2 * int64_t(sizeof(Narrow))) +
                       call.m * (4 * int64_t(sizeof(Wide)) + (1 + call.d) * of_sum);
  return std::clamp<int64_t>(allowed / std::max<int64_t>(each, 1), 1,
                             std::max<int64_t>(call.batch, 1));
}

int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Moves a pointer to the batch element `first`, of so many bytes each.
template <class Pointer>
void advance(Pointer& pointer, int64_t first, int64_t bytes) {
  if (!pointer) return;
  const char* moved = reinterpret_cast<const char*>(pointer) + first * bytes;
  pointer = reinterpret_cast<Pointer>(const_cast<char*>(moved));
}

AggregateBackwardParams part_of(AggregateBackwardParams p, int64_t first, int64_t count) {
  AggregateParams& f = p.forward;
  const int64_t bytes = bytes_of(f.dtype), pairs = f.n * f.k;
  advance(f.value.data, first, f.m * f.c * bytes);
  advance(f.similarities, first, pairs * bytes_of(f.similarity_dtype));
  advance(f.indices, first, pairs * int64_t(sizeof(int64_t)));
  advance(p.grad_output, first, f.n * f.c * bytes);
  advance(p.grad_value, first, f.m * f.c * bytes);
  advance(p.grad_similarities, first, pairs * bytes_of(f.similarity_dtype));
  f.batch = count;
  return p;
}

SelectBackwardParams part_of(SelectBackwardParams p, int64_t first, int64_t count) {
  const int64_t bytes = bytes_of(p.dtype), pairs = p.n * p.k;
  const int64_t of_pair = p.dtype == DType::float64 ? 8 : 4;
  advance(p.query.data, first, p.n * p.d * bytes);
  advance(p.key.data, first, p.m * p.d * bytes);
  advance(p.grad_similarities, first, pairs * of_pair);
  advance(p.similarities, first, pairs * of_pair);
  advance(p.indices, first, pairs * int64_t(sizeof(int64_t)));
  advance(p.grad_query, first, p.n * p.d * bytes);
  advance(p.grad_key, first, p.m * p.d * bytes);
  p.batch = count;
  return p;
}

template <class T>
void gradients_of_parts(const Call& whole, Context& context) {
  const int64_t at_a_time = elements_at_a_time<T>(whole, context);
  const bool fast = is_fast<T>(whole, at_a_time);
  Reused memory(context);
  int64_t parts = 0, first = 0;
  do {
    const int64_t count = std::min(at_a_time, whole.batch - first);
    AggregateBackwardParams output;
    SelectBackwardParams search;
    if (whole.output) output = part_of(*whole.output, first, count);
    if (whole.search) search = part_of(*whole.search, first, count);
    Call call = make_call(whole.output ? &output : nullptr, whole.search ? &search : nullptr);
    call.is_first = first == 0;
    call.is_last = first + count >= whole.batch;
    call.parts = &parts;
    memory.restart();
    if (fast) {
      gradients_as<T, true>(call, memory);
    } else {
      gradients_as<T, false>(call, memory);
    }
    first += at_a_time;
  } while (first < whole.batch);
}

}  // namespace

void gradients(const AggregateBackwardParams* output, const SelectBackwardParams* search,
               Context& context) {
  const Call call = make_call(output, search);
  if (!call.output && !call.search) return;
  with_type(output ? output->forward.dtype : search->dtype,
            [&](auto t) { gradients_of_parts<decltype(t)>(call, context); });
}

}  // namespace convnn::cuda
