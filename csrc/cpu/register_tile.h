// SPDX-License-Identifier: MIT
// The register tile of every matrix product on the CPU, and its sizes.
//
//   c[r][j] (+)= sum over t of a[r][t] * b[t][j]        r < kTileRows, j < kTileColumns<A>
//
// The columns are packed so that step t reads one short row of b. The sum over t is taken in a
// fixed order, in registers; lanes are columns. So an element depends only on its row and column,
// not on their position in a tile: equal rows give equal bits.
#pragma once

#include "vector.h"

namespace convnn::CONVNN_ISA {

// kTileRows * kTileVectors accumulators, kTileVectors operands and one broadcast fit into the
// registers: 32 with AVX-512 and on AArch64, 16 otherwise.
constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
template <class A>
constexpr int kTileColumns = kTileVectors * kLanes<A>;

// A thread works on this many tiles of rows at a time, so that a packed panel of columns is read
// from the outer cache once for all of them.
#if defined(__AMX_BF16__)
constexpr int kBlockTiles = 8;  // as many rows as three AMX tiles have
#else
constexpr int kBlockTiles = 4;
#endif
constexpr int kBlockRows = kBlockTiles * kTileRows;

// Steps summed before the sum is added to c. Short sums have small rounding errors, and that part
// of the columns stays in the L1 cache. The similarities of all paths are sums of kSummedSteps.
constexpr int64_t kSummedSteps = 32;
// Of the products of a dense convolution: c is read and written less often.
constexpr int64_t kDenseSummedSteps = 64;

// The rows a[r][t] of a product, with the strides between rows and between steps t.
template <class A>
struct TileRows {
  const A* at;
  int64_t row_stride;
  int64_t step_stride;
};

// A stride for rows of d elements that are read side by side: whole vectors, but not a multiple of
// eight, so that the rows do not map to the same few cache sets.
template <class A>
inline int64_t padded_stride(int64_t d) {
  const int64_t vectors = ceil_div(d, kLanes<A>);
  return (vectors % 8 ? vectors : vectors + 1) * kLanes<A>;
}

// Transposes kLanes rows of d elements, [kLanes, stride] and readable in whole vectors, to columns
// [d, kTileColumns]: element t of row i goes to columns[t][i].
template <class A>
inline void interleave(const A* rows, int64_t stride, int64_t d, A* columns) {
  for (int64_t t = 0; t < d; t += kLanes<A>) {
    Vector<A> block[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) block[i] = load(rows + i * stride + t);
    transpose<A>(block);
    const int64_t steps = min_of(kLanes<A>, d - t);
    for (int64_t j = 0; j < steps; ++j) store(columns + (t + j) * kTileColumns<A>, block[j]);
  }
}

// One tile. b [steps, kTileColumns], c [kTileRows, ldc].
// SquaredDifference: c[r][j] = -sum over t of (a[r][t] - b[t][j])^2 instead of the product.
// Vectors: how many of the columns are computed, in whole vectors.
template <class A, bool SquaredDifference, int Vectors>
inline void multiply_tile(TileRows<A> a, const A* b, int64_t steps, A* c, int64_t ldc,
                          bool accumulate) {
  using V = Vector<A>;
  V sum[kTileRows][Vectors] = {};
  for (int64_t t = 0; t < steps; ++t) {
    V column[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) column[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        if constexpr (SquaredDifference) {
          const V difference = column[v] - a.at[r * a.row_stride];
          sum[r][v] -= difference * difference;
        } else {
          sum[r][v] += column[v] * a.at[r * a.row_stride];
        }
      }
    }
    a.at += a.step_stride;
    b += kTileColumns<A>;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      A* to = c + r * ldc + v * kLanes<A>;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// Multiplies `rows` rows of a, rounded up to whole tiles, by the first `columns` of a panel,
// rounded up to whole vectors. b [depth, kTileColumns], c [rows, ldc]. All rows use a short piece
// of the panel, `Steps`, which stays in the L1 cache, before the next one.
template <class A, bool SquaredDifference = false, int64_t Steps = kSummedSteps,
          int Vectors = kTileVectors>
inline void multiply(TileRows<A> a, int64_t rows, const A* b, int64_t depth, int64_t columns, A* c,
                     int64_t ldc, bool accumulate = false) {
  if constexpr (Vectors > 1) {
    if (columns <= (Vectors - 1) * kLanes<A>) {
      multiply<A, SquaredDifference, Steps, Vectors - 1>(a, rows, b, depth, columns, c, ldc,
                                                         accumulate);
      return;
    }
  }
  int64_t t = 0;
  do {
    const int64_t steps = min_of(Steps, depth - t);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const TileRows<A> tile = {a.at + r * a.row_stride + t * a.step_stride, a.row_stride,
                                a.step_stride};
      multiply_tile<A, SquaredDifference, Vectors>(tile, b + t * kTileColumns<A>, steps,
                                                   c + r * ldc, ldc, accumulate || t > 0);
    }
    t += steps;
  } while (t < depth);
}

}  // namespace convnn::CONVNN_ISA
