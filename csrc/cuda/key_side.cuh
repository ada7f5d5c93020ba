// SPDX-License-Identifier: MIT
// Gradients key by key, over the pairs (i, j) with I_ij = m (pairs.h), with G the gradient of the
// output and W depthwise, or 1:
//
//   value       dV[m]  = sum rho_ij W_j * G_i
//   dot         dk_m   = sum ds_ij q_i
//   euclidean   dk_m   = sum 2 ds_ij (q_i - k_m)
//   cosine      dk_m   = (t - (t . u_m) u_m) / ||k_m||, t = sum ds_ij u_i, with u the unit vectors
//
// A group of eight lanes has a key and goes through its pairs in order, eight at a time: each lane
// reads one of them and its factors (query_side.h), which all then take from it, while every lane
// has 16 bytes of the rows of G and of query. The sums stay in registers.
//
// A key that many queries chose has a long list, on which one group would work for long. So the
// list of all keys is divided, without regard to them, into chunks of equal size. A first launch
// has a warp for each: if the chunk lies within the list of one key, its groups sum a quarter of
// its pairs each. The second launch adds these sums to those of the pairs before the first chunk of
// a key and after its last: always the same terms in the same order.
#pragma once

#include "pairs.cuh"
#include "query_side.h"
#include "rows.cuh"

namespace convnn::cuda {

constexpr int64_t kPairsOfChunk = 256;  // or as many as a key has sums, if that is more

// Pointers to what is absent or not needed are null.
template <class T>
struct KeySideWork {
  using A = Accumulate<T>;

  int64_t keys, c, d, k;  // keys: of all batch elements
  Metric metric;
  PairList list;
  const Factors<A>* factors;  // as in QuerySideWork

  const T* grad;    // G [rows, c]
  const T* weight;  // W [k, c]
  T* grad_value;    // dV [keys, c]

  const T* query;      // [rows, d]
  const T* key;        // [keys, d]
  const A* key_units;  // [keys] unit_of() a row of key, cosine
  T* grad_key;         // dk [keys, d]
  A* key_sums;         // t [keys, d], cosine, if d is more than a group has at a time

  int64_t chunk, chunks;
  A* chunk_sums;  // [chunks, size_of_sum()] dV, then dk or t

  __host__ __device__ int64_t columns_of_value() const { return grad_value ? c : 0; }
  __host__ __device__ int64_t columns_of_weight() const { return grad_value && weight ? c : 0; }
  __host__ __device__ int64_t columns_of_key() const { return grad_key ? d : 0; }
  __host__ __device__ int64_t size_of_sum() const { return columns_of_value() + columns_of_key(); }
};

// Blocks per multiprocessor, at least: with this bound the compiler spills nothing.
template <class T, bool kFast>
constexpr int kKeySideBlocks = kFast && sizeof(T) < 8 ? 4 : 3;

template <bool kFast>
using PairId = std::conditional_t<kFast, Narrow, Wide>;

// Pairs of a list from `first` to `last`, without those of whole chunks, if sums of these are used.
struct PairRun {
  int64_t first, last;
  int64_t first_chunk, chunks;
  int64_t before, skipped;  // pairs before those chunks, and in them

  __device__ int64_t count() const { return last - first - skipped; }
  __device__ int64_t at(int64_t i) const { return first + (i < before ? i : i + skipped); }
};
__device__ inline PairRun run_of_key(int64_t first, int64_t last, int64_t chunk) {
  PairRun run = {first, last, 0, 0, last - first, 0};
  // Most lists are shorter: no division.
  if (last - first < chunk) return run;
  run.first_chunk = (first + chunk - 1) / chunk;
  run.chunks = last / chunk - run.first_chunk;
  if (run.chunks <= 0) return {first, last, 0, 0, last - first, 0};
  run.before = run.first_chunk * chunk - first;
  run.skipped = run.chunks * chunk;
  return run;
}

// Sums over pairs of one key: kVector<T> columns of dV, and of dk or t.
template <class T>
struct KeySums {
  Accumulate<T> value[kVector<T>] = {}, key[kVector<T>] = {};
};

// A pair of a run, and the numbers that its rows are multiplied by.
template <class T, bool kFast>
struct KeyPair {
  RowNumber<kFast> row = -1, slot = -1;  // negative: no pair
  Factors<Accumulate<T>> factors = {0, 0};

