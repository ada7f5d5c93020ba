// SPDX-License-Identifier: MIT
// The hits of every query: the columns of S = Q K^T (Eq. 3) that may be among its k nearest. What a
// sweep reads and writes; hopper_sweep.cuh and mma_sweep.cuh compute it.
//
// s = rn(a inv_q) with a = rd(acc inv_k): acc is the product of 16-bit rows summed in float32, and
// rd rounds down. Then the sign of fma(acc, inv_k, -T) says exactly whether a >= T, and S is never
// stored. T is a lower bound of the k-th largest a of the row:
//
// 1. The sampled sweep over every step-th tile of 128 columns keeps the maxima of 64 groups of
//    columns for each row (32 for few neighbors). The k-th largest of these is T, lowered by a few
//    ulp because different a may give equal s.
// 2. The main sweep over all tiles writes the hits to four lists per row, one of each lane that
//    holds columns of the row. When a list is full, the k nearest of the row stay and T rises to
//    the least a that still enters (hit_lists.cuh).
#pragma once

#include "hopper.cuh"

namespace convnn::cuda {

constexpr int kSweepRows = 256;    // queries of a block
constexpr int kTileColumns = 128;  // columns of a tile of keys
constexpr int kSweepWarps = 8;     // that have queries

// Where column c lies within inv_k: a lane finds its four factors of 16 columns side by side.
inline __host__ __device__ int64_t place_of(int64_t c) {
  return (c & ~int64_t(15)) + c % 8 / 2 * 4 + c / 8 % 2 * 2 + c % 2;
}

// Room for the hits of one row in one of its four lists. Of a sample of a quarter of the tiles
// about 1.1 k are expected in each (k <= 32; for k = 64, of a sample of all of them), so that a
// list is seldom full. Then at most k stay in it, and there is room for at least 20 more. Even, so
// that the finish can read two hits at a time.
inline __host__ __device__ constexpr int hits_per_list(int64_t k) {
  return k <= 10 ? 30 : k <= 16 ? 40 : k <= 32 ? 64 : 128;
}

// The largest step between sampled tiles for which the lists are seldom full.
inline int most_sample_step(int64_t k) { return k <= 16 ? 4 : k <= 32 ? 3 : k <= 48 ? 2 : 1; }

// A launch takes `blocks` blocks of 256 queries; block b of all, counted from first_block, has the
// batch element b / ceil(n / 256) and its rows from b % ceil(n / 256) * 256 on. Row r of the launch
// is row r % 256 of its block r / 256; rows beyond n of a batch element have no hits.
struct SweepParams {
  const void* query;          // [batch, n, d] Float16 or BFloat16
  const float* inv_k;         // [batch, m_padded] in the order of place_of(); dot: 1; a column that
                              // may not be a neighbor: -0.0f, a key that counts as zero: +0.0f
  const float* inv_k_sample;  // [batch, m_padded] the same, but NaN instead of -0.0f
  float* inv_q;               // [batch, n] written: the factor of a row: s = rn(a * inv_q); dot: 1
  uint64_t* hits;             // [splits, blocks * 256, 4, hits_per_list(k)]; entry i of list t of a
                              // row at [t][i]: bits of a = rd(acc * inv_k) << 32 | column
  uint8_t* counts;            // [splits, blocks * 256, 4] entries of each list
  int64_t n, d, m_padded;     // m_padded = 128 * tiles
  int64_t first_block;
  int blocks;
  int tiles;   // of 128 columns
  int splits;  // 1..tiles; split s has the tiles from s * tiles / splits on; at most 32767 each
  int step;    // every step-th tile of a split is sampled
  int k;       // 1..64
  int list;    // hits_per_list(k)
  bool cosine;
  bool pairs;  // d is even and query aligned to 4 bytes
};

// What a block works on at a time.
struct SweepItem {
  int number;
  int block, split;  // of the launch
  int64_t batch, first_row;
  int first_tile, tiles;
};
__device__ inline SweepItem sweep_item(const SweepParams& p, int item) {
  const int block = item / p.splits, split = item % p.splits;
  const int64_t blocks_each = (p.n + kSweepRows - 1) / kSweepRows, b = p.first_block + block;
  const int first = int(int64_t(p.tiles) * split / p.splits);
  const int end = int(int64_t(p.tiles) * (split + 1) / p.splits);
  return {item, block, split, b / blocks_each, b % blocks_each * kSweepRows, first, end - first};
}

}  // namespace convnn::cuda
