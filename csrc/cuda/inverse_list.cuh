// SPDX-License-Identifier: MIT
// The inverse neighbor list: the row of key that each pair chose, sorted by row (sort.cuh).
#pragma once

#include "inverse_list.h"
#include "neighbors.cuh"

namespace convnn::cuda {

// The row of key, among those of all batch elements, that each pair chose; batch * m if none.
static __global__ __launch_bounds__(kThreads) void chosen_rows_kernel(
    const int64_t* indices,    // [batch, n, k]
    const void* similarities,  // [batch, n, k]
    DType similarity_dtype,
    int64_t* rows,  // [batch, k, n]
    int64_t batch, int64_t n, int64_t m, int64_t k) {
  for (int64_t pair = grid_thread(); pair < batch * k * n; pair += grid_threads()) {
    const int64_t b = pair / n / k, slot = pair / n % k, i = pair % n;
    const int64_t entry = (b * n + i) * k + slot;
    const bool missing = is_missing(similarities, similarity_dtype, indices, entry, m);
    rows[pair] = missing ? batch * m : b * m + indices[entry];
  }
}

// Where the pairs of each row begin: the first position whose row is not lower.
static __global__ __launch_bounds__(kThreads) void offsets_kernel(
    const int64_t* rows,   // [count] by pair
    const int64_t* pairs,  // [count] sorted by row
    int64_t* offsets,      // [limit + 1]
    int64_t count, int64_t limit) {
  for (int64_t row = grid_thread(); row <= limit; row += grid_threads()) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (rows[pairs[middle]] < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    offsets[row] = low;
  }
}

}  // namespace convnn::cuda
