// SPDX-License-Identifier: MIT
// The keys K as a sweep (sweep.cuh) reads them, and the factors 1 / ||k_j|| of the cosine (section
// 4.1).
//
// A column of S is a row of key, or a candidate in ascending order. The sweep reads rows of key as
// they are where it can: where they are aligned, and all of them are columns. Otherwise they are
// copied to rows of 64 or 128 elements, zeros beyond d, for whole tiles of 128 columns. Rows of any
// finite norm may stay as they are, because those of query are scaled (kQueryScale).
//
// A block prepares a tile, a warp 32 columns of it: 8 lanes read one row, and each of them then has
// the sum of squares of a row of its own. Nothing is kept on chip but the rows, in registers.
#pragma once

#include "query_rows.cuh"
#include "sweep.cuh"

namespace convnn::cuda {

template <class T>
struct KeysWork {
  const T* key;         // [batch, m, d]
  const int64_t* rows;  // [columns] rows of key, m or more where there is none; null: the column
  const uint8_t* key_mask;  // [batch, m] or null
  T* copy;                  // [batch, m_padded, 64 or 128], or null: not needed
  float* inverse;           // [batch, m_padded] as inv_k of SweepParams
  float* inverse_sample;    // [batch, m_padded] as inv_k_sample of SweepParams, or null: the same
  int m, columns, tiles, d;
  bool cosine;
  bool vectors;  // d is a multiple of 8, and key is aligned to 16 bytes; true without a copy

  // The row of key in a column, or -1: none
  __device__ int key_row(int column) const {
    if (column >= columns) return -1;
    const int row = rows ? int(rows[column]) : column;
    return row < m ? row : -1;
  }
};

// Part of a row that 8 lanes share, of columns `first` to first + 7, in pairs; zeros beyond d. row
// [d], or null: zeros
template <class T>
__device__ __forceinline__ void load_eight(uint32_t (&pairs)[4], const T* row, int first, int d,
                                           bool vectors) {
#pragma unroll
  for (uint32_t& pair : pairs) pair = 0;
  if (!row) return;
  if (vectors) {
    if (first < d) copy16(pairs, row + first);
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (first + e < d) pairs[e / 2] |= uint32_t(row[first + e].bits) << (e % 2 * 16);
  }
}

constexpr int kRowsOfWarp = 32, kRowsAtOnce = 4, kTurns = kRowsOfWarp / kRowsAtOnce;
static_assert(kTurns == kWarp / kRowsAtOnce);

// Copies the columns from `column` on to copy [kRowsOfWarp, kD], each lane what sum_squares() lets
// it read. keys [m, d]
template <class T, int kD>
__device__ __forceinline__ void copy_rows(const KeysWork<T>& w, const T* keys, int column,
                                          T* copy) {
#pragma unroll 1
  for (int i = 0; i < kRowsOfWarp; i += kRowsAtOnce) {
    const int at = i + lane() / 8, row = w.key_row(column + at);
#pragma unroll
    for (int first = lane() % 8 * 8; first < kD; first += 64) {
      alignas(16) uint32_t pairs[4];
      load_eight(pairs, row < 0 ? nullptr : keys + int64_t(row) * w.d, first, w.d, w.vectors);
      copy16(copy + at * kD + first, pairs);
    }
  }
}

// The row of which a lane gets the sum.
__device__ __forceinline__ int row_of_lane() { return lane() % 8 * kRowsAtOnce + lane() / 8; }

// The sum of squares of scale * x over row row_of_lane() of rows [count, d] at the given distance,
// all aligned to 16 bytes; of no more than 32 of them. 0 where there is none.
template <class T, int kD>
__device__ __forceinline__ float sum_squares(const T* rows, int64_t distance, int count, int d,
                                             float scale) {
  float sums[kTurns];
  const T* row = rows + lane() / 8 * distance;
#pragma unroll
  for (int i = 0; i < kTurns; ++i, row += kRowsAtOnce * distance) {
    sums[i] = 0;
#pragma unroll
    for (int part = 0; part < kD / 64; ++part) {
      const int first = 64 * part + lane() % 8 * 8;
      alignas(16) uint32_t pairs[4] = {};
      if (i * kRowsAtOnce + lane() / 8 < count && first < d) copy16(pairs, row + first);
#pragma unroll
      for (const uint32_t pair : pairs) {
        const float low = low_of_pair<T>(pair) * scale, high = high_of_pair<T>(pair) * scale;
        sums[i] = fmaf(high, high, fmaf(low, low, sums[i]));
      }
    }
  }
  // Each exchange halves the sums that a lane has; all sums are added in the same order.
#pragma unroll
  for (int half = kTurns / 2; half > 0; half /= 2) {
    const bool upper = (lane() & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float own = upper ? sums[i + half] : sums[i], other = upper ? sums[i] : sums[i + half];
      sums[i] = own + __shfl_xor_sync(kAllLanes, other, half);
    }
  }
  return sums[0];
}

// 1 / the norm of row row_of_lane(), over kQueryScale: 0 of a row that counts as zero, NaN of one
// that is not finite. The arguments are those of sum_squares().
template <class T, int kD>
__device__ __forceinline__ float inverse_norm(const T* rows, int64_t distance, int count, int d) {
  float sum = sum_squares<T, kD>(rows, distance, count, d, 1);
  float numerator = 1 / kQueryScale<T>;
  if constexpr (!std::is_same_v<T, Float16>) {
    // Squares overflow beyond 2^64; rows below that have a sum that is exact enough.
    const bool huge = !(sum < 0x1p126f);
    if (__any_sync(kAllLanes, huge)) {
      constexpr float kScale = 0x1p-72f;
      const float scaled = sum_squares<T, kD>(rows, distance, count, d, kScale);
      sum = huge ? scaled : sum;
      numerator = huge ? numerator * kScale : numerator;
    }
  }
  // The norm of a huge row is far above epsilon even if scaled.
  const float norm = sqrtf(sum);
  if (norm <= float(kCosineEpsilon)) return 0;
  return norm == kInfinity<float> ? kNan<float> : numerator / norm;
}

template <class T, int kD>
__global__ __launch_bounds__(kThreads) void hopper_keys_kernel(const KeysWork<T> w) {
  static_assert(kThreads / kWarp * kRowsOfWarp == kTileColumns);
  const int batch = int(blockIdx.x / unsigned(w.tiles));
  const int tile = int(blockIdx.x % unsigned(w.tiles));
  const int column = tile * kTileColumns + int(threadIdx.x) / kWarp * kRowsOfWarp;
  const T* keys = w.key + int64_t(batch) * w.m * w.d;
  const int64_t first = int64_t(batch) * w.tiles * kTileColumns;
  T* copy = w.copy ? w.copy + (first + column) * kD : nullptr;
  if (copy) copy_rows<T, kD>(w, keys, column, copy);
  float factor = 1;
  if (w.cosine) {
    factor = copy ? inverse_norm<T, kD>(copy, kD, kRowsOfWarp, kD)
                  : inverse_norm<T, kD>(keys + int64_t(column) * w.d, w.d, w.m - column, w.d);
  }
  const int own = column + row_of_lane(), row = w.key_row(own);
  const bool allowed = row >= 0 && (!w.key_mask || w.key_mask[int64_t(batch) * w.m + row]);
  const int64_t place = first + place_of(own);
  w.inverse[place] = allowed ? factor : -0.0f;
  if (w.inverse_sample) w.inverse_sample[place] = allowed ? factor : kNan<float>;
}

}  // namespace convnn::cuda
