// SPDX-License-Identifier: MIT
// Selection from rows of S: the best k columns of a row, one chunk at a time.
//
// The columns of a chunk are divided into groups, one for each lane of a scan block of kScanVectors
// vectors, and one pass over the row computes the maximum of every group. The k-th largest of these
// maxima is a lower bound of the k-th similarity of the row, so only elements of groups that reach
// it matter: on average little more than k of them. (A slightly lower bound works as well and is
// found faster.) They are collected as ranks; as soon as there are k, only elements that precede
// the k-th are. The buffer of ranks is reduced to the best k whenever it is full, and sorted at the
// end.
//
// From a row of screened similarities (screen.h), columns that its error cannot rule out are
// collected with lower bounds of their similarities. Those that remain when exact similarities are
// needed, at the end or before a chunk of exact ones, are computed again.
#pragma once

#include <algorithm>

#include "../params.h"
#include "register_tile.h"

namespace convnn::CONVNN_ISA {

// A similarity and its column as one number, in the total order of neighbors:
// similarity descending, NaN first, -0 equal to +0, then column ascending.
template <class A>
struct RankCode;
template <>
struct RankCode<float> {
  using Bits = uint32_t;
  using Code = uint64_t;
};
template <>
struct RankCode<double> {
  using Bits = uint64_t;
  __extension__ typedef unsigned __int128 Code;
};

template <class A>
class Rank {
  using Bits = typename RankCode<A>::Bits;
  using Code = typename RankCode<A>::Code;
  static constexpr int kBits = 8 * sizeof(Bits);
  static constexpr Bits kSign = Bits(1) << (kBits - 1);

 public:
  Rank() = default;
  Rank(A similarity, int64_t column) {
    Bits key = 0;  // NaN: before every number
    if (similarity == similarity) {
      const A plus_zero = similarity + A(0);
      std::memcpy(&key, &plus_zero, sizeof key);
      key = key & kSign ? key : ~(key | kSign);
    }
    code_ = Code(key) << kBits | Bits(column);
  }
  int64_t column() const { return int64_t(Bits(code_)); }
  A similarity() const {
    Bits key = Bits(code_ >> kBits);
    if (key == 0) return std::numeric_limits<A>::quiet_NaN();
    key = key & kSign ? key : ~key & ~kSign;
    A similarity;
    std::memcpy(&similarity, &key, sizeof similarity);
    return similarity;
  }
  bool operator<(const Rank& other) const { return code_ < other.code_; }

 private:
  Code code_;
};

constexpr int64_t kChunk = 1024;     // columns of S in memory at a time
constexpr int64_t kScanVectors = 8;  // vectors of one scan block
template <class A>
constexpr int64_t kScanColumns = kScanVectors * kLanes<A>;
static_assert(kChunk % kScanColumns<float> == 0 && kChunk % kScanColumns<double> == 0);
static_assert(kChunk % kTileColumns<float> == 0 && kChunk % kTileColumns<double> == 0);

// The best `wanted` of the columns of one row seen so far.
template <class A>
class BestColumns {
  using V = Vector<A>;
  using Keys = decltype(V{} > V{});  // as many integers of the same size
  using Key = std::remove_reference_t<decltype(Keys{}[0])>;

 public:
  static int64_t capacity(int64_t k) { return k + k / 4 + 256; }

  void start(Rank<A>* ranks, int64_t wanted, int64_t excluded) {
    ranks_ = ranks;
    capacity_ = capacity(wanted);
    wanted_ = wanted;
    excluded_ = excluded;
    count_ = 0;
    blocks_ = 0;
    has_nan_ = false;
    kept_ = wanted;
    bound_ = std::numeric_limits<A>::infinity();
    slack_ = 0;
    complete_ = false;
    all_nan_ = false;
  }

