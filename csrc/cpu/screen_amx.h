// SPDX-License-Identifier: MIT
// A screen for select (screen.h) on AMX tiles, for bfloat16 rows. The tiles multiply the rows
// unchanged, and a similarity is the product times a scale for each row: 1, or its inverse norm.
// The only rounding is that of the normalized row, to float32.
//
// One call multiplies a block of 24 query rows, 16 and 8, by a panel of 64 keys, 32 at a time, with
// four tiles of sums, two of rows and two of columns. A step takes up to 16 pairs of elements.
#pragma once

#include "normalize.h"
#include "screen.h"

#if defined(__AMX_BF16__)

namespace convnn::CONVNN_ISA {

struct AmxScreen {
  static constexpr int kRows = 16;       // of a tile
  static constexpr int kBytes = 64;      // of a row of a tile
  static constexpr int kColumns = 16;    // of a tile of sums
  static constexpr int64_t kPairs = 16;  // of elements in a row of a tile
  static_assert(kBlockRows == kRows + kRows / 2 && kTileColumns<float> == 4 * kColumns);

  // The steps for a row of d elements, which have equal depth, and its words: steps times depth.
  static int64_t steps(int64_t d) { return ceil_div(ceil_div(d, 2), kPairs); }
  static int64_t words(int64_t d) {
    return d == 0 ? 0 : steps(d) * ceil_div(ceil_div(d, 2), steps(d));
  }

  // Rounds x [d] (null for zeros), which is row [d] in float32, to words [words(d)].
  static Rounded round(const bfloat16* x, const float* row, int64_t d, Metric metric,
                       uint32_t* words) {
    std::memset(words, 0, size_t(AmxScreen::words(d)) * sizeof *words);
    if (!x) return {{}, 0};
    const double norm = std::sqrt(dot(x, x, d));
    if (!(norm < kLargestNorm)) return {kNoBound, 0};
    typedef uint16_t Element __attribute__((may_alias));
    Element* elements = reinterpret_cast<Element*>(words);
    for (int64_t i = 0; i < d; ++i) {
      elements[i] = x[i].bits & 0x7f80 ? x[i].bits : 0;  // AMX flushes subnormals to 0
    }
    const float scale = metric == Metric::cosine ? float(normalizer(x, d).inverse_norm()) : 1;
    const double rounding = std::sqrt(sum_of(d, [&](int64_t i) {
      const double error = double(row[i]) - double(scale) * double(widen(bfloat16{elements[i]}));
      return error * error;
    }));
    return {{upper_bound(std::sqrt(dot(row, row, d))), upper_bound(rounding)}, scale};
  }

  // A compiler barrier, because some compilers do not know which memory the intrinsics access:
  // earlier stores, including those through this pointer, come before it, and later loads after it.
  static void settle(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

  // Configures the tiles for rows of `words` words while it exists; does nothing for 0.
  class Session {
   public:
    explicit Session(int64_t words) : open_(words > 0) {
      if (!open_) return;
      const int64_t depth = words / ceil_div(words, kPairs);
      struct alignas(64) {
        uint8_t palette = 1;
        uint8_t zeros[15] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } shapes;
      const auto shape = [&](int tile, int64_t rows, int64_t bytes) {
        shapes.rows[tile] = uint8_t(rows);
        shapes.row_bytes[tile] = uint16_t(bytes);
      };
      for (int upper : {0, 1}) shape(upper, kRows, kBytes);
      for (int lower : {2, 3}) shape(lower, kRows / 2, kBytes);
      shape(4, kRows, 4 * depth);
      shape(5, kRows / 2, 4 * depth);
      for (int columns : {6, 7}) shape(columns, depth, kBytes);
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

  // Like FixedPointScreen::multiply, within a Session for `count` words; always kBlockRows rows.
  static void multiply(const uint32_t* a, int64_t stride, const float* row_scales, int64_t,
                       const uint32_t* b, int64_t count, const float* column_scales,
                       int64_t columns, float* c, int64_t ldc) {
    constexpr int64_t kPanel = kTileColumns<float>;
    const int64_t depth = count / ceil_div(count, kPairs);
    settle(a);
    settle(b);
    for (int64_t j = 0; j < columns; j += 2 * kColumns) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t t = 0; t < count; t += depth) {
        _tile_loadd(4, a + t, stride * 4);
        _tile_loadd(5, a + kRows * stride + t, stride * 4);
        _tile_loadd(6, b + t * kPanel + j, kPanel * 4);
        _tile_loadd(7, b + t * kPanel + j + kColumns, kPanel * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c + j, ldc * 4);
      _tile_stored(1, c + j + kColumns, ldc * 4);
      _tile_stored(2, c + kRows * ldc + j, ldc * 4);
      _tile_stored(3, c + kRows * ldc + j + kColumns, ldc * 4);
      settle(c);
      for (int64_t r = 0; r < kBlockRows; ++r) {
        for (int64_t v = j; v < j + 2 * kColumns; v += kLanes<float>) {
          float* to = c + r * ldc + v;
          store(to, load(to) * (load(column_scales + v) * row_scales[r]));
        }
      }
    }
  }

  // Whether this processor computes a product of integers correctly.
  static bool multiplies_correctly() {
    constexpr int64_t kDepth = 70;
    constexpr int64_t kPanel = kTileColumns<float>;
    const int64_t count = words(kDepth);
    uint32_t a[kBlockRows * kDepth] = {}, b[kDepth * kPanel] = {};
    float ones[kPanel], c[kBlockRows * kPanel];
    const auto element = [](int64_t row, int64_t i) { return float((7 * row + 5 * i) % 11 - 5); };
    const auto pair = [&](int64_t row, int64_t t) {
      return bits_of(element(row, 2 * t)) >> 16 | (bits_of(element(row, 2 * t + 1)) & 0xffff0000);
    };
    for (int64_t t = 0; t < kDepth / 2; ++t) {
      for (int64_t r = 0; r < kBlockRows; ++r) a[r * count + t] = pair(r, t);
      for (int64_t j = 0; j < kPanel; ++j) b[t * kPanel + j] = pair(3 * j, t);
    }
    for (float& one : ones) one = 1;
    {
      const Session session(count);
      multiply(a, count, ones, kBlockRows, b, count, ones, kPanel, c, kPanel);
    }
    for (int64_t r = 0; r < kBlockRows; ++r) {
      for (int64_t j = 0; j < kPanel; ++j) {
        float sum = 0;
        for (int64_t i = 0; i < kDepth; ++i) sum += element(r, i) * element(3 * j, i);
        if (c[r * kPanel + j] != sum) return false;
      }
    }
    return true;
  }
};

}  // namespace convnn::CONVNN_ISA

#endif
