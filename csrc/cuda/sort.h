// SPDX-License-Identifier: MIT
// A stable sort on the device.
#pragma once

#include "operators.h"

namespace convnn::cuda {

// The positions 0 to count - 1 in ascending order of keys [count], equal keys by position. Keys
// are between 0 and `largest`. Nothing is added atomically: the order is the same in every run.
const int64_t* sort_positions(const int64_t* keys, int64_t count, int64_t largest,
                              Context& context);

// keys [count] clamped into the range: those outside [0, limit) become `limit`.
const int64_t* keys_in_range(const int64_t* keys, int64_t count, int64_t limit, Context& context);

// rows [batch, count] ascending in each batch element; those outside [0, limit) become `limit`.
const int64_t* sort_rows(const int64_t* rows, int64_t batch, int64_t count, int64_t limit,
                         Context& context);

// values [count] at the given positions [count], in their order.
const int64_t* gather(const int64_t* values, const int64_t* positions, int64_t count,
                      Context& context);

}  // namespace convnn::cuda
