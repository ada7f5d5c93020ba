// SPDX-License-Identifier: MIT
#include "inverse_list.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace convnn::cpu {
namespace {

struct NeighborList {
  int64_t batch, n, m, k;
  const int64_t* indices;    // [batch, n, k]
  const void* similarities;  // [batch, n, k]
  DType similarity_dtype;

  bool is_missing(int64_t i) const {
    const double s = similarity_dtype == DType::float64
                         ? static_cast<const double*>(similarities)[i]
                         : static_cast<const float*>(similarities)[i];
    return std::isinf(s) && s < 0;
  }
};

// A counting sort of the pairs of batch element b by the key that they chose.
// offsets [m + 1], pairs [n * k].
void invert_element(const NeighborList& list, int64_t b, int row_bits, int64_t* offsets,
                    int64_t* pairs) {
  const int64_t n = list.n, m = list.m, k = list.k, first = b * n * k;
  std::fill(offsets, offsets + m + 1, 0);
  for (int64_t i = first; i < first + n * k; ++i) {
    if (!list.is_missing(i)) ++offsets[list.indices[i] + 1];
  }
  for (int64_t row = 0; row < m; ++row) offsets[row + 1] += offsets[row];
  // Each offset ends up at the end of its key's pairs, where those of the next key begin.
  for (int64_t slot = 0; slot < k; ++slot) {
    for (int64_t row = 0; row < n; ++row) {
      const int64_t i = first + row * k + slot;
      if (!list.is_missing(i)) pairs[offsets[list.indices[i]]++] = slot << row_bits | row;
    }
  }
  std::copy_backward(offsets, offsets + m, offsets + m + 1);
  offsets[0] = 0;
}

int bits_below(int64_t n) {
  int bits = 0;
  while ((int64_t(1) << bits) < n) ++bits;
  return bits;
}

OwnedInverseList invert(const NeighborList& list, ParallelFor parallel_for) {
  const int64_t pair_count = list.n * list.k;
  constexpr const char* kFor = "the queries that each key is a neighbor of";
  OwnedInverseList inverse = {Workspace(bytes_of(list.batch, list.m + 1, sizeof(int64_t)), kFor),
                              Workspace(bytes_of(list.batch, pair_count, sizeof(int64_t)), kFor),
                              bits_below(list.n)};
  int64_t* offsets = inverse.offsets.as<int64_t>();
  int64_t* pairs = inverse.pairs.as<int64_t>();
  run(parallel_for, list.batch, double(pair_count), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      invert_element(list, b, inverse.row_bits, offsets + b * (list.m + 1), pairs + b * pair_count);
    }
  });
  return inverse;
}

}  // namespace

OwnedInverseList invert(const AggregateParams& p, ParallelFor parallel_for) {
  return invert({p.batch, p.n, p.m, p.k, p.indices, p.similarities, p.similarity_dtype},
                parallel_for);
}

OwnedInverseList invert(const SelectBackwardParams& p, ParallelFor parallel_for) {
  const DType dtype = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  return invert({p.batch, p.n, p.m, p.k, p.indices, p.similarities, dtype}, parallel_for);
}

}  // namespace convnn::cpu
