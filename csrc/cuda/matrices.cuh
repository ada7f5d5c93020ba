// SPDX-License-Identifier: MIT
// Operands of the matrix instruction from shared memory.
#pragma once

#include "hopper.cuh"

#ifndef __CUDACC__
#include <matrix_loads.h>
#endif

namespace convnn::cuda {

// Four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8; of
// matrix i it gets bytes 4 t to 4 t + 3 of row g in x[i], with g = lane / 4 and t = lane % 4. So
// rows of 32 columns of keys are the second operand of two multiply_accumulate_16().
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
#else
  execution::load_matrices(x, row);
#endif
}

}  // namespace convnn::cuda
