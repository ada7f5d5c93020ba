// SPDX-License-Identifier: MIT
// select on the CPU: s_i = k-max(S)[i, :], I_i = k-argmax(S)[i, :] with S = Q^ K^T (Eq. 3 to 5),
// without S.
//
// The keys that may be neighbors are packed into panels of tile columns, once. A task then owns
// kBlockRows query rows and sweeps the panels in chunks of kChunk columns: it fills a strip
// [kBlockRows, kChunk] of S, which stays in the L2 cache, and selects from it row by row.
//
// Selection from a strip row: the columns fall into groups, one group for each lane of a scan
// block of kScanVectors vectors, and one pass over the row takes the maximum of every group. The
// k-th largest of these maxima is a lower bound for the k-th similarity of the row, so only
// elements of groups that reach it can matter: on average little more than k of them. (A bound a
// little lower serves as well and is found faster.) They are
// collected with their positions as ranks; once k are known, only what is strictly above the k-th
// is collected, since an equal one later in the row has the larger index. What is collected is
// reduced to the best k whenever its buffer is full, and ordered at the end.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "normalize.h"

namespace convnn::CONVNN_ISA {

// A similarity and its column as one number that sorts by the total order of the contract:
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

constexpr int64_t kChunk = 1024;     // columns of S kept at a time
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
  static int64_t capacity(int64_t k) { return k + k / 4 + 2 * kScanColumns<A>; }

  void start(Rank<A>* ranks, int64_t wanted, int64_t excluded) {
    ranks_ = ranks;
    capacity_ = capacity(wanted);
    wanted_ = wanted;
    excluded_ = excluded;
    count_ = 0;
    complete_ = false;
    nan_closed_ = false;
  }

  // row [kChunk]: similarities of the columns first ... first + columns - 1. It holds -inf after
  // them and at the excluded column.
  void scan(const A* row, int64_t first, int64_t columns) {
    if (wanted_ == 0) return;
    const int64_t blocks = ceil_div(columns, kScanColumns<A>);
    V group_max[kChunk / kScanColumns<A>];
    V unordered = {};
    for (int64_t block = 0; block < blocks; ++block) {
      V largest = V{} - std::numeric_limits<A>::infinity();
      for (int v = 0; v < kScanVectors; ++v) {
        const V x = load(row + block * kScanColumns<A> + v * kLanes<A>);
        largest = x > largest ? x : largest;  // keeps the old one where x is NaN
        unordered = x != x ? V{} - A(1) : unordered;
      }
      group_max[block] = largest;
    }
    const bool has_nan = lane_bits(unordered) != 0;
    if (!complete_) bound_ = bound_of(group_max, blocks);

    for (int64_t block = 0; block < blocks; ++block) {
      if (count_ + kScanColumns<A> > capacity_) keep_best();
      const A* block_row = row + block * kScanColumns<A>;
      const int64_t block_first = first + block * kScanColumns<A>;
      const int64_t block_columns = min_of(kScanColumns<A>, columns - block * kScanColumns<A>);
      // With `wanted` collected, all of them earlier and none below the bound, an element equal
      // to the bound comes too late.
      const bool strict = complete_ || count_ >= wanted_;
      if (has_nan) {
        for (int64_t c = 0; c < block_columns; ++c) {
          const A s = block_row[c];
          const bool in = s != s ? !nan_closed_ : strict ? s > bound_ : s >= bound_;
          if (in) collect(s, block_first + c);
        }
        continue;
      }
      const V bounds = V{} + bound_;
      const V reached =
          strict ? as_mask(group_max[block] > bounds) : as_mask(group_max[block] >= bounds);
      for (uint32_t lanes = lane_bits(reached); lanes; lanes &= lanes - 1) {
        const int64_t lane = __builtin_ctz(lanes);
        for (int64_t c = lane; c < block_columns; c += kLanes<A>) {
          const A s = block_row[c];
          if (strict ? s > bound_ : s >= bound_) collect(s, block_first + c);
        }
      }
    }
    if (!complete_ && count_ >= wanted_) keep_best();
  }

