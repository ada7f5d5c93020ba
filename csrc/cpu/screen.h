// SPDX-License-Identifier: MIT
// A screen for select: S~ = Q~ K~^T of rows rounded to a format that the processor multiplies
// faster than float32, and a bound of |S~ - S| for a query row and a panel of keys. A key whose
// screened similarity is below that of a k-th key by more than the bounds of both is no neighbor;
// the others are computed again in float32, in the order of multiply_tile. So the selection is the
// same, bit for bit, as without the screen.
//
// FixedPointScreen: 16-bit integers times a scale, at twice the rate of float32. A rounded row is
// the multiple of a row of integers that is nearest to the row, so it is orthogonal to its rounding
// error, and only the part of q~ that is orthogonal to k~ can have a product with the
// error of k~, and vice versa. With the angle t between the rounded rows (Cauchy-Schwarz):
//
//   |q . k - q~ . k~| = |q~ . (k - k~) + (q - q~) . k~ + (q - q~) . (k - k~)|
//                    <= (||q~|| ||k - k~|| + ||q - q~|| ||k~||) sin t + ||q - q~|| ||k - k~||
//
// plus the rounding of the float32 sums. The angle follows from S~. It is small for neighbors, so
// their similarities are known best.
#pragma once

#include <cmath>

#include "../params.h"
#include "register_tile.h"
#include "wide_rows.h"

namespace convnn::CONVNN_ISA {

// There is no bound for rows with this norm or more, whose products might overflow, or with NaN.
constexpr double kLargestNorm = 0x1p60;

// A sum of d squares in float32, divided by the exact sum, is at least 1 over this. Squares that
// are flushed to 0 do not count if the sum is not tiny.
inline double sum_bound(int64_t d) { return 1 + 0x1p-20 + 0x1p-23 * double(d); }

// x rounded up. The sum covers subnormal results, which are rounded coarsely.
inline float upper_bound(double x) { return float(x * 1.000001) + 0x1p-120f; }

// The bound of the errors of screened similarities: of a query row to some key rows.
struct ScreenError {
  float fixed;    // at any angle
  float angular;  // times the sine of the angle between the rounded rows
  float norms;    // of the query row times the largest of the key rows

  float largest() const { return fixed + angular; }
  bool exists() const { return std::isfinite(largest()); }

  // The bound for screened similarities that are at least this. 2^-18 covers the rounding of the
  // cosine.
  float from(float least) const {
    const float cosine = (least - fixed) / norms;
    if (!(cosine > 0)) return largest();
    const float squared_sine = cosine < 1 ? 1 - cosine * cosine : 0;
    return fixed + angular * std::sqrt(squared_sine + 0x1p-18f);
  }
};

// A row of a strip. Its similarities are finish(load()), where finish() keeps the order.
template <class A>
struct StripRow {
  const A* at;

  Vector<A> load(int64_t column) const { return CONVNN_ISA::load(at + column); }
  Vector<A> finish(Vector<A> x) const { return x; }
  A operator[](int64_t column) const { return at[column]; }
};

// A row of a strip of sums, which are multiplied by scales when they are read. A sum of -inf, which
// is no similarity, may become NaN.
struct ScaledStripRow {
  const float* at;
  const float* column_scales;  // not negative
  float scale;

  Vector<float> load(int64_t column) const {
    return CONVNN_ISA::load(at + column) * CONVNN_ISA::load(column_scales + column);
  }
  Vector<float> finish(Vector<float> x) const { return x * scale; }
  float operator[](int64_t column) const { return at[column] * column_scales[column] * scale; }
};

#if defined(__AVX2__)

struct FixedPointScreen {
  static constexpr int64_t kTileRows = CONVNN_ISA::kTileRows;
  static constexpr bool kHasScales = true;
  using Row = StripRow<float>;
  // A row of what multiply() writes.
  static Row strip_row(const float* sums, const float*, float) { return {sums}; }
  struct Session {
    explicit Session(int64_t) {}
  };

  // Upper bounds for some rows: of ||x||, and of ||x - x~||.
  struct Extent {
    float norm = 0;
    float rounding = 0;

    void include(const Extent& other) {
      norm = other.norm > norm ? other.norm : norm;
      rounding = other.rounding > rounding ? other.rounding : rounding;
    }
  };
  // A rounded row: words of two 16-bit numbers, times a scale.
  struct Rounded {
    Extent extent;
    float scale;
  };

