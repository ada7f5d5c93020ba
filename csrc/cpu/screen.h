// SPDX-License-Identifier: MIT
// A screen for select: S~ = Q~ K~^T of rows rounded to fixed point, whole numbers of 16 bits times
// a scale, which processors multiply at twice the rate of float32, and a bound of |S~ - S| for a
// query row and a panel of keys:
//
//   |q . k - q~ . k~| <= ||q|| ||k - k~|| + ||q - q~|| ||k~||        (Cauchy-Schwarz)
//
// and what the float32 sums lose. A key whose screened similarity lies further than twice the bound
// below that of a k-th key is no neighbor; the others are computed again in float32, in the order
// of multiply_tile. So what is selected is the same, bit for bit, with and without.
#pragma once

#include <cmath>

#include "tile.h"

namespace convnn::CONVNN_ISA {

#if defined(__AVX2__)
template <class A>
constexpr bool kScreens = std::is_same_v<A, float>;
#else
template <class A>
constexpr bool kScreens = false;
#endif

// The norm of a row, in units of its scale. Rounding makes no element larger than 2^15 - 1, and a
// sum of products, or a part of one, stays below 2^31: it is at most the product of the norms.
constexpr float kFixedNorm = 32766;

// From this norm on, and for NaN, there is no bound: products might overflow.
constexpr double kLargestNorm = 0x1p60;
// Below this one the scale would not be a normal number. All elements are rounded to 0.
constexpr float kSmallestNorm = 0x1p-100f;

// Upper bounds for some rows: of ||x||, and of ||x - x~||.
struct Extent {
  float norm = 0;
  float rounding = 0;

  void include(const Extent& other) {
    norm = other.norm > norm ? other.norm : norm;
    rounding = other.rounding > rounding ? other.rounding : rounding;
  }
};

// Rounded up, also where the result is subnormal, whose rounding is coarse.
inline float upper_bound(double x) { return float(x * 1.000001) + 0x1p-120f; }

// An upper bound of ||x||, x [d]; inf where it is too large for a screen, or NaN.
inline float norm_of(const float* x, int64_t d) {
  const double norm = std::sqrt(dot(x, x, d));
  return norm < kLargestNorm ? upper_bound(norm) : std::numeric_limits<float>::infinity();
}

// The scale for rows of at most this norm.
inline float scale_of(float norm) {
  return norm >= kSmallestNorm && std::isfinite(norm) ? norm / kFixedNorm : 0;
}

// x [d], with `norm` from norm_of, to fixed point. Returns an upper bound of ||x - scale fixed||.
inline float round_row(const float* x, int64_t d, float scale, int16_t* fixed) {
  const float inverse = scale > 0 ? 1 / scale : 0;
  // Added to a number below 2^22, leaves it in the last bits, rounded to nearest.
  constexpr float kShift = 0x1.8p23f;
  for (int64_t i = 0; i < d; ++i) {
    fixed[i] = int16_t(bits_of(x[i] * inverse + kShift) - bits_of(kShift));
  }
  return upper_bound(std::sqrt(sum_of(d, [&](int64_t i) {
    const double error = double(x[i]) - double(scale) * fixed[i];
    return error * error;
  })));
}

// The bound for a query row and a key row of these extents and d columns; inf where there is none.
//
// Each of the d sums of the float32 product is off by at most 2^-24 of ||q|| ||k||; 2^-22 also
// covers three roundings of a screened similarity and those of this bound and of what is computed
// with it. The last term is for products that are too small to be normal numbers.
inline float screening_error(const Extent& query, const Extent& key, int64_t d) {
  const float error = query.norm * key.rounding + query.rounding * (key.norm + key.rounding) +
                      0x1p-22f * float(d + 64) * query.norm * key.norm + 0x1p-100f;
  return std::isfinite(error) ? error : std::numeric_limits<float>::infinity();
}

#if defined(__AVX2__)

typedef int32_t FixedVector __attribute__((vector_size(kVectorBytes)));

// sum + a . b in every lane, of pairs of 16 bits.
inline FixedVector add_products(FixedVector sum, FixedVector a, FixedVector b) {
#if defined(__AVX512VNNI__)
  return FixedVector(_mm512_dpwssd_epi32(__m512i(sum), __m512i(a), __m512i(b)));
#elif defined(__AVX512F__)
  return sum + FixedVector(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#else
  return sum + FixedVector(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#endif
}

// c[r][j] = row_scales[r] column_scales[v] times the sum over t of a[r][t] . b[t][j], pairs of 16
// bits, for `rows` rows, rounded up to whole tiles, and the first `columns` of a panel; v is the
// vector that has column j. a [rows, stride], b [pairs, kTileColumns<float>], c [rows, ldc],
// row_scales [rows], column_scales [kTileVectors].
template <int Vectors = kTileVectors>
inline void multiply_pairs(const uint32_t* a, int64_t stride, const float* row_scales, int64_t rows,
                           const uint32_t* b, int64_t pairs, const float* column_scales,
                           int64_t columns, float* c, int64_t ldc) {
  if constexpr (Vectors > 1) {
    if (columns <= (Vectors - 1) * kLanes<float>) {
      multiply_pairs<Vectors - 1>(a, stride, row_scales, rows, b, pairs, column_scales, columns, c,
                                  ldc);
      return;
    }
  }
  for (int64_t first = 0; first < rows; first += kTileRows) {
    FixedVector sum[kTileRows][Vectors] = {};
    const uint32_t* tile = a + first * stride;
    for (int64_t t = 0; t < pairs; ++t) {
      FixedVector column[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        std::memcpy(&column[v], b + t * kTileColumns<float> + v * kLanes<float>, kVectorBytes);
      }
      for (int r = 0; r < kTileRows; ++r) {
        const FixedVector row = FixedVector{} + int32_t(tile[r * stride + t]);
        for (int v = 0; v < Vectors; ++v) sum[r][v] = add_products(sum[r][v], row, column[v]);
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < Vectors; ++v) {
        const Vector<float> whole = __builtin_convertvector(sum[r][v], Vector<float>);
        store(c + (first + r) * ldc + v * kLanes<float>,
              whole * (row_scales[first + r] * column_scales[v]));
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
