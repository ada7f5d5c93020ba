// SPDX-License-Identifier: MIT
// Rows of query, key, value and gradients, of which the eight lanes of a group read 16 bytes each,
// and sums over the lanes of a group or over the groups of a warp. All sums have a fixed order.
#pragma once

#include "normalize.cuh"

namespace convnn::cuda {

constexpr int kGroup = 8;  // lanes that share a row
constexpr int kGroups = kWarp / kGroup;
// Elements in 16 bytes, and those of a row that a group has at a time.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));
template <class T>
constexpr int kStretch = kGroup * kVector<T>;

__device__ inline int group() { return lane() / kGroup; }
// The number of this lane in its group.
__device__ inline int member() { return lane() % kGroup; }

// kVector<T> elements, as they lie in memory.
struct alignas(16) Packed {
  uint32_t words[4];
};

template <class T>
__device__ inline void unpack(const Packed& x, Accumulate<T> (&values)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if constexpr (std::is_same_v<T, double>) {
      const uint64_t high = x.words[2 * i + 1];
      values[i] = __longlong_as_double(int64_t(high << 32 | x.words[2 * i]));
    } else if constexpr (std::is_same_v<T, float>) {
      values[i] = __uint_as_float(x.words[i]);
    } else {
      values[i] = widen(T{uint16_t(x.words[i / 2] >> 16 * (i % 2))});
    }
  }
}

template <class T>
__device__ inline void set(Packed& x, int i, T element) {
  if constexpr (std::is_same_v<T, double>) {
    const auto bits = uint64_t(__double_as_longlong(element));
    x.words[2 * i] = uint32_t(bits);
    x.words[2 * i + 1] = uint32_t(bits >> 32);
  } else if constexpr (std::is_same_v<T, float>) {
    x.words[i] = __float_as_uint(element);
  } else {
    x.words[i / 2] |= uint32_t(element.bits) << 16 * (i % 2);
  }
}

// Reads 16 bytes, or gives x. The memory is not written in the same launch.
__device__ inline Packed load_if(bool reads, const void* address, Packed x) {
#ifdef __CUDACC__
  // A load with a predicate: the compiler would branch around it, and wait for one before the next.
  asm("{\n"
      ".reg .pred reads;\n"
      "setp.ne.u32 reads, %5, 0;\n"
      "@reads ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(x.words[0]), "+r"(x.words[1]), "+r"(x.words[2]), "+r"(x.words[3])
      : "l"(address), "r"(uint32_t(reads)));
#else
  if (reads) copy16(&x, address);
#endif
  return x;
}

// The type of the numbers of rows: 32 bits only if all rows consist of whole 16 bytes and begin at
// multiples of them.
template <bool kFast>
using RowNumber = std::conditional_t<kFast, int32_t, int64_t>;

// Elements of 1.
template <class T>
__device__ inline Packed ones() {
  T one;
  narrow(Accumulate<T>(1), one);
  Packed x = {{0, 0, 0, 0}};
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) set(x, i, one);
  return x;
}

// Elements of a row of x from column c on; what `otherwise` has if the row is negative, or from
// `columns` on.
template <class T, class Row>
__device__ inline Packed load_row(const T* x, Row row, int64_t c, int64_t columns,
                                  Packed otherwise = {{0, 0, 0, 0}}) {
  if constexpr (sizeof(Row) == 4) {
    const uint64_t offset = uint64_t(uint32_t(row)) * uint32_t(columns * int64_t(sizeof(T)));
    return load_if(row >= 0 && c < columns, reinterpret_cast<const char*>(x + c) + offset,
                   otherwise);
  } else {
    if (row < 0 || c >= columns) return otherwise;
    Packed packed = {{0, 0, 0, 0}};
    const T* elements = x + row * columns + c;
    if (is_aligned16(elements) && c + kVector<T> <= columns) {
      copy16(&packed, elements);
      return packed;
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (c + i < columns) set(packed, i, elements[i]);
    }
    return packed;
  }
}

template <class T, bool kAligned>
__device__ inline void store_row(T* row, int64_t c, int64_t columns,
                                 const Accumulate<T> (&values)[kVector<T>]) {
  T elements[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) narrow(values[i], elements[i]);
  if constexpr (kAligned) {
    Packed x = {{0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) set(x, i, elements[i]);
    if (c < columns) copy16(row + c, &x);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (c + i < columns) row[c + i] = elements[i];
    }
  }
}

