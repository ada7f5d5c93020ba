// SPDX-License-Identifier: MIT
// Gradients of the dense convolution over neighbors, with G the gradient of the output.
//
//   P_ij[c]     = sum_o G_i[o] W[o, c, j]
//   drho_ij     = sum_c P_ij[c] V[I_ij, c]
//   dV[m]       = sum of rho_ij P_ij over the pairs (i, j) with I_ij = m
//   dW[:, :, j] = sum_i G_i (rho_ij V[I_ij])^T
//
// P is never stored.
//
// drho: a block computes 64 queries and one j, one tile of P at a time.
// dV: a block computes 64 keys and 64 channels. For each j it first sums H[m], which is rho_ij G_i
// over the pairs of a key, and then multiplies the tile of H by W_j. A key without such pairs skips
// the product, because W_j may contain infinity. dW: a block computes a tile of W_j for a part of
// the queries; the parts are then added up. Keys with many pairs have those summed in chunks by
// separate blocks first (runs.cuh).
//
// There are no atomic additions: the pairs of a key come from the inverse neighbor list, ordered by
// slot and then by query, and parts have a fixed size. Factors multiplied by rho are not rounded to
// 16 bits.
#pragma once

#include "aggregate.cuh"
#include "runs.cuh"

namespace convnn::cuda {

template <class T>
struct AggregateBackwardWork {
  using A = Accumulate<T>;

  AggregateWork<T> forward;
  InverseList inverse;
  A* chunk_sums;                  // [chunks, o] sums over pairs of rho G, or of rho G W
  A* grad_rho;                    // [batch, n, k]
  A* parts;                       // [parts, elements of a weight or bias]
  int64_t part_count, rows_each;  // rows of [batch, n] in a part
  const void* grad_output;        // [batch, n, o]
  void* grad_value;               // [batch, m, c]

  __device__ const T* grad(int64_t row) const {
    return static_cast<const T*>(grad_output) + row * forward.p.o;
  }
  // The query, among those of all batch elements, and the slot of a pair.
  __device__ int64_t query_of(int64_t pair) const {
    return pair / forward.p.n / forward.p.k * forward.p.n + pair % forward.p.n;
  }
  __device__ int64_t slot_of(int64_t pair) const { return pair / forward.p.n % forward.p.k; }
  __device__ A rho(int64_t row, int64_t j) const { return forward.rho[row * forward.p.k + j]; }
};

template <class T>
__global__ __launch_bounds__(kThreads,
                             2) void rho_grad_dense_kernel(const AggregateBackwardWork<T> w) {
  using A = Accumulate<T>;
  T* tile_g = reinterpret_cast<T*>(shared_memory());
  T* tile_w = tile_g + kTileElements<T>;
  const AggregateParams& p = w.forward.p;
  const int64_t rows = p.batch * p.n, j = blockIdx.x % p.k;
  const int64_t first_row = blockIdx.x / p.k * kTile;
  const int64_t loaded = first_row + loaded_row();
  const T* g = loaded < rows ? w.grad(loaded) : nullptr;
  A sum[2] = {};
  for (int64_t first = 0; first < p.c; first += kTile) {
    const int64_t channel = first + loaded_row();
    const T* of_channel = channel < p.c ? w.forward.weight + (j * p.c + channel) * p.o : nullptr;
    TileValues<A> product;
    for (int64_t o = 0; o < p.o; o += kDepth) {
      load_tile(tile_g, g, o, p.o);
      load_tile(tile_w, of_channel, o, p.o);
      __syncthreads();
      multiply_tile(tile_g, tile_w, p.o, product);
      __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row + tile_row(h);
      const int64_t value_row = row < rows ? w.forward.value_row(row, j) : -1;
      if (value_row < 0) continue;
      const T* v = w.forward.value() + value_row * p.c + first;
      A run = 0;
#pragma unroll
      for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = tile_column(n, e);
          if (first + c < p.c) run += product.value[n][2 * h + e] * widen(v[c]);
        }
      }
      sum[h] += run;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int span = 1; span < 4; span *= 2) sum[h] += __shfl_xor_sync(kAllLanes, sum[h], span);
    const int64_t row = first_row + tile_row(h);
    if (lane() % 4 == 0 && row < rows) w.grad_rho[row * p.k + j] = sum[h];
  }
}

