// SPDX-License-Identifier: MIT
// The matrix tile of every product on the device: C [64, 64] += A [64, depth] B [64, depth]^T.
//
// A block of four warps computes C. Warp w has 16 rows from row 16 w on, all columns, in the
// registers of the matrix instruction: with g = lane / 4 and t = lane % 4, a lane's value
// [n][2 h + e] belongs to row 16 w + g + 8 h and column 8 n + 2 t + e. Operands go through shared
// memory, kDepth columns at a time; both are read row by row. An element depends only on its row of
// A and its row of B, summed in one order: equal rows give equal bits.
//
// float16 and bfloat16: exact products, summed in float32. float64, and differences for the
// euclidean metric: ordinary arithmetic in the same layout.
//
// float32: a number is split into three bfloat16, truncated and not rounded, so that all have its
// sign: x = x0 + x1 + x2. Of the nine products of two numbers, the x_i y_j with i + j <= 2 are
// summed. What is omitted is less than 8.1 * 2^-24 of a product (more for numbers below 2^-126),
// and nothing if the product is a float32: x1 y2 is 0 unless x has at least 9 significant bits and
// y 17, and (2^8 + 1) (2^16 + 1) > 2^24. No sum of pieces exceeds the sum of all |x y|, so a sum of
// integers is exact if that is at most 2^24.
#pragma once

#include "device.cuh"

namespace convnn::cuda {

constexpr int kTile = 64;
constexpr int kDepth = 32;
// Tiles of the matrix instruction, of 8 columns each, in a row of C.
constexpr int kTileColumns = kTile / 8;

// Elements of a row in shared memory. The padding keeps the lanes of a warp in different banks.
template <class T>
constexpr int kTileStride = kDepth + (sizeof(T) == 2 ? 8 : 4);
template <class T>
constexpr int kTileElements = kTile * kTileStride<T>;

// The elements of C that a thread holds.
template <class A>
struct TileValues {
  A value[kTileColumns][4] = {};
};
__device__ inline int tile_row(int h) { return 16 * warp() + lane() / 4 + 8 * h; }
__device__ inline int tile_column(int n, int e) { return 8 * n + lane() % 4 * 2 + e; }

// Each thread fills half of the row threadIdx.x / 2 of tile [kTile, kTileStride] with columns
// `begin` to begin + kDepth of row [columns]; zeros beyond its end and if row is null.
template <class T, class U>
__device__ inline void load_tile(U* tile, const T* row, int64_t begin, int64_t columns) {
  constexpr int kHalf = kDepth / 2;
  const int half = int(threadIdx.x) % 2 * kHalf;
  U* target = tile + int(threadIdx.x) / 2 * kTileStride<U> + half;
  begin += half;
  if constexpr (std::is_same_v<T, U>) {
    if (row && begin + kHalf <= columns && is_aligned16(row + begin)) {
      constexpr int kStep = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < kHalf; i += kStep) copy16(target + i, row + begin + i);
      return;
    }
  }
#pragma unroll 4
  for (int i = 0; i < kHalf; ++i) {
    const T x = row && begin + i < columns ? row[begin + i] : T{};
    if constexpr (std::is_same_v<T, U>) {
      target[i] = x;
    } else {
      target[i] = widen(x);
    }
  }
}

// The row of a tile that this thread loads.
__device__ inline int loaded_row() { return int(threadIdx.x) / 2; }

// Two adjacent 16-bit elements, at an address aligned to both.
template <class T>
__device__ inline uint32_t load_pair(const T* elements) {
  uint32_t pair;
  copy4(&pair, elements);
  return pair;
}

// Two numbers x as x0 + 2^-8 x1 + 2^-16 x2, one register with the piece of both for each i. With
// these factors a piece is within the range of bfloat16 unless x is too small, and less than 2 |x|,
// so it does not overflow. Sums of pieces may be eight times as large as those of |x y|; if they
// overflow, the products are computed again.
struct SplitPair {
  uint32_t piece[3];
  __device__ SplitPair(float x, float y) {
#pragma unroll
    for (uint32_t& both : piece) {
      const uint32_t of_x = __float_as_uint(x) & 0xFFFF0000u;
      const uint32_t of_y = __float_as_uint(y) & 0xFFFF0000u;
      both = of_x >> 16 | of_y;
      x = (x - __uint_as_float(of_x)) * 0x1p8f;
      y = (y - __uint_as_float(of_y)) * 0x1p8f;
    }
  }
};

// C += A B^T over the kDepth columns of a, b [kTile, kTileStride] in shared memory.
template <class T>
__device__ inline void multiply_tile(const T* a, const T* b, TileValues<float>& c) {
  static_assert(sizeof(T) == 2);
  const int g = lane() / 4, t = lane() % 4;
  const T* row = a + (16 * warp() + g) * kTileStride<T> + 2 * t;
#pragma unroll
  for (int d = 0; d < kDepth; d += 16) {
    const uint32_t of_a[4] = {load_pair(row + d), load_pair(row + d + 8 * kTileStride<T>),
                              load_pair(row + d + 8), load_pair(row + d + 8 * kTileStride<T> + 8)};
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
      const T* column = b + (8 * n + g) * kTileStride<T> + 2 * t + d;
      const uint32_t of_b[2] = {load_pair(column), load_pair(column + 8)};
      multiply_accumulate_16<T>(c.value[n], of_a, of_b);
    }
  }
}

