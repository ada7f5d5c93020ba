// SPDX-License-Identifier: MIT
#include "sort.cuh"

namespace convnn::cuda {

const int64_t* sort_positions(const int64_t* keys, int64_t count, int64_t largest,
                              Context& context) {
  SortPass pass = {};
  pass.keys = keys;
  pass.count = count;
  // A multiple of the warp size, and at most kSortBlocks blocks.
  pass.each = std::max<int64_t>(8, ceil_div(count, kSortBlocks * kThreads)) * kWarp;
  pass.blocks = std::max<int64_t>(1, ceil_div(count, pass.each * kWarps));
  pass.before = allocate<int64_t>(context, kDigits * pass.blocks);
  pass.totals = allocate<int64_t>(context, kDigits);
  int64_t* const results[] = {allocate<int64_t>(context, count), allocate<int64_t>(context, count)};
  constexpr size_t kCounts = kWarps * kDigits * sizeof(int);
  constexpr size_t kLocations = (kWarps + 1) * kDigits * sizeof(int64_t);
  // At least one pass: it writes the positions.
  do {
    pass.sorted = results[pass.shift / kDigitBits % 2];
    launch("count_digits_kernel", count_digits_kernel, pass.blocks, kCounts, context, pass);
    launch("sum_counts_kernel", sum_counts_kernel, kDigits, kThreads * sizeof(int64_t), context,
           pass);
    launch("scatter_kernel", scatter_kernel, pass.blocks, kCounts + kLocations, context, pass);
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

const int64_t* sort_rows(const int64_t* rows, int64_t batch, int64_t count, int64_t limit,
                         Context& context) {
  const int64_t all = batch * count;
  const int64_t* in_range = keys_in_range(rows, all, limit, context);
  const int64_t* keys = in_range;
  if (batch > 1) {
    int64_t* of_batch = allocate<int64_t>(context, all);
    launch("batch_keys_kernel", batch_keys_kernel, strided_blocks(all), 0, context, in_range,
           of_batch, all, count, limit);
    keys = of_batch;
  }
  const int64_t largest = batch * (limit + 1) - 1;
  return gather(in_range, sort_positions(keys, all, largest, context), all, context);
}

}  // namespace convnn::cuda
