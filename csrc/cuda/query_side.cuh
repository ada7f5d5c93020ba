// SPDX-License-Identifier: MIT
// Gradients query by query, with G the gradient of the output and W depthwise, or 1 (Eq. 6):
//
//   drho_ij = sum_c G_i[c] W[c, j] V[I_ij, c]      dW[c, j] = sum_i rho_ij G_i[c] V[I_ij, c]
//   ds_i    = the derivative of rho (section 4.1) times drho_i, + the gradient of the returned s_i
//   dot        dq_i = sum_j ds_ij k_j              db[c] = sum_i G_i[c]
//   euclidean  dq_i = sum_j -2 ds_ij (q_i - k_j)
//   cosine     dq_i = (sum_j ds_ij (u_j - s_ij u_i)) / ||q_i||, with u the unit vectors
//
// A warp has a tile of queries, kRows for each of its groups of eight lanes, and then the next one
// that is its own. Whatever has one number per pair is computed by the lane of the query. With the
// rows of V and of key, slot by slot, the lanes of a group have 16 bytes each of a row: kRows rows
// at a time, so that many loads are under way. The rows of G, then the sums of dq, stay in
// registers while the slots pass.
//
// rho, drho and ds of a tile are in shared memory, or in a workspace where k is large; so is the
// part of dW and db that a warp, or a block, sums. rho and ds of all pairs are stored for the key
// side, which needs them in another order. There are no atomic additions: tiles belong to warps,
// parts are added up in order.
#pragma once

#include "neighbors.cuh"
#include "query_side.h"
#include "rows.cuh"

namespace convnn::cuda {

// Numbers of the pairs of a tile: slot by slot, and in it query by query.
template <class T, bool kFast, int kRows>
struct TileArrays {
  using A = Accumulate<T>;
  using Row = RowNumber<kFast>;
  static constexpr int kTileRows = kRows * kGroups;

  Row* row;  // [k, kTileRows] of key and value, among those of all batch elements; -1: missing
  A* rho;    // [k, kTileRows]
  A* ds;     // [k, kTileRows] drho; then ds; then, cosine, ds_ij / ||k_j||
  A* unit;   // [kTileRows] cosine: unit_of() the query, 0 of one without a neighbor
  A* back;   // [kTileRows] cosine: that times sum_j ds_ij s_ij

  __host__ __device__ static int64_t bytes(int64_t k) {
    return kTileRows * (k * int64_t(sizeof(Row) + 2 * sizeof(A)) + 2 * int64_t(sizeof(A)));
  }
  __device__ TileArrays(unsigned char* memory, int64_t k) {
    unit = reinterpret_cast<A*>(memory);
    back = unit + kTileRows;
    row = reinterpret_cast<Row*>(back + kTileRows);
    rho = reinterpret_cast<A*>(row + k * kTileRows);
    ds = rho + k * kTileRows;
  }
};

// A sum whose rounding errors are added up, too (Kahan), since the lane of a query takes one term
// after the other.
template <class A>
class ExactSum {
 public:
  __device__ void add(A x) {
    const A term = x - error_, sum = sum_ + term;
    error_ = isfinite(sum) ? (sum - sum_) - term : A(0);
    sum_ = sum;
  }
  __device__ A value() const { return sum_; }