  // The bound for a query row and key rows of these extents and d columns.
  //
  // Each step of the float32 product has an error of at most 2^-24 ||q|| ||k||, or twice that
  // without fused operations; an element takes kSummedSteps and one for each piece of as many. 40
  // more cover the scaling of a screened similarity, the rounding of scales, so that a rounded row
  // is only almost orthogonal to its error, and the rounding of this bound and of what is computed
  // from it. Two sums of d steps in eight or more lanes, from which the scale of x~ follows, make
  // ||x~|| wrong by at most 2^-26 (d + 64) ||x - x~||, which matters for thousands of columns. The
  // last term is for products of scales that are too small to be normal numbers and may be flushed
  // to 0; a sum has up to 2^30 of them.
  static ScreenError error(const Extent& query, const Extent& key, int64_t d) {
    const float norms = query.norm * key.norm;
    const float steps = float(2 * kSummedSteps + d / kSummedSteps + 40);
    const float angular = query.norm * key.rounding + query.rounding * key.norm;
    return {0x1p-24f * steps * norms + query.rounding * key.rounding +
                0x1p-26f * float(d + 64) * angular + 0x1p-94f,
            angular, norms};
  }

  // The norm of a row in units of its scale, so that a sum of products, or a part of one, which is
  // at most the product of two norms, stays below 2^31: rounding adds at most sqrt(d) / 2. A row
  // that has an element above kElement in these units gets this norm, which no element exceeds.
  static float largest_norm(int64_t d) { return 46339 - std::sqrt(float(d)) / 2; }
  static constexpr float kElement = 32766;
  // Below this norm the scale would not be a normal number. All elements are rounded to 0.
  static constexpr float kSmallestNorm = 0x1p-100f;

  // Words of a row of d elements.
  static int64_t words(int64_t d) { return ceil_div(d, 2); }

  // Rounds row [d], padded with zeros to whole vectors, to words [words(d)], also up to whole
  // vectors.
  template <class T>
  static Rounded round(const T*, const float* row, int64_t d, Metric, double, uint32_t* words) {
    const double above = sum_bound(d);
    Vector<float> sum = {};
    for (int64_t i = 0; i < d; i += kLanes<float>) sum += load(row + i) * load(row + i);
    const float squares = sum_of_lanes(sum);
    const double norm = std::sqrt(squares < 0x1p-90f ? dot(row, row, d) : squares * above);
    if (!(norm < kLargestNorm)) return {{std::numeric_limits<float>::infinity(), 0}, 0};
    const float bound = upper_bound(norm);
    float scale = bound >= kSmallestNorm ? bound / largest_norm(d) : 0;
    Sums sums = fixed_point(row, d, scale > 0 ? 1 / scale : 0, words);
    if (sums.may_exceed(kElement)) {
      scale = bound / kElement;
      sums = fixed_point(row, d, 1 / scale, words);
    }
    // In units of the scale, x is off by at most 2^-24 of itself and as much for the inverse; a row
    // has less than 2^16 units.
    const double rounding = std::sqrt(sum_of_lanes(sums.squared_errors) * above) + 0x1p-7;
    const float square = sum_of_lanes(sums.squares);
    const float nearest = square > 0 ? scale + scale * (sum_of_lanes(sums.products) / square) : 0;
    return {{bound, scale > 0 ? upper_bound(rounding * scale) : bound}, nearest};
  }

  // Sums over the elements of a row times 1 / scale: of the squares of the integers that they are
  // rounded to, of the squares of the errors, and of the products of integers and errors.
  struct Sums {
    Vector<float> squares = {}, squared_errors = {}, products = {};

    // False if no integer exceeds `largest`.
    bool may_exceed(float largest) const {
      return lane_bits(Vector<float>(squares > largest * largest)) != 0;
    }
  };

