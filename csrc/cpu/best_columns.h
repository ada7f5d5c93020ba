// SPDX-License-Identifier: MIT
// Selection from rows of S: the best k columns of a row, one chunk at a time.
//
// 1. The columns of a chunk are divided into groups of four, those in the same lane of four
//    adjacent vectors, and one pass over the row computes the maximum of every group.
// 2. The k-th largest maximum of disjoint groups is a lower bound of the k-th similarity of the
//    row. Merged groups, some 64, give a bound almost as high. It is found by counting, for each of
//    some pivots, the groups that reach it: all rows take the same steps, without branches.
// 3. Groups that reach the bound are marked, listed by compressing lanes, and then those of their
//    columns that do: on average little more than k.
// 4. They are collected as ranks; as soon as there are k, only elements that precede the k-th are.
//    The buffer of ranks is reduced to the best k whenever it is full, and sorted at the end. A few
//    ranks are sorted by counting those that precede each (rank.h).
//
// From a row of screened similarities (screen.h), columns that its error cannot rule out are
// collected with lower bounds of their similarities. Those that remain when exact similarities are
// needed, at the end or before a chunk of exact ones, are computed again.
#pragma once

#include <algorithm>

#include "../params.h"
#include "rank.h"
#include "register_tile.h"
#include "screen.h"

namespace convnn::CONVNN_ISA {

constexpr int64_t kChunk = 1024;  // columns of S in memory at a time
constexpr int64_t kGroup = 4;     // columns of a group
template <class A>
constexpr int64_t kScanColumns = kGroup * kLanes<A>;  // of a vector of groups
constexpr int64_t kGroups = kChunk / kGroup;
static_assert(kChunk % kScanColumns<float> == 0 && kChunk % kScanColumns<double> == 0);
static_assert(kChunk % kTileColumns<float> == 0 && kChunk % kTileColumns<double> == 0);

// The best `wanted` of the columns of one row seen so far.
template <class A>
class BestColumns {
  using V = Vector<A>;
  using Keys = decltype(V{} > V{});  // as many integers of the same size
  using Key = std::remove_reference_t<decltype(Keys{}[0])>;

 public:
  static int64_t capacity(int64_t k) { return ceil_div(k + k / 4, 8) * 8 + 256; }

  // group_max [kGroups]: memory for a row between survey and collect.
  void start(Rank<A>* ranks, A* group_max, int64_t wanted, int64_t excluded) {
    ranks_ = ranks;
    group_max_ = group_max;
    capacity_ = capacity(wanted);
    wanted_ = wanted;
    excluded_ = excluded;
    count_ = 0;
    blocks_ = 0;
    open_ = 0;
    has_nan_ = false;
    kept_ = wanted;
    bound_ = std::numeric_limits<A>::infinity();
    error_ = 0;
    slack_ = 0;
    complete_ = false;
    all_nan_ = false;
  }

  // Finds the bound that a column of a chunk has to reach. row: exact similarities of as many
  // adjacent columns of a chunk, with -inf at the excluded one, then -inf up to a multiple of
  // kScanColumns.
  void survey(const A* row, int64_t columns) {
    find_group_maxima<false>(StripRow<A>{row}, columns);
    error_ = 0;
    if (!complete_ && blocks_ > 0) bound_ = bound_of_groups();
  }

  // The same for screened similarities, with NaN at most where a row has -inf. Those below the
  // bound by more than their largest error are no neighbors whatever it is, so only the error of
  // the others matters.
  template <class Row>
  void survey_screened(const Row& row, int64_t columns, const ScreenError& error) {
    find_group_maxima<true>(row, columns);
    if (complete_) {
      error_ = error.from(bound_ - error.largest());
    } else if (blocks_ > 0) {
      const A reached = bound_of_groups();
      error_ = error.from(reached - 2 * error.largest());
      bound_ = reached - error_;
    }
    open_ = mark_open(bound_ - error_);
  }

  // How many groups of the row that was surveyed as screened are not ruled out.
  int64_t open_groups() const { return open_; }
  static int64_t group_count(int64_t columns) {
    return ceil_div(columns, kScanColumns<A>) * kLanes<A>;
  }

  // Collects from a row that was surveyed as exact; its first column is `first`. Columns collected
  // with an error must have been resolved.
  void collect(const A* row, int64_t first, int64_t columns) {
    if (has_nan_) {
      for (int64_t c = 0; c < columns; ++c) consider(row[c], first + c);
    } else {
      int32_t positions[kChunk + kLanes<A>];
      const A least = too_late(first) ? next_above(bound_) : bound_;
      mark_open(least);
      const int64_t listed = list(StripRow<A>{row}, first, columns, least, positions);
      if (count_ + listed <= capacity_) {
        for (int64_t i = 0; i < listed; ++i) add(row[positions[i]], first + positions[i]);
      } else {
        for (int64_t i = 0; i < listed; ++i) consider(row[positions[i]], first + positions[i]);
      }
    }
  }

