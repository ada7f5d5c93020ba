// SPDX-License-Identifier: MIT
// The end of the forward in 16 bits: s_i = k-max and I_i = k-argmax (Eq. 4, 5) of the hits that a
// sweep (sweep.cuh) has left, and the depthwise or weightless convolution of section 4.1,
//
//   y_i[c] = b[c] + sum_j rho_ij W[c, 0, j] V[I_ij, c]
//
// A hit is a pair (rd(acc * inv_k), column); its similarity is s = rn(rd(acc * inv_k) * inv_q). The
// hits of a row lie in four lists for each split of the columns, in no order, and contain its k
// nearest keys.
//
// A group of 8 lanes finishes a row for k <= 10, of 16 for k <= 16, and a warp beyond. Its lanes
// hold the keys (similarity, column) of order.cuh of one split in registers. If these are too many
// to rank, a bisection finds a bound that at least k of them reach and few do; those are moved to
// shared memory, where each finds its place by counting larger keys. Everything is decided by the
// keys, which all differ, so no result depends on the order of hits. Places, with rho and the row
// of V, then lie in shared memory, and 8 lanes gather 64 columns of V at a time.
//
// Shared memory of a block: the weight as float32 [k][c rounded up to 64] if it fits, and for each
// group its keys and its places.
#pragma once

#include "hopper.cuh"
#include "order.cuh"
#include "sweep.cuh"

namespace convnn::cuda {

template <class T>
struct FinishWork {
  // There are fewer than 2^31 rows of queries and 2^32 - 1 rows of V, of all batch elements.
  // The rows of the launch are those of query blocks first_block to first_block + blocks - 1. A
  // batch element has blocks_each of them, the last one filled up with rows that do not exist.
  int first_block, blocks, blocks_each;
  int n, k;
  int splits;
  const uint64_t* hits;        // [splits][rows of the launch][4][hits_per_list(k)] bits of
                               // rd(acc * inv_k) << 32 | column
  const uint8_t* counts;       // [splits][rows of the launch][4] hits in each list
  const float* inverse_query;  // [batch, n]
  const int64_t* rows;         // [columns] row of key of each column, ascending; null: the column
  bool by_index;
  float* similarities;  // [batch, n, k]
  int64_t* indices;     // [batch, n, k]

  const T* value;  // [batch, m, c], or null: only similarities and indices
  uint32_t m;
  int c;
  Rho rho;
  float scale;
  const T* weight;     // [c, 1, k] or null
  bool weight_staged;  // in shared memory; a missing weight is a row of ones
  int weight_stride;   // there, from place to place: c rounded up to kGathered, or 0
  bool vectors;        // weight_staged, and rows of value, bias and output are aligned to 16 bytes
  const T* bias;       // [c] or null
  T* output;           // [batch, n, c]
  // Blocks with the same number modulo `processors` share a range of units: `range` of them, and
  // the first `longer` processors one more.
  int processors, range, longer;