  static Sums fixed_point(const float* row, int64_t d, float inverse, uint32_t* words) {
    typedef int16_t Fixed __attribute__((vector_size(kVectorBytes / 2)));
    typedef int32_t Whole __attribute__((vector_size(kVectorBytes)));
    // Adding this to a number below 2^22 leaves that number, rounded to nearest, in the last bits.
    constexpr float kShift = 0x1.8p23f;
    Sums sums;
    for (int64_t i = 0; i < d; i += kLanes<float>) {
      const Vector<float> x = load(row + i) * inverse;
      const Vector<float> shifted = x + kShift;
      const Vector<float> integer = shifted - kShift, error = x - integer;
      sums.squares += integer * integer;
      sums.squared_errors += error * error;
      sums.products += error * integer;
      Whole whole;
      std::memcpy(&whole, &shifted, sizeof whole);
      const Fixed fixed = __builtin_convertvector(whole - int32_t(bits_of(kShift)), Fixed);
      std::memcpy(words + i / 2, &fixed, sizeof fixed);
    }
    return sums;
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

// Elements t ... t + 3 of kLanes rows, with lanes for rows. Rows are loaded four elements at a time
// and transposed within 128 bits, which takes half as many shuffles as a transpose of whole rows.
inline void load_columns(const float* const* rows, int64_t t, Vector<float> (&columns)[4]) {
#if defined(__AVX512F__)
  const auto load_rows = [&](int i) {
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + t));
    x = _mm512_maskz_insertf32x4(0xffff, x, _mm_loadu_ps(rows[i + 4] + t), 1);
    x = _mm512_maskz_insertf32x4(0xffff, x, _mm_loadu_ps(rows[i + 8] + t), 2);
    return _mm512_maskz_insertf32x4(0xffff, x, _mm_loadu_ps(rows[i + 12] + t), 3);
  };
  const auto low = [](__m512 x, __m512 y) { return _mm512_maskz_unpacklo_ps(0xffff, x, y); };
  const auto high = [](__m512 x, __m512 y) { return _mm512_maskz_unpackhi_ps(0xffff, x, y); };
  const auto lows = [](__m512 x, __m512 y) { return _mm512_maskz_shuffle_ps(0xffff, x, y, 0x44); };
  const auto highs = [](__m512 x, __m512 y) { return _mm512_maskz_shuffle_ps(0xffff, x, y, 0xee); };
#else
  const auto load_rows = [&](int i) {
    const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps(rows[i] + t));
    return _mm256_insertf128_ps(x, _mm_loadu_ps(rows[i + 4] + t), 1);
  };
  const auto low = [](__m256 x, __m256 y) { return _mm256_unpacklo_ps(x, y); };
  const auto high = [](__m256 x, __m256 y) { return _mm256_unpackhi_ps(x, y); };
  const auto lows = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0x44); };
  const auto highs = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0xee); };
#endif
  const auto x0 = load_rows(0), x1 = load_rows(1), x2 = load_rows(2), x3 = load_rows(3);
  const auto low01 = low(x0, x1), low23 = low(x2, x3);
  const auto high01 = high(x0, x1), high23 = high(x2, x3);
  columns[0] = Vector<float>(lows(low01, low23));
  columns[1] = Vector<float>(highs(low01, low23));
  columns[2] = Vector<float>(lows(high01, high23));
  columns[3] = Vector<float>(highs(high01, high23));
}

// Transposes kLanes rows [kLanes, stride], readable in whole vectors, to columns [d, kLanes].
inline void to_lanes(const float* rows, int64_t stride, int64_t d, float* columns) {
  const float* row[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) row[i] = rows + i * stride;
  for (int64_t t = 0; t < d; t += 4) {
    Vector<float> column[4];
    load_columns(row, t, column);
    for (int64_t j = 0; j < min_of(4, d - t); ++j)
      store(columns + (t + j) * kLanes<float>, column[j]);
  }
}

// The products of kLanes pairs, as multiply_tile computes each of them. queries [d, kLanes];
// numbers [kLanes]: which of them; keys [kLanes]: rows [d], readable in whole vectors.
inline Vector<float> products(const float* queries, const int32_t* numbers,
                              const float* const* keys, int64_t d) {
  static_assert(kSummedSteps % 4 == 0);
  typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));
  Lanes lanes;
  std::memcpy(&lanes, numbers, sizeof lanes);
  const auto query = [&](int64_t t) {
    const Vector<float> all = load(queries + t * kLanes<float>);
#if defined(__AVX512F__)
    return Vector<float>(_mm512_maskz_permutexvar_ps(0xffff, __m512i(lanes), all));
#else
    return Vector<float>(_mm256_permutevar8x32_ps(all, __m256i(lanes)));
#endif
  };
  Vector<float> total = {};
  int64_t t = 0;
  do {
    Vector<float> sum = {}, key[4];
    const int64_t first = t, stop = min_of(t + kSummedSteps, d);
    for (; t + 4 <= stop; t += 4) {
      load_columns(keys, t, key);
      for (int64_t j = 0; j < 4; ++j) sum += key[j] * query(t + j);
    }
    if (t < stop) {
      load_columns(keys, t, key);
      for (int64_t j = 0; t < stop; ++j, ++t) sum += key[j] * query(t);
    }
    total = first == 0 ? sum : total + sum;
  } while (t < d);
  return total;
}

#endif

}  // namespace convnn::CONVNN_ISA
