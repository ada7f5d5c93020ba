// SPDX-License-Identifier: MIT
// The gradients of select, from g = grad_similarities at the selected neighbors:
//
//   dot        dq_i = sum_j g_ij k_j                  dk_m = sum g_ij q_i
//   euclidean  dq_i = sum_j -2 g_ij (q_i - k_j)       dk_m = sum 2 g_ij (q_i - k_m)
//   cosine     dq_i = (I - q^ q^T) t / ||q_i||,       dk_m = (I - k^ k^T) u / ||k_m||,
//              t = sum_j g_ij k^_j                    u = sum g_ij q^_i
//
// where j runs over the neighbors of i, and the sums of dk over the pairs (i, j) with I_ij = m.
// One warp per query row, one block per key row; lanes are columns, 32 at a time. The warps of a
// block divide the pairs of its key row, which come from the inverse neighbor list in a fixed
// order, and their sums are added in order, without atomics. Key rows with many pairs have those
// summed in chunks by separate blocks first (runs.cuh). A row of norm <= epsilon has gradient
// exactly 0.
#pragma once

#include "neighbors.cuh"
#include "normalize.cuh"
#include "runs.cuh"

namespace convnn::cuda {

template <class T>
struct SelectBackwardWork {
  using A = Accumulate<T>;

  SelectBackwardParams p;
  Norms<A> query_norms, key_norms;
  InverseList inverse;
  A* chunk_sums;  // [chunks, d + 1]: as KeySums, `along` in the last column

