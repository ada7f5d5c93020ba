// SPDX-License-Identifier: MIT
// The keys K as the sweep on Hopper reads them, and the factors 1 / ||k_j|| of the cosine (section
// 4.1).
//
// A column of S is a row of key, or a candidate in ascending order. Rows are copied to rows of 64
// or 128 elements, zeros beyond d, for whole tiles of 128 columns. For the cosine, rows of bfloat16
// are scaled near 1 by a power of two, which is exact, so that no product and no square of a finite
// row overflows; the range of float16 is too small to need it. Where rows can be read as they are,
// nothing is copied.
//
// A block prepares a tile, 8 lanes one row. Nothing is kept on chip but the row, in registers.
#pragma once

#include "hopper_sweep.cuh"

namespace convnn::cuda {

template <class T>
struct KeysWork {
  const T* key;           // [batch, m, d]
  const int64_t* rows;    // [columns] rows of key, m or more where there is none; null: the column
  const bool* key_mask;   // [batch, m] or null
  T* copy;                // [batch, m_padded, 64 or 128], or null: not needed
  float* inverse;         // [batch, m_padded] as inv_k of SweepParams
  float* inverse_sample;  // [batch, m_padded] as inv_k_sample of SweepParams
  int m, columns, tiles, d;
  bool cosine;
  bool vectors;  // d is a multiple of 8, and key is aligned to 16 bytes

  // The row of key in a column, or -1: none, or it may not be a neighbor. mask [m] or null
  __device__ int key_row(int column, const bool* mask) const {
    if (column >= columns) return -1;
    const int row = rows ? int(rows[column]) : column;
    if (row >= m) return -1;
    return !mask || mask[row] ? row : -1;
  }
};

// A power of two that brings x >= 0 near 1. It and its inverse are finite.
__device__ inline float power_of_2_near_inverse(float x) {
  const int exponent = int(__float_as_uint(x) >> 23);  // and 127; 255 for infinity, 0 near zero
  return __uint_as_float(uint32_t(254 - (exponent < 7     ? 7
                                         : exponent > 247 ? 247
                                                          : exponent))
                         << 23);
}

// A row of keys in the registers of 8 lanes: lane l has elements 64 i + 8 l to 64 i + 8 l + 7.
template <class T, int kD>
struct KeyRow {
  static constexpr int kParts = kD / 64;
  float x[kParts][8];

  // row [d], or null: zeros
  __device__ void load(const T* row, int d, bool vectors) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int first = 64 * i + int(threadIdx.x) % 8 * 8;
      if (vectors) {
        alignas(16) uint32_t pairs[4] = {};
        if (row && first < d) copy16(pairs, row + first);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[i][e] = widen(T{uint16_t(pairs[e / 2] >> (e % 2 * 16))});
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          x[i][e] = row && first + e < d ? widen(row[first + e]) : 0.0f;
        }
      }
    }
  }
  // row [kD]
  __device__ void store(T* row) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      alignas(16) uint32_t pairs[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        T low, high;
        narrow(x[i][2 * e], low);
        narrow(x[i][2 * e + 1], high);
        pairs[e] = uint32_t(high.bits) << 16 | low.bits;
      }
      copy16(row + 64 * i + int(threadIdx.x) % 8 * 8, pairs);
    }
  }
  // Scales the row if T needs it, and returns 1 / its norm: 0 of a row that counts as zero.
  __device__ float normalize() {
    float scale = 1;
    if constexpr (!std::is_same_v<T, Float16>) {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(x[i][e]));
      }
#pragma unroll
      for (int span = 1; span < 8; span *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, span));
      }
      scale = power_of_2_near_inverse(largest);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        x[i][e] *= scale;
        sum += x[i][e] * x[i][e];
      }
    }
#pragma unroll
    for (int span = 1; span < 8; span *= 2) sum += __shfl_xor_sync(kAllLanes, sum, span);
    const float norm = sqrtf(sum);
    if (norm <= float(kCosineEpsilon) * scale) return 0;
    return norm == kInfinity<float> ? kNan<float> : 1 / norm;
  }
};

template <class T, int kD>
__global__ __launch_bounds__(kThreads) void hopper_keys_kernel(const KeysWork<T> w) {
  const int batch = int(blockIdx.x / unsigned(w.tiles));
  int column = int(blockIdx.x % unsigned(w.tiles)) * kTileColumns + int(threadIdx.x) / 8;
  const T* keys = w.key + int64_t(batch) * w.m * w.d;
  const bool* mask = w.key_mask ? w.key_mask + int64_t(batch) * w.m : nullptr;
  // Positions of the column in the results. place_of() of columns 16 apart is 16 apart.
  const int64_t first = int64_t(batch) * w.tiles * kTileColumns;
  T* copy = w.copy ? w.copy + (first + column) * kD : nullptr;
  float* inverse = w.inverse + first + place_of(column);
  float* inverse_sample = w.inverse_sample + first + place_of(column);
  constexpr int kStep = kThreads / 8;
  static_assert(kStep == 16);
#pragma unroll 2
  for (int i = 0; i < kTileColumns; i += kStep) {
    const int row = w.key_row(column + i, mask);
    KeyRow<T, kD> key;
    float factor = 1;
    if (copy || w.cosine) {
      key.load(row < 0 ? nullptr : keys + int64_t(row) * w.d, w.d, w.vectors);
      if (w.cosine) factor = key.normalize();
      if (copy) key.store(copy + i * kD);
    }
    if (threadIdx.x % 8 == 0) {
      inverse[i] = row < 0 ? -0.0f : factor;
      inverse_sample[i] = row < 0 ? kNan<float> : factor;
    }
  }
}

}  // namespace convnn::cuda
