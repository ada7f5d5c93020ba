// SPDX-License-Identifier: MIT
// Runs the sweep of csrc/cuda/hopper_sweep.cuh on the host execution layer, and compares its lists
// with all similarities of a row, summed as the layer sums products. Arguments: a seed of
// scheduling, and a case or "all". Prints a line for each case; exits with 1 if one is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/hopper_sweep.cuh"
#include "fibers.h"

namespace {

using namespace convnn::cuda;

// What is special about the elements.
enum class Kind {
  random,
  equal_keys,
  few_keys,            // 40 different ones
  few_directions,      // 37, of different lengths: similarities equal, or nearly, at different a
  rising,              // every key nearer to every query than the one before
  rising_in_one_lane,  // every eighth; the others are far
  peaks,               // as rising, but some of the first keys, which are not sampled, are nearest
  up_by_an_ulp,        // equal keys, and then others a last place of the sum nearer
  nan_key,
  nan_keys,
  nan_keys_in_one_lane,
  zero_keys,    // every other one; the others are at right angles or behind
  odd_queries,  // rows of zeros, NaN, infinity, and below epsilon
  infinite_key,
  huge,  // and tiny rows: products of the elements overflow, or vanish
  subnormal,
  negative,  // no similarity above zero
  half_masked,
  mostly_masked,  // all but 7 keys
  all_masked,
};

struct Case {
  const char* name;
  Kind kind;
  bool is_half;
  int64_t batch, n, m, d;
  int k;
  bool cosine;
  int splits, step, grid;
  // Blocks of one launch, or 0: all; and whether the queries begin at an odd element.
  int blocks = 0;
  bool unaligned = false;
};

constexpr Kind kRandom = Kind::random;
const Case kCases[] = {
    {"tail", kRandom, false, 1, 520, 700, 64, 9, true, 1, 2, 1},
    {"batch", kRandom, false, 2, 300, 1024, 64, 9, true, 1, 4, 2},
    {"launches", kRandom, false, 2, 300, 700, 64, 9, true, 1, 2, 1, 1},
    {"unaligned", kRandom, true, 1, 256, 500, 64, 9, true, 1, 2, 1, 0, true},
    {"half", kRandom, true, 1, 256, 1100, 64, 9, true, 1, 3, 1},
    {"dot", kRandom, false, 1, 300, 700, 64, 9, false, 1, 2, 2},
    {"dot_half", kRandom, true, 1, 256, 700, 128, 9, false, 1, 2, 1},
    {"splits", kRandom, false, 2, 200, 1400, 64, 9, true, 3, 2, 2},
    {"splits_of_one_tile", kRandom, true, 1, 256, 640, 64, 16, true, 5, 1, 3},
    {"wide", kRandom, false, 1, 300, 1000, 128, 20, true, 1, 2, 1},
    {"wide_half", kRandom, true, 1, 256, 900, 128, 64, true, 2, 2, 1},
    {"columns_40", kRandom, false, 1, 256, 700, 40, 9, true, 1, 2, 1},
    {"columns_33", kRandom, true, 1, 256, 520, 33, 16, true, 1, 2, 1},
    {"columns_100", kRandom, false, 1, 256, 520, 100, 9, true, 1, 2, 1},
    {"columns_1", kRandom, false, 1, 256, 300, 1, 5, true, 1, 1, 1},
    {"one_neighbor", kRandom, false, 1, 256, 700, 64, 1, true, 1, 2, 1},
    {"many_neighbors", kRandom, false, 1, 256, 1024, 64, 64, true, 1, 2, 1},
    {"fewer_keys_than_k", kRandom, false, 1, 256, 5, 64, 9, true, 1, 1, 1},
    {"fewer_in_a_split_than_k", kRandom, true, 1, 256, 140, 64, 20, false, 2, 1, 1},
    {"equal_keys", Kind::equal_keys, false, 1, 256, 1500, 64, 9, true, 1, 2, 1},
    {"equal_keys_many", Kind::equal_keys, true, 1, 256, 1500, 64, 64, true, 1, 2, 1},
    {"peaks", Kind::peaks, false, 1, 256, 1500, 64, 9, true, 1, 12, 1},
    {"peaks_wide", Kind::peaks, true, 1, 256, 1500, 128, 20, false, 1, 12, 1},
    {"up_by_an_ulp", Kind::up_by_an_ulp, false, 1, 256, 800, 64, 9, false, 1, 2, 1},
    {"wide_equal_keys", Kind::equal_keys, true, 1, 256, 900, 100, 9, true, 1, 2, 1},
    {"wide_rising", Kind::rising, false, 1, 256, 1500, 128, 9, true, 1, 4, 1},
    {"few_keys", Kind::few_keys, false, 1, 256, 1300, 64, 16, true, 1, 2, 1},
    {"few_keys_dot", Kind::few_keys, true, 1, 256, 700, 64, 64, false, 1, 2, 1},
    {"few_directions", Kind::few_directions, false, 1, 256, 1300, 64, 9, true, 1, 2, 1},
    {"few_directions_half", Kind::few_directions, true, 1, 256, 1300, 40, 16, true, 1, 2, 1},
    {"rising_in_one_lane", Kind::rising_in_one_lane, true, 1, 256, 1800, 64, 16, true, 1, 2, 1},
    {"rising", Kind::rising, false, 1, 256, 1400, 64, 9, true, 1, 4, 1},
    {"rising_many", Kind::rising, true, 1, 256, 2000, 64, 40, true, 1, 8, 1},
    {"nan_key", Kind::nan_key, false, 1, 256, 520, 64, 5, true, 1, 2, 1},
    {"nan_key_dot", Kind::nan_key, true, 1, 256, 520, 64, 1, false, 1, 2, 1},
    {"nan_keys", Kind::nan_keys, false, 1, 300, 600, 64, 9, true, 1, 2, 1},
    {"nan_keys_in_one_lane", Kind::nan_keys_in_one_lane, false, 1, 256, 600, 64, 9, true, 1, 2, 1},
    {"zero_keys", Kind::zero_keys, false, 1, 256, 900, 64, 9, true, 1, 2, 1},
    {"odd_queries", Kind::odd_queries, false, 1, 256, 900, 64, 9, true, 1, 2, 1},
    {"odd_queries_half", Kind::odd_queries, true, 1, 256, 520, 64, 20, true, 2, 2, 1},
    {"odd_queries_dot", Kind::odd_queries, false, 1, 256, 520, 64, 9, false, 1, 2, 1},
    {"infinite_key", Kind::infinite_key, false, 1, 256, 520, 64, 9, true, 1, 2, 1},
    {"infinite_key_dot", Kind::infinite_key, true, 1, 256, 520, 64, 9, false, 1, 2, 1},
    {"huge", Kind::huge, false, 1, 256, 700, 64, 9, true, 1, 2, 1},
    {"huge_half", Kind::huge, true, 1, 256, 700, 128, 9, true, 1, 2, 1},
    {"subnormal_half", Kind::subnormal, true, 1, 256, 520, 64, 9, true, 1, 2, 1},
    {"negative_dot", Kind::negative, false, 1, 256, 700, 64, 9, false, 1, 2, 1},
    {"negative_masked", Kind::half_masked, false, 1, 256, 700, 1, 9, false, 1, 2, 1},
    {"half_masked", Kind::half_masked, false, 1, 256, 1024, 64, 9, true, 1, 2, 1},
    {"mostly_masked", Kind::mostly_masked, true, 1, 256, 700, 64, 9, false, 2, 2, 1},
    {"all_masked", Kind::all_masked, false, 1, 256, 300, 64, 9, true, 1, 1, 1},
};

float number(uint16_t bits, bool is_half) {
  return is_half ? widen(Float16{bits}) : widen(BFloat16{bits});
}
uint16_t bits_of_number(float x, bool is_half) {
  Float16 half;
  BFloat16 other;
  narrow(x, half);
  narrow(x, other);
  return is_half ? half.bits : other.bits;
}

using Bits = std::vector<uint16_t>;
using Random = std::mt19937;

Bits elements(const Case& c, int64_t rows, bool keys, Random& random) {
  std::normal_distribution<float> normal;
  Bits x(size_t(rows * c.d));
  for (int64_t row = 0; row < rows; ++row) {
    const float huge = c.is_half ? 2e4f : 1e37f, tiny = c.is_half ? 1e-5f : 1e-30f;
    float size = c.kind == Kind::huge ? (row % 2 ? huge : tiny) : 1;
    if (c.kind == Kind::subnormal) size = 2e-7f;
    for (int64_t i = 0; i < c.d; ++i) {
      float value = normal(random) * size;
      const int64_t at = row * c.d + i;
      if (c.kind == Kind::equal_keys && keys) value = float(i % 3) - .5f;
      if (c.kind == Kind::few_keys && keys && row >= 40) {
        value = number(x[size_t(row % 40 * c.d + i)], c.is_half);
      }
      const bool in_one_lane = c.kind == Kind::rising_in_one_lane;
      if (c.kind == Kind::rising || in_one_lane) {
        value = i == 0 ? 1 : keys && i == 1 ? 4 - 4 * float(row) / float(rows) : 0;
        if (in_one_lane && keys && i == 0 && row % 8) value = -1;
      }
      if (c.kind == Kind::peaks) {
        value = i == 0 ? 1 : keys && i == 1 ? 4 - 4 * float(row) / float(rows) : 0;
        if (keys && i == 1 && row >= 130 && row < 162) value = float(row * 7 % 32) / 64 - 2;
        if (!keys && i == 1) value = -.25f;
      }
      if (c.kind == Kind::up_by_an_ulp) {
        value = i == 0 ? 1 : i > 1 ? 0 : keys ? float(row >= 500) : 0x1p-23f;
      }
      if (c.kind == Kind::few_directions) {
        const int64_t of = keys ? row % 37 : row + 500;
        value =
            float((of * 131 + i * 37 + of * i * 7) % 5 - 2) * (keys ? float(row / 37 % 7 + 1) : 1);
      }
      if (keys && c.kind == Kind::nan_key && row == 77 && i == 3) value = kNan<float>;
      if (keys && c.kind == Kind::nan_keys) value = kNan<float>;
      if (keys && c.kind == Kind::nan_keys_in_one_lane && row % 8 == 0) value = kNan<float>;
      if (keys && c.kind == Kind::zero_keys && row % 2) value = 0;
      if (keys && c.kind == Kind::zero_keys && row % 2 == 0) value = -std::fabs(value);
      if (!keys && c.kind == Kind::zero_keys) value = std::fabs(value);
      if (keys && c.kind == Kind::infinite_key && row == 99 && i == 3) value = kInfinity<float>;
      if (c.kind == Kind::negative) value = keys ? -std::fabs(value) : std::fabs(value) + .1f;
      if (c.kind == Kind::half_masked && c.d == 1) value = keys ? -1 - std::fabs(value) : 1;
      if (!keys && c.kind == Kind::odd_queries) {
        if (row % 7 == 1) value = 0;
        if (row % 7 == 2 && i == 1) value = kNan<float>;
        if (row % 7 == 3 && i == 2) value = -kInfinity<float>;
        if (row % 7 == 4) value *= c.is_half ? 1e-7f : 1e-20f;
      }
      x[size_t(at)] = bits_of_number(value, c.is_half);
    }
  }
  return x;
}

bool is_allowed(const Case& c, int64_t column) {
  if (column >= c.m) return false;
  if (c.kind == Kind::half_masked) return column * 2654435761u % 65536 < 32768;
  if (c.kind == Kind::mostly_masked) return column % 100 == 50;
  return c.kind != Kind::all_masked;
}

// Rows padded to `padded` columns, those of query scaled by powers of two for the cosine, and the
// factors of their sums.
struct Rows {
  std::vector<float> x;  // [rows, padded]
  std::vector<float> inverse;
};
Rows prepare(const Case& c, const Bits& bits, int64_t rows, int64_t padded, bool is_query) {
  Rows result = {std::vector<float>(size_t(rows * padded)), std::vector<float>(size_t(rows), 1)};
  for (int64_t row = 0; row < rows; ++row) {
    float* x = &result.x[size_t(row * padded)];
    float largest = 0;
    for (int64_t i = 0; i < c.d; ++i) {
      x[i] = number(bits[size_t(row * c.d + i)], c.is_half);
      largest = std::max(largest, std::fabs(x[i]));
    }
    if (!c.cosine) continue;
    const int exponent = largest > 0 && largest < kInfinity<float> ? std::ilogb(largest) : 0;
    const float scale_of_query = c.is_half ? 1 : kQueryScale<BFloat16>;
    float scale = 1;
    if (is_query && !c.is_half) {
      scale = std::exp2(-float(std::clamp(exponent, -120, 120))) * scale_of_query;
    }
    double sum = 0;
    for (int64_t i = 0; i < c.d; ++i) {
      x[i] *= scale;
      sum += double(x[i]) * double(x[i]);
    }
    const double norm = std::sqrt(sum);
    float& inverse = result.inverse[size_t(row)];
    const double numerator = is_query ? scale_of_query : 1 / scale_of_query;
    inverse = norm / double(scale) <= 1e-12 ? 0 : float(numerator / norm);
    if (!(sum < kInfinity<double>)) inverse = kNan<float>;
    if (is_query && !(inverse > 0)) std::fill(x, x + padded, 0.0f);
  }
  return result;
}

struct Problem {
  Bits query, key;  // [batch, n, d], [batch, m_padded, padded]
  std::vector<float> inv_k, inv_k_sample;
  std::vector<float> a;  // [batch * n, m_padded] rd(acc * inv_k)
  Rows queries;
  int64_t m_padded, padded;
};

Problem make(const Case& c) {
  Random random(1234);
  Problem p;
  p.padded = c.d <= 64 ? 64 : 128;
  p.m_padded = (c.m + 127) / 128 * 128;
  p.query = elements(c, c.batch * c.n, false, random);
  const Bits key = elements(c, c.batch * c.m, true, random);
  p.queries = prepare(c, p.query, c.batch * c.n, p.padded, true);
  const Rows keys = prepare(c, key, c.batch * c.m, p.padded, false);
  p.key.resize(size_t(c.batch * p.m_padded * p.padded));
  p.inv_k.assign(size_t(c.batch * p.m_padded), -0.0f);
  p.inv_k_sample.assign(p.inv_k.size(), kNan<float>);
  p.a.resize(size_t(c.batch * c.n * p.m_padded));
  for (int64_t b = 0; b < c.batch; ++b) {
    std::vector<float> columns(size_t(p.padded * p.m_padded));  // transposed
    for (int64_t j = 0; j < c.m; ++j) {
      const int64_t row = b * c.m + j, at = b * p.m_padded + place_of(j);
      for (int64_t i = 0; i < p.padded; ++i) {
        const float x = keys.x[size_t(row * p.padded + i)];
        columns[size_t(i * p.m_padded + j)] = x;
        p.key[size_t((b * p.m_padded + j) * p.padded + i)] = bits_of_number(x, c.is_half);
      }
      if (!is_allowed(c, j)) continue;
      p.inv_k[size_t(at)] = p.inv_k_sample[size_t(at)] = keys.inverse[size_t(row)];
    }
    for (int64_t i = b * c.n; i < (b + 1) * c.n; ++i) {
      std::vector<float> acc(size_t(p.m_padded), 0.0f);
      for (int64_t s = 0; s < p.padded; s += 16) {
        execution::multiply_row(acc.data(), &p.queries.x[size_t(i * p.padded + s)],
                                &columns[size_t(s * p.m_padded)], int(p.m_padded));
      }
      for (int64_t j = 0; j < p.m_padded; ++j) {
        p.a[size_t(i * p.m_padded + j)] =
            multiply_down(acc[size_t(j)], p.inv_k[size_t(b * p.m_padded + place_of(j))]);
      }
    }
  }
  return p;
}

class NoMemory : public Context {
 public:
  NoMemory() : Context(nullptr) {}
  void* allocate(size_t) override { std::abort(); }
};

// Why the lists of a row are wrong, or null. hits: columns and bits of a.
const char* wrong(const Case& c, const Problem& p, int64_t row, float inv_q,
                  const std::map<uint32_t, uint32_t>& hits) {
  const double expected = double(p.queries.inverse[size_t(row)]);
  if (std::isnan(expected) != std::isnan(inv_q)) return "inv_q";
  if (std::fabs(double(inv_q) - expected) > 3e-7 * expected) return "inv_q";
  std::vector<NarrowKey> keys;
  for (int64_t j = 0; j < p.m_padded; ++j) {
    const float a = p.a[size_t(row * p.m_padded + j)];
    if (is_allowed(c, j)) keys.push_back(key_of<float>(order_of(a * inv_q), j));
  }
  std::sort(keys.begin(), keys.end(), std::greater<NarrowKey>());
  for (const auto& [column, bits] : hits) {
    if (!is_allowed(c, column)) return "a column that may not be a neighbor";
    const float a = p.a[size_t(row * p.m_padded + column)];
    if (bits != bits_of(a) && !(a != a && from_bits(bits) != from_bits(bits))) return "bits of a";
  }
  for (size_t i = 0; i < keys.size() && i < size_t(c.k); ++i) {
    if (!hits.count(uint32_t(index_of<float>(keys[i])))) return "a neighbor is missing";
  }
  return nullptr;
}

// Compares the lists; returns the number of wrong rows.
int check(const Case& c, const Problem& p, const SweepParams& params, const float* inv_q) {
  const int64_t each = (c.n + kSweepRows - 1) / kSweepRows;
  const int capacity = hits_per_list(c.k);
  int64_t total = 0, bad = 0;
  for (int64_t row = 0; row < c.batch * c.n; ++row) {
    const int64_t local = row / c.n * each * kSweepRows + row % c.n;
    std::map<uint32_t, uint32_t> hits;
    const char* why = nullptr;
    for (int split = 0; split < c.splits; ++split) {
      const int64_t at = split * params.blocks * kSweepRows + local;
      for (int list = 0; list < 4; ++list) {
        const int count = params.counts[at * 4 + list];
        if (count > capacity) why = "a list is too long";
        for (int i = 0; i < count && i < capacity; ++i) {
          const uint64_t hit = params.hits[(at * 4 + list) * capacity + i];
          if (!hits.emplace(uint32_t(hit), uint32_t(hit >> 32)).second)
            why = "a column comes twice";
          ++total;
        }
      }
    }
    if (!why) why = wrong(c, p, row, inv_q[row], hits);
    if (why && ++bad <= 3) std::printf("  row %d: %s\n", int(row), why);
  }
  const double mean = double(total) / double(c.batch * c.n);
  std::printf("%-24s %4d of %d rows wrong, %.1f hits a row\n", c.name, int(bad), int(c.batch * c.n),
              mean);
  // Nothing is gained if everything is a hit.
  const bool many = c.kind == kRandom && c.d > 1 && mean > 4.0 * c.k * c.splits * c.step;
  if (many) std::printf("  too many hits\n");
  std::fflush(stdout);
  return int(bad) + many;
}

// The parameters, but for the results, which have room for all launches.
SweepParams parameters(const Case& c, const Problem& p, const Bits& query) {
  SweepParams params = {};
  params.query = query.data() + c.unaligned;
  params.inv_k = p.inv_k.data();
  params.inv_k_sample = p.inv_k_sample.data();
  params.n = c.n;
  params.d = c.d;
  params.m_padded = p.m_padded;
  params.blocks = int(c.batch * ((c.n + kSweepRows - 1) / kSweepRows));
  params.tiles = int(p.m_padded / kTileColumns);
  params.splits = c.splits;
  params.step = c.step;
  params.k = c.k;
  params.list = hits_per_list(c.k);
  params.cosine = c.cosine;
  params.pairs = c.d % 2 == 0 && !c.unaligned;
  return params;
}

// As if the kernel before wrote it, or read it.
template <class T>
void depend_on(std::vector<T>& memory) {
  execution::written_by_kernels(memory.data(), memory.size() * sizeof(T));
}

template <class T, int kD>
int run(const Case& c) {
  Problem p = make(c);
  Bits query(p.query);
  query.insert(query.begin(), size_t(c.unaligned), 0);
  SweepParams params = parameters(c, p, query);
  const size_t rows = size_t(c.splits) * size_t(params.blocks) * kSweepRows;
  std::vector<float> inv_q(size_t(c.batch * c.n), -7);
  std::vector<uint64_t> hits(rows * 4 * size_t(hits_per_list(c.k)), ~uint64_t(0));
  std::vector<uint8_t> counts(rows * 4, 255);
  params.inv_q = inv_q.data();
  NoMemory context;
  const TensorMap map =
      map_rows(reinterpret_cast<const T*>(p.key.data()), c.batch, p.m_padded, kD, kTileColumns);
  depend_on(p.key);
  depend_on(p.inv_k);
  depend_on(p.inv_k_sample);
  depend_on(hits);
  depend_on(counts);
  const int all = params.blocks, each = c.blocks ? c.blocks : all;
  for (int first = 0; first < all; first += each) {
    params.first_block = first;
    params.blocks = each;
    params.counts = &counts[size_t(first) * kSweepRows * 4];
    params.hits = &hits[size_t(first) * kSweepRows * 4 * size_t(hits_per_list(c.k))];
    launch_hopper("hopper_sweep", hopper_sweep_kernel<T, kD>, c.grid, kSweepThreads,
                  sizeof(SweepShared<kD>), true, context, map, params);
  }
  execution::forget_memory();
  params.blocks = all;
  params.hits = hits.data();
  params.counts = counts.data();
  return check(c, p, params, inv_q.data());
}

int run_case(const Case& c) {
  if (c.d <= 64) return c.is_half ? run<Float16, 64>(c) : run<BFloat16, 64>(c);
  return c.is_half ? run<Float16, 128>(c) : run<BFloat16, 128>(c);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  execution::seed(std::stoul(arguments[1]));
  const std::string name = arguments[2];
  int bad = 0, ran = 0;
  for (const Case& c : kCases) {
    if (name != "all" && name != c.name) continue;
    bad += run_case(c) != 0;
    ++ran;
  }
  if (ran == 0) return 2;
  std::printf("%d cases, %d wrong\n", ran, bad);
  return bad != 0;
}