  // Orders what was found, by rank or by column. Returns how many.
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

  void collect(A similarity, int64_t column) {
    if (column != excluded_) ranks_[count_++] = Rank<A>(similarity, column);
  }

  // A number that at least `wanted` group maxima reach, so that the row's `wanted`-th similarity
  // does, and hardly more: found by bisection over the numbers in their order, counting lanes.
  A bound_of(const V* group_max, int64_t blocks) const {
    if (wanted_ > blocks * kLanes<A>) return -std::numeric_limits<A>::infinity();
    Keys keys[kChunk / kScanColumns<A>];
    Key low = std::numeric_limits<Key>::max(), high = std::numeric_limits<Key>::min();
    for (int64_t block = 0; block < blocks; ++block) {
      keys[block] = in_order(group_max[block]);
      for (int lane = 0; lane < kLanes<A>; ++lane) {
        low = keys[block][lane] < low ? keys[block][lane] : low;
        high = keys[block][lane] > high ? keys[block][lane] : high;
      }
    }
    const int64_t enough = wanted_ + wanted_ / 8;
    int64_t reached = blocks * kLanes<A>;  // how many reach `low`
    while (reached > enough && low < high) {
      const Key middle = (low | high) - ((low ^ high) >> 1);  // rounded up, without overflow
      int64_t count = 0;
      for (int64_t block = 0; block < blocks; ++block) {
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

  // The bits of a number as an integer of the same order, and back.
  template <class Bits>
  static Bits in_order(Bits bits) {
    return bits ^ ((bits >> (8 * sizeof(A) - 1)) & std::numeric_limits<Key>::max());
  }
  static Keys in_order(V x) {
    Keys bits;
    std::memcpy(&bits, &x, sizeof bits);
    return in_order(bits);
  }

  void keep_best() {
    std::nth_element(ranks_, ranks_ + wanted_ - 1, ranks_ + count_);
    count_ = wanted_;
    complete_ = true;
    bound_ = ranks_[wanted_ - 1].similarity();
    if (bound_ != bound_) {
      nan_closed_ = true;
      bound_ = std::numeric_limits<A>::infinity();
    }
  }

  Rank<A>* ranks_;
  int64_t capacity_, wanted_, excluded_, count_;
  A bound_;          // what an element has to reach
  bool complete_;    // `wanted` are known and the bound is the last of them: it has to be exceeded
  bool nan_closed_;  // all `wanted` are NaN
};

template <class T>
class Select {
  using A = accumulate_t<T>;
  static constexpr int64_t kPanel = kTileColumns<A>;

  struct Scratch {
    A* queries;            // [kBlockTiles, d, kTileRows]
    A* strip;              // [kBlockRows, kChunk]
    A* self_similarities;  // [kBlockRows]
    A* self_panel;         // [d, kPanel]
    A* self_tile;          // [kTileRows, kPanel]
    Rank<A>* ranks;        // [rows, capacity]
    size_t bytes;

    Scratch(const SelectParams& p, void* base) {
      Arena arena(base);
      queries = arena.take<A>(kBlockRows * p.d);
      strip = arena.take<A>(kBlockRows * kChunk);
      self_similarities = arena.take<A>(kBlockRows);
      self_panel = arena.take<A>(p.self_indices ? p.d * kPanel : 0);
      self_tile = arena.take<A>(kTileRows * kPanel);
      ranks = arena.take<Rank<A>>(min_of(kBlockRows, p.n) * BestColumns<A>::capacity(p.k));
      bytes = arena.used();
    }
  };

  static int64_t columns_of(const SelectWork& work, int64_t b) {
    return work.counts ? work.counts[b] : work.max_columns;
  }
  static int64_t key_row(const SelectWork& work, int64_t b, int64_t column) {
    return work.columns ? work.columns[b * work.max_columns + column] : column;
  }

  // x [d] into packed[t * stride], normalised for the cosine.
  static void pack_row(const SelectParams& p, const T* x, A* packed, int64_t stride) {
    if (p.metric == Metric::cosine) {
      const Normalizer normalize = normalizer(x, p.d);
      for (int64_t t = 0; t < p.d; ++t) packed[t * stride] = normalize(x[t]);
    } else {
      for (int64_t t = 0; t < p.d; ++t) packed[t * stride] = widen(x[t]);
    }
  }

  // columns: how many of the panel are wanted.
  static void multiply(const SelectParams& p, const A* queries, const A* panel, int64_t columns,
                       A* c, int64_t ldc) {
    if (p.metric == Metric::euclidean) {
      multiply_columns<A, true>(queries, panel, p.d, columns, c, ldc);
    } else {
      multiply_columns<A, false>(queries, panel, p.d, columns, c, ldc);
    }
  }

 public:
  static size_t packed_bytes(const SelectParams& p, int64_t columns) {
    return size_t(ceil_div(columns, kPanel) * kPanel * p.d) * sizeof(A);
  }

  static size_t scratch_bytes(const SelectParams& p) { return Scratch(p, nullptr).bytes; }

  static void pack(const SelectParams& p, const SelectWork& work, int64_t begin, int64_t end) {
    const int64_t panels = ceil_div(work.max_columns, kPanel);
    const size_t bytes = packed_bytes(p, work.max_columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / panels, panel = task % panels;
      const int64_t first = panel * kPanel;
      const int64_t columns = columns_of(work, b);
      if (first >= columns) continue;
      const T* key = static_cast<const T*>(p.key) + (work.first_batch + b) * p.m * p.d;
      A* packed = reinterpret_cast<A*>(static_cast<char*>(work.packed) + b * bytes) + first * p.d;
      for (int64_t c = 0; c < kPanel; ++c) {
        if (first + c < columns) {
          pack_row(p, key + key_row(work, b, first + c) * p.d, packed + c, kPanel);
        } else {
          for (int64_t t = 0; t < p.d; ++t) packed[t * kPanel + c] = 0;
        }
      }
    }
  }

  static void rows(const SelectParams& p, const SelectWork& work, int64_t begin, int64_t end,
                   void* scratch) {
    const int64_t blocks = ceil_div(p.n, kBlockRows);
    for (int64_t task = begin; task < end; ++task) {
      block(p, work, task / blocks, task % blocks * kBlockRows, Scratch(p, scratch));
    }
  }

 private:
  // Query rows first_row ... first_row + kBlockRows - 1 of batch element b of the work.
  static void block(const SelectParams& p, const SelectWork& work, int64_t b, int64_t first_row,
                    const Scratch& scratch) {
    const int64_t batch = work.first_batch + b;
    const int64_t rows = min_of(kBlockRows, p.n - first_row);
    const int64_t tiles = ceil_div(rows, kTileRows);
    const int64_t columns = columns_of(work, b);
    const T* query = static_cast<const T*>(p.query) + (batch * p.n + first_row) * p.d;
    const A* packed = reinterpret_cast<const A*>(static_cast<const char*>(work.packed) +
                                                 b * packed_bytes(p, work.max_columns));

    for (int64_t r = 0; r < tiles * kTileRows; ++r) {
      A* to = scratch.queries + r / kTileRows * kTileRows * p.d + r % kTileRows;
      if (r < rows) {
        pack_row(p, query + r * p.d, to, kTileRows);
      } else {
        for (int64_t t = 0; t < p.d; ++t) to[t * kTileRows] = 0;
      }
    }
    if (p.self_indices) multiply_self(p, batch, first_row, rows, scratch);

    int64_t self_columns[kBlockRows];
    BestColumns<A> best[kBlockRows];
    const int64_t capacity = BestColumns<A>::capacity(p.k);
    for (int64_t r = 0; r < rows; ++r) {
      const bool self = has_self(p, batch, first_row + r);
      self_columns[r] = self ? column_of(work, b, p.self_indices[first_row + r]) : -1;
      best[r].start(scratch.ranks + r * capacity, p.k - self, self_columns[r]);
    }

    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    for (int64_t first = 0; first < columns; first += kChunk) {
      const int64_t chunk = min_of(kChunk, columns - first);
      for (int64_t c = 0; c < chunk; c += kPanel) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          multiply(p, scratch.queries + tile * kTileRows * p.d, packed + (first + c) * p.d,
                   chunk - c, scratch.strip + tile * kTileRows * kChunk + c, kChunk);
        }
      }
      const int64_t scanned = ceil_div(chunk, kScanColumns<A>) * kScanColumns<A>;
      for (int64_t r = 0; r < rows; ++r) {
        A* strip = scratch.strip + r * kChunk;
        for (int64_t c = chunk; c < scanned; ++c) strip[c] = kLowest;
        const int64_t self = self_columns[r] - first;
        if (self >= 0 && self < chunk) strip[self] = kLowest;
        best[r].scan(strip, first, chunk);
      }
    }

    for (int64_t r = 0; r < rows; ++r) {
      write(p, work, b, first_row + r, best[r], scratch.self_similarities[r]);
    }
  }

  // The similarity of each row to its own token, through the same tile as every other pair.
  static void multiply_self(const SelectParams& p, int64_t batch, int64_t first_row, int64_t rows,
                            const Scratch& scratch) {
    const T* key = static_cast<const T*>(p.key) + batch * p.m * p.d;
    constexpr int64_t kStep = kTileRows < kPanel ? kTileRows : kPanel;
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int64_t tile_rows = min_of(kTileRows, rows - first);
      for (int64_t step = 0; step < tile_rows; step += kStep) {
        const int64_t stop = min_of(step + kStep, tile_rows);
        for (int64_t i = 0; i < p.d * kPanel; ++i) scratch.self_panel[i] = 0;
        for (int64_t r = step; r < stop; ++r) {
          const int64_t self = p.self_indices[first_row + first + r];
          pack_row(p, key + self * p.d, scratch.self_panel + r - step, kPanel);
        }
        multiply(p, scratch.queries + first * p.d, scratch.self_panel, kPanel, scratch.self_tile,
                 kPanel);
        for (int64_t r = step; r < stop; ++r) {
          scratch.self_similarities[first + r] = scratch.self_tile[r * kPanel + r - step];
        }
      }
    }
  }

