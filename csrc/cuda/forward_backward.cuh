// SPDX-License-Identifier: MIT
// The gradient of the similarities in the backward pass of forward: what reaches them from the
// output, and what reaches them directly.
#pragma once

#include "device.cuh"

namespace convnn::cuda {

// sums += addends
template <class A>
__global__ __launch_bounds__(kThreads) void add_kernel(A* sums,           // [count]
                                                       const A* addends,  // [count]
                                                       int64_t count) {
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) sums[i] += addends[i];
}

}  // namespace convnn::cuda
