// SPDX-License-Identifier: MIT
// Rows of Q in registers, as wgmma() takes its first operand, and their norms.
//
// With g = lane / 4 and t = lane % 4, a warp holds 16 rows of which a lane has rows g and g + 8:
// register r of step s has the columns 16 s + 2 t and 16 s + 2 t + 1 of row g + 8 r, register 2 + r
// those 8 further. So the four lanes of a quad hold two whole rows.
#pragma once

#include "hopper.cuh"

namespace convnn::cuda {

// Over the four lanes of a quad, in each of them.
template <class A, class Combine>
__device__ __forceinline__ A over_quad(A x, const Combine& combine) {
  x = combine(x, __shfl_xor_sync(kAllLanes, x, 1));
  return combine(x, __shfl_xor_sync(kAllLanes, x, 2));
}
template <class A>
__device__ __forceinline__ A quad_sum(A x) {
  return over_quad(x, [](A a, A b) { return a + b; });
}
__device__ __forceinline__ float quad_min(float x) {
  return over_quad(x, [](float a, float b) { return fminf(a, b); });
}
__device__ __forceinline__ float quad_max(float x) {
  return over_quad(x, [](float a, float b) { return fmaxf(a, b); });
}

// Two neighboring elements of a row [d] from an even column on; zero beyond d. kPairs: d is even
// and the row aligned to 4 bytes.
template <bool kPairs, class T>
__device__ __forceinline__ uint32_t load_pair(const T* row, int column, int d) {
  if constexpr (kPairs) {
    return column < d ? __ldg(reinterpret_cast<const uint32_t*>(row + column)) : 0;
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(row) + column;
    const uint32_t low = column < d ? __ldg(bits) : 0;
    const uint32_t high = column + 1 < d ? __ldg(bits + 1) : 0;
    return low | high << 16;
  }
}
// Row r of the two in a; null: zeros.
template <bool kPairs, class T, int kSteps>
__device__ __forceinline__ void load_row(uint32_t (&a)[kSteps][4], int r, const T* row, int d) {
  const int first = 2 * (lane() % 4);
  if (!row) d = 0;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    a[s][r] = load_pair<kPairs>(row, 16 * s + first, d);
    a[s][2 + r] = load_pair<kPairs>(row, 16 * s + 8 + first, d);
  }
}

template <class T>
__device__ __forceinline__ float low_of_pair(uint32_t pair) {
  return widen(T{uint16_t(pair)});
}
template <class T>
__device__ __forceinline__ float high_of_pair(uint32_t pair) {
  return widen(T{uint16_t(pair >> 16)});
}

// For the cosine, rows of query are scaled to norms near this, and the factors of keys are divided
// by it. So no product of bfloat16 overflows, however large the key, and none loses digits that
// matter: below 1e-12 a row of key counts as zero. The range of float16 is too small to need it.
template <class T>
constexpr float kQueryScale = std::is_same_v<T, Float16> ? 1.0f : 0x1p-20f;

// The power of two that brings the largest element of row r near kQueryScale.
template <class T, int kSteps>
__device__ __forceinline__ float scale_of_row(const uint32_t (&a)[kSteps][4], int r) {
  if constexpr (std::is_same_v<T, Float16>) return 1;
  uint32_t largest = 0;  // bits without the sign, in the upper half
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
    const uint32_t pair = a[i / 2][i % 2 * 2 + r];
    const uint32_t high = pair & 0x7FFF0000u, low = pair << 16 & 0x7FFF0000u;
    largest = high > largest ? high : largest;
    largest = low > largest ? low : largest;
  }
  largest = over_quad(largest, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
  const int exponent = int(largest >> 23) - 127;
  const int least = exponent < -120 ? -120 : exponent;
  // May be subnormal, and is exact all the same.
  return __uint_as_float(uint32_t(127 - (least > 120 ? 120 : least)) << 23) * kQueryScale<T>;
}

// Scales row r and returns kQueryScale / norm of the scaled row: 0 of a row that counts as zero,
// NaN of one that is not finite. Either becomes zeros, so that all its products are equal.
template <class T, int kSteps>
__device__ __forceinline__ float normalize_row(uint32_t (&a)[kSteps][4], int r) {
  const float scale = scale_of_row<T>(a, r);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
    uint32_t& pair = a[i / 2][i % 2 * 2 + r];
    const float low = low_of_pair<T>(pair) * scale, high = high_of_pair<T>(pair) * scale;
    sum += low * low;
    sum += high * high;
    // Exact but for elements that vanish beside the largest.
    if constexpr (std::is_same_v<T, BFloat16>) {
      pair = __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xFFFF0000u);
    }
  }
  const float norm = sqrtf(quad_sum(sum));
  float inverse = norm <= float(kCosineEpsilon) * scale ? 0.0f : kQueryScale<T> / norm;
  if (!(norm < kInfinity<float>)) inverse = kNan<float>;
  if (!(inverse > 0)) {
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) a[i / 2][i % 2 * 2 + r] = 0;
  }
  return inverse;
}

}  // namespace convnn::cuda