  static bool has_self(const SelectParams& p, int64_t batch, int64_t row) {
    return p.self_indices && (!p.key_mask || p.key_mask[batch * p.m + p.self_indices[row]]);
  }

  // The column of a row of key, or -1 where it is not among the columns.
  static int64_t column_of(const SelectWork& work, int64_t b, int64_t row) {
    if (!work.columns) return row;
    const int64_t* columns = work.columns + b * work.max_columns;
    int64_t low = 0, high = columns_of(work, b);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (columns[middle] < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < columns_of(work, b) && columns[low] == row ? low : -1;
  }

  static void write(const SelectParams& p, const SelectWork& work, int64_t b, int64_t row,
                    BestColumns<A>& best, A self_similarity) {
    const int64_t batch = work.first_batch + b;
    A* similarities = static_cast<A*>(p.similarities) + (batch * p.n + row) * p.k;
    int64_t* indices = p.indices + (batch * p.n + row) * p.k;
    int64_t count = 0;
    const auto put = [&](A similarity, int64_t index) {
      similarities[count] = similarity;
      indices[count++] = index;
    };
    const int64_t found = best.finish(p.order);
    bool self_due = has_self(p, batch, row);
    for (int64_t j = 0; j < found; ++j) {
      const int64_t index = key_row(work, b, best.ranks()[j].column());
      if (self_due && (p.order == Order::similarity || p.self_indices[row] < index)) {
        put(self_similarity, p.self_indices[row]);
        self_due = false;
      }
      put(best.ranks()[j].similarity(), index);
    }
    if (self_due) put(self_similarity, p.self_indices[row]);
    while (count < p.k) put(-std::numeric_limits<A>::infinity(), 0);
  }
};

template <class T>
SelectKernel select_kernel() {
  return {kBlockRows,
          kTileColumns<accumulate_t<T>>,
          Select<T>::packed_bytes,
          Select<T>::scratch_bytes,
          Select<T>::pack,
          Select<T>::rows};
}

}  // namespace convnn::CONVNN_ISA
