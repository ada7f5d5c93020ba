// SPDX-License-Identifier: MIT
// Rows of any dtype in float64, a block of vectors at a time, and sums over them, which have the
// same bits with vectors of every length.
#pragma once

#include "vector.h"

namespace convnn::CONVNN_ISA {

// Some whole vectors of a row. The pointers are to the first of them.
template <int Vectors>
struct RowBlock {
  static constexpr int kVectors = Vectors;

  template <class T>
  Vector<double> load(const T* from, int v = 0) const {
    return load_wide(from + v * kLanes<double>);
  }
  template <class T>
  void store(T* to, Vector<double> x, int v = 0) const {
    store_narrow(to + v * kLanes<double>, x);
  }
};

// The last elements of a row, fewer than a vector has. The other lanes are 0.
struct RowEnd {
  static constexpr int kVectors = 1;
  int64_t count;

  template <class T>
  Vector<double> load(const T* from, int = 0) const {
    T part[kLanes<double>] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = from[i];
    return load_wide(part);
  }
  template <class T>
  void store(T* to, Vector<double> x, int = 0) const {
    T part[kLanes<double>];
    store_narrow(part, x);
    for (int64_t i = 0; i < count; ++i) to[i] = part[i];
  }
};

// Calls visit(block, its first element) for blocks of up to `Vectors` vectors, a power of two, that
// together are a row.
template <int Vectors, class Visit>
inline void each_block(int64_t elements, const Visit& visit, int64_t first = 0) {
  constexpr int64_t kElements = Vectors * kLanes<double>;
  for (; first + kElements <= elements; first += kElements) visit(RowBlock<Vectors>(), first);
  if constexpr (Vectors > 1) {
    each_block<Vectors / 2>(elements, visit, first);
  } else {
    if (first < elements) visit(RowEnd{elements - first}, first);
  }
}

// to[i] = from[i]
template <class T>
inline void widen_row(const T* from, int64_t elements, double* to) {
  each_block<4>(elements, [&](auto block, int64_t first) {
#pragma GCC unroll 4
    for (int v = 0; v < block.kVectors; ++v) {
      block.store(to + first, block.load(from + first, v), v);
    }
  });
}

// Sums of several rows: vectors of sums that stay in registers.
constexpr int kSumVectors = 8;

// sum += scale x
template <class Block, class T>
inline void add_scaled(const Block& block, double scale, const T* x,
                       Vector<double> (&sum)[Block::kVectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < Block::kVectors; ++v) sum[v] += scale * block.load(x, v);
}

// sum += scale x y
template <class Block, class T, class U>
inline void add_scaled(const Block& block, double scale, const T* x, const U* y,
                       Vector<double> (&sum)[Block::kVectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < Block::kVectors; ++v) {
    sum[v] += scale * block.load(x, v) * block.load(y, v);
  }
}

// to = sum
template <class Block, class T>
inline void store_sum(const Block& block, const Vector<double> (&sum)[Block::kVectors], T* to) {
#pragma GCC unroll 8
  for (int v = 0; v < Block::kVectors; ++v) block.store(to, sum[v], v);
}

// The sum of the elements of a row has a fixed order: so many interleaved partial sums, which are
// then added pairwise.
constexpr int kPartial = 16;
constexpr int kPartialVectors = kPartial / kLanes<double>;

inline double sum_of_partial(Vector<double> (&partial)[kPartialVectors]) {
#pragma GCC unroll 8
  for (int half = kPartialVectors / 2; half > 0; half /= 2) {
    for (int v = 0; v < half; ++v) partial[v] += partial[v + half];
  }
  return sum_of_lanes(partial[0]);
}

inline double sum_of_partial(const double* sums) {
  Vector<double> partial[kPartialVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kPartialVectors; ++v) partial[v] = load(sums + v * kLanes<double>);
  return sum_of_partial(partial);
}

// The sum over the vectors of a row of the lanes of term(block, its first element), which must be 0
// where what it loads is.
template <class Term>
inline double sum_of(int64_t elements, const Term& term) {
  constexpr int64_t kWide = kLanes<double>;
  Vector<double> partial[kPartialVectors] = {};
  int64_t i = 0;
  for (; i + kPartial <= elements; i += kPartial) {
#pragma GCC unroll 8
    for (int v = 0; v < kPartialVectors; ++v) partial[v] += term(RowBlock<1>(), i + v * kWide);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kPartialVectors; ++v, i += kWide) {
    if (i + kWide <= elements) {
      partial[v] += term(RowBlock<1>(), i);
    } else if (i < elements) {
      partial[v] += term(RowEnd{elements - i}, i);
    }
  }
  return sum_of_partial(partial);
}

// The dot product of two rows.
template <class X, class Y>
inline double dot(const X* x, const Y* y, int64_t elements) {
  return sum_of(elements,
                [&](auto block, int64_t i) { return block.load(x + i) * block.load(y + i); });
}

}  // namespace convnn::CONVNN_ISA
