// SPDX-License-Identifier: MIT
// Lists of hits: columns that may be among the k nearest of a row.
//
// A row has four lists, one of each lane of a quad; a hit is the bits of a over its column. The
// similarity is s = rn(a inv_q), which does not fall as a rises, but makes ties of different a. So
// what stays in a full list is decided by s and the column, and what may still enter by a.
#pragma once

#include "order.cuh"
#include "query_rows.cuh"

namespace convnn::cuda {

constexpr float kLargest = std::numeric_limits<float>::max();

// The least a with rn(a * inv_q) > s; at most the largest finite number, because NaN always enters.
__device__ inline float next_threshold(float s, float inv_q) {
  uint32_t low = order_of(-kInfinity<float>), high = order_of(kLargest);
#pragma unroll 1
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (similarity_of<float>(middle) * inv_q <= s) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return similarity_of<float>(low);
}

// One of the four lists of a row. All lanes of a warp call each function together.
struct HitList {
  uint64_t* hits;  // [count]
  int count;
  float inv_q;

  __device__ float similarity(int i) const {
    return __uint_as_float(uint32_t(hits[i] >> 32)) * inv_q;
  }
  __device__ uint32_t column(int i) const { return uint32_t(hits[i]); }

  // Hits of the row, in all four lists, of which holds(s, column).
  template <class Predicate>
  __device__ __forceinline__ int count_row(const Predicate& holds) const {
    int n = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) n += holds(similarity(i), column(i));
    return quad_sum(n);
  }
};

// Which hits of a row stay: those above `s`, and those that equal it up to column `last`. If only
// NaN stays, those up to `last`.
struct Cut {
  float s;
  bool only_nan;
  uint32_t last;

  __device__ bool above(float x) const { return !only_nan && !(x <= s); }
  __device__ bool equal(float x) const { return only_nan ? x != x : x == s; }
  __device__ bool keeps(float x, uint32_t column) const {
    return above(x) || (equal(x) && column <= last);
  }
};

// Where to cut a row with at least k hits, so that the k nearest stay. Quads with `idle` only keep
// the others company.
__device__ __forceinline__ Cut find_cut(const HitList& list, int k, bool idle) {
  float least = kInfinity<float>, most = -kInfinity<float>;
#pragma unroll 1
  for (int i = 0; i < list.count; ++i) {
    const float s = list.similarity(i);
    least = fminf(least, s);
    most = fmaxf(most, s);
  }
  Cut cut = {0, false, ~0u};
  cut.only_nan = list.count_row([](float s, uint32_t) { return s != s; }) >= k;
  // At least k are not below `low`, fewer than k not below `high`.
  uint32_t low = order_of(quad_min(least)), high = order_of(quad_max(most)) + 1;
  int found = quad_sum(list.count);
#pragma unroll 1
  while (__any_sync(kAllLanes, !idle && !cut.only_nan && found != k && high - low > 1)) {
    const uint32_t middle = low + (high - low) / 2;
    const float s = similarity_of<float>(middle);
    const int n = list.count_row([&](float x, uint32_t) { return !(x < s); });
    if (n >= k) {
      low = middle;
      found = n;
    } else {
      high = middle;
    }
  }
  cut.s = similarity_of<float>(low);
  // Of equal ones, the lowest columns.
  const int wanted = k - list.count_row([&](float s, uint32_t) { return cut.above(s); });
  const int equal = list.count_row([&](float s, uint32_t) { return cut.equal(s); });
  if (!__any_sync(kAllLanes, !idle && equal > wanted)) return cut;
  uint32_t first = 0;
#pragma unroll 1
  for (int i = 0; i < 32; ++i) {
    const uint32_t middle = first + (cut.last - first) / 2;
    const int n =
        list.count_row([&](float s, uint32_t column) { return cut.equal(s) && column <= middle; });
    if (n >= wanted) {
      cut.last = middle;
    } else {
      first = middle + 1;
    }
  }
  return cut;
}

// The k nearest of a row stay, in the lists where they are. Returns the threshold of a above which
// hits to their right enter, infinity if none does.
__device__ __forceinline__ float keep_nearest(HitList& list, int k, bool idle) {
  const Cut cut = find_cut(list, k, idle);
  if (idle) list.count = 0;
  float last = kInfinity<float>;
  int kept = 0;
#pragma unroll 1
  for (int i = 0; i < list.count; ++i) {
    const float s = list.similarity(i);
    if (!cut.keeps(s, list.column(i))) continue;
    list.hits[kept++] = list.hits[i];
    last = fminf(last, s);
  }
  list.count = kept;
  last = quad_min(last);
  return cut.only_nan ? kInfinity<float> : next_threshold(last, list.inv_q);
}

}  // namespace convnn::cuda