  __device__ KeyPair(const KeySideWork<T>& w, const PairRun& run, int64_t i) {
    using Id = PairId<kFast>;
    if (i >= run.count()) return;
    const Id pair = static_cast<const Id*>(w.list.pairs)[run.at(i)];
    row = RowNumber<kFast>(pair >> w.list.shift);
    slot = RowNumber<kFast>(pair & ((Id(1) << w.list.shift) - 1));
    factors = w.factors[place_of_factors(row, slot, w.k)];
  }
};

// Adds a run in columns c and following. A group takes eight pairs and then those `step` later;
// `most` is the same in all lanes, and no group has more. Rows that are not needed are zeros.
template <class T, bool kFast, bool kEuclidean>
__device__ inline void add_pairs(const KeySideWork<T>& w, const PairRun& run, int64_t offset,
                                 int64_t step, int64_t most, int64_t c,
                                 const Accumulate<T> (&of_key)[kVector<T>], KeySums<T>& sums) {
  using A = Accumulate<T>;
  constexpr int kCount = kVector<T>, kTogether = 4;
  const Packed one = ones<T>();
  for (int64_t start = 0; start < most; start += step) {
    const KeyPair<T, kFast> own(w, run, start + offset + member());
#pragma unroll 1
    for (int u = 0; u < kGroup && start + u < most; u += kTogether) {
      Packed g[kTogether], q[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const int source = group() * kGroup + u + t;
        const auto row = __shfl_sync(kAllLanes, own.row, source);
        g[t] = load_row(w.grad, row, c, w.columns_of_value());
        q[t] = load_row(w.query, row, c, w.columns_of_key());
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const int source = group() * kGroup + u + t;
        const A rho = __shfl_sync(kAllLanes, own.factors.rho, source);
        const A ds = __shfl_sync(kAllLanes, own.factors.ds, source);
        const auto slot = __shfl_sync(kAllLanes, own.slot, source);
        A x[kCount], weight[kCount];
        unpack<T>(g[t], x);
        unpack<T>(load_row(w.weight, slot, c, w.columns_of_weight(), one), weight);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums.value[i] += rho * (weight[i] * x[i]);
        unpack<T>(q[t], x);
        if (kEuclidean) {
          const bool is_pair = start + offset + u + t < run.count();
#pragma unroll
          for (int i = 0; i < kCount; ++i) x[i] = is_pair ? 2 * (x[i] - of_key[i]) : A(0);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums.key[i] += ds * x[i];
      }
    }
  }
}

// Elements of the row of key, from column c on.
template <class T, bool kFast>
__device__ inline void unpack_key(const KeySideWork<T>& w, int64_t key, int64_t c,
                                  Accumulate<T> (&values)[kVector<T>]) {
  unpack<T>(load_row(w.key, RowNumber<kFast>(w.grad_key && key < w.keys ? key : -1), c, w.d),
            values);
}

// The key whose list has the pair at `position`; or one with another list, if none has.
template <class Id>
__device__ inline int64_t key_of(const PairList& list, int64_t keys, int64_t position) {
  const Id* begins = static_cast<const Id*>(list.begins);
  // The last key whose list begins there or before. Each step leaves a 32nd part.
  int64_t low = 0, high = keys;
  while (high - low > 1) {
    const int64_t part = (high - low + kWarp - 1) / kWarp, at = low + part * lane();
    const unsigned lanes = __ballot_sync(kAllLanes, at < high && int64_t(begins[at]) <= position);
    const int last = lanes ? __popc(lanes) - 1 : 0;
    high = min(high, low + part * (last + 1));
    low += part * last;
  }
  return low;
}

template <class T, bool kFast>
__global__ __launch_bounds__(kThreads, kKeySideBlocks<T, kFast>) void key_side_chunks_kernel(
    const KeySideWork<T> w) {
  using A = Accumulate<T>;
  using Id = PairId<kFast>;
  const int64_t chunk = grid_warp();
  if (chunk >= w.chunks) return;
  const int64_t first = chunk * w.chunk, last = first + w.chunk;
  const int64_t key = key_of<Id>(w.list, w.keys, first);
  if (int64_t(static_cast<const Id*>(w.list.begins)[key]) > first) return;
  if (int64_t(static_cast<const Id*>(w.list.ends)[key]) < last) return;
  const PairRun run = {first, last, 0, 0, w.chunk, 0};
  A* result = w.chunk_sums + chunk * w.size_of_sum();
  const int64_t columns = max(w.columns_of_value(), w.columns_of_key());
  for (int64_t c = member() * kVector<T>; c - member() * kVector<T> < columns; c += kStretch<T>) {
    A of_key[kVector<T>];
    unpack_key<T, kFast>(w, key, c, of_key);
    KeySums<T> sums;
    if (w.metric == Metric::euclidean) {
      add_pairs<T, kFast, true>(w, run, group() * kGroup, kWarp, w.chunk, c, of_key, sums);
    } else {
      add_pairs<T, kFast, false>(w, run, group() * kGroup, kWarp, w.chunk, c, of_key, sums);
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      for (int span = kGroup; span < kWarp; span *= 2) {
        sums.value[i] += __shfl_xor_sync(kAllLanes, sums.value[i], span);
        sums.key[i] += __shfl_xor_sync(kAllLanes, sums.key[i], span);
      }
      if (group() > 0) continue;
      if (c + i < w.columns_of_value()) result[c + i] = sums.value[i];
      if (c + i < w.columns_of_key()) result[w.columns_of_value() + c + i] = sums.key[i];
    }
  }
}

// Adds the sums of the chunks in a run.
template <class T>
__device__ inline void add_chunks(const KeySideWork<T>& w, const PairRun& run, int64_t c,
                                  KeySums<T>& sums) {
  const int64_t size = w.size_of_sum(), of_value = w.columns_of_value();
  for (int64_t chunk = run.first_chunk; chunk < run.first_chunk + run.chunks; ++chunk) {
    const Accumulate<T>* of_chunk = w.chunk_sums + chunk * size;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (c + i < of_value) sums.value[i] += of_chunk[c + i];
      if (c + i < w.columns_of_key()) sums.key[i] += of_chunk[of_value + c + i];
    }
  }
}

// dk from t, cosine, in columns c and following; `along` is t . u. `unit` is 0 also of a key
// without pairs: its gradient is 0, whatever its elements are.
template <class T, bool kFast>
__device__ inline void store_projected(const KeySideWork<T>& w, int64_t key, int64_t c,
                                       Accumulate<T> unit, Accumulate<T> along,
                                       const Accumulate<T> (&of_key)[kVector<T>],
                                       Accumulate<T> (&t)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    t[i] = unit == 0 ? Accumulate<T>(0) : unit * (t[i] - along * (unit * of_key[i]));
  }
  store_row<T, kFast>(w.grad_key + key * w.d, c, w.d, t);
}