  __device__ int launch_rows() const { return blocks * kSweepRows; }
};

// Rows, all of one query block, that a block of the finish takes at a time.
constexpr int kFinishUnit = 64;
// Blocks of the finish on a multiprocessor: with this bound the compiler spills nothing.
constexpr int kFinishBlocks = 4;

// kMostNeighbors is 10, 16, 32 or 64.
template <int kMostNeighbors, bool kSplits>
struct FinishShape {
  // Of a row.
  static constexpr int kLanes = kMostNeighbors <= 10 ? 8 : kMostNeighbors <= 16 ? 16 : 32;
  static constexpr int kList = hits_per_list(kMostNeighbors), kHits = 4 * kList;
  // Most keys that are ranked.
  static constexpr int kKept = kMostNeighbors == 10 ? 16 : 2 * kMostNeighbors;
  // Each list belongs to a quarter of the lanes, which read two hits at a time.
  static constexpr int kOfList = kLanes / 4, kStep = 2 * kOfList;
  // Keys in the registers of a lane: those of the lists of one split, for which kShort usually
  // suffice, and what was kept of the splits before.
  static constexpr int kLong = (kList + kStep - 1) / kStep * 2;
  static constexpr int kShort = kLanes == 8 ? 10 : (kLong * 3 / 4 + 1) / 2 * 2;
  static constexpr int kOwnKept = kKept / kLanes;
  static constexpr int kPlaces = (kMostNeighbors + kLanes - 1) / kLanes;  // of a lane
  static constexpr int kGroups = kThreads / kLanes;                       // of a block
  static constexpr size_t kBytes = size_t(kGroups) * (kKept + kMostNeighbors) * sizeof(uint64_t);
};

// Columns of V that 8 lanes gather at a time.
constexpr int kGathered = 64;
// Where a column of the weight lies among its kGathered in shared memory: lanes that read 4 columns
// each find them side by side.
__device__ inline int staged_column(int c) { return c % 8 / 4 * 32 + c / 8 * 4 + c % 4; }
inline size_t staged_bytes(int64_t k, int64_t c) {
  return size_t(k * ceil_div(c, kGathered) * kGathered) * sizeof(float);
}

// The sum over the lanes of a group, in one fixed order.
template <int kLanes, class A>
__device__ inline A group_sum(A x) {
#pragma unroll
  for (int span = 1; span < kLanes; span *= 2) x += __shfl_xor_sync(kAllLanes, x, span);
  return x;
}

// Adds 1 to `count` if a >= b, from the borrow of a difference: one instruction less than with a
// predicate.
__device__ __forceinline__ void count_reaching(int& count, uint64_t a, uint64_t b) {
#ifdef __CUDACC__
  asm("{\n.reg .u32 none;\n"
      "sub.cc.u32 none, %1, %3;\n"
      "subc.cc.u32 none, %2, %4;\n"
      "subc.u32 %0, %0, -1;\n}\n"
      : "+r"(count)
      : "r"(low_of(a)), "r"(high_of(a)), "r"(low_of(b)), "r"(high_of(b)));
#else
  count += a >= b;
#endif
}
__device__ __forceinline__ void count_reaching(int& count, uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  asm("{\n.reg .u32 none;\n"
      "sub.cc.u32 none, %1, %2;\n"
      "subc.u32 %0, %0, -1;\n}\n"
      : "+r"(count)
      : "r"(a), "r"(b));
#else
  count += a >= b;
#endif
}
// The key of a hit. Differs from key_of() in the order of a NaN: multiply_add() makes only one NaN,
// and its bits are in order.
__device__ __forceinline__ uint64_t key_of_hit(uint64_t hit, float inverse_query) {
  const float s = multiply_add(__uint_as_float(high_of(hit)), inverse_query, 0.0f) + 0.0f;
  const uint32_t bits = __float_as_uint(s);
  return pack(bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u), ~low_of(hit));
}
__device__ __forceinline__ float similarity_of_key(uint64_t key) {
  const uint32_t order = high_of(key);
  return __uint_as_float(order ^ (~uint32_t(int32_t(order) >> 31) | 0x80000000u));
}
// 2^x and 1 / x, off by a few units of the last place; 2^x is 0 below 2^-126.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDACC__
  return __fdividef(1, x);
#else
  return 1 / x;
#endif
}
__device__ inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
__device__ inline uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

template <class T, int kMostNeighbors, bool kSplits>
class Finish : FinishShape<kMostNeighbors, kSplits> {
  using Shape = FinishShape<kMostNeighbors, kSplits>;
  static constexpr int kLanes = Shape::kLanes, kKept = Shape::kKept, kPlaces = Shape::kPlaces;
  // The row of V of a place that contributes nothing.
  static constexpr uint32_t kNone = 0xFFFFFFFFu;