 private:
  A sum_ = 0, error_ = 0;
};

// Neighboring numbers of an array whose address is a multiple of 16 bytes or of all of them.
template <int kCount, class X>
__device__ inline void load_together(X (&values)[kCount], const X* source) {
  constexpr int kBytes = kCount * int(sizeof(X));
  if constexpr (kBytes % 16 == 0) {
    struct alignas(16) Block {
      X values[16 / sizeof(X)];
    };
    Block blocks[kBytes / 16];
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      copy16(blocks + i, source + i * int(16 / sizeof(X)));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = blocks[i / int(16 / sizeof(X))].values[i % int(16 / sizeof(X))];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = source[i];
  }
}

// The rows of key and rho of the query of this lane. S: the type of the similarities.
template <class S, class T, bool kFast, int kRows>
__device__ inline void modulate_query(const QuerySideWork<T>& w,
                                      const TileArrays<T, kFast, kRows>& a, int64_t row) {
  using A = Accumulate<T>;
  using Arrays = TileArrays<T, kFast, kRows>;
  using Row = typename Arrays::Row;
  constexpr int kTileRows = Arrays::kTileRows;
  const bool has = row < w.rows;
  // Most rows have 32 bits, and so a shorter division.
  const int64_t b = kFast ? int64_t(uint32_t(row) / uint32_t(w.n)) : row / w.n;
  const S* similarities = static_cast<const S*>(w.similarities) + row * w.k;
  const int64_t* indices = w.indices + row * w.k;
  // That of the largest logit. A NaN among them does not matter: the sum is NaN.
  S best = 0;
  bool any = false;
  for (int64_t j = 0; j < w.k; ++j) {
    int64_t key = -1;
    if (has) {
      const int64_t index = indices[j];
      const S s = similarities[j];
      if (index >= 0 && index < w.m && s != -kInfinity<S>) {
        key = b * w.m + index;
        if (!any || S(w.scale) * (s - best) > 0) best = s;
        any = true;
      }
    }
    a.row[j * kTileRows + lane()] = Row(key);
  }
  if (!w.grad) return;
  ExactSum<A> sum;
  for (int64_t j = 0; j < w.k; ++j) {
    const int64_t at = j * kTileRows + lane();
    A rho = 0;
    if (a.row[at] >= 0) {
      const S s = similarities[j];
      rho = w.rho == Rho::softmax ? exp(A(S(w.scale) * (s - best)))
            : w.rho == Rho::ones  ? A(1)
                                  : A(w.scale) * A(s);
    }
    a.rho[at] = rho;
    sum.add(rho);
  }
  if (w.rho != Rho::softmax) return;
  for (int64_t j = 0; j < w.k; ++j) {
    const int64_t at = j * kTileRows + lane();
    // The sum may be NaN, but rho of a missing neighbor is 0.
    if (a.row[at] >= 0) a.rho[at] /= sum.value();
  }
}

// drho, in the place of ds, and what the tile adds to the part of dW and db.
template <class T, bool kFast, int kRows>
__device__ inline void differentiate_output(const QuerySideWork<T>& w,
                                            const TileArrays<T, kFast, kRows>& a,
                                            RowNumber<kFast> first, Accumulate<T>* part) {
  using A = Accumulate<T>;
  using Arrays = TileArrays<T, kFast, kRows>;
  constexpr int kTileRows = Arrays::kTileRows, kCount = kVector<T>;
  const int own = group() * kRows;
  for (int64_t c = member() * kCount; c - member() * kCount < w.c; c += kStretch<T>) {
    Packed g[kRows];
    A sums[kCount] = {};
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      const int64_t row = first + own + t;
      g[t] = load_row(w.grad, RowNumber<kFast>(row < w.rows ? row : -1), c, w.c);
      A values[kCount];
      unpack<T>(g[t], values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += values[i];
    }
    if (w.of_bias) add_sums_of_groups(sums, part + (w.of_weight ? w.k : 0) * w.c, c, w.c);
    if (!w.value) continue;
    for (int64_t j = 0; j < w.k; ++j) {
      typename Arrays::Row rows[kRows];
      load_together(rows, a.row + j * kTileRows + own);
      Packed v[kRows];
#pragma unroll
      for (int t = 0; t < kRows; ++t) v[t] = load_row(w.value, rows[t], c, w.c);
      A weight[kCount];
      if (w.weight) {
        unpack<T>(load_row(w.weight, RowNumber<kFast>(j), c, w.c), weight);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) weight[i] = 1;
      }
      A rho[kRows], drho[kRows] = {}, dw[kCount] = {};
      load_together(rho, a.rho + j * kTileRows + own);
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        // Of a missing neighbor nothing is added, also where G is not finite.
        const uint32_t mask = rows[t] >= 0 ? 0xFFFFFFFFu : 0;
        Packed masked;
#pragma unroll
        for (int i = 0; i < 4; ++i) masked.words[i] = g[t].words[i] & mask;
        A of_grad[kCount], of_value[kCount];
        unpack<T>(masked, of_grad);
        unpack<T>(v[t], of_value);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const A x = of_grad[i] * of_value[i];
          drho[t] += x * weight[i];
          dw[i] += rho[t] * x;
        }
      }
      if (w.through_rho) {
        const A sum = sum_to_members(drho);
        A* result = a.ds + j * kTileRows + own + member() % kRows;
        if (member() < kRows) *result = (c < kStretch<T> ? A(0) : *result) + sum;
      }
      if (w.of_weight) add_sums_of_groups(dw, part + j * w.c, c, w.c);
    }
    __syncwarp();
  }
}

