// SPDX-License-Identifier: MIT
// The pairs (i, j) of queries and neighbors, sorted by key.
#pragma once

#include "operators.h"

namespace convnn::cuda {

// The pairs whose neighbor is a key, from begins[key] to ends[key], ascending. A pair is the number
// i << shift | j, with i the query and key the row among those of all batch elements. Missing
// neighbors and indices out of range are in no list. Numbers have 32 bits if `is_narrow`, else 64.
struct PairList {
  bool is_narrow;
  int shift;
  const void* pairs;   // [count]
  const void* begins;  // [batch * m]
  const void* ends;    // [batch * m]
  int64_t count;       // batch * n * k
};

// Whether pairs, rows and positions fit into 32 bits.
bool fit_narrow_pairs(int64_t batch, int64_t n, int64_t m, int64_t k);

PairList sort_pairs(int64_t batch, int64_t n, int64_t m, int64_t k, bool is_narrow,
                    const void* similarities, DType similarity_dtype, const int64_t* indices,
                    Context& context);

}  // namespace convnn::cuda