  // What a pair of rows adds to the gradient of one of them, x, before Norms::through().
  __device__ A term(A x, A other, A grad, const Norms<A>& other_norms, int64_t other_row) const {
    if (p.metric == Metric::euclidean) return 2 * grad * (other - x);
    return grad * (p.metric == Metric::cosine ? other_norms.unit(other, other_row) : other);
  }
};

template <class T>
__global__ __launch_bounds__(kThreads) void query_grad_kernel(const SelectBackwardWork<T> w) {
  using A = Accumulate<T>;
  constexpr DType kSimilarities = std::is_same_v<A, double> ? DType::float64 : DType::float32;
  const SelectBackwardParams& p = w.p;
  const int64_t row = grid_warp();
  if (row >= p.batch * p.n) return;
  const int64_t first_key = row / p.n * p.m;
  const A* grads = static_cast<const A*>(p.grad_similarities) + row * p.k;
  const A* similarities = static_cast<const A*>(p.similarities) + row * p.k;
  for (int64_t d = lane(); d < p.d; d += kWarp) {
    const A q = widen(static_cast<const T*>(p.query.data)[row * p.d + d]);
    RunningSum<A> sum, along;
    bool in_pairs = false;
    for (int64_t j = 0; j < p.k; ++j) {
      if (is_missing(p.similarities, kSimilarities, p.indices, row * p.k + j, p.m)) continue;
      in_pairs = true;
      const int64_t key_row = first_key + p.indices[row * p.k + j];
      const A k = widen(static_cast<const T*>(p.key.data)[key_row * p.d + d]);
      sum.add(w.term(q, k, grads[j], w.key_norms, key_row));
      if (p.metric == Metric::cosine) along.add(grads[j] * similarities[j]);
    }
    A grad = sum.value();
    // A row in no pair has gradient 0, whatever its elements are.
    if (p.metric == Metric::cosine && in_pairs) {
      grad = w.query_norms.through(grad, along.value(), q, row);
    }
    narrow(grad, static_cast<T*>(p.grad_query)[row * p.d + d]);
  }
}

// Sums over pairs of a key row: one column of its gradient, or for the cosine of the gradient of
// its unit vector, and there the dot product of both vectors.
template <class A>
struct KeySums {
  A grad, along;
};
// The sums over a run in column d of key row `row`, where its element is k. The warps of the block
// share the work, and all receive the result.
template <class T>
__device__ inline KeySums<Accumulate<T>> sums_of_run(const SelectBackwardWork<T>& w, int64_t row,
                                                     const Run& run, int64_t d, Accumulate<T> k) {
  using A = Accumulate<T>;
  A* sums = reinterpret_cast<A*>(shared_memory());  // [2, kWarps, kWarp]: gradients, along
  const SelectBackwardParams& p = w.p;
  const int64_t first_query = row / p.m * p.n;
  RunningSum<A> grad, along;
  for_each_term(
      w.inverse, run, warp(), kWarps,
      [&](int64_t pair) {
        const int64_t query_row = first_query + pair % p.n;
        const int64_t entry = query_row * p.k + pair / p.n % p.k;
        const A g = static_cast<const A*>(p.grad_similarities)[entry];
        if (p.metric == Metric::cosine) {
          along.add(g * static_cast<const A*>(p.similarities)[entry]);
        }
        if (d >= p.d) return;
        const A q = widen(static_cast<const T*>(p.query.data)[query_row * p.d + d]);
        grad.add(w.term(k, q, g, w.query_norms, query_row));
      },
      [&](int64_t chunk) {
        const A* of_chunk = w.chunk_sums + chunk * (p.d + 1);
        along.add(of_chunk[p.d]);
        if (d < p.d) grad.add(of_chunk[d]);
      });
  sums[threadIdx.x] = grad.value();
  sums[kThreads + threadIdx.x] = along.value();
  __syncthreads();
  KeySums<A> total = {0, 0};
  for (int i = lane(); i < kThreads; i += kWarp) {
    total.grad += sums[i];
    total.along += sums[kThreads + i];
  }
  __syncthreads();
  return total;
}

// One block per chunk.
template <class T>
__global__ __launch_bounds__(kThreads, 4) void key_chunks_kernel(const SelectBackwardWork<T> w) {
  using A = Accumulate<T>;
  const SelectBackwardParams& p = w.p;
  for (int64_t chunk = blockIdx.x; chunk < w.inverse.chunks; chunk += gridDim.x) {
    const int64_t row = row_of_chunk(w.inverse, chunk);
    if (row < 0) continue;
    A* result = w.chunk_sums + chunk * (p.d + 1);
    for (int64_t first = 0; first < p.d; first += kWarp) {
      const int64_t d = first + lane();
      const A k = d < p.d ? A(widen(static_cast<const T*>(p.key.data)[row * p.d + d])) : A(0);
      const KeySums<A> sums = sums_of_run(w, row, run_of_chunk(w.inverse, chunk), d, k);
      if (warp() == 0 && d < p.d) result[d] = sums.grad;
      if (threadIdx.x == 0) result[p.d] = sums.along;
    }
  }
}

template <class T>
__global__ __launch_bounds__(kThreads, 4) void key_grad_kernel(const SelectBackwardWork<T> w) {
  using A = Accumulate<T>;
  const SelectBackwardParams& p = w.p;
  const int64_t* offsets = w.inverse.offsets;
  for (int64_t row = blockIdx.x; row < w.inverse.row_count; row += gridDim.x) {
    const Run run = run_between(w.inverse, offsets[row], offsets[row + 1]);
    for (int64_t first = 0; first < p.d; first += kWarp) {
      const int64_t d = first + lane();
      const A k = d < p.d ? A(widen(static_cast<const T*>(p.key.data)[row * p.d + d])) : A(0);
      const KeySums<A> sums = sums_of_run(w, row, run, d, k);
      if (warp() != 0 || d >= p.d) continue;
      A grad = sums.grad;
      // As in query_grad_kernel: a row in no pair has gradient 0.
      if (p.metric == Metric::cosine && run.first < run.last) {
        grad = w.key_norms.through(grad, sums.along, k, row);
      }
      narrow(grad, static_cast<T*>(p.grad_key)[row * p.d + d]);
    }
  }
}

}  // namespace convnn::cuda