  // Finds the bound that a column of a chunk has to reach. row [kChunk]: similarities of the first
  // `columns` of a chunk, each with an error of at most `error`, then -inf; -inf also at the
  // excluded column. Returns how many of the group_count(columns) groups are not ruled out.
  int64_t survey(const A* row, int64_t columns, A error) {
    blocks_ = wanted_ == 0 ? 0 : ceil_div(columns, kScanColumns<A>);
    error_ = error;
    if (blocks_ == 0) return 0;
    V unordered = {};
    for (int64_t block = 0; block < blocks_; ++block) {
      V largest = V{} - std::numeric_limits<A>::infinity();
      for (int v = 0; v < kScanVectors; ++v) {
        const V x = load(row + block * kScanColumns<A> + v * kLanes<A>);
        largest = x > largest ? x : largest;  // unchanged if x is NaN
        unordered = x != x ? V{} - A(1) : unordered;
      }
      group_max_[block] = largest;
    }
    has_nan_ = lane_bits(unordered) != 0;
    if (!complete_) bound_ = bound_of_groups() - error_;
    int64_t left = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      left += __builtin_popcount(lane_bits(as_mask(group_max_[block] >= V{} + (bound_ - error_))));
    }
    return left;
  }
  static int64_t group_count(int64_t columns) {
    return ceil_div(columns, kScanColumns<A>) * kLanes<A>;
  }

  // Collects from a row that was surveyed with an error of 0; its first column is `first`. Columns
  // collected with an error must have been resolved.
  void collect(const A* row, int64_t first, int64_t columns) {
    if (has_nan_) {
      for (int64_t c = 0; c < columns; ++c) {
        consider(row[c], first + c);
      }
    } else {
      int32_t positions[kChunk + kLanes<A>];
      const int64_t listed = list(row, columns, bound_, too_late(first), positions);
      for (int64_t i = 0; i < listed; ++i) consider(row[positions[i]], first + positions[i]);
    }
    end_chunk();
  }

  // The same for a row that was surveyed with an error. exact(columns [kLanes]) computes the
  // similarities of kLanes columns.
  template <class Exact>
  void collect_screened(const A* row, int64_t first, int64_t columns, const Exact& exact) {
    int32_t positions[kChunk + kLanes<A>];
    const int64_t listed = list(row, columns, bound_ - error_, false, positions);
    for (int64_t i = 0; i < listed; ++i) {
      const int64_t column = first + positions[i];
      if (column == excluded_) continue;
      if (count_ == capacity_) {
        keep_best();
        if (count_ > capacity_ - capacity_ / 4) resolve(exact);
      }
      slack_ = 2 * error_ > slack_ ? 2 * error_ : slack_;
      ranks_[count_++] = Rank<A>(row[positions[i]] - error_, column);
    }
    end_chunk();
  }

  // Replaces the lower bounds of columns collected with an error by their similarities.
  template <class Exact>
  void resolve(const Exact& exact) {
    if (slack_ == 0) return;
    if (count_ > wanted_) keep_best();
    for (int64_t i = 0; i < count_; i += kLanes<A>) {
      int64_t columns[kLanes<A>];
      for (int64_t j = 0; j < kLanes<A>; ++j)
        columns[j] = ranks_[min_of(i + j, count_ - 1)].column();
      const V similarities = exact(columns);
      for (int64_t j = 0; j < min_of(kLanes<A>, count_ - i); ++j) {
        ranks_[i + j] = Rank<A>(similarities[j], columns[j]);
      }
    }
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

  // Sorts the best columns by rank or by column. Returns how many there are.
  int64_t finish(Order order) {
    if (count_ > wanted_) keep_best();
    if (order == Order::similarity) {
      std::sort(ranks_, ranks_ + count_);
    } else {
      std::sort(ranks_, ranks_ + count_,
                [](const Rank<A>& x, const Rank<A>& y) { return x.column() < y.column(); });
    }
    return count_;
  }

  const Rank<A>* ranks() const { return ranks_; }

 private:
  static V as_mask(Keys comparison) {
    V mask;
    std::memcpy(&mask, &comparison, sizeof mask);
    return mask;
  }

  // Whether `wanted` columns precede this one if its similarity only equals the bound. Similarities
  // must be exact.
  bool too_late(int64_t column) const { return complete_ && last_column_ < column; }

  void consider(A s, int64_t column) {
    if (s != s ? !(all_nan_ && too_late(column))
               : s > bound_ || (s == bound_ && !too_late(column))) {
      add(s, column);
    }
  }

  void add(A similarity, int64_t column) {
    if (column == excluded_) return;
    if (count_ == capacity_) keep_best();
    ranks_[count_++] = Rank<A>(similarity, column);
  }

  // Lists the columns of the surveyed row that reach the bound, or exceed it, in ascending order.
  // Returns how many.
  int64_t list(const A* row, int64_t columns, A bound, bool exceed, int32_t* positions) const {
    const V bounds = V{} + bound;
    const auto bits_of = [&](V x) {
      return lane_bits(exceed ? as_mask(x > bounds) : as_mask(x >= bounds));
    };
    int64_t count = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      if (bits_of(group_max_[block]) == 0) continue;
      for (int64_t v = 0; v < kScanVectors; ++v) {
        const int64_t position = block * kScanColumns<A> + v * kLanes<A>;
        count += list_lanes<A>(bits_of(load(row + position)), int32_t(position), positions + count);
      }
    }
    while (count > 0 && positions[count - 1] >= columns) --count;
    return count;
  }

