// SPDX-License-Identifier: MIT
// Entries of similarities and indices [batch, n, k].
#pragma once

#include "device.cuh"

namespace convnn::cuda {

__device__ inline double similarity_at(const void* similarities, DType dtype, int64_t entry) {
  return dtype == DType::float64 ? static_cast<const double*>(similarities)[entry]
                                 : static_cast<const float*>(similarities)[entry];
}

// A similarity of -inf marks a missing neighbor, and an index out of range counts as one.
__device__ inline bool is_missing(const void* similarities, DType dtype, const int64_t* indices,
                                  int64_t entry, int64_t m) {
  const int64_t row = indices[entry];
  if (row < 0 || row >= m) return true;
  return dtype == DType::float64
             ? static_cast<const double*>(similarities)[entry] == -kInfinity<double>
             : static_cast<const float*>(similarities)[entry] == -kInfinity<float>;
}

}  // namespace convnn::cuda
