// SPDX-License-Identifier: MIT
// A screen for select: S~ = Q~ K~^T of rows rounded to bfloat16, which some processors multiply at
// twice the rate of float32, and a bound of |S~ - S| for a query row and a panel of keys:
//
//   |q . k - q~ . k~| <= ||q|| ||k - k~|| + ||q - q~|| ||k~||        (Cauchy-Schwarz)
//
// and what the sums of both products lose. A key whose screened similarity lies further than twice
// the bound below that of a k-th key is no neighbor; the others are computed again in float32, in
// the order of multiply_tile. So what is selected is the same, bit for bit, with and without.
#pragma once

#include <cmath>

#include "tile.h"

namespace convnn::CONVNN_ISA {

#if defined(__AVX512BF16__)
template <class A>
constexpr bool kScreens = std::is_same_v<A, float>;
#else
template <class A>
constexpr bool kScreens = false;
#endif

// From this norm on, and for NaN, there is no bound: products might overflow.
constexpr double kLargestNorm = 0x1p60;

// Upper bounds for some rows: of ||x||, and of ||x - x~||.
struct Extent {
  float norm = 0;
  float rounding = 0;

  void include(const Extent& other) {
    norm = other.norm > norm ? other.norm : norm;
    rounding = other.rounding > rounding ? other.rounding : rounding;
  }
};

// x [d] rounded to bfloat16, subnormal numbers to 0, as the product takes them.
inline Extent round_row(const float* x, int64_t d, bfloat16* rounded) {
  for (int64_t i = 0; i < d; ++i) {
    const uint32_t bits = bits_of(x[i]);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded[i].bits = uint16_t(nearest & 0x7f80 ? nearest : 0);
  }
  const double norm = std::sqrt(dot(x, x, d));
  if (!(norm < kLargestNorm)) return {std::numeric_limits<float>::infinity(), 0};
  const double rounding = std::sqrt(sum_of(d, [&](int64_t i) {
    const double error = double(x[i]) - double(widen(rounded[i]));
    return error * error;
  }));
  // Rounded up; the second term also where the result is subnormal, whose rounding is coarse.
  return {float(norm * 1.000001) + 0x1p-120f, float(rounding * 1.000001) + 0x1p-120f};
}

// The bound for a query row and a key row of these extents and d columns; inf where there is none.
//
// Each of the d sums in a product is off by at most 2^-24 of ||q|| ||k||, or half as many in
// float32; 2^-22 also covers the rounding of this bound and of what is computed with it. The last
// term is for products that are too small to be normal numbers.
inline float screening_error(const Extent& query, const Extent& key, int64_t d) {
  const float error = query.norm * key.rounding + query.rounding * (key.norm + key.rounding) +
                      0x1p-22f * float(d + 64) * query.norm * key.norm + 0x1p-100f;
  return std::isfinite(error) ? error : std::numeric_limits<float>::infinity();
}

#if defined(__AVX512BF16__)

// c[r][j] = sum over t of a[r][t] . b[t][j], pairs of bfloat16, for `rows` rows, rounded up to
// whole tiles, and the first `columns` of a panel. a [rows, stride], b [pairs,
// kTileColumns<float>], c [rows, ldc].
template <int Vectors = kTileVectors>
inline void multiply_pairs(const uint32_t* a, int64_t stride, int64_t rows, const uint32_t* b,
                           int64_t pairs, int64_t columns, float* c, int64_t ldc) {
  if constexpr (Vectors > 1) {
    if (columns <= (Vectors - 1) * kLanes<float>) {
      multiply_pairs<Vectors - 1>(a, stride, rows, b, pairs, columns, c, ldc);
      return;
    }
  }
  for (int64_t first = 0; first < rows; first += kTileRows) {
    __m512 sum[kTileRows][Vectors] = {};
    const uint32_t* tile = a + first * stride;
    for (int64_t t = 0; t < pairs; ++t) {
      __m512bh column[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        column[v] = __m512bh(_mm512_loadu_si512(b + t * kTileColumns<float> + v * kLanes<float>));
      }
      for (int r = 0; r < kTileRows; ++r) {
        int pair;  // written as bfloat16
        std::memcpy(&pair, tile + r * stride + t, sizeof pair);
        const __m512bh row = __m512bh(_mm512_set1_epi32(pair));
        for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, column[v]);
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < Vectors; ++v) {
        _mm512_storeu_ps(c + (first + r) * ldc + v * kLanes<float>, sum[r][v]);
      }
    }
  }
}

#endif

// The products of a query row with kLanes key rows, as multiply_tile computes each of them.
// query [d], keys: kLanes rows of d elements. Whole vectors of all rows can be read.
inline Vector<float> products(const float* query, const float* const* keys, int64_t d) {
  constexpr int64_t kSteps = kLanes<float>;
  static_assert(kSummedSteps % kSteps == 0);
  Vector<float> total = {};
  int64_t t = 0;
  do {
    Vector<float> sum = {};
    const int64_t stop = min_of(t + kSummedSteps, d);
    for (; t < stop; t += kSteps) {
      Vector<float> block[kSteps];
      for (int i = 0; i < kSteps; ++i) block[i] = load(keys[i] + t);
      transpose<float>(block);
      const int64_t steps = min_of(kSteps, stop - t);
      if (steps == kSteps) {
        for (int64_t j = 0; j < kSteps; ++j) sum += block[j] * query[t + j];
      } else {
        for (int64_t j = 0; j < steps; ++j) sum += block[j] * query[t + j];
      }
    }
    total = t <= kSummedSteps ? sum : total + sum;
  } while (t < d);
  return total;
}

}  // namespace convnn::CONVNN_ISA