 public:
  // weight [k][c rounded up to 64] in shared memory, and keys [kGroups][kKept + kMostNeighbors]
  __device__ Finish(const FinishWork<T>& w, const float* weight, uint64_t* keys)
      : w_(w),
        weight_(weight),
        kept_(keys + group() * (kKept + kMostNeighbors)),
        places_(kept_ + kKept),
        lane_(int(threadIdx.x) % kLanes) {}

  static __device__ int group() { return int(threadIdx.x) / kLanes; }

  // One row: number `local` of the launch, `row` of the batch element, which may be n or more.
  __device__ void finish(int local, int batch, int row) {
    const bool exists = row < w_.n;
    const int at = batch * w_.n + row;
    const int found = select(local, exists, exists ? w_.inverse_query[at] : 1);
    bool gaps = false;
    const int last = modulate(found, exists, at, uint32_t(batch) * w_.m, gaps);
    if (w_.value) {
      __syncwarp();
      if (w_.vectors && !gaps) {
        gather<true>(at, exists, last);
      } else {
        gather<false>(at, exists, last);
      }
    }
    __syncwarp();
  }

 private:
  // Writes the k nearest keys to places_, by similarity or by index, and returns how many there
  // are.
  __device__ int select(int local, bool exists, float inverse_query) {
    int kept = 0;
    for (int split = 0; split < (kSplits ? w_.splits : 1); ++split) {
      const int row = split * w_.launch_rows() + local;
      uint32_t counts = 0;
      if (exists) copy4(&counts, w_.counts + row * 4);
      const int list = lane_ / Shape::kOfList, first = lane_ % Shape::kOfList * 2;
      // Of its list, from the first that is this lane's
      const int own = int(counts >> (8 * list) & 0xFF) - first;
      const uint32_t pairs = (counts & 0x00FF00FFu) + (counts >> 8 & 0x00FF00FFu);
      const int count = int((pairs & 0xFFFFu) + (pairs >> 16));
      const uint64_t* hits = w_.hits + (int64_t(row) * Shape::kHits + list * Shape::kList + first);
      constexpr int kMost = Shape::kShort / 2 * Shape::kStep;
      kept = __any_sync(kAllLanes, own > kMost)
                 ? merge<Shape::kLong>(hits, own, count, kept, inverse_query)
                 : merge<Shape::kShort>(hits, own, count, kept, inverse_query);
    }
    rank(kept);
    const int found = kept < w_.k ? kept : w_.k;
    if (w_.by_index) {
      // Again, with similarity and index swapped.
#pragma unroll
      for (int e = 0; e < Shape::kOwnKept; ++e) {
        const int j = lane_ + e * kLanes;
        kept_[j] = j < found ? pack(low_of(places_[j]), high_of(places_[j])) : 0;
      }
      __syncwarp();
      rank(found);
    }
    return found;
  }

  // Adds the `count` hits of one split to kept_, and returns how many keys are there now. This lane
  // has the first two of every kStep of hits [own].
  template <int kOfHits>
  __device__ int merge(const uint64_t* hits, int own, int count, int kept, float inverse_query) {
    // The order is 0 where there is none.
    uint64_t keys[kOfHits + (kSplits ? Shape::kOwnKept : 0)];
    alignas(16) uint64_t hit[kOfHits];
#pragma unroll
    for (int e = 0; e < kOfHits; e += 2) {
      hit[e] = hit[e + 1] = 0;
      if (e / 2 * Shape::kStep < own) copy16(hit + e, hits + e / 2 * Shape::kStep);
    }
#pragma unroll
    for (int e = 0; e < kOfHits; ++e) {
      const bool there = e / 2 * Shape::kStep + e % 2 < own;
      const uint64_t key = key_of_hit(hit[e], inverse_query);
      keys[e] = pack(there ? high_of(key) : 0, low_of(key));
    }
    const int rest = own % Shape::kStep;
    int reaching = own <= 0 ? 0 : own / Shape::kStep * 2 + (rest < 2 ? rest : 2);
    if constexpr (kSplits) {
#pragma unroll
      for (int e = 0; e < Shape::kOwnKept; ++e) {
        const int at = lane_ + e * kLanes;
        keys[kOfHits + e] = at < kept ? kept_[at] : 0;
        reaching += at < kept;
      }
      __syncwarp();
    }
    const uint64_t bound = bound_of(keys, count + kept, reaching);
    // The lower half of the bound decides only among ties.
    return __any_sync(kAllLanes, low_of(bound) != 0) ? keep<true>(keys, bound, reaching)
                                                     : keep<false>(keys, bound, reaching);
  }

