// SPDX-License-Identifier: MIT
// A counting sort of the pairs (i, j) by the key I_ij, in each batch element by itself. It is
// stable, so the pairs of a key stay in order, whatever the division into tiles.
//
// 1. count_pairs_kernel: how often a tile of consecutive pairs has each key.
// 2. place_keys_kernel: one thread per key turns these counts into sums over earlier tiles, and a
//    block adds up those of its 128 keys.
// 3. scatter_pairs_kernel: the warps of a block take turns at 32 pairs, and lanes with the same key
//    write in order.
//
// A block has one tile and a range of keys, whose counts are in shared memory. The counts are
// integers, which have one sum in any order.
#pragma once

#include "neighbors.cuh"
#include "pairs.h"

namespace convnn::cuda {

// Numbers of pairs, rows of key and positions.
using Narrow = uint32_t;
using Wide = unsigned long long;

constexpr int64_t kBytesOfCounts = 32 << 10;  // shared memory for the counts of a range of keys
// Keys of a range: a multiple of kThreads.
template <class Id>
constexpr int64_t kRange = kBytesOfCounts / int64_t(sizeof(Id));

struct PairSort {
  int64_t batch, n, m, k;
  int64_t each, tiles;  // pairs of a tile, and tiles of a batch element
  int64_t ranges;       // of keys
  int64_t blocks;       // of kThreads keys
  int shift;
  const void* similarities;  // [batch, n, k]
  DType similarity_dtype;
  const int64_t* indices;  // [batch, n, k]
  void* counts;            // [batch, tiles, m]
  void* sums;              // [batch, blocks] pairs of a block of keys
  void* starts;            // [batch, m] where the pairs of a key begin, in those of its block
  void* stops;             // [batch, m] and where they end
  void* begins;            // [batch, m], as PairList has them; so those below
  void* ends;              // [batch, m]
  void* pairs;             // [batch, n k]
};

// What a block sorts: pairs of one tile whose key is in one range.
struct SortBlock {
  int64_t b, tile, first, last, first_key, keys;

  __device__ explicit SortBlock(const PairSort& p, int64_t range) {
    int64_t rest = blockIdx.x / p.ranges;
    tile = rest % p.tiles;
    b = rest / p.tiles;
    first = tile * p.each;
    last = min(first + p.each, p.n * p.k);
    first_key = blockIdx.x % p.ranges * range;
    keys = min(range, p.m - first_key);
  }
  // The key of a pair of this batch element in the range; -1 if there is none.
  __device__ int key_at(const PairSort& p, int64_t at) const {
    const int64_t entry = b * p.n * p.k + at;
    if (is_missing(p.similarities, p.similarity_dtype, p.indices, entry, p.m)) return -1;
    const int64_t key = p.indices[entry] - first_key;
    return key >= 0 && key < keys ? int(key) : -1;
  }
};

template <class Id>
__global__ __launch_bounds__(kThreads) void count_pairs_kernel(const PairSort p) {
  Id* counts = reinterpret_cast<Id*>(shared_memory());  // [keys]
  const SortBlock own(p, kRange<Id>);
  for (int i = int(threadIdx.x); i < own.keys; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int64_t at = own.first + threadIdx.x; at < own.last; at += kThreads) {
    const int key = own.key_at(p, at);
    if (key >= 0) atomicAdd(counts + key, Id(1));
  }
  __syncthreads();
  Id* result = static_cast<Id*>(p.counts) + (own.b * p.tiles + own.tile) * p.m + own.first_key;
  for (int i = int(threadIdx.x); i < own.keys; i += kThreads) result[i] = counts[i];
}

template <class Id>
__global__ __launch_bounds__(kThreads) void place_keys_kernel(const PairSort p) {
  Id* sums = reinterpret_cast<Id*>(shared_memory());  // [kThreads]
  const int64_t b = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks;
  const int64_t key = block * kThreads + threadIdx.x;
  Id total = 0;
  if (key < p.m) {
    Id* counts = static_cast<Id*>(p.counts) + b * p.tiles * p.m + key;
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      const Id count = counts[tile * p.m];
      counts[tile * p.m] = total;
      total += count;
    }
  }
  Id sum = total;
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int span = 1; span < kThreads; span *= 2) {
    if (int(threadIdx.x) >= span) sum += sums[threadIdx.x - span];
    __syncthreads();
    sums[threadIdx.x] = sum;
    __syncthreads();
  }
  if (key < p.m) {
    static_cast<Id*>(p.starts)[b * p.m + key] = sum - total;
    static_cast<Id*>(p.stops)[b * p.m + key] = sum;
  }
  if (threadIdx.x == kThreads - 1) static_cast<Id*>(p.sums)[blockIdx.x] = sum;
}