// The sum of values[i] over the lanes of a group, for i = member() % kCount. A lane passes on half
// of its values at a time. kCount: a power of two, at most kGroup.
template <int kCount, class A>
__device__ inline A sum_to_members(A (&values)[kCount]) {
#pragma unroll
  for (int span = kGroup / 2; span > 0; span /= 2) {
    if (span >= kCount) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], span);
      continue;
    }
    const bool upper = lane() & span;
#pragma unroll
    for (int i = 0; i < span; ++i) {
      const A sent = upper ? values[i] : values[i + span];
      values[i] = (upper ? values[i + span] : values[i]) + __shfl_xor_sync(kAllLanes, sent, span);
    }
  }
  return values[0];
}

template <class A>
__device__ inline A group_sum(A x) {
#pragma unroll
  for (int span = kGroup / 2; span > 0; span /= 2) x += __shfl_xor_sync(kAllLanes, x, span);
  return x;
}

// Adds the sums of values over the groups of the warp to sums[c + i], for c + i < columns. A lane
// passes on half of its values at a time, and adds those that remain.
template <int kCount, class A>
__device__ inline void add_sums_of_groups(A (&values)[kCount], A* sums, int64_t c,
                                          int64_t columns) {
  int count = kCount;
  bool adds = true;
#pragma unroll
  for (int span = kWarp / 2; span >= kGroup; span /= 2) {
    const bool upper = lane() & span;
    if (count == 1) {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], span);
      adds = adds && !upper;
      continue;
    }
    count /= 2;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= count) break;
      const A sent = upper ? values[i] : values[i + count];
      values[i] = (upper ? values[i + count] : values[i]) + __shfl_xor_sync(kAllLanes, sent, span);
    }
    if (upper) c += count;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count && adds && c + i < columns) sums[c + i] += values[i];
  }
}

// What turns a row into its unit vector: 1 / its norm, 0 of a row that counts as zero, NaN of one
// with infinity. `sum` is that of its squares.
template <class T>
__device__ inline Accumulate<T> unit_of(Accumulate<T> sum, const T* row, int64_t d) {
  using A = Accumulate<T>;
  constexpr A kLeast = std::is_same_v<A, double> ? A(1e-250) : A(1e-29);
  A scale = 1;
  if (!(sum >= kLeast && sum <= 1 / kLeast)) {
    // Squares may have left the range of A.
    A largest = 0;
    for (int64_t i = 0; i < d; ++i) {
      const A size = fabs(A(widen(row[i])));
      if (size > largest) largest = size;
    }
    scale = scale_of(largest);
    sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += A(widen(row[i])) * scale * (A(widen(row[i])) * scale);
  }
  const A norm = sqrt(sum);
  if (norm == kInfinity<A>) return kNan<A>;
  return norm / scale <= A(kCosineEpsilon) ? A(0) : scale / norm;
}

// unit_of() the rows from `first` on, kRows for each group, in the lane of that number; 0 in
// others.
template <class T, bool kFast, int kRows>
__device__ inline Accumulate<T> units_of_rows(const T* x,  // [rows, d]
                                              int64_t first, int64_t rows, int64_t d) {
  using A = Accumulate<T>;
  A sums[kRows] = {};
  for (int64_t c = member() * kVector<T>; c - member() * kVector<T> < d; c += kStretch<T>) {
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      const int64_t row = first + group() * kRows + t;
      A values[kVector<T>];
      unpack<T>(load_row(x, RowNumber<kFast>(row < rows ? row : -1), c, d), values);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sums[t] += values[i] * values[i];
    }
  }
  A sum = sum_to_members(sums);
  if (kRows < kGroup) {
    sum = __shfl_sync(kAllLanes, sum, lane() / kRows * kGroup % kWarp + lane() % kRows);
  }
  const int64_t row = first + lane();
  return lane() < kGroups * kRows && row < rows ? unit_of(sum, x + row * d, d) : A(0);
}

template <class T, bool kFast>
__global__ __launch_bounds__(kThreads) void units_kernel(const T* x,            // [rows, d]
                                                         Accumulate<T>* units,  // [rows]
                                                         int64_t rows, int64_t d) {
  const int64_t first = grid_warp() * kWarp, row = first + lane();
  const Accumulate<T> unit = units_of_rows<T, kFast, kGroup>(x, first, rows, d);
  if (row < rows) units[row] = unit;
}

}  // namespace convnn::cuda
