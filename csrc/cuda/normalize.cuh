// SPDX-License-Identifier: MIT
// The normalization of the cosine (section 4.1 of the paper): x^ = x / ||x||, or 0 where
// ||x|| <= epsilon. Rows are first scaled near 1 by a power of two, so that no square and no
// product of finite rows overflows.
#pragma once

#include "device.cuh"

namespace convnn::cuda {

// A power of two that brings x near 1. It and its inverse are finite.
template <class A>
__device__ inline A scale_of(A x) {
  constexpr int kMost = std::is_same_v<A, double> ? 1000 : 120;
  const int exponent = x > 0 ? ilogb(x) : 0;
  return scalbn(A(1), -(exponent > kMost ? kMost : exponent < -kMost ? -kMost : exponent));
}

// The norms of rows [rows, d], one warp per row. Scaling by a power of two is exact and keeps
// squares and products finite; the range of float16 is too small to need it.
template <class T>
__global__ __launch_bounds__(kThreads) void scale_rows_kernel(
    const T* x,              // [rows, d]
    T* scaled,               // [rows, d], or null: not needed, or float16
    Accumulate<T>* inverse,  // [rows] 1 / norm of the scaled row, 0 of a row that counts as zero
    Accumulate<T>* scales,   // [rows]
    int64_t rows, int64_t d) {
  using A = Accumulate<T>;
  const int64_t row = grid_warp();
  if (row >= rows) return;
  x += row * d;
  A scale = 1;
  if constexpr (!std::is_same_v<T, Float16>) {
    A largest = 0;
    for (int64_t i = lane(); i < d; i += kWarp) {
      const A size = fabs(widen(x[i]));
      if (size > largest) largest = size;
    }
    scale = scale_of(warp_max(largest));
  }
  A sum = 0;
  for (int64_t i = lane(); i < d; i += kWarp) {
    const A element = widen(x[i]) * scale;
    if (scaled) narrow(element, scaled[row * d + i]);
    sum += element * element;
  }
  const A norm = sqrt(warp_sum(sum));
  if (lane() == 0) {
    A result = norm / scale <= A(kCosineEpsilon) ? A(0) : 1 / norm;
    // Infinity among the elements: the unit vector is NaN.
    if (norm == kInfinity<A>) result = kNan<A>;
    inverse[row] = result;
    scales[row] = scale;
  }
}

// Norms of rows [rows]; null unless the metric is cosine.
template <class A>
struct Norms {
  const A* inverse;  // 1 / norm of the scaled row, 0 of a row that counts as zero
  const A* scale;
};

// Norms of x [rows, d], and the scaled rows unless `scaled` is null.
template <class T>
Norms<Accumulate<T>> norms_of(const T* x, T* scaled, int64_t rows, int64_t d, Context& context) {
  using A = Accumulate<T>;
  A* inverse = allocate<A>(context, rows);
  A* scale = allocate<A>(context, rows);
  launch("scale_rows_kernel", scale_rows_kernel<T>, ceil_div(rows, kWarps), 0, context, x, scaled,
         inverse, scale, rows, d);
  return {inverse, scale};
}

}  // namespace convnn::cuda