// The sum of rho G over a run in column o. The warps of the block share the work, and all receive
// the result.
template <class T>
__device__ inline Accumulate<T> sum_of_run(const AggregateBackwardWork<T>& w, const Run& run,
                                           int64_t o) {
  using A = Accumulate<T>;
  A* sums = reinterpret_cast<A*>(shared_memory());  // [kWarps, kWarp]
  const AggregateParams& p = w.forward.p;
  RunningSum<A> sum;
  if (o < p.o) {
    for_each_term(
        w.inverse, run, warp(), kWarps,
        [&](int64_t pair) {
          const int64_t row = w.query_of(pair), j = w.slot_of(pair);
          sum.add(w.rho(row, j) * A(widen(w.grad(row)[o])));
        },
        [&](int64_t chunk) { sum.add(w.chunk_sums[chunk * p.o + o]); });
  }
  sums[threadIdx.x] = sum.value();
  __syncthreads();
  A total = 0;
  for (int i = lane(); i < kThreads; i += kWarp) total += sums[i];
  __syncthreads();
  return total;
}

// One block per chunk.
template <class T>
__global__ __launch_bounds__(kThreads,
                             8) void value_chunks_kernel(const AggregateBackwardWork<T> w) {
  const AggregateParams& p = w.forward.p;
  for (int64_t chunk = blockIdx.x; chunk < w.inverse.chunks; chunk += gridDim.x) {
    // A chunk with pairs of two slots lies in no run, so its sum is never read.
    if (row_of_chunk(w.inverse, chunk) < 0) continue;
    for (int64_t first = 0; first < p.o; first += kWarp) {
      const int64_t o = first + lane();
      const Accumulate<T> sum = sum_of_run(w, run_of_chunk(w.inverse, chunk), o);
      if (warp() == 0 && o < p.o) w.chunk_sums[chunk * p.o + o] = sum;
    }
  }
}

template <class T>
__global__ __launch_bounds__(kThreads,
                             2) void value_grad_dense_kernel(const AggregateBackwardWork<T> w) {
  using A = Accumulate<T>;
  A* tile_h = reinterpret_cast<A*>(shared_memory());
  A* tile_w = tile_h + kTileElements<A>;
  int64_t* firsts = reinterpret_cast<int64_t*>(tile_w + kTileElements<A>);  // [kTile]
  int64_t* ends = firsts + kTile;                                           // [kTile]
  const AggregateParams& p = w.forward.p;
  const int64_t keys = p.batch * p.m, channel_blocks = (p.c + kTile - 1) / kTile;
  const int64_t first_key = blockIdx.x / channel_blocks * kTile;
  const int64_t first_channel = blockIdx.x % channel_blocks * kTile;
  const int64_t channel = first_channel + loaded_row();
  const int64_t thread_key = first_key + threadIdx.x;
  const bool has_key = threadIdx.x < kTile && thread_key < keys;
  int64_t at = has_key ? w.inverse.offsets[thread_key] : 0;
  const int64_t last = has_key ? w.inverse.offsets[thread_key + 1] : 0;

  TileValues<A> dv;
  for (int64_t j = 0; j < p.k; ++j) {
    if (threadIdx.x < kTile) {
      // The pairs of slot j come next and end where those of the next slot begin.
      firsts[threadIdx.x] = at;
      int64_t high = last;
      while (at < high) {
        const int64_t middle = at + (high - at) / 2;
        if (w.slot_of(w.inverse.pairs[middle]) <= j) {
          at = middle + 1;
        } else {
          high = middle;
        }
      }
      ends[threadIdx.x] = at;
    }
    const T* of_channel = channel < p.c ? w.forward.weight + (j * p.c + channel) * p.o : nullptr;
    __syncthreads();
    bool chosen[2];
    for (int h = 0; h < 2; ++h) chosen[h] = firsts[tile_row(h)] < ends[tile_row(h)];
    TileValues<A> product;
    for (int64_t first = 0; first < p.o; first += kDepth) {
      const int64_t o = first + lane();
      for (int r = warp(); r < kTile; r += kWarps) {
        RunningSum<A> sum;
        if (o < p.o) {
          for_each_term(
              w.inverse, run_between(w.inverse, firsts[r], ends[r]), 0, 1,
              [&](int64_t pair) {
                const int64_t row = w.query_of(pair);
                sum.add(w.rho(row, j) * A(widen(w.grad(row)[o])));
              },
              [&](int64_t chunk) { sum.add(w.chunk_sums[chunk * p.o + o]); });
        }
        tile_h[r * kTileStride<A> + lane()] = sum.value();
      }
      load_tile(tile_w, of_channel, first, p.o);
      __syncthreads();
      multiply_tile(tile_h, tile_w, p.o, product);
      __syncthreads();
    }
    if (p.o == 0) __syncthreads();
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (chosen[e / 2]) dv.value[n][e] += product.value[n][e];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = first_key + tile_row(h);
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t c = first_channel + tile_column(n, e);
        if (row >= keys || c >= p.c) continue;
        narrow(dv.value[n][2 * h + e], static_cast<T*>(w.grad_value)[row * p.c + c]);
      }
    }
  }
}

