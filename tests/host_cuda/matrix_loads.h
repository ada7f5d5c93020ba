// SPDX-License-Identifier: MIT
// Replaces what csrc/cuda/matrices.cuh uses of CUDA.
#pragma once

#include "execution.h"

namespace execution {

inline void load_matrices(uint32_t (&x)[4], uint32_t row,
                          Site site = {__builtin_FILE(), __builtin_LINE()}) {
  struct Operand {
    uint32_t row;
    uint32_t* x;
  } operand = {row, x};
  collective(site, &operand, [](void* const* lanes) {
    const auto of = [&](int lane) { return static_cast<Operand*>(lanes[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        alignas(16) uint32_t row_of_matrix[4];
        copy<16>(row_of_matrix, shared_memory() + of(8 * i + lane / 4)->row);
        of(lane)->x[i] = row_of_matrix[lane % 4];
      }
    }
  });
}

}  // namespace execution
