// SPDX-License-Identifier: MIT
// A stable radix sort of positions by a key, eight bits per pass, lowest bits first:
//
// 1. count_digits_kernel: how often each digit occurs in the run of positions of a block, of which
//    each warp counts a part.
// 2. sum_counts_kernel: one block per digit turns these counts into the number of positions with
//    that digit in earlier blocks.
// 3. scatter_kernel: writes every position to its new location. Lanes of a warp with the same digit
//    write in order; a warp's first location follows from the counts of its block.
//
// The counts of a warp are in shared memory, and each is written by one lane at a time, so nothing
// is atomic.
#pragma once

#include "device.cuh"
#include "sort.h"

namespace convnn::cuda {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int64_t kSortBlocks = 2048;

struct SortPass {
  const int64_t* keys;       // [count]
  const int64_t* positions;  // [count] in the order so far, or null: ascending
  int64_t* sorted;           // [count]
  int64_t* before;           // [kDigits, blocks]
  int64_t* totals;           // [kDigits]
  int64_t count, each;       // positions of a warp
  int64_t blocks;            // at most kSortBlocks
  int shift;
};

// Calls body(position, digit, lanes) for 32 positions of this warp at a time, in order. `lanes` are
// those with the same digit, which is -1 beyond the end. All lanes must participate.
template <class Body>
__device__ inline void for_each_position(const SortPass& p, const Body& body) {
  const int64_t first = grid_warp() * p.each;
  const int64_t end = min(first + p.each, p.count);
  for (int64_t i = first; i < end; i += kWarp) {
    const int64_t at = i + lane();
    int64_t position = at;
    int digit = -1;
    if (at < end) {
      if (p.positions) position = p.positions[at];
      digit = int(p.keys[position] >> p.shift) & (kDigits - 1);
    }
    body(position, digit, __match_any_sync(kAllLanes, digit));
    __syncwarp();
  }
}

// Shared memory [kWarps, kDigits]: how often each digit occurs for each warp of this block.
__device__ inline int* count_digits(const SortPass& p) {
  int* counts = reinterpret_cast<int*>(shared_memory());
  for (int i = int(threadIdx.x); i < kWarps * kDigits; i += kThreads) counts[i] = 0;
  __syncthreads();
  int* warp_counts = counts + warp() * kDigits;
  for_each_position(p, [&](int64_t, int digit, unsigned lanes) {
    if (digit >= 0 && lane() == __ffs(int(lanes)) - 1) warp_counts[digit] += __popc(lanes);
  });
  __syncthreads();
  return counts;
}

static __global__ __launch_bounds__(kThreads) void count_digits_kernel(const SortPass p) {
  const int* counts = count_digits(p);
  for (int digit = int(threadIdx.x); digit < kDigits; digit += kThreads) {
    int64_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += counts[w * kDigits + digit];
    p.before[digit * p.blocks + blockIdx.x] = sum;
  }
}

// For the digit of this block, turns the counts of blocks into sums over earlier blocks.
static __global__ __launch_bounds__(kThreads) void sum_counts_kernel(const SortPass p) {
  int64_t* sums = reinterpret_cast<int64_t*>(shared_memory());  // [kThreads]
  int64_t* counts = p.before + blockIdx.x * p.blocks;
  const int64_t each = (p.blocks + kThreads - 1) / kThreads;
  const int64_t first = min(threadIdx.x * each, p.blocks), end = min(first + each, p.blocks);
  int64_t sum = 0;
  for (int64_t i = first; i < end; ++i) sum += counts[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  int64_t before = 0;
  for (int i = 0; i < int(threadIdx.x); ++i) before += sums[i];
  if (threadIdx.x == kThreads - 1) p.totals[blockIdx.x] = before + sum;
  for (int64_t i = first; i < end; ++i) {
    const int64_t count = counts[i];
    counts[i] = before;
    before += count;
  }
}

static __global__ __launch_bounds__(kThreads) void scatter_kernel(const SortPass p) {
  const int* counts = count_digits(p);
  // [kWarps, kDigits]: the location of a warp's next position with each digit.
  int64_t* locations = reinterpret_cast<int64_t*>(shared_memory() + kWarps * kDigits * sizeof(int));
  int64_t* totals = locations + kWarps * kDigits;  // [kDigits]
  for (int digit = int(threadIdx.x); digit < kDigits; digit += kThreads) {
    totals[digit] = p.totals[digit];
  }
  __syncthreads();
  for (int digit = int(threadIdx.x); digit < kDigits; digit += kThreads) {
    int64_t location = p.before[digit * p.blocks + blockIdx.x];
    for (int i = 0; i < digit; ++i) location += totals[i];
    for (int w = 0; w < kWarps; ++w) {
      locations[w * kDigits + digit] = location;
      location += counts[w * kDigits + digit];
    }
  }
  __syncthreads();
  int64_t* next = locations + warp() * kDigits;
  for_each_position(p, [&](int64_t position, int digit, unsigned lanes) {
    int64_t location = 0;
    if (digit >= 0) location = next[digit] + __popc(lanes & ((1u << lane()) - 1));
    __syncwarp();
    if (digit < 0) return;
    p.sorted[location] = position;
    if (lane() == __ffs(int(lanes)) - 1) next[digit] += __popc(lanes);
  });
}

static __global__ __launch_bounds__(kThreads) void keys_in_range_kernel(
    const int64_t* keys,  // [count]
    int64_t* result,      // [count]
    int64_t count, int64_t limit) {
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) {
    result[i] = keys[i] >= 0 && keys[i] < limit ? keys[i] : limit;
  }
}

// Keys by which rows [batch, count], at most `limit`, are sorted in each batch element.
static __global__ __launch_bounds__(kThreads) void batch_keys_kernel(const int64_t* rows,  // [all]
                                                                     int64_t* result,      // [all]
                                                                     int64_t all, int64_t count,
                                                                     int64_t limit) {
  for (int64_t i = grid_thread(); i < all; i += grid_threads()) {
    result[i] = i / count * (limit + 1) + rows[i];
  }
}

static __global__ __launch_bounds__(kThreads) void gather_kernel(
    const int64_t* values,     // [count]
    const int64_t* positions,  // [count]
    int64_t* result,           // [count]
    int64_t count) {
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) result[i] = values[positions[i]];
}

}  // namespace convnn::cuda