  // A bound that between k and kKept keys of the group reach, any key if there are at most kKept.
  // This lane has `own` keys; afterwards, that many reach the bound.
  template <int kSlots>
  __device__ uint64_t bound_of(const uint64_t (&keys)[kSlots], int count, int& own) {
    const bool too_many = count > kKept;
    // Where there is no key, the lower half may be anything.
    constexpr uint64_t kAny = uint64_t(1) << 32;
    if (!__any_sync(kAllLanes, too_many)) return kAny;
    uint32_t low = ~0u, high = 0;
#pragma unroll
    for (int e = 0; e < kSlots; ++e) {
      high = larger(high, high_of(keys[e]));
      low = smaller(low, high_of(keys[e]) - 1);  // huge where there is no key
    }
#pragma unroll
    for (int span = 1; span < kLanes; span *= 2) {
      high = larger(high, __shfl_xor_sync(kAllLanes, high, span));
      low = smaller(low, __shfl_xor_sync(kAllLanes, low, span));
    }
    // Too many keys have the order `low` or more, and fewer than k one above `high`; the search
    // ends where both meet.
    low = too_many ? low : 0;
    high = too_many ? high : 0;
    int reaching;
#pragma unroll 1
    do {
      const uint32_t middle = low + (high - low) / 2;
      reaching = 0;
#pragma unroll
      for (int e = 0; e < kSlots; ++e) count_reaching(reaching, high_of(keys[e]), middle);
      const int reach = group_sum<kLanes>(reaching);
      low = reach < w_.k && too_many ? low : middle;
      high = reach > kKept ? high : middle;
    } while (__any_sync(kAllLanes, high - low > 1));
    own = too_many ? reaching : own;
    uint64_t bound = too_many ? pack(low, 0u) : kAny;
    if (__any_sync(kAllLanes, low != high)) {
      bound = bound_of_ties(keys, bound, high, low != high, own);
    }
    return bound;
  }

  // The bound, if `searching` for one between `bound`, which too many keys reach, and the order
  // `most`, above which there are fewer than k: many keys have one similarity.
  template <int kSlots>
  __device__ uint64_t bound_of_ties(const uint64_t (&keys)[kSlots], uint64_t bound, uint32_t most,
                                    bool searching, int& own) {
    uint64_t low = bound, high = pack(most, ~0u);
    // Halves end after 64 steps, so a damaged list does not hang.
#pragma unroll 1
    for (int step = 0; step < 64 && __any_sync(kAllLanes, searching); ++step) {
      const uint64_t middle = low + (high - low) / 2;
      int reaching = 0;
#pragma unroll
      for (int e = 0; e < kSlots; ++e) count_reaching(reaching, keys[e], middle);
      const int reach = group_sum<kLanes>(reaching);
      bound = searching ? middle : bound;
      own = searching ? reaching : own;
      low = reach > kKept ? middle : low;
      high = reach < w_.k ? middle : high;
      searching = searching && (reach > kKept || reach < w_.k);
    }
    own = searching ? 0 : own;
    return searching ? ~uint64_t(0) : bound;
  }

