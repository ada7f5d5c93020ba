// SPDX-License-Identifier: MIT
// The inverse neighbor list on the device.
#pragma once

#include "operators.h"

namespace convnn::cuda {

// For each row of key, the pairs (query i, slot j) that chose it: pairs[at] for offsets[row] <= at
// < offsets[row + 1], ascending. A pair is the number (batch * k + j) * n + i: by slot, then by
// query. Missing neighbors and indices out of range are in no list.
//
// runs.cuh sums over the pairs of a row, in chunks first; in_chunks() sets their size.
struct InverseList {
  const int64_t* offsets;  // [row_count + 1]
  const int64_t* pairs;    // [batch * n * k]
  const int64_t* rows;     // [batch * n * k] by pair: the row that it chose, or row_count
  int64_t row_count;       // batch * m
  int64_t pair_count;      // batch * n * k
  int64_t chunk, chunks;   // pairs of a chunk, and chunks of the list
};

InverseList invert(const AggregateParams& params, Context& context);

// The list cut into chunks for sums of so many columns. A chunk has at least as many pairs as there
// are columns, so the sums of all chunks are at most as many numbers as there are pairs.
constexpr int64_t kFewestOfChunk = 128;
InverseList in_chunks(InverseList list, int64_t columns);

}  // namespace convnn::cuda
