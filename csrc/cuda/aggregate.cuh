// SPDX-License-Identifier: MIT
// The convolution over modulated neighbors (Eq. 6 and section 4.1):
//
//   dense      y_i[o] = b[o] + sum_j rho_ij sum_c W[o, c, j] V[I_ij, c]
//   depthwise  y_i[c] = b[c] + sum_j rho_ij W[c, 0, j] V[I_ij, c]
//   no weight  y_i[c] = b[c] + sum_j rho_ij V[I_ij, c]
//
// Dense: a block computes 64 queries (of any batch elements) and 64 outputs. For each j it gathers
// the 64 rows of V and multiplies them by W_j in the tile of matmul_tile.cuh. rho is applied to the
// product, so rows reach the matrix instruction unchanged. An output that is not finite is computed
// again with rho applied first. X_nn [n, k, c] is never stored.
// Depthwise or no weight: a thread computes one output at a time.
#pragma once

#include "matmul_tile.cuh"
#include "neighbors.cuh"

namespace convnn::cuda {

template <class T>
struct AggregateWork {
  using A = Accumulate<T>;

  AggregateParams p;
  const A* rho;     // [batch, n, k], or null: 1
  const T* weight;  // dense: [k, o, c] in forward, [k, c, o] in backward; depthwise [c, 1, k]

  __device__ const T* value() const { return static_cast<const T*>(p.value.data); }
  // The row of V, among those of all batch elements, of neighbor j of `row`; -1 if missing.
  __device__ int64_t value_row(int64_t row, int64_t j) const {
    const int64_t entry = row * p.k + j;
    if (is_missing(p.similarities, p.similarity_dtype, p.indices, entry, p.m)) return -1;
    return row / p.n * p.m + p.indices[entry];
  }
  __device__ A rho_of(int64_t row, int64_t j) const { return rho ? rho[row * p.k + j] : A(1); }
  __device__ A depthwise_weight(int64_t c, int64_t j) const {
    return p.convolution == Convolution::depthwise ? A(widen(weight[c * p.k + j])) : A(1);
  }
};

// weight [o, c, k] to [k, o, c], or to [k, c, o].
template <class T>
__global__ __launch_bounds__(kThreads) void permute_weight_kernel(
    const T* weight,  // [o, c, k]
    T* result,        // [k, o, c], or [k, c, o]
    int64_t o, int64_t c, int64_t k, bool outputs_last) {
  for (int64_t i = grid_thread(); i < o * c * k; i += grid_threads()) {
    const int64_t j = i / (o * c), rest = i % (o * c);
    const int64_t of_o = outputs_last ? rest % o : rest / c;
    const int64_t of_c = outputs_last ? rest / o : rest % c;
    result[i] = weight[(of_o * c + of_c) * k + j];
  }
}
template <class T>
const T* permute_weight(const AggregateParams& p, bool outputs_last, Context& context) {
  const int64_t count = p.o * p.c * p.k;
  T* result = allocate<T>(context, count);
  launch("permute_weight_kernel", permute_weight_kernel<T>, strided_blocks(count), 0, context,
         static_cast<const T*>(p.weight), result, p.o, p.c, p.k, outputs_last);
  return result;
}

// One output of a dense convolution without bias, term by term; weight(j, c) are those of the
// output. Returns early once it is NaN.
template <class T, class Weight>
__device__ __forceinline__ Accumulate<T> plain_output(const AggregateWork<T>& w, int64_t row,
                                                      const Weight& weight) {
  using A = Accumulate<T>;
  const AggregateParams& p = w.p;
  RunningSum<A> sum;
  for (int64_t j = 0; j < p.k; ++j) {
    const int64_t value_row = w.value_row(row, j);
    if (value_row < 0) continue;
    const A rho = w.rho_of(row, j);
    for (int64_t c = 0; c < p.c; ++c) {
      const A v = widen(w.value()[value_row * p.c + c]);
      sum.add(rho * v * A(widen(weight(j, c))));
      if (sum.value() != sum.value()) return kNan<A>;
    }
  }
  return sum.value();
}

// Blocks per multiprocessor, at least: with this bound the compiler spills nothing.
template <class T>
constexpr int kDenseBlocks = sizeof(T) == 8   ? 2
                             : sizeof(T) == 4 ? 3
                                              : 4;

template <class T>
__global__ __launch_bounds__(kThreads, kDenseBlocks<T>) void aggregate_dense_kernel(
    const AggregateWork<T> w) {
  using A = Accumulate<T>;
  T* tile_v = reinterpret_cast<T*>(shared_memory());
  T* tile_w = tile_v + kTileElements<T>;
  const AggregateParams& p = w.p;
  const int64_t rows = p.batch * p.n, output_blocks = (p.o + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / output_blocks * kTile;
  const int64_t first_output = blockIdx.x % output_blocks * kTile;
  const int64_t row = first_row + loaded_row(), output = first_output + loaded_row();

  TileValues<A> y;
  for (int64_t j = 0; j < p.k; ++j) {
    const int64_t value_row = row < rows ? w.value_row(row, j) : -1;
    const T* v = value_row < 0 ? nullptr : w.value() + value_row * p.c;
    const T* of_output = output < p.o ? w.weight + (j * p.o + output) * p.c : nullptr;
    TileValues<A> product;
    for (int64_t c = 0; c < p.c; c += kDepth) {
      load_tile(tile_v, v, c, p.c);
      load_tile(tile_w, of_output, c, p.c);
      __syncthreads();
      multiply_tile(tile_v, tile_w, p.c, product);
      __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = first_row + tile_row(h);
      const A rho = at < rows ? w.rho[at * p.k + j] : A(0);
#pragma unroll
      for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) y.value[n][2 * h + e] += rho * product.value[n][2 * h + e];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t at = first_row + tile_row(h);
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t o = first_output + tile_column(n, e);
        if (at >= rows || o >= p.o) continue;
        const A bias = p.bias ? A(widen(static_cast<const T*>(p.bias)[o])) : A(0);
        A sum = y.value[n][2 * h + e];
        // V W may overflow where rho V W does not, and the row of zeros that stands for a missing
        // neighbor gives NaN with a weight that is not finite.
        if (!isfinite(sum)) {
          sum = plain_output(
              w, at, [&](int64_t j, int64_t c) { return w.weight[(j * p.o + o) * p.c + c]; });
        }
        narrow(sum + bias, static_cast<T*>(p.output)[at * p.o + o]);
      }
    }
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void aggregate_depthwise_kernel(const AggregateWork<T> w) {
  using A = Accumulate<T>;
  const AggregateParams& p = w.p;
  const int64_t count = p.batch * p.n * p.c;
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) {
    const int64_t row = i / p.c, c = i % p.c;
    RunningSum<A> sum;
    for (int64_t j = 0; j < p.k; ++j) {
      const int64_t value_row = w.value_row(row, j);
      if (value_row < 0) continue;
      const A v = widen(w.value()[value_row * p.c + c]);
      sum.add(w.rho[row * p.k + j] * v * w.depthwise_weight(c, j));
    }
    const A bias = p.bias ? A(widen(static_cast<const T*>(p.bias)[c])) : A(0);
    narrow(sum.value() + bias, static_cast<T*>(p.output)[i]);
  }
}

}  // namespace convnn::cuda
