// SPDX-License-Identifier: MIT
// The arguments of the kernels of query_side.cuh and key_side.cuh.
#pragma once

#include "device.cuh"

namespace convnn::cuda {

// What the key side multiplies rows by, for a pair (i, j): rho_ij for rows of W_j G, and for rows
// of query ds_ij, cosine: ds_ij / ||q_i||.
template <class A>
struct alignas(2 * sizeof(A)) Factors {
  A rho, ds;
};
// They are stored for 32 queries at a time, slot by slot: where a pair has its own.
static_assert(kWarp == 32);
__device__ inline int64_t place_of_factors(int64_t row, int64_t j, int64_t k) {
  return ((row >> 5) * k + j) << 5 | (row & 31);
}

// Pointers to what is absent or not needed are null.
template <class T>
struct QuerySideWork {
  using A = Accumulate<T>;

  int64_t rows, n, m, c, d, k;  // rows: of all batch elements
  Metric metric;
  Rho rho;
  A scale;
  DType similarity_dtype;
  const void* similarities;  // [rows, k] similarity_dtype
  const int64_t* indices;    // [rows, k]

  const T* grad;            // G [rows, c]
  const T* value;           // V [batch, m, c]
  const T* weight;          // W [k, c]
  bool through_rho;         // whether ds depends on drho
  const void* direct;       // [rows, k] similarity_dtype: a gradient of the similarities themselves
  void* grad_similarities;  // ds [rows, k] similarity_dtype
  Factors<A>* factors;      // [ceil(rows / 32), k, 32]

  const T* query;      // [rows, d]
  const T* key;        // [batch, m, d]
  const A* key_units;  // [batch, m] unit_of() a row of key, cosine
  T* grad_query;       // dq [rows, d]

  bool of_weight, of_bias;  // whether parts of dW and of db are needed
  bool adds;                // to the parts that there are
  A* parts;                 // [blocks, size_of_part()], of warps if they are not in shared memory
  bool parts_are_shared;    // summed in shared memory
  // Blocks with the same number modulo `processors`, `each` of them, share a range of tiles.
  int processors, each;
  int64_t range;
  unsigned char* arrays;  // [warps, bytes_of_arrays()] if they are not in shared memory
  bool arrays_are_shared;

  __device__ bool has_ds() const { return through_rho || direct || grad_similarities; }
  // dW [k, c] and db [c].
  __host__ __device__ int64_t size_of_part() const {
    return of_weight || of_bias ? (of_weight ? k : 0) * c + c : 0;
  }
};

}  // namespace convnn::cuda