  // Moves the keys that reach the bound, `own` of this lane, to kept_, with zeros behind them, and
  // returns how many there are.
  template <bool kTies, int kSlots>
  __device__ __forceinline__ int keep(const uint64_t (&keys)[kSlots], uint64_t bound, int own) {
    int before = own;
#pragma unroll
    for (int span = 1; span < kLanes; span *= 2) {
      const int other = __shfl_sync(kAllLanes, before, lane() - span);
      if (lane_ >= span) before += other;
    }
    const int count = __shfl_sync(kAllLanes, before, lane() | (kLanes - 1));
    uint64_t* next = kept_ + (before - own);
#pragma unroll
    for (int e = 0; e < kSlots; ++e) {
      if (kTies ? keys[e] >= bound : high_of(keys[e]) >= high_of(bound)) *next++ = keys[e];
    }
#pragma unroll
    for (int e = 0; e < Shape::kOwnKept; ++e) {
      if (lane_ + e * kLanes >= count) kept_[lane_ + e * kLanes] = 0;
    }
    __syncwarp();
    return count;
  }

  // Writes the k largest of kept_ [count], with zeros behind, to places_, the largest first.
  __device__ void rank(int count) {
    uint64_t own[Shape::kOwnKept];
    int above[Shape::kOwnKept];  // keys that are at least as large: itself, too
#pragma unroll
    for (int e = 0; e < Shape::kOwnKept; ++e) {
      own[e] = kept_[lane_ + e * kLanes];
      above[e] = -1;
    }
    const auto compare_two = [&](int j) {
      alignas(16) uint64_t other[2];
      copy16(other, kept_ + j);
#pragma unroll
      for (int e = 0; e < Shape::kOwnKept; ++e) {
        count_reaching(above[e], other[0], own[e]);
        count_reaching(above[e], other[1], own[e]);
      }
    };
    if constexpr (kKept == 16) {
      // Comparing zeros, too, costs less than a loop.
#pragma unroll
      for (int j = 0; j < kKept; j += 2) compare_two(j);
    } else {
#pragma unroll 2
      for (int j = 0; j < count; j += 2) compare_two(j);
    }
#pragma unroll
    for (int e = 0; e < Shape::kOwnKept; ++e) {
      if (own[e] && above[e] < w_.k) places_[above[e]] = own[e];
    }
    __syncwarp();
  }

  // Stores similarities and indices, and replaces places_ by (rho, row of V), from `first_value`
  // on. Returns the number of places up to the last one that contributes; there are `gaps` if
  // others lie between in any row of the warp.
  __device__ int modulate(int found, bool exists, int at, uint32_t first_value, bool& gaps) {
    float rho[kPlaces];
    uint32_t rows[kPlaces];
    bool there[kPlaces];
    uint64_t* places = places_ + lane_;
    bool some_infinite = false;
#pragma unroll
    for (int e = 0; e < kPlaces; ++e) {
      const bool is_found = lane_ + e * kLanes < found;
      uint64_t key = is_found ? places[e * kLanes] : 0;
      if (w_.by_index) key = pack(low_of(key), high_of(key));
      rho[e] = is_found ? similarity_of_key(key) : -kInfinity<float>;
      rows[e] = is_found ? ~low_of(key) : 0;
      there[e] = rho[e] != -kInfinity<float>;
      some_infinite = some_infinite || (is_found && !there[e]);
    }
    if (w_.rows) {
#pragma unroll
      for (int e = 0; e < kPlaces; ++e) {
        if (lane_ + e * kLanes < found) rows[e] = uint32_t(w_.rows[rows[e]]);
      }
    }
    if (exists) {
      float* similarities = w_.similarities + int64_t(at) * w_.k + lane_;
      int64_t* indices = w_.indices + int64_t(at) * w_.k + lane_;
#pragma unroll
      for (int e = 0; e < kPlaces; ++e) {
        if (lane_ + e * kLanes < w_.k) {
          similarities[e * kLanes] = rho[e];
          indices[e * kLanes] = int64_t(rows[e]);
        }
      }
    }
    if (!w_.value) return 0;
    weigh(rho, there);
#pragma unroll
    for (int e = 0; e < kPlaces; ++e) {
      if (lane_ + e * kLanes < found) {
        places[e * kLanes] =
            pack(__float_as_uint(rho[e]), there[e] ? first_value + rows[e] : kNone);
      }
    }
    if (!__any_sync(kAllLanes, some_infinite)) return found;
    int contributing = 0;
#pragma unroll
    for (int e = 0; e < kPlaces; ++e) contributing += there[e];
    contributing = group_sum<kLanes>(contributing);
    gaps = __any_sync(kAllLanes, w_.by_index && contributing < found);
    // Sorted by similarity, those that contribute come first.
    return gaps ? found : contributing;
  }