// ds of the query of this lane. Returns sum_j ds_ij s_ij.
template <class S, class T, bool kFast, int kRows>
__device__ inline Accumulate<T> differentiate_rho(const QuerySideWork<T>& w,
                                                  const TileArrays<T, kFast, kRows>& a,
                                                  int64_t row) {
  using A = Accumulate<T>;
  constexpr int kTileRows = TileArrays<T, kFast, kRows>::kTileRows;
  const S* similarities = static_cast<const S*>(w.similarities) + row * w.k;
  const S* direct = static_cast<const S*>(w.direct);
  S* result = static_cast<S*>(w.grad_similarities);
  // Softmax: ds_j = scale rho_j (drho_j - mean), with the mean weighted by rho. A constant added to
  // all drho_j does not change it, so one of them is subtracted: equal ones give exactly 0.
  A origin = 0;
  ExactSum<A> mean;
  if (w.through_rho && w.rho == Rho::softmax) {
    bool any = false;
    for (int64_t j = 0; j < w.k; ++j) {
      const int64_t at = j * kTileRows + lane();
      if (a.row[at] < 0) continue;
      if (!any && isfinite(a.ds[at])) origin = a.ds[at];
      any = true;
      mean.add(a.rho[at] * (a.ds[at] - origin));
    }
  }
  A along = 0;
  for (int64_t j = 0; j < w.k; ++j) {
    const int64_t at = j * kTileRows + lane();
    A ds = 0;
    if (a.row[at] >= 0) {
      if (w.through_rho) {
        ds = a.ds[at];
        if (w.rho == Rho::softmax) ds = w.scale * a.rho[at] * (ds - origin - mean.value());
      }
      if (direct) ds += A(direct[row * w.k + j]);
      along += ds * A(similarities[j]);
    }
    a.ds[at] = ds;
    if (result && row < w.rows) result[row * w.k + j] = S(ds);
  }
  return along;
}

// Stores what the key side multiplies by, and divides ds by the norm of the key. `unit`: unit_of()
// the query of this lane.
template <class T, bool kFast, int kRows>
__device__ inline void finish_factors(const QuerySideWork<T>& w,
                                      const TileArrays<T, kFast, kRows>& a, int64_t row,
                                      Accumulate<T> unit) {
  using A = Accumulate<T>;
  constexpr int kTileRows = TileArrays<T, kFast, kRows>::kTileRows;
  for (int64_t j = 0; j < w.k; ++j) {
    const int64_t at = j * kTileRows + lane();
    const A rho = w.grad ? a.rho[at] : A(0), ds = w.has_ds() ? a.ds[at] : A(0);
    if (w.factors && row < w.rows) {
      w.factors[place_of_factors(row, j, w.k)] = {rho, w.metric == Metric::cosine ? ds * unit : ds};
    }
    if (w.grad_query && w.metric == Metric::cosine) {
      a.ds[at] = a.row[at] >= 0 ? ds * w.key_units[a.row[at]] : A(0);
    }
  }
}

// What the neighbors in slot j add to the sums of dq in columns c and following.
template <class T, bool kFast, int kRows>
__device__ inline void add_keys(const QuerySideWork<T>& w, const TileArrays<T, kFast, kRows>& a,
                                int64_t j, int64_t c, Accumulate<T> (&sums)[kRows][kVector<T>]) {
  using A = Accumulate<T>;
  const int64_t at = j * a.kTileRows + group() * kRows;
  RowNumber<kFast> rows[kRows];
  A ds[kRows];
  load_together(rows, a.row + at);
  load_together(ds, a.ds + at);
  // Half of the rows at a time: the sums leave few registers.
  constexpr int kTogether = kRows / 2;
#pragma unroll
  for (int first = 0; first < kRows; first += kTogether) {
    Packed x[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) x[t] = load_row(w.key, rows[first + t], c, w.d);
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      A values[kVector<T>];
      unpack<T>(x[t], values);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sums[first + t][i] += ds[first + t] * values[i];
    }
  }
}

