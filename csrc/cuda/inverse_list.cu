// SPDX-License-Identifier: MIT
#include "inverse_list.cuh"

#include "sort.h"

namespace convnn::cuda {
namespace {

InverseList invert(int64_t batch, int64_t n, int64_t m, int64_t k, const int64_t* indices,
                   const void* similarities, DType similarity_dtype, Context& context) {
  const int64_t count = batch * n * k, limit = batch * m;
  int64_t* rows = allocate<int64_t>(context, count);
  int64_t* offsets = allocate<int64_t>(context, limit + 1);
  launch("chosen_rows_kernel", chosen_rows_kernel, strided_blocks(count), 0, context, indices,
         similarities, similarity_dtype, rows, batch, n, m, k);
  const int64_t* pairs = sort_positions(rows, count, limit, context);
  launch("offsets_kernel", offsets_kernel, strided_blocks(limit + 1), 0, context, rows, pairs,
         offsets, count, limit);
  return {offsets, pairs, rows, limit, count, 0, 0};
}

}  // namespace

InverseList invert(const AggregateParams& p, Context& context) {
  return invert(p.batch, p.n, p.m, p.k, p.indices, p.similarities, p.similarity_dtype, context);
}

InverseList in_chunks(InverseList list, int64_t columns) {
  list.chunk = std::max(kFewestOfChunk, columns);
  list.chunks = list.pair_count / list.chunk;
  return list;
}

}  // namespace convnn::cuda
