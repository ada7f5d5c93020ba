// SPDX-License-Identifier: MIT
// The columns that a query may see, in the order in which a block of queries looks at them, and
// which queries look at them together.
#pragma once

#include "best_columns.h"

namespace convnn::CONVNN_ISA {

// The columns begin ... end - 1.
struct ColumnRange {
  int64_t begin = 0;
  int64_t end = 0;

  int64_t count() const { return end - begin; }
  // The part that lies in `other`; if there is none, an empty range at one end of `other`.
  ColumnRange within(const ColumnRange& other) const {
    const int64_t first = min_of(max_of(begin, other.begin), other.end);
    return {first, max_of(first, min_of(end, other.end))};
  }
  // Extends the range to include another one and all between them.
  void include(const ColumnRange& other) {
    if (other.count() == 0) return;
    *this = count() == 0 ? other : ColumnRange{min_of(begin, other.begin), max_of(end, other.end)};
  }
};

// How many of these rows, from the first one on, are best multiplied by all columns that any of
// them may see: a part of a block, whole blocks, or all. All rows of a tile cost the same, and each
// row for itself would waste the others; but rows of two sequences have no columns in common.
inline int64_t rows_together(const ColumnRange* ranges, int64_t rows) {
  constexpr int64_t kPreparing = 64;  // what another pass costs, in columns of a tile
  const auto tiles = [](int64_t count) { return ceil_div(count, kTileRows); };
  ColumnRange all = ranges[0];
  for (int64_t r = 1; r < rows; ++r) {
    ColumnRange extended = all;
    extended.include(ranges[r]);
    const int64_t together = tiles(r + 1) * extended.count();
    const int64_t apart = tiles(r) * all.count() + ranges[r].count() + kPreparing;
    if (together > apart + apart / 4) return r < kBlockRows ? r : r / kBlockRows * kBlockRows;
    all = extended;
  }
  return rows;
}

// Divides a range into chunks of at most kChunk columns that begin with a whole vector: first the
// one that has a certain column, or the nearest to it, then the others from left to right.
template <class A>
class Chunks {
  static constexpr int64_t kPanel = kTileColumns<A>;

 public:
  Chunks(const ColumnRange& range, int64_t nearest)
      : begin_(range.count() ? range.begin / kLanes<A> * kLanes<A> : range.end),
        end_(range.end),
        next_(begin_) {
    const int64_t column = max_of(begin_, min_of(nearest, end_ - 1));
    first_ = begin_ + (column - begin_) / kChunk * kChunk;
    // A short chunk would say little about the others.
    if (first_ > begin_ && first_ + kChunk > end_) {
      first_ = ceil_div(end_ - kChunk, kPanel) * kPanel;
    }
  }

  // Returns false after the last one.
  bool next(ColumnRange& chunk) {
    if (is_first_) {
      is_first_ = false;
      chunk = {first_, stop(first_, end_)};
      after_first_ = chunk.end;
      return chunk.count() > 0;
    }
    if (next_ == first_) next_ = after_first_;
    if (next_ >= end_) return false;
    chunk = {next_, stop(next_, next_ < first_ ? first_ : end_)};
    next_ = chunk.end;
    return true;
  }

 private:
  // Chunks end with a panel where possible.
  static int64_t stop(int64_t begin, int64_t end) {
    return min_of(end, (begin + kChunk) / kPanel * kPanel);
  }

  int64_t begin_, end_, next_, first_, after_first_ = 0;
  bool is_first_ = true;
};

}  // namespace convnn::CONVNN_ISA
