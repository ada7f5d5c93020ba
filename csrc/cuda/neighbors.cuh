// SPDX-License-Identifier: MIT
// What a place of similarities and indices [batch, n, k] says.
#pragma once

#include "device.cuh"

namespace convnn::cuda {

__device__ inline double similarity_at(const void* similarities, DType dtype, int64_t place) {
  return dtype == DType::float64 ? static_cast<const double*>(similarities)[place]
                                 : static_cast<const float*>(similarities)[place];
}

// Whether there is no neighbor: a similarity of -inf marks it, and an index out of range is left
// out.
__device__ inline bool is_missing(const void* similarities, DType dtype, const int64_t* indices,
                                  int64_t place, int64_t m) {
  const int64_t row = indices[place];
  if (row < 0 || row >= m) return true;
  return dtype == DType::float64
             ? static_cast<const double*>(similarities)[place] == -kInfinity<double>
             : static_cast<const float*>(similarities)[place] == -kInfinity<float>;
}

}  // namespace convnn::cuda