  // Raises the bound to the last of the best as soon as there are `wanted`, and again whenever
  // enough columns were added to make it worthwhile.
  void end_chunk() {
    if (wanted_ > 0 && count_ >= (complete_ ? kept_ + kept_ / 2 + kLanes<A> : wanted_)) keep_best();
  }

  // A number that at least `wanted` group maxima reach, and so the row's `wanted`-th similarity,
  // but few more: found by bisection over the ordered floating-point numbers, counting lanes.
  A bound_of_groups() const {
    if (wanted_ > blocks_ * kLanes<A>) return -std::numeric_limits<A>::infinity();
    Keys keys[kChunk / kScanColumns<A>];
    Key low = std::numeric_limits<Key>::max(), high = std::numeric_limits<Key>::min();
    for (int64_t block = 0; block < blocks_; ++block) {
      keys[block] = in_order(group_max_[block]);
      for (int lane = 0; lane < kLanes<A>; ++lane) {
        low = keys[block][lane] < low ? keys[block][lane] : low;
        high = keys[block][lane] > high ? keys[block][lane] : high;
      }
    }
    const int64_t enough = wanted_ + wanted_ / 8;
    int64_t reached = blocks_ * kLanes<A>;  // how many reach `low`
    while (reached > enough && low < high) {
      const Key middle = (low | high) - ((low ^ high) >> 1);  // rounded up, without overflow
      int64_t count = 0;
      for (int64_t block = 0; block < blocks_; ++block) {
        count += __builtin_popcount(lane_bits(as_mask(keys[block] >= middle)));
      }
      if (count >= wanted_) {
        low = middle;
        reached = count;
      } else {
        high = middle - 1;
      }
    }
    A bound;
    low = in_order(low);
    std::memcpy(&bound, &low, sizeof bound);
    return bound;
  }

  // Maps the bits of a number to an integer of the same order, and back.
  template <class Bits>
  static Bits in_order(Bits bits) {
    return bits ^ ((bits >> (8 * sizeof(A) - 1)) & std::numeric_limits<Key>::max());
  }
  static Keys in_order(V x) {
    Keys bits;
    std::memcpy(&bits, &x, sizeof bits);
    return in_order(bits);
  }

  // Keeps the best `wanted` and those that may be among them.
  void keep_best() {
    std::nth_element(ranks_, ranks_ + wanted_ - 1, ranks_ + count_);
    bound_ = ranks_[wanted_ - 1].similarity();
    last_column_ = ranks_[wanted_ - 1].column();
    complete_ = true;
    if (slack_ > 0) {
      const Rank<A> last(bound_ - slack_, std::numeric_limits<uint32_t>::max());
      count_ = std::partition(ranks_ + wanted_, ranks_ + count_,
                              [&](const Rank<A>& rank) { return rank < last; }) -
               ranks_;
    } else {
      count_ = wanted_;
    }
    kept_ = count_;
    if (bound_ != bound_) {
      all_nan_ = true;
      bound_ = std::numeric_limits<A>::infinity();
    }
  }

  Rank<A>* ranks_;
  int64_t capacity_, wanted_, excluded_, count_;
  int64_t kept_;                           // count_ when the bound was last raised
  V group_max_[kChunk / kScanColumns<A>];  // of the surveyed row
  int64_t blocks_;                         // how many of them
  bool has_nan_;                           // whether that row contains NaN
  A error_;                                // largest error of a similarity of that row
  A bound_;                                // what an element has to reach
  A slack_;                                // by how much a similarity may exceed its lower bound
  bool complete_;                          // there are `wanted`, and the bound is the last of them
  bool all_nan_;                           // they are all NaN
  int64_t last_column_;                    // the column of the last of them
};

}  // namespace convnn::CONVNN_ISA
