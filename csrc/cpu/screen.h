// SPDX-License-Identifier: MIT
// A screen for select: S~ = Q~ K~^T of rows rounded to a format that the processor multiplies
// faster than float32, and a bound of |S~ - S| for a query row and a panel of keys:
//
//   |q . k - q~ . k~| <= ||q|| ||k - k~|| + ||q - q~|| ||k~||        (Cauchy-Schwarz)
//
// plus the rounding of the float32 sums. A key whose screened similarity is below that of a k-th
// key by more than twice the bound is no neighbor; the others are computed again in float32, in the
// order of multiply_tile. So the selection is the same, bit for bit, as without the screen.
//
// FixedPointScreen: 16-bit integers times a scale, at twice the rate of float32.
#pragma once

#include <cmath>

#include "../params.h"
#include "register_tile.h"

namespace convnn::CONVNN_ISA {

// There is no bound for rows with this norm or more, whose products might overflow, or with NaN.
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

constexpr Extent kNoBound = {std::numeric_limits<float>::infinity(), 0};

// A rounded row: words of two 16-bit numbers, times a scale.
struct Rounded {
  Extent extent;
  float scale;
};

// x rounded up. The sum covers subnormal results, which are rounded coarsely.
inline float upper_bound(double x) { return float(x * 1.000001) + 0x1p-120f; }

// The bound for a query row and a key row of these extents and d columns; inf if there is none.
//
// Each of the d additions of the float32 product has an error of at most 2^-24 ||q|| ||k||, and so
// have those of a screen in float32; 2^-22 also covers the scaling of a screened similarity and the
// rounding of this bound and of what is computed from it. The last term is for products of scales
// that are too small to be normal numbers and may be flushed to 0; a sum has up to 2^30 of them.
inline float screening_error(const Extent& query, const Extent& key, int64_t d) {
  const float error = query.norm * key.rounding + query.rounding * (key.norm + key.rounding) +
                      0x1p-22f * float(d + 64) * query.norm * key.norm + 0x1p-94f;
  return std::isfinite(error) ? error : std::numeric_limits<float>::infinity();
}

#if defined(__AVX2__)

struct FixedPointScreen {
  // The norm of a row in units of its scale. Rounding makes no element larger than 2^15 - 1 and
  // adds at most sqrt(d) / 2 to the norm. A sum of products, or a part of one, is at most the
  // product of two norms, so it stays below 2^31 for every d that fits into memory.
  static constexpr float kNorm = 32766;
  // Below this norm the scale would not be a normal number. All elements are rounded to 0.
  static constexpr float kSmallestNorm = 0x1p-100f;

  // Words of a row of d elements.
  static int64_t words(int64_t d) { return ceil_div(d, 2); }

  // Rounds row [d] to words [words(d)].
  static Rounded round(const float* row, int64_t d, uint32_t* words) {
    const double norm = std::sqrt(dot(row, row, d));
    if (!(norm < kLargestNorm)) return {kNoBound, 0};
    const float bound = upper_bound(norm);
    const float scale = bound >= kSmallestNorm ? bound / kNorm : 0;
    const float inverse = scale > 0 ? 1 / scale : 0;
    // Adding this to a number below 2^22 leaves that number, rounded to nearest, in the last bits.
    constexpr float kShift = 0x1.8p23f;
    typedef int16_t Fixed __attribute__((may_alias));
    Fixed* fixed = reinterpret_cast<Fixed*>(words);
    for (int64_t i = 0; i < d; ++i) {
      fixed[i] = int16_t(bits_of(row[i] * inverse + kShift) - bits_of(kShift));
    }
    if (d % 2) fixed[d] = 0;
    const double rounding = std::sqrt(sum_of(d, [&](int64_t i) {
      const double error = double(row[i]) - double(scale) * fixed[i];
      return error * error;
    }));
    return {{bound, upper_bound(rounding)}, scale};
  }

  typedef int32_t Sum __attribute__((vector_size(kVectorBytes)));

  // sum + a . b in every lane, of pairs of 16-bit numbers.
  static Sum add_products(Sum sum, Sum a, Sum b) {
#if defined(__AVX512VNNI__)
    return Sum(_mm512_dpwssd_epi32(__m512i(sum), __m512i(a), __m512i(b)));
#elif defined(__AVX512F__)
    return sum + Sum(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#else
    return sum + Sum(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#endif
  }

  // c[r][j] = row_scales[r] column_scales[j] times the sum over t of a[r][t] . b[t][j], for `rows`
  // rows, rounded up to whole tiles, and the first `columns` of a panel, rounded up to whole
  // vectors. a [rows, stride], b [count, kTileColumns<float>] words, c [rows, ldc].
  template <int Vectors = kTileVectors>
  static void multiply(const uint32_t* a, int64_t stride, const float* row_scales, int64_t rows,
                       const uint32_t* b, int64_t count, const float* column_scales,
                       int64_t columns, float* c, int64_t ldc) {
    if constexpr (Vectors > 1) {
      if (columns <= (Vectors - 1) * kLanes<float>) {
        multiply<Vectors - 1>(a, stride, row_scales, rows, b, count, column_scales, columns, c,
                              ldc);
        return;
      }
    }
    for (int64_t first = 0; first < rows; first += kTileRows) {
      Sum sum[kTileRows][Vectors] = {};
      const uint32_t* tile = a + first * stride;
      for (int64_t t = 0; t < count; ++t) {
        Sum column[Vectors];
        for (int v = 0; v < Vectors; ++v) {
          std::memcpy(&column[v], b + t * kTileColumns<float> + v * kLanes<float>, kVectorBytes);
        }
        for (int r = 0; r < kTileRows; ++r) {
          const Sum row = Sum{} + int32_t(tile[r * stride + t]);
          for (int v = 0; v < Vectors; ++v) sum[r][v] = add_products(sum[r][v], row, column[v]);
        }
      }
      for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < Vectors; ++v) {
          const Vector<float> scale =
              load(column_scales + v * kLanes<float>) * row_scales[first + r];
          store(c + (first + r) * ldc + v * kLanes<float>,
                __builtin_convertvector(sum[r][v], Vector<float>) * scale);
        }
      }
    }
  }
};

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