  // The same for a row that was surveyed as screened. resolve() resolves the columns of this row.
  template <class Row, class Resolve>
  void collect_screened(const Row& row, int64_t first, int64_t columns, const Resolve& resolve) {
    if (open_ == 0) return;
    int32_t positions[kChunk + kLanes<A>];
    const int64_t listed = list(row, first, columns, bound_ - error_, positions);
    for (int64_t i = 0; i < listed; ++i) {
      if (count_ == capacity_) {
        keep_best();
        if (count_ > capacity_ - capacity_ / 4) resolve();
      }
      slack_ = 2 * error_ > slack_ ? 2 * error_ : slack_;
      add(row[positions[i]] - error_, first + positions[i]);
    }
  }

  // Returns how many columns are to be resolved: those collected with an error that may be among
  // the best. They are the first of ranks(), whose similarities are lower bounds.
  int64_t unresolved() {
    if (slack_ == 0) return 0;
    if (count_ > wanted_ + wanted_ / 2 + 4) keep_best();  // fewer are resolved as fast
    return count_;
  }
  // To be called when their ranks have been replaced, and before exact similarities follow.
  void end_resolve() {
    if (slack_ == 0) return;
    slack_ = 0;
    if (count_ >= wanted_) keep_best();
  }

  // Adds columns of which none is excluded.
  void include(const Rank<A>* ranks, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (count_ == capacity_) keep_best();
      ranks_[count_++] = ranks[i];
    }
  }

  // Sorts the best columns, which must have been resolved, by rank or by column. Returns how many
  // there are.
  int64_t finish(Order order) {
    slack_ = 0;
    if (order == Order::similarity && count_ <= kMostCounted<A>) {
      sort_ranks(ranks_, count_);
      return min_of(count_, wanted_);
    }
    if (count_ > wanted_) keep_best();
    if (order == Order::similarity) {
      sort_ranks(ranks_, count_);
    } else {
      std::sort(ranks_, ranks_ + count_,
                [](const Rank<A>& x, const Rank<A>& y) { return x.column() < y.column(); });
    }
    return count_;
  }

  Rank<A>* ranks() { return ranks_; }

 private:
  static V as_mask(Keys comparison) {
    V mask;
    std::memcpy(&mask, &comparison, sizeof mask);
    return mask;
  }

  // Raises the bound if that pays and computes the maximum of every group.
  template <bool Screened, class Row>
  void find_group_maxima(const Row& row, int64_t columns) {
    // The bound is the last of the best as soon as there are `wanted`. It is raised whenever enough
    // columns were added to make it worthwhile.
    if (wanted_ > 0 && count_ >= (complete_ ? kept_ + kept_ / 2 + kLanes<A> : wanted_)) {
      keep_best();
    }
    blocks_ = wanted_ == 0 ? 0 : ceil_div(columns, kScanColumns<A>);
    V unordered = {};
    for (int64_t block = 0; block < blocks_; ++block) {
      V largest = V{} - std::numeric_limits<A>::infinity();
      for (int v = 0; v < kGroup; ++v) {
        const V x = row.load(block * kScanColumns<A> + v * kLanes<A>);
        largest = x > largest ? x : largest;  // unchanged if x is NaN
        if constexpr (!Screened) unordered = x != x ? V{} - A(1) : unordered;
      }
      store(group_max_ + block * kLanes<A>, row.finish(largest));
    }
    has_nan_ = lane_bits(unordered) != 0;
  }