// A tile of one W_j for one part of the queries. Rows of the tile are outputs.
template <class T>
__global__ __launch_bounds__(kThreads) void weight_grad_dense_kernel(
    const AggregateBackwardWork<T> w) {
  using A = Accumulate<T>;
  A* tile_g = reinterpret_cast<A*>(shared_memory());
  A* tile_v = tile_g + kTileElements<A>;
  const AggregateParams& p = w.forward.p;
  const int64_t channel_blocks = (p.c + kTile - 1) / kTile;
  const int64_t output_blocks = (p.o + kTile - 1) / kTile;
  int64_t block = blockIdx.x;
  const int64_t first_channel = block % channel_blocks * kTile;
  block /= channel_blocks;
  const int64_t first_output = block % output_blocks * kTile;
  block /= output_blocks;
  const int64_t j = block % p.k, part = block / p.k;
  const int64_t end = min((part + 1) * w.rows_each, p.batch * p.n);

  TileValues<A> dw;
  for (int64_t first = part * w.rows_each; first < end; first += kDepth) {
    for (int i = int(threadIdx.x); i < kTile * kDepth; i += kThreads) {
      // Lanes read consecutive outputs and channels of one query.
      const int column = i % kTile, depth = i / kTile;
      const int64_t row = first + depth, o = first_output + column, c = first_channel + column;
      const int64_t value_row = row < end ? w.forward.value_row(row, j) : -1;
      A g = 0, v = 0;
      if (value_row >= 0) {
        if (o < p.o) g = widen(w.grad(row)[o]);
        if (c < p.c) v = w.rho(row, j) * A(widen(w.forward.value()[value_row * p.c + c]));
      }
      tile_g[column * kTileStride<A> + depth] = g;
      tile_v[column * kTileStride<A> + depth] = v;
    }
    __syncthreads();
    multiply_tile(tile_g, tile_v, p.batch * p.n, dw);
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t o = first_output + tile_row(h);
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t c = first_channel + tile_column(n, e);
        if (o >= p.o || c >= p.c) continue;
        w.parts[((part * p.o + o) * p.c + c) * p.k + j] = dw.value[n][2 * h + e];
      }
    }
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void bias_grad_kernel(const AggregateBackwardWork<T> w) {
  using A = Accumulate<T>;
  const AggregateParams& p = w.forward.p;
  for (int64_t i = grid_thread(); i < w.part_count * p.o; i += grid_threads()) {
    const int64_t o = i % p.o, part = i / p.o;
    const int64_t end = min((part + 1) * w.rows_each, p.batch * p.n);
    RunningSum<A> sum;
    for (int64_t row = part * w.rows_each; row < end; ++row) sum.add(A(widen(w.grad(row)[o])));
    w.parts[i] = sum.value();
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void add_parts_kernel(
    const Accumulate<T>* parts,  // [count, size]
    void* result,                // [size]
    int64_t count, int64_t size) {
  for (int64_t i = grid_thread(); i < size; i += grid_threads()) {
    RunningSum<Accumulate<T>> sum;
    for (int64_t part = 0; part < count; ++part) sum.add(parts[part * size + i]);
    narrow(sum.value(), static_cast<T*>(result)[i]);
  }
}

}  // namespace convnn::cuda
