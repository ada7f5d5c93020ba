// SPDX-License-Identifier: MIT
// The modulation rho of section 4.1 and its derivative, in float64. One warp per query, one
// neighbor per lane at a time.
#pragma once

#include "neighbors.cuh"

namespace convnn::cuda {

template <class A>
__global__ __launch_bounds__(kThreads) void modulate_kernel(
    const AggregateParams p,
    A* rho) {  // [batch, n, k]; 0 for a missing neighbor
  const int64_t row = grid_warp();
  if (row >= p.batch * p.n) return;
  const int64_t first = row * p.k;
  const auto missing = [&](int64_t j) {
    return is_missing(p.similarities, p.similarity_dtype, p.indices, first + j, p.m);
  };
  const auto logit = [&](int64_t j) {
    return p.scale * similarity_at(p.similarities, p.similarity_dtype, first + j);
  };
  if (p.rho != Rho::softmax) {
    for (int64_t j = lane(); j < p.k; j += kWarp) {
      rho[first + j] = missing(j) ? A(0) : p.rho == Rho::ones ? A(1) : A(logit(j));
    }
    return;
  }
  // A maximum that misses NaN does no harm: the sum is NaN.
  double largest = -kInfinity<double>;
  for (int64_t j = lane(); j < p.k; j += kWarp) {
    if (!missing(j) && logit(j) > largest) largest = logit(j);
  }
  largest = warp_max(largest);
  double sum = 0;
  for (int64_t j = lane(); j < p.k; j += kWarp) {
    if (!missing(j)) sum += exp(logit(j) - largest);
  }
  sum = warp_sum(sum);
  for (int64_t j = lane(); j < p.k; j += kWarp) {
    rho[first + j] = missing(j) ? A(0) : A(exp(logit(j) - largest) / sum);
  }
}

template <class A>
__global__ __launch_bounds__(kThreads, 8) void modulate_backward_kernel(
    const AggregateParams p,
    const A* rho,               // [batch, n, k]
    const A* grad_rho,          // [batch, n, k]
    void* grad_similarities) {  // [batch, n, k]
  const int64_t row = grid_warp();
  if (row >= p.batch * p.n) return;
  const int64_t first = row * p.k;
  const auto missing = [&](int64_t entry) {
    return is_missing(p.similarities, p.similarity_dtype, p.indices, entry, p.m);
  };
  // Softmax: ds_j = scale rho_j (drho_j - mean), with the mean weighted by rho. A constant added to
  // all drho_j does not change it, so one of them is subtracted: equal ones give exactly 0.
  double origin = 0, mean = 0;
  if (p.rho == Rho::softmax) {
    int64_t before = -p.k;
    for (int64_t j = p.k - 1 - lane(); j >= 0; j -= kWarp) {
      if (!missing(first + j)) before = -j;
    }
    before = warp_max(before);
    if (before > -p.k) origin = double(grad_rho[first - before]);
    if (!isfinite(origin)) origin = 0;
    for (int64_t entry = first + lane(); entry < first + p.k; entry += kWarp) {
      if (!missing(entry)) mean += double(rho[entry]) * (double(grad_rho[entry]) - origin);
    }
    mean = warp_sum(mean);
  }
  for (int64_t entry = first + lane(); entry < first + p.k; entry += kWarp) {
    double grad = 0;
    if (!missing(entry)) {
      if (p.rho == Rho::softmax) {
        grad = p.scale * double(rho[entry]) * (double(grad_rho[entry]) - origin - mean);
      }
      if (p.rho == Rho::similarity) grad = double(grad_rho[entry]);
    }
    if (p.similarity_dtype == DType::float64) {
      static_cast<double*>(grad_similarities)[entry] = grad;
    } else {
      static_cast<float*>(grad_similarities)[entry] = float(grad);
    }
  }
}

// rho of all neighbors [batch, n, k].
template <class A>
const A* modulate(const AggregateParams& p, Context& context) {
  A* rho = allocate<A>(context, p.batch * p.n * p.k);
  launch("modulate_kernel", modulate_kernel<A>, ceil_div(p.batch * p.n, kWarps), 0, context, p,
         rho);
  return rho;
}

}  // namespace convnn::cuda