  // Marks the groups that reach this. Returns how many.
  int64_t mark_open(A least) {
    const V bounds = V{} + least;
    int64_t open = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      const uint32_t lanes = lane_bits(as_mask(group_max(block) >= bounds));
      marks_[block] = uint16_t(lanes);
      open += __builtin_popcount(lanes);
    }
    return open;
  }

  V group_max(int64_t block) const { return load(group_max_ + block * kLanes<A>); }

  // Whether `wanted` columns precede this one if its similarity only equals the bound. Similarities
  // must be exact.
  bool too_late(int64_t column) const { return complete_ && last_column_ < column; }

  void consider(A s, int64_t column) {
    if (column == excluded_) return;
    if (s != s ? !(all_nan_ && too_late(column))
               : s > bound_ || (s == bound_ && !too_late(column))) {
      if (count_ == capacity_) keep_best();
      add(s, column);
    }
  }

  void add(A similarity, int64_t column) { ranks_[count_++] = Rank<A>(similarity, column); }

  // Lists the columns of the surveyed row whose similarity is at least this, of which the groups
  // are marked, but not the excluded one. Returns how many.
  template <class Row>
  int64_t list(const Row& row, int64_t first, int64_t columns, A least, int32_t* positions) const {
    int64_t count = 0;
    if (least == -std::numeric_limits<A>::infinity()) {  // which is also after the last column
      for (int64_t c = 0; c < columns; ++c) {
        if (first + c != excluded_) positions[count++] = int32_t(c);
      }
      return count;
    }
    int32_t groups[kGroups + kLanes<A>];  // the first columns of groups
    int64_t open = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      open += list_lanes<A>(marks_[block], int32_t(block * kScanColumns<A>), groups + open);
    }
    for (int64_t i = 0; i < open; ++i) {
      for (int32_t v = 0; v < kGroup; ++v) {
        positions[count] = groups[i] + v * kLanes<A>;
        count += row[positions[count]] >= least;
      }
    }
    return count;
  }

  // The least number above x.
  static A next_above(A x) {
    if (x == 0) return std::numeric_limits<A>::denorm_min();
    Key bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits += x > 0 ? 1 : -1;
    std::memcpy(&x, &bits, sizeof x);
    return x;  // NaN, which no number reaches, for infinity
  }

  // A number that at least `wanted` group maxima reach, and so the row's `wanted`-th similarity,
  // but few more. Groups are merged to some more than 1.5 `wanted` pivots, and to twice as many or
  // more of which each pivot is a maximum; the result is the largest pivot that enough of them
  // reach. Groups side by side are not merged: neighbors in an image would be in one group.
  A bound_of_groups() const {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    constexpr int kChains = kLanes<A> < 4 ? kLanes<A> : 4;  // of independent sums
    if (wanted_ > blocks_ * kLanes<A>) return kLowest;
    const int64_t pivot_vectors = min_of(blocks_, ceil_div(wanted_ + wanted_ / 2, kLanes<A>));
    const int64_t merged_vectors =
        min_of(blocks_, max_of(2 * pivot_vectors, ceil_div(64, kLanes<A>)));
    A merged[kGroups], pivots[kGroups];
    merge(group_max_, blocks_, merged, merged_vectors);
    merge(merged, merged_vectors, pivots, pivot_vectors);
    V best = V{} + kLowest;
    for (int64_t v = 0; v < pivot_vectors; ++v) {
      const V pivot = load(pivots + v * kLanes<A>);
      Keys reached[kChains] = {}, count = {};
      for (int64_t i = 0; i < merged_vectors * kLanes<A>; i += kChains) {
        for (int chain = 0; chain < kChains; ++chain) {
          reached[chain] =
              broadcast(merged[i + chain]) >= pivot ? reached[chain] + 1 : reached[chain];
        }
      }
      for (const Keys& part : reached) count += part;
      const V candidate = count >= Key(wanted_) ? pivot : V{} + kLowest;
      best = candidate > best ? candidate : best;
    }
    return largest_lane(best);
  }

  // Vector i of `to` is the maximum of the vectors i, i + to_count, ... of `from`.
  static void merge(const A* from, int64_t count, A* to, int64_t to_count) {
    for (int64_t i = 0; i < to_count; ++i) {
      V largest = load(from + i * kLanes<A>);
      for (int64_t j = i + to_count; j < count; j += to_count) {
        const V x = load(from + j * kLanes<A>);
        largest = x > largest ? x : largest;
      }
      store(to + i * kLanes<A>, largest);
    }
  }

  static A largest_lane(V x) {
    A lanes[kLanes<A>];
    store(lanes, x);
#pragma GCC unroll 4
    for (int half = kLanes<A> / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
      }
    }
    return lanes[0];
  }

  // Keeps the best `wanted` and those that may be among them.
  void keep_best() {
    Rank<A> last;
    if (count_ <= kMostCounted<A>) {
      sort_ranks(ranks_, count_);
      last = ranks_[wanted_ - 1];
    } else {
      last = last_of_best(ranks_, wanted_, count_);
    }
    bound_ = last.similarity();
    last_column_ = last.column();
    complete_ = true;
    if (slack_ > 0) {
      last = Rank<A>(bound_ - slack_, std::numeric_limits<uint32_t>::max());
      count_ = move_to_front(ranks_, count_, last);
    } else if (count_ <= kMostCounted<A>) {
      count_ = wanted_;
    } else {
      count_ = move_to_front(ranks_, count_, last);
    }
    kept_ = count_;
    if (bound_ != bound_) {
      all_nan_ = true;
      bound_ = std::numeric_limits<A>::infinity();
    }
  }

  Rank<A>* ranks_;
  int64_t capacity_, wanted_, excluded_, count_;
  int64_t kept_;                              // count_ when the bound was last raised
  A* group_max_;                              // [kGroups] of the surveyed row
  uint16_t marks_[kChunk / kScanColumns<A>];  // of those that are not ruled out, a bit each
  int64_t blocks_;                            // how many vectors of them
  int64_t open_;                              // how many are marked
  bool has_nan_;                              // whether that row contains NaN
  A error_;              // largest error of what may be collected from that row
  A bound_;              // what an element has to reach
  A slack_;              // by how much a similarity may exceed its lower bound
  bool complete_;        // there are `wanted`, and the bound is the last of them
  bool all_nan_;         // they are all NaN
  int64_t last_column_;  // the column of the last of them
};

}  // namespace convnn::CONVNN_ISA