// Replaces elements of `sum` that are not finite by the products of 16 columns of a and b without
// the split. Unnecessary if all elements of c, to which they are added, are NaN, as they are after
// rows with NaN.
__device__ inline void multiply_again(const float* a, const float* b, const float (&c)[4],
                                      float (&sum)[4]) {
  bool all_nan = true;
#pragma unroll
  for (int e = 0; e < 4; ++e) all_nan = all_nan && c[e] != c[e];
  if (all_nan) return;
  float plain[4] = {};
#pragma unroll 1
  for (int d = 0; d < 16; ++d) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      plain[e] += a[e / 2 * 8 * kTileStride<float> + d] * b[e % 2 * kTileStride<float> + d];
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (!isfinite(sum[e])) sum[e] = plain[e];
  }
}

__device__ inline void multiply_tile(const float* a, const float* b, TileValues<float>& c) {
  const int g = lane() / 4, t = lane() % 4;
  const float* row = a + (16 * warp() + g) * kTileStride<float>;
#pragma unroll
  for (int d = 0; d < kDepth; d += 16) {
    // A lane may hold any columns as long as a and b agree: these are in different banks.
    const auto split = [&](const float* x, int first) {
      return SplitPair(x[d + t + first], x[d + t + first + 4]);
    };
    const float* next = row + 8 * kTileStride<float>;
    const SplitPair of_a[4] = {split(row, 0), split(next, 0), split(row, 8), split(next, 8)};
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
      const float* column = b + (8 * n + g) * kTileStride<float>;
      const SplitPair of_b[2] = {split(column, 0), split(column, 8)};
      // The instruction truncates its sums, so these are short and combined by rounding additions.
      float sums[3][4] = {};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const uint32_t piece_a[4] = {of_a[0].piece[i], of_a[1].piece[i], of_a[2].piece[i],
                                     of_a[3].piece[i]};
#pragma unroll
        for (int j = 0; i + j < 3; ++j) {
          const uint32_t piece_b[2] = {of_b[0].piece[j], of_b[1].piece[j]};
          multiply_accumulate_16<BFloat16>(sums[i + j], piece_a, piece_b);
        }
      }
      float sum[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum[e] = sums[0][e] + 0x1p-8f * (sums[1][e] + 0x1p-8f * sums[2][e]);
      }
      if (!isfinite(sum[0] + sum[1] + sum[2] + sum[3])) {
        multiply_again(row + d, b + tile_column(n, 0) * kTileStride<float> + d, c.value[n], sum);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) c.value[n][e] += sum[e];
    }
  }
}

// Adds the sum over d < depth <= kDepth of a_d b_d, or of -(a_d - b_d)^2, without the matrix
// instruction. The sum is taken separately and then added to C, so that runs are short.
template <bool kDifferences, class T, class A>
__device__ inline void multiply_tile_without_mma(const T* a, const T* b, int depth,
                                                 TileValues<A>& c) {
  const T* rows = a + tile_row(0) * kTileStride<T>;
  TileValues<A> run;
  // float64 has digits to spare, but no registers for a second tile.
  TileValues<A>& sum = std::is_same_v<A, double> ? c : run;
#pragma unroll 1
  for (int d = 0; d < depth; ++d) {
    const A of_a[2] = {widen(rows[d]), widen(rows[8 * kTileStride<T> + d])};
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const A of_b = widen(b[tile_column(n, e % 2) * kTileStride<T> + d]);
        if constexpr (kDifferences) {
          const A difference = of_a[e / 2] - of_b;
          sum.value[n][e] -= difference * difference;
        } else {
          sum.value[n][e] += of_a[e / 2] * of_b;
        }
      }
    }
  }
  if constexpr (!std::is_same_v<A, double>) {
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c.value[n][e] += sum.value[n][e];
    }
  }
}

__device__ inline void multiply_tile(const double* a, const double* b, TileValues<double>& c) {
  multiply_tile_without_mma<false>(a, b, kDepth, c);
}

// With fewer terms in a sum, what the split of float32 omits would exceed the rounding errors of
// the sum.
constexpr int64_t kFewestSplitTerms = 32;

// C += A B^T over kDepth columns, as part of sums of `terms` terms.
template <class T, class A>
__device__ inline void multiply_tile(const T* a, const T* b, int64_t terms, TileValues<A>& c) {
  if constexpr (std::is_same_v<T, float>) {
    if (terms < kFewestSplitTerms) {
      multiply_tile_without_mma<false>(a, b, kDepth, c);
      return;
    }
  }
  multiply_tile(a, b, c);
}

}  // namespace convnn::cuda