  // Replaces the similarities of places by rho.
  __device__ void weigh(float (&rho)[kPlaces], const bool (&there)[kPlaces]) {
    if (w_.rho != Rho::softmax) {
#pragma unroll
      for (float& x : rho) x = w_.rho == Rho::ones ? 1.0f : x * w_.scale;
      return;
    }
    const float scale = w_.scale * 1.44269504f;  // exp(x) = 2^(x / ln 2)
    // A maximum that misses NaN does no harm: the sum is NaN.
    float largest = -kInfinity<float>;
#pragma unroll
    for (int e = 0; e < kPlaces; ++e) {
      if (there[e]) largest = fmaxf(largest, rho[e] * scale);
    }
#pragma unroll
    for (int span = 1; span < kLanes; span *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, span));
    }
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kPlaces; ++e) {
      rho[e] = there[e] ? power_of_2(fmaf(rho[e], scale, -largest)) : 0;
      sum += rho[e];
    }
    const float inverse = reciprocal(group_sum<kLanes>(sum));
#pragma unroll
    for (float& x : rho) x *= inverse;
  }

  // The convolution of the first `count` places; with kFast they all contribute, and eight columns
  // are read at a time.
  template <bool kFast>
  __device__ void gather(int at, bool exists, int count) {
    for (int first = 0; first < w_.c; first += kGathered) {
      const int c = first + lane_ % 8 * 8, columns = w_.c - c;
      const T* value = w_.value + c;
      float y[8] = {};
      if (columns > 0) {
        constexpr int kStep = kLanes / 8;
        int j = lane_ / 8;
        if constexpr (kFast) {
          // Three at a time, so that their loads overlap.
#pragma unroll 1
          for (; j + 2 * kStep < count; j += 3 * kStep) {
#pragma unroll
            for (int i = 0; i < 3; ++i) add_place<kFast>(value, j + i * kStep, c, columns, y);
          }
        }
#pragma unroll 1
        for (; j < count; j += kStep) add_place<kFast>(value, j, c, columns, y);
      }
#pragma unroll
      for (int span = 8; span < kLanes; span *= 2) {
#pragma unroll
        for (float& sum : y) sum += __shfl_xor_sync(kAllLanes, sum, span);
      }
      if (exists && lane_ < 8 && columns > 0) {
        store<kFast>(w_.output + int64_t(at) * w_.c + c, c, columns, y);
      }
    }
  }

  // Adds what a place contributes to columns c to c + 7. value [.., c], from that column on
  template <bool kFast>
  __device__ __forceinline__ void add_place(const T* value, int j, int c, int columns,
                                            float (&y)[8]) const {
    const uint64_t place = places_[j];
    if (!kFast && low_of(place) == kNone) return;
    const float rho = __uint_as_float(high_of(place));
    float v[8], f[8];
    load_columns<kFast>(row_of(value, low_of(place)), columns, v);
    load_weight<kFast>(j, c, columns, f);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = fmaf(rho * v[i], f[i], y[i]);
  }

  // The same column, `row` rows further on. In bytes, because that is one instruction.
  __device__ const T* row_of(const T* value, uint32_t row) const {
    const uint32_t row_bytes = uint32_t(w_.c) * uint32_t(sizeof(T));
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(value) +
                                      uint64_t(row) * row_bytes);
  }

  template <bool kFast>
  static __device__ void load_columns(const T* from, int columns, float (&x)[8]) {
    if constexpr (kFast) {
      alignas(16) uint32_t pairs[4];
      copy16(pairs, from);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = widen(T{uint16_t(pairs[i / 2] >> (i % 2 * 16))});
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = i < columns ? widen(from[i]) : 0.0f;
    }
  }

  // W[c : c + 8, 0, j]
  template <bool kFast>
  __device__ void load_weight(int j, int c, int columns, float (&x)[8]) const {
    if (kFast || w_.weight_staged) {
      const float* from = weight_ + j * w_.weight_stride + (c - lane_ % 8 * 4);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        alignas(16) float half[4];
        copy16(half, from + 32 * h);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * h + i] = half[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i] = i < columns ? widen(w_.weight[int64_t(c + i) * w_.k + j]) : 0.0f;
      }
    }
  }

  template <bool kFast>
  __device__ void store(T* output, int c, int columns, float (&y)[8]) const {
    if (w_.bias) {
      float bias[8];
      load_columns<kFast>(w_.bias + c, columns, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += bias[i];
    }
    T elements[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) narrow(y[i], elements[i]);
    if constexpr (kFast) {
      alignas(16) uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = uint32_t(elements[2 * i + 1].bits) << 16 | elements[2 * i].bits;
      }
      copy16(output, pairs);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < columns) output[i] = elements[i];
      }
    }
  }

  const FinishWork<T>& w_;
  const float* weight_;
  uint64_t* const kept_;    // [kKept] keys
  uint64_t* const places_;  // [kMostNeighbors] keys, then rho and the row of V
  const int lane_;          // of the group
};

