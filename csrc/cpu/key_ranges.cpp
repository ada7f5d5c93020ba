// SPDX-License-Identifier: MIT
#include "key_ranges.h"

#include <algorithm>

#include "parallel.h"

namespace convnn::cpu {
namespace {

void include(KeyRanges::Rows& rows, int64_t begin, int64_t end) {
  if (begin == end) return;
  const bool none = rows.begin == rows.end;
  rows = {none ? begin : std::min(rows.begin, begin), none ? end : std::max(rows.end, end)};
}

}  // namespace

KeyRanges::KeyRanges(const SelectParams& p, int64_t rows_per_block, ParallelFor parallel_for)
    : queries_(p.n), blocks_per_batch_(ceil_div(p.n, rows_per_block)) {
  if (!p.key_range) return;
  const int64_t batches = p.range_stride ? p.batch : 1;
  blocks_ = zeros<Block>(size_t(batches * blocks_per_batch_), "the ranges of blocks of queries");
  run(parallel_for, batches * blocks_per_batch_, double(rows_per_block),
      [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task % blocks_per_batch_ * rows_per_block;
          const int64_t* of = p.key_range + task / blocks_per_batch_ * p.range_stride;
          Block block = {};
          for (int64_t row = first; row < std::min(p.n, first + rows_per_block); ++row) {
            include(block.seen, of[2 * row], of[2 * row + 1]);
            block.pairs += of[2 * row + 1] - of[2 * row];
          }
          blocks_[size_t(task)] = block;
        }
      });
  seen_ = zeros<Rows>(size_t(batches), "the ranges of batch elements");
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Rows& rows = blocks_[i].seen;
    include(seen_[i / size_t(blocks_per_batch_)], rows.begin, rows.end);
  }
}

int64_t KeyRanges::most_seen() const {
  int64_t most = 0;
  for (const Rows& rows : seen_) most = std::max(most, rows.end - rows.begin);
  return most;
}

int64_t KeyRanges::average() const {
  double pairs = 0;
  for (const Block& block : blocks_) pairs += double(block.pairs);
  return int64_t(pairs / double(int64_t(seen_.size()) * queries_));
}

}  // namespace convnn::cpu