// The pairs before each block of keys of the range, and then in `next` [keys] where the first pair
// of each key goes. The first tile also writes where the list of a key begins and ends.
template <class Id>
__device__ inline void find_places(const PairSort& p, const SortBlock& own, Id* next) {
  const Id* sums = static_cast<const Id*>(p.sums) + own.b * p.blocks;
  const int64_t first_block = own.first_key / kThreads;
  // Each thread adds up every kThreads-th sum before the range; then all do in one order.
  Id part = 0;
  for (int64_t i = threadIdx.x; i < first_block; i += kThreads) part += sums[i];
  next[threadIdx.x] = part;
  __syncthreads();
  Id before = Id(own.b * p.n * p.k);
  for (int i = 0; i < kThreads; ++i) before += next[i];
  __syncthreads();
  for (int64_t first = 0; first < own.keys; first += kThreads) {
    const int64_t i = first + threadIdx.x, key = own.b * p.m + own.first_key + i;
    if (i < own.keys) {
      const Id begin = before + static_cast<const Id*>(p.starts)[key];
      const int64_t of_tile = (own.b * p.tiles + own.tile) * p.m + own.first_key + i;
      next[i] = begin + static_cast<const Id*>(p.counts)[of_tile];
      if (own.tile == 0) {
        static_cast<Id*>(p.begins)[key] = begin;
        static_cast<Id*>(p.ends)[key] = before + static_cast<const Id*>(p.stops)[key];
      }
    }
    before += sums[first_block + first / kThreads];
  }
  __syncthreads();
}

template <class Id>
__global__ __launch_bounds__(kThreads) void scatter_pairs_kernel(const PairSort p) {
  Id* next = reinterpret_cast<Id*>(shared_memory());  // [max(keys, kThreads)]
  const SortBlock own(p, kRange<Id>);
  find_places(p, own, next);
  Id* pairs = static_cast<Id*>(p.pairs);
  const int64_t i_step = kThreads / p.k, j_step = kThreads % p.k;
  int64_t i = (own.first + threadIdx.x) / p.k, j = (own.first + threadIdx.x) % p.k;
  for (int64_t start = own.first; start < own.last; start += kThreads) {
    const int64_t at = start + threadIdx.x;
    const int key = at < own.last ? own.key_at(p, at) : -1;
    const Id pair = Id(own.b * p.n + i) << p.shift | Id(j);
    Id place = 0;
    for (int turn = 0; turn < kWarps; ++turn) {
      if (warp() == turn) {
        const unsigned lanes = __match_any_sync(kAllLanes, key);
        if (key >= 0) place = next[key] + Id(__popc(lanes & ((1u << lane()) - 1)));
        __syncwarp();
        if (key >= 0 && lane() == __ffs(int(lanes)) - 1) next[key] += Id(__popc(lanes));
      }
      __syncthreads();
    }
    if (key >= 0) pairs[place] = pair;
    i += i_step;
    j += j_step;
    if (j >= p.k) {
      j -= p.k;
      ++i;
    }
  }
}

}  // namespace convnn::cuda