// Fills weight [k][c rounded up to kGathered], of which there is one row if W is null.
template <class T>
__device__ inline void stage_weight(const FinishWork<T>& w, float* weight) {
  const int row = (w.c + kGathered - 1) / kGathered * kGathered, count = w.weight ? w.k : 1;
  // Two threads share a column.
  constexpr int kShare = kThreads / kGathered;
  const int own = int(threadIdx.x) % kGathered, first = int(threadIdx.x) / kGathered;
  for (int c = own; c < row; c += kGathered) {
    const T* from = w.weight ? w.weight + c * w.k : nullptr;
    float* to = weight + (c - own + staged_column(own));
#pragma unroll 4
    for (int j = first; j < count; j += kShare) {
      to[j * row] = c >= w.c ? 0.0f : from ? widen(from[j]) : 1.0f;
    }
  }
}

template <class T, int kMostNeighbors, bool kSplits>
__global__ __launch_bounds__(kThreads,
                             kFinishBlocks) void hopper_finish_kernel(const FinishWork<T> w) {
  using Shape = FinishShape<kMostNeighbors, kSplits>;
  uint64_t* keys = reinterpret_cast<uint64_t*>(shared_memory());
  float* weight = reinterpret_cast<float*>(shared_memory() + Shape::kBytes);
  if (w.weight_staged) stage_weight(w, weight);
  __syncthreads();
  wait_for_previous();
  Finish<T, kMostNeighbors, kSplits> finish(w, weight, keys);
  constexpr int kUnits = kSweepRows / kFinishUnit;
  // Blocks that probably share a multiprocessor have rows side by side, so that some of the rows of
  // V that they gather are in L1.
  const int number = int(blockIdx.x) / w.processors;
  const int processor = int(blockIdx.x) - number * w.processors;
  const int begin = processor * w.range + min(processor, w.longer);
  const int end = begin + w.range + (processor < w.longer);
  for (int unit = begin + number; unit < end; unit += kFinishBlocks) {
    const int block = w.first_block + unit / kUnits;
    // Shuffled so that the compiler does not divide again for every row.
    const int batch = __shfl_sync(kAllLanes, block / w.blocks_each, 0);
    const int row = (block - batch * w.blocks_each) * kSweepRows + unit % kUnits * kFinishUnit;
    for (int i = finish.group(); i < kFinishUnit; i += Shape::kGroups) {
      finish.finish(unit * kFinishUnit + i, batch, row + i);
    }
  }
}

}  // namespace convnn::cuda