template <class T, bool kFast>
__global__ __launch_bounds__(kThreads, kKeySideBlocks<T, kFast>) void key_side_kernel(
    const KeySideWork<T> w) {
  using A = Accumulate<T>;
  using Id = PairId<kFast>;
  constexpr int kCount = kVector<T>;
  const auto key = RowNumber<kFast>(grid_warp() * kGroups + group());
  const bool has = key < w.keys;
  PairRun run = {};
  if (has) {
    run = run_of_key(int64_t(static_cast<const Id*>(w.list.begins)[key]),
                     int64_t(static_cast<const Id*>(w.list.ends)[key]), w.chunk);
  }
  const int64_t most = warp_max(run.count());
  const bool projects = w.grad_key && w.metric == Metric::cosine;
  const A unit = projects && run.first < run.last ? w.key_units[key] : A(0);
  A along = 0;
  const int64_t columns = max(w.columns_of_value(), w.columns_of_key());
  for (int64_t c = member() * kCount; c - member() * kCount < columns; c += kStretch<T>) {
    A of_key[kCount];
    KeySums<T> sums;
    unpack_key<T, kFast>(w, key, c, of_key);
    if (w.metric == Metric::euclidean) {
      add_pairs<T, kFast, true>(w, run, 0, kGroup, most, c, of_key, sums);
    } else {
      add_pairs<T, kFast, false>(w, run, 0, kGroup, most, c, of_key, sums);
    }
    add_chunks(w, run, c, sums);
    if (projects) {
      A sum = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += sums.key[i] * (unit * of_key[i]);
      along += group_sum(sum);
    }
    if (!has) continue;
    if (w.grad_value) store_row<T, kFast>(w.grad_value + key * w.c, c, w.c, sums.value);
    if (!w.grad_key) continue;
    if (!projects) {
      store_row<T, kFast>(w.grad_key + key * w.d, c, w.d, sums.key);
    } else if (!w.key_sums) {
      store_projected<T, kFast>(w, key, c, unit, along, of_key, sums.key);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (c + i < w.d) w.key_sums[key * w.d + c + i] = sums.key[i];
      }
    }
  }
  if (!projects || !w.key_sums || !has) return;
  // Each lane reads what it has written.
  for (int64_t c = member() * kCount; c < w.d; c += kStretch<T>) {
    A of_key[kCount], t[kCount] = {};
    unpack_key<T, kFast>(w, key, c, of_key);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (c + i < w.d) t[i] = w.key_sums[key * w.d + c + i];
    }
    store_projected<T, kFast>(w, key, c, unit, along, of_key, t);
  }
}

}  // namespace convnn::cuda
