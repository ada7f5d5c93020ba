// SPDX-License-Identifier: MIT
#include "sort.cuh"

namespace convnn::cuda {

const int64_t* sort_positions(const int64_t* keys, int64_t count, int64_t largest,
                              Context& context) {
  SortPass pass = {};
  pass.keys = keys;
  pass.count = count;
  // Whole steps of a warp, and no more blocks than sum_counts_kernel is meant for.
  pass.each = std::max<int64_t>(8, ceil_div(count, kSortBlocks * kThreads)) * kWarp;
  pass.blocks = std::max<int64_t>(1, ceil_div(count, pass.each * kWarps));
  pass.before = allocate<int64_t>(context, kDigits * pass.blocks);
  pass.totals = allocate<int64_t>(context, kDigits);
  int64_t* const results[] = {allocate<int64_t>(context, count), allocate<int64_t>(context, count)};
  constexpr size_t kCounts = kWarps * kDigits * sizeof(int);
  constexpr size_t kPlaces = (kWarps + 1) * kDigits * sizeof(int64_t);
  // One pass at least: without any there would be no positions.
  do {
    pass.sorted = results[pass.shift / kDigitBits % 2];
    launch("count_digits_kernel", count_digits_kernel, pass.blocks, kCounts, context, pass);
    launch("sum_counts_kernel", sum_counts_kernel, kDigits, kThreads * sizeof(int64_t), context,
           pass);
    launch("place_kernel", place_kernel, pass.blocks, kCounts + kPlaces, context, pass);
    pass.positions = pass.sorted;
    pass.shift += kDigitBits;
  } while (pass.shift < 63 && largest >> pass.shift);
  return pass.sorted;
}

const int64_t* keys_in_range(const int64_t* keys, int64_t count, int64_t limit, Context& context) {
  int64_t* result = allocate<int64_t>(context, count);
  launch("keys_in_range_kernel", keys_in_range_kernel, strided_blocks(count), 0, context, keys,
         result, count, limit);
  return result;
}

const int64_t* gather(const int64_t* values, const int64_t* positions, int64_t count,
                      Context& context) {
  int64_t* result = allocate<int64_t>(context, count);
  launch("gather_kernel", gather_kernel, strided_blocks(count), 0, context, values, positions,
         result, count);
  return result;
}

InverseNeighbors invert(int64_t batch, int64_t n, int64_t m, int64_t k, const int64_t* indices,
                        const void* similarities, DType similarity_dtype, int64_t columns,
                        Context& context) {
  const int64_t count = batch * n * k, limit = batch * m;
  int64_t* rows = allocate<int64_t>(context, count);
  int64_t* offsets = allocate<int64_t>(context, limit + 1);
  launch("chosen_rows_kernel", chosen_rows_kernel, strided_blocks(count), 0, context, indices,
         similarities, similarity_dtype, rows, batch, n, m, k);
  const int64_t* pairs = sort_positions(rows, count, limit, context);
  launch("offsets_kernel", offsets_kernel, strided_blocks(limit + 1), 0, context, rows, pairs,
         offsets, count, limit);
  const int64_t chunk = std::max(kFewestOfChunk, columns);
  return {offsets, pairs, rows, limit, chunk, count / chunk};
}

}  // namespace convnn::cuda