// As add_keys() for the Euclidean distance, from differences.
template <class T, bool kFast, int kRows>
__device__ inline void add_differences(const QuerySideWork<T>& w,
                                       const TileArrays<T, kFast, kRows>& a, int64_t j, int64_t c,
                                       const Packed (&q)[kRows],
                                       Accumulate<T> (&sums)[kRows][kVector<T>]) {
  using A = Accumulate<T>;
  const int64_t at = j * a.kTileRows + group() * kRows;
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    const RowNumber<kFast> row = a.row[at + t];
    if (row < 0) continue;
    A values[kVector<T>], of_query[kVector<T>];
    unpack<T>(load_row(w.key, row, c, w.d), values);
    unpack<T>(q[t], of_query);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      sums[t][i] += 2 * a.ds[at + t] * (values[i] - of_query[i]);
    }
  }
}

// dq of a tile.
template <class T, bool kFast, int kRows>
__device__ inline void differentiate_query(const QuerySideWork<T>& w,
                                           const TileArrays<T, kFast, kRows>& a,
                                           RowNumber<kFast> first) {
  using A = Accumulate<T>;
  constexpr int kCount = kVector<T>;
  const int own = group() * kRows;
  const auto load_query = [&](int t, int64_t c) {
    const int64_t row = first + own + t;
    return load_row(w.query, RowNumber<kFast>(row < w.rows ? row : -1), c, w.d);
  };
  for (int64_t c = member() * kCount; c - member() * kCount < w.d; c += kStretch<T>) {
    A sums[kRows][kCount] = {};
    if (w.metric == Metric::euclidean) {
      Packed q[kRows];
#pragma unroll
      for (int t = 0; t < kRows; ++t) q[t] = load_query(t, c);
      for (int64_t j = 0; j < w.k; ++j) add_differences(w, a, j, c, q, sums);
    } else {
      for (int64_t j = 0; j < w.k; ++j) add_keys(w, a, j, c, sums);
    }
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      const int64_t row = first + own + t;
      // Not all rows of query at a time: registers are few.
      __syncwarp();
      if (w.metric == Metric::cosine) {
        const A unit = a.unit[own + t], back = a.back[own + t];
        A of_query[kCount];
        unpack<T>(load_query(t, c), of_query);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          // A row that counts as zero, or is in no pair, has gradient 0, whatever its elements are.
          sums[t][i] = unit == 0 ? A(0) : unit * (sums[t][i] - back * of_query[i]);
        }
      }
      if (row < w.rows) store_row<T, kFast>(w.grad_query + row * w.d, c, w.d, sums[t]);
    }
  }
}

// One tile of queries from `first` on.
template <class T, bool kFast, int kRows>
__device__ inline void query_tile(const QuerySideWork<T>& w, const TileArrays<T, kFast, kRows>& a,
                                  RowNumber<kFast> first, Accumulate<T>* part) {
  using A = Accumulate<T>;
  const int64_t row = first + lane();
  const bool has = lane() < TileArrays<T, kFast, kRows>::kTileRows;
  const bool is_double = w.similarity_dtype == DType::float64;
  if (has && is_double) modulate_query<double>(w, a, row);
  if (has && !is_double) modulate_query<float>(w, a, row);
  __syncwarp();
  if (w.grad && (w.through_rho || part)) differentiate_output(w, a, first, part);
  __syncwarp();
  A unit = 0, along = 0;
  if (w.query && w.metric == Metric::cosine) {
    unit = units_of_rows<T, kFast, kRows>(w.query, first, w.rows, w.d);
  }
  if (has) {
    if (w.has_ds()) {
      along =
          is_double ? differentiate_rho<double>(w, a, row) : differentiate_rho<float>(w, a, row);
    }
    finish_factors(w, a, row, unit);
    // A query without a neighbor.
    bool any = false;
    for (int64_t j = 0; j < w.k; ++j) any |= a.row[j * a.kTileRows + lane()] >= 0;
    a.unit[lane()] = any ? unit : A(0);
    a.back[lane()] = along * unit;
  }
  __syncwarp();
  if (w.grad_query) differentiate_query(w, a, first);
  __syncwarp();
}

