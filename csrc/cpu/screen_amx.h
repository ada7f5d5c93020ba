// SPDX-License-Identifier: MIT
// A screen for select (screen.h) on AMX tiles, which multiply bfloat16 and add in float32.
//
// A row of float32 or float16, normalized for the cosine, is the sum of two rows of bfloat16,
// x = h + l, but for a rounding error, and three products make
//
//   S~ = h_q h_k^T + h_q l_k^T + l_q h_k^T
//
// What is missing, l_q l_k^T and the products with the rounding errors, has a bound
// (Cauchy-Schwarz) that is as small for neighbors as that of the fixed-point screen. A row of
// bfloat16 is used as it is, h = x, and for the cosine the sums are multiplied by the inverse
// norms, but only when they are read: by then, most of a strip has left the L1 cache.
//
// A tile holds 16 rows of 16 words of two numbers, or 16 x 16 sums. One call multiplies a block of
// three tiles of query rows by a panel of keys, one tile of columns at a time: three tiles of sums,
// three of rows, and two of columns, which all rows use.
#pragma once

#include "normalize.h"
#include "screen.h"

#if defined(__AMX_BF16__)

namespace convnn::CONVNN_ISA {

// A compiler barrier, because some compilers do not know which memory the intrinsics access.
inline void settle(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

template <class T>
struct AmxScreen {
  static constexpr int64_t kTileRows = 16;   // also the columns of a tile of sums
  static constexpr int64_t kTileWords = 16;  // of a row of a tile
  static constexpr bool kIsExact = std::is_same_v<T, bfloat16>;  // h is x
  static constexpr bool kHasScales = kIsExact;                   // the inverse norms
  using Row = std::conditional_t<kIsExact, ScaledStripRow, StripRow<float>>;
  static constexpr int kParts = kIsExact ? 1 : 2;
  static constexpr int64_t kPanel = kTileColumns<float>;
  static_assert(kBlockRows == 3 * kTileRows && kPanel % kTileRows == 0);

  // Upper bounds for some rows: of ||x||, ||l|| and ||x - h - l||.
  struct Extent {
    float norm = 0, low = 0, rounding = 0;

    void include(const Extent& other) {
      norm = other.norm > norm ? other.norm : norm;
      low = other.low > low ? other.low : low;
      rounding = other.rounding > rounding ? other.rounding : rounding;
    }
  };
  static constexpr Extent kNoBound = {std::numeric_limits<float>::infinity(), 0, 0};

  struct Rounded {
    Extent extent;
    float scale;  // of x, if it is exact
  };

  // A row takes this many steps, each as many words deep in a tile.
  static int64_t steps(int64_t words) { return ceil_div(words, kTileWords); }
  // Words of h, or of l: those of whole vectors of elements, which round() writes, in whole steps.
  static int64_t words_of_part(int64_t d) {
    const int64_t words = ceil_div(d, kLanes<float>) * kLanes<float> / 2;
    return words == 0 ? 0 : steps(words) * ceil_div(words, steps(words));
  }
  static int64_t words(int64_t d) { return kParts * words_of_part(d); }

  // Rounds x [d] (null for zeros), which times `scale` is row [d] in float32, normalized for the
  // cosine and padded with zeros to whole vectors, to words [words(d)]: h, then l.
  static Rounded round(const T* x, const float* row, int64_t d, Metric metric, double scale,
                       uint32_t* words) {
    std::memset(words, 0, size_t(AmxScreen::words(d)) * sizeof *words);
    if (!x) return {{}, 0};
    if constexpr (kIsExact) {
      return copy(x, d, metric, scale, words);
    } else {
      return split(row, d, words);
    }
  }

  // The bound for a query row and key rows of these extents and d columns. A similarity is a sum of
  // d products, or of 3 d, in any order. Each addition is off by at most 2^-24 times what is added
  // up: the product of the norms, or 1/64 more for h and l. The other steps are those of
  // FixedPointScreen. The last term is for numbers that tiles flush to 0; where sums are scaled, by
  // up to 1e24, it is far below one step.
  static ScreenError error(const Extent& query, const Extent& key, int64_t d) {
    const float norms = query.norm * key.norm;
    const float products = float(kIsExact ? d : 3 * d) * (1 + 0x1p-6f);
    const float steps = float(2 * kSummedSteps + d / kSummedSteps + 40) + products;
    const float missing = query.low * key.low + query.rounding * key.norm +
                          query.norm * key.rounding + query.rounding * key.rounding;
    return {0x1p-24f * steps * norms + (1 + 0x1p-10f) * missing + 0x1p-94f, 0, norms};
  }

  // A row of what multiply() writes. column_scales: from its first column on.
  static Row strip_row(const float* sums, const float* column_scales, float row_scale) {
    if constexpr (kHasScales) {
      return {sums, column_scales, row_scale};
    } else {
      return {sums};
    }
  }

  // Configures the tiles for rows of d elements while it exists; does nothing for 0.
  class Session {
   public:
    explicit Session(int64_t d) : open_(d > 0) {
      if (!open_) return;
      const int64_t part = words_of_part(d), depth = part / steps(part);
      struct alignas(64) {
        uint8_t palette = 1;
        uint8_t zeros[15] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } shapes;
      for (int tile = 0; tile < 8; ++tile) {
        const bool is_columns = tile >= 6, is_rows = !is_columns && tile >= 3;
        shapes.rows[tile] = uint8_t(is_columns ? depth : kTileRows);
        shapes.row_bytes[tile] = uint16_t(4 * (is_rows ? depth : kTileRows));
      }
      settle(&shapes);
      _tile_loadconfig(&shapes);
    }
    ~Session() {
      if (open_) _tile_release();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    bool open_;
  };

  // Like FixedPointScreen::multiply, but without the scales, and within a Session; whole tiles of
  // rows and columns.
  static void multiply(const uint32_t* a, int64_t stride, const float*, int64_t rows,
                       const uint32_t* b, int64_t count, const float*, int64_t columns, float* c,
                       int64_t ldc) {
    settle(a);
    const int64_t part = count / kParts;
    if (rows > 2 * kTileRows) {
      multiply_tiles<3>(a, stride, b, part, columns, c, ldc);
    } else if (rows > kTileRows) {
      multiply_tiles<2>(a, stride, b, part, columns, c, ldc);
    } else {
      multiply_tiles<1>(a, stride, b, part, columns, c, ldc);
    }
    settle(c);
  }

 private:
  // Below this norm, elements may be subnormal. All of them are rounded to 0.
  static constexpr float kSmallestNorm = 0x1p-90f;

  static Rounded copy(const T* x, int64_t d, Metric metric, double scale, uint32_t* words) {
    const bool is_cosine = metric == Metric::cosine;
    if (is_cosine && scale == 0) return {{}, 0};
    const double norm = is_cosine ? 1 / scale : std::sqrt(dot(x, x, d));
    if (!(norm < kLargestNorm)) return {kNoBound, 0};
    const float bound = upper_bound(is_cosine ? 1 : norm);
    if (norm < kSmallestNorm) return {{bound, 0, bound}, 0};
    std::memcpy(words, x, size_t(d) * sizeof *x);
    // Both the elements of the row and the scale are rounded to float32.
    return {{bound, 0, upper_bound(0x1p-22 * bound)}, float(scale)};
  }

  static Rounded split(const float* row, int64_t d, uint32_t* words) {
    const int64_t part = words_of_part(d);
    Vector<float> squares = {}, low_squares = {}, errors = {};
    for (int64_t i = 0; i < d; i += kLanes<float>) {
      const Vector<float> x = load(row + i);
      const Vector<float> high = to_bfloat16(x, words + i / 2);
      const Vector<float> low = to_bfloat16(x - high, words + part + i / 2);
      const Vector<float> error = x - high - low;
      squares += x * x;
      low_squares += low * low;
      errors += error * error;
    }
    const double above = sum_bound(d);
    const float square = sum_of_lanes(squares);
    const double norm = std::sqrt(square < 0x1p-90f ? dot(row, row, d) : square * above);
    if (!(norm < kLargestNorm)) return {kNoBound, 1};
    // Elements that are flushed to 0, or whose squares are, have a norm of less than kFlushed. A
    // row that this is not far below counts as rounded to 0.
    constexpr double kFlushed = 0x1p-50;
    const float bound = upper_bound(norm);
    if (square < 0x1p-60f) {
      std::memset(words, 0, size_t(2 * part) * sizeof *words);
      return {{bound, 0, bound}, 1};
    }
    const auto norm_of = [&](Vector<float> sum) {
      return upper_bound(std::sqrt(sum_of_lanes(sum) * above) + kFlushed);
    };
    return {{bound, norm_of(low_squares), norm_of(errors)}, 1};
  }

  // x rounded to the nearest bfloat16, also written to words [kLanes / 2].
  static Vector<float> to_bfloat16(Vector<float> x, uint32_t* words) {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    Bits bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(bits, Halves);
    std::memcpy(words, &halves, sizeof halves);
    bits <<= 16;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  // c[r][j] = the sum over t of a[r][t] . b[t][j], for Rows tiles of rows. Tiles: 0 to 2 sums, 3 to
  // 5 rows, 6 and 7 columns, h and l.
  template <int Rows>
  static void multiply_tiles(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t part,
                             int64_t columns, float* c, int64_t ldc) {
    const int64_t depth = part / steps(part), a_bytes = 4 * stride, c_bytes = 4 * ldc;
    const uint32_t* const a1 = a + kTileRows * stride;
    const uint32_t* const a2 = a1 + kTileRows * stride;
    for (int64_t j = 0; j < columns; j += kTileRows) {
      _tile_zero(0);
      if constexpr (Rows > 1) _tile_zero(1);
      if constexpr (Rows > 2) _tile_zero(2);
      for (int64_t t = 0; t < part; t += depth) {
        _tile_loadd(6, b + t * kPanel + j, 4 * kPanel);
        _tile_loadd(3, a + t, a_bytes);
        if constexpr (Rows > 1) _tile_loadd(4, a1 + t, a_bytes);
        if constexpr (Rows > 2) _tile_loadd(5, a2 + t, a_bytes);
        _tile_dpbf16ps(0, 3, 6);
        if constexpr (Rows > 1) _tile_dpbf16ps(1, 4, 6);
        if constexpr (Rows > 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (kParts == 1) continue;
        _tile_loadd(7, b + (part + t) * kPanel + j, 4 * kPanel);
        _tile_dpbf16ps(0, 3, 7);
        if constexpr (Rows > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (Rows > 2) _tile_dpbf16ps(2, 5, 7);
        _tile_loadd(3, a + part + t, a_bytes);
        if constexpr (Rows > 1) _tile_loadd(4, a1 + part + t, a_bytes);
        if constexpr (Rows > 2) _tile_loadd(5, a2 + part + t, a_bytes);
        _tile_dpbf16ps(0, 3, 6);
        if constexpr (Rows > 1) _tile_dpbf16ps(1, 4, 6);
        if constexpr (Rows > 2) _tile_dpbf16ps(2, 5, 6);
      }
      _tile_stored(0, c + j, c_bytes);
      if constexpr (Rows > 1) _tile_stored(1, c + kTileRows * ldc + j, c_bytes);
      if constexpr (Rows > 2) _tile_stored(2, c + 2 * kTileRows * ldc + j, c_bytes);
    }
  }
};

}  // namespace convnn::CONVNN_ISA

#endif
