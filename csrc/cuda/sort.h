// SPDX-License-Identifier: MIT
// A stable sort on the device, and the inverse neighbor list that rests on it.
#pragma once

#include "launch.h"

namespace convnn::cuda {

// The positions 0 to count - 1 in ascending order of keys [count], equal keys by position. Keys
// are between 0 and `largest`. Nothing is added atomically: the order is the same in every run.
const int64_t* sort_positions(const int64_t* keys, int64_t count, int64_t largest,
                              Context& context);

// keys [count] clamped into the range: those outside [0, limit) become `limit`.
const int64_t* keys_in_range(const int64_t* keys, int64_t count, int64_t limit, Context& context);

// values [count] at the given positions [count], in their order.
const int64_t* gather(const int64_t* values, const int64_t* positions, int64_t count,
                      Context& context);

// For each row of key, the pairs (query i, slot j) that chose it: pairs[at] for offsets[row] <= at
// < offsets[row + 1], ascending. A pair is the number (batch * k + j) * n + i: by slot, then by
// query. Missing neighbors and indices out of range are in no list.
//
// runs.cuh sums over the pairs of a row, in chunks first. They have at least as many pairs as there
// are columns to sum, so that all sums of chunks are at most as many numbers as there are pairs.
constexpr int64_t kFewestOfChunk = 128;
struct InverseNeighbors {
  const int64_t* offsets;  // [row_count + 1]
  const int64_t* pairs;    // [batch * n * k]
  const int64_t* rows;     // [batch * n * k] by pair: the row that it chose, or row_count
  int64_t row_count;       // batch * m
  int64_t chunk, chunks;   // pairs of a chunk, and chunks of the list
};
InverseNeighbors invert(int64_t batch, int64_t n, int64_t m, int64_t k, const int64_t* indices,
                        const void* similarities, DType similarity_dtype, int64_t columns,
                        Context& context);

}  // namespace convnn::cuda
