// SPDX-License-Identifier: MIT
// Emulates AMX tiles, for processors without them. Included before the kernels, it replaces the
// intrinsics by functions. Operands that an instruction would reject abort the program.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace amx_emulation {

struct Shapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Shapes) == 64);

inline thread_local Shapes shapes = {};
inline thread_local unsigned char tiles[8][16][64];
inline thread_local int64_t products = 0;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "amx_emulation: %s\n", what);
  std::abort();
}

inline void load_config(const void* from) {
  std::memcpy(&shapes, from, sizeof shapes);
  std::memset(tiles, 0, sizeof tiles);
  require(shapes.palette == 1 && shapes.start_row == 0, "palette or start row");
  for (uint8_t zero : shapes.reserved) require(zero == 0, "reserved bytes");
  for (int i = 0; i < 16; ++i) {
    require(i < 8 ? shapes.rows[i] <= 16 && shapes.row_bytes[i] <= 64
                  : shapes.rows[i] == 0 && shapes.row_bytes[i] == 0,
            "shape of a tile");
  }
}

inline void release() { shapes = {}; }

inline void require_tile(int tile) {
  require(shapes.palette == 1 && shapes.rows[tile] > 0 && shapes.row_bytes[tile] > 0,
          "a tile without a shape");
}

inline void zero(int tile) {
  require_tile(tile);
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
}

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int r = 0; r < shapes.rows[tile]; ++r) {
    std::memcpy(tiles[tile][r], static_cast<const char*>(from) + r * stride,
                shapes.row_bytes[tile]);
  }
}

inline void store(int tile, void* to, int64_t stride) {
  require_tile(tile);
  for (int r = 0; r < shapes.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[tile][r], shapes.row_bytes[tile]);
  }
}

// Subnormal numbers count as 0, in operands and in results.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x; }

inline float element(int tile, int row, int i) {
  uint16_t half;
  std::memcpy(&half, tiles[tile][row] + 2 * i, sizeof half);
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

// In another order than the hardware, which adds up even and odd elements first.
inline void multiply_bf16(int sums, int a, int b) {
  ++products;
  for (int tile : {sums, a, b}) require_tile(tile);
  require(shapes.rows[sums] == shapes.rows[a] && shapes.row_bytes[sums] == shapes.row_bytes[b] &&
              shapes.row_bytes[a] == 4 * shapes.rows[b] && shapes.row_bytes[sums] % 4 == 0,
          "shapes of a product");
  for (int m = 0; m < shapes.rows[sums]; ++m) {
    for (int k = 0; k < shapes.rows[b]; ++k) {
      for (int n = 0; n < shapes.row_bytes[sums] / 4; ++n) {
        float sum;
        std::memcpy(&sum, tiles[sums][m] + 4 * n, sizeof sum);
        for (int i : {0, 1}) {
          sum = flushed(std::fma(element(a, m, 2 * k + i), element(b, k, 2 * n + i), sum));
        }
        std::memcpy(tiles[sums][m] + 4 * n, &sum, sizeof sum);
      }
    }
  }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulation::load_config
#define _tile_release amx_emulation::release
#define _tile_zero amx_emulation::zero
#define _tile_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_dpbf16ps amx_emulation::multiply_bf16