// Blocks per multiprocessor, at least: with this bound the compiler spills nothing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kQuerySideBlocks = 4;
#else
constexpr int kQuerySideBlocks = 3;
#endif

template <class T, bool kFast, int kRows>
__global__ __launch_bounds__(kThreads,
                             kQuerySideBlocks) void query_side_kernel(const QuerySideWork<T> w) {
  using A = Accumulate<T>;
  using Arrays = TileArrays<T, kFast, kRows>;
  const int64_t bytes = Arrays::bytes(w.k), size = w.size_of_part();
  // Parts first, if they are shared, then the arrays of warps.
  A* shared_parts = reinterpret_cast<A*>(shared_memory());  // [kWarps, size]
  unsigned char* arrays =
      kFast || w.arrays_are_shared
          ? shared_memory() + (w.parts_are_shared ? (kWarps * size * sizeof(A) + 15) / 16 * 16 : 0)
          : w.arrays + blockIdx.x * int64_t(kWarps) * bytes;
  const Arrays a(arrays + warp() * bytes, w.k);
  A* part = size == 0            ? nullptr
            : w.parts_are_shared ? shared_parts + warp() * size
                                 : w.parts + grid_warp() * size;
  if (w.parts_are_shared || !w.adds) {
    for (int64_t i = lane(); i < size; i += kWarp) part[i] = 0;
    __syncwarp();
  }
  using Row = RowNumber<kFast>;
  // Blocks that probably share a multiprocessor have queries side by side, so that some of the rows
  // of V and K that they gather are in L1.
  const int number = int(blockIdx.x) / w.processors;
  const int processor = int(blockIdx.x) - number * w.processors;
  const Row end = min(Row(processor + 1) * Row(w.range) * Arrays::kTileRows, Row(w.rows));
  const Row step = Row(w.each) * kWarps * Arrays::kTileRows;
  const Row begin = Row(processor) * Row(w.range) + Row(number * kWarps + warp());
  for (Row first = begin * Arrays::kTileRows; first < end; first += step) {
#ifdef __CUDACC__
    // The compiler would keep multiples of this number, too, for which there are no registers.
    if constexpr (kFast) asm volatile("" : "+r"(first));
#endif
    query_tile(w, a, first, part);
  }
  if (!w.parts_are_shared) return;
  __syncthreads();
  A* result = w.parts + blockIdx.x * size;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    A sum = w.adds ? result[i] : A(0);
    for (int of_warp = 0; of_warp < kWarps; ++of_warp) sum += shared_parts[of_warp * size + i];
    result[i] = sum;
  }
}

// Adds up parts, and turns those of dW around: a thread of each group of eight columns adds every
// sixteenth part, and then the sixteen sums are added.
template <class T>
__global__ __launch_bounds__(kThreads) void sum_parts_kernel(
    const Accumulate<T>* parts,  // [count, stride]
    T* result,                   // [c, k]
    int64_t count, int64_t stride, int64_t c, int64_t k) {
  using A = Accumulate<T>;
  A* sums = reinterpret_cast<A*>(shared_memory());  // [kThreads]
  const int64_t column = int64_t(blockIdx.x) * kGroup + member();
  A sum = 0;
  if (column < c * k) {
    for (int64_t i = threadIdx.x / kGroup; i < count; i += kThreads / kGroup) {
      sum += parts[i * stride + column];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kGroup || column >= c * k) return;
  sum = 0;
  for (int i = 0; i < kThreads / kGroup; ++i) sum += sums[i * kGroup + threadIdx.x];
  narrow(sum, result[column % c * k + column / c]);
}

}  // namespace convnn::cuda
