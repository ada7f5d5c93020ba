// SPDX-License-Identifier: MIT
// select on the CPU for few queries: s_i = k-max(S)[i, :], I_i = k-argmax(S)[i, :] (Eq. 4, 5).
//
// With few queries, reading the keys costs more than the products. So they are neither packed nor
// screened, but read once, where they lie: a task takes a range of the columns of one batch element
// and all its queries. It transposes kLanes keys at a time in registers, multiplies them by every
// query, and collects the best columns of its range. What the ranges of a query found is then
// merged in the total order of neighbors. With key ranges, it reads only what one of the queries
// may see, and multiplies it only by those from the first to the last that may.
//
// The cosine with very few queries does not need normalized keys either: the products of a key as
// it is, divided by its norm, both in float32, are a screen (screen.h) of the similarities, which
// are then computed exactly for the few keys that it does not rule out. Norms near the limits of
// float32, NaN, and chunks of too similar keys are left to the normalized keys.
//
// The number of ranges depends on shapes and key ranges only. A similarity has the same bits as
// from multiply_tile, so a result depends neither on the number of queries nor on that of threads.
#pragma once

#include "select.h"

namespace convnn::CONVNN_ISA {

// So many queries are few; with several tasks, so many are. Otherwise the packed keys are worth
// their time: they are multiplied in larger tiles, and blocks of queries are divided among threads.
// All measured.
constexpr int64_t kFewRows = 16;
constexpr int64_t kMostFewRows = kVectorBytes == 64 ? 64 : 32;
constexpr int64_t kSeveralTasks = 4;

// A range is worth this many multiply-adds, at least one chunk, and for large k this many columns
// for each neighbor of a query: then merging takes little time. There are not more ranges than make
// this many tasks.
constexpr int64_t kRangeWork = int64_t(1) << 17;
constexpr int64_t kColumnsPerNeighbor = 8;
constexpr int64_t kEnoughTasks = 256;

// Up to this many queries, a screened cosine pays. With more, computing exact similarities takes
// longer than normalizing the keys. Measured up to 8, beyond that estimated.
constexpr int64_t kMostScreenedRows = 16;

// Squares of norms for which a float32 has no overflow and a relative error of at most the rounding
// of its sum, and which are surely above that of epsilon: up to there, the cosine is 0.
constexpr float kLeastSquare = 0x1p-78f, kLargestSquare = 0x1p80f;
static_assert(double(kLeastSquare) > 2 * kCosineEpsilon * kCosineEpsilon);

// The products of this many queries are summed side by side: their sums are independent, and with
// the columns they fit into the registers.
constexpr int kRowsAtOnce = 4;

template <class T>
class SelectFew : Select<T> {
  using Base = Select<T>;
  using A = accumulate_t<T>;
  using V = Vector<A>;

  struct Scratch {
    A* group_max;           // [n, kGroups]
    A* queries;             // [n, padded_stride of d]
    A* self_similarities;   // [n, rounded up to kTileRows]
    A* rows;                // [kLanes, padded_stride of d]
    A* panel;               // with self: [d, kTileColumns]
    A* tile;                // with self: [kTileRows, kTileColumns]
    A* sums;                // [n, kLanes]
    A* strip;               // [n, kStripStride]
    Rank<A>* ranks;         // [n, capacity]
    BestColumns<A>* best;   // [n]
    int64_t* self_columns;  // [n]
    ColumnRange* seen;      // [n] the columns that each may see
    ColumnRange* parts;     // [n] those of a chunk
    size_t bytes;

    Scratch(const SelectParams& p, void* base) {
      const int64_t padded = ceil_div(p.n, kTileRows) * kTileRows;
      Arena arena(base);
      queries = arena.take<A>(padded * padded_stride<A>(p.d));
      self_similarities = arena.take<A>(padded);
      rows = arena.take<A>(kLanes<A> * padded_stride<A>(p.d));
      panel = arena.take<A>(Base::includes_self(p) ? p.d * kTileColumns<A> : 0);
      tile = arena.take<A>(Base::includes_self(p) ? kTileRows * kTileColumns<A> : 0);
      sums = arena.take<A>(p.n * kLanes<A>);
      strip = arena.take<A>(p.n * kStripStride<A>);
      group_max = arena.take<A>(p.n * kGroups);
      ranks = arena.take<Rank<A>>(p.n * BestColumns<A>::capacity(Base::most_found(p)));
      best = arena.take<BestColumns<A>>(p.n);
      self_columns = arena.take<int64_t>(p.n);
      seen = arena.take<ColumnRange>(p.n);
      parts = arena.take<ColumnRange>(p.n);
      bytes = arena.used();
    }
  };

 public:
  static bool pays(const SelectParams& p, int64_t columns) {
    return p.n <= kFewRows ||
           (p.n <= kMostFewRows && p.batch * ranges(p, columns) >= kSeveralTasks);
  }

  static int64_t ranges(const SelectParams& p, int64_t columns) {
    const int64_t work = ceil_div(kRangeWork, max_of(1, p.n * p.d));
    const int64_t shortest =
        max_of(max_of(work, kChunk), kColumnsPerNeighbor * Base::most_found(p));
    return max_of(1, min_of(columns / shortest, ceil_div(kEnoughTasks, p.batch)));
  }

  static size_t found_bytes(const SelectParams& p) {
    return size_t(Base::most_found(p)) * sizeof(Rank<A>);
  }
  static size_t scratch_bytes(const SelectParams& p) { return Scratch(p, nullptr).bytes; }

  static void search(const SelectParams& p, const SelectWork& work, const FoundInRanges& found,
                     int64_t begin, int64_t end, void* base) {
    Scratch scratch(p, base);
    int64_t prepared = -1;  // the batch element whose queries are in scratch
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / found.ranges, range = task % found.ranges;
      if (b != prepared) read_queries(p, work.first_batch + b, scratch);
      prepared = b;
      search_range(p, work, b, range, found.ranges, scratch);
      for (int64_t r = 0; r < p.n; ++r) {
        if (found.ranges == 1) {
          Base::write(p, work, b, r, scratch.best[r], scratch.self_similarities[r]);
        } else {
          keep(p, found, (b * p.n + r) * found.ranges + range, scratch.best[r]);
        }
      }
    }
  }

  static void merge(const SelectParams& p, const SelectWork& work, const FoundInRanges& found,
                    int64_t begin, int64_t end, void* base) {
    Scratch scratch(p, base);
    const Rank<A>* ranks = static_cast<const Rank<A>*>(found.ranks);
    int64_t prepared = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.n, r = task % p.n;
      if (Base::includes_self(p) && b != prepared) read_queries(p, work.first_batch + b, scratch);
      prepared = b;
      BestColumns<A>& best = start(p, work, b, r, scratch);
      for (int64_t i = task * found.ranges; i < (task + 1) * found.ranges; ++i) {
        best.include(ranks + i * Base::most_found(p), found.counts[i]);
      }
      Base::write(p, work, b, r, best, scratch.self_similarities[r]);
    }
  }

 private:
  static void read_queries(const SelectParams& p, int64_t batch, Scratch& scratch) {
    const int64_t stride = padded_stride<A>(p.d);
    for (int64_t r = 0; r < p.n; ++r) {
      Base::read_row(p, p.query.at<T>(batch, r), scratch.queries + r * stride);
    }
    if (!Base::includes_self(p)) return;
    for (int64_t r = p.n; r < ceil_div(p.n, kTileRows) * kTileRows; ++r) {
      Base::pad_row(p, scratch.queries + r * stride, 0);
    }
    Base::multiply_self(p, batch, 0, p.n, scratch);
  }

  // The selection of query r from no columns yet.
  static BestColumns<A>& start(const SelectParams& p, const SelectWork& work, int64_t b, int64_t r,
                               const Scratch& scratch) {
    const bool self = Base::has_self(p, work.first_batch + b, r);
    scratch.self_columns[r] = Base::self_column(p, work, b, r);
    const int64_t most = Base::most_found(p);
    scratch.best[r].start(scratch.ranks + r * BestColumns<A>::capacity(most),
                          scratch.group_max + r * kGroups, most - self, scratch.self_columns[r]);
    return scratch.best[r];
  }

  // Stores what was found as entry i.
  static void keep(const SelectParams& p, const FoundInRanges& found, int64_t i,
                   BestColumns<A>& best) {
    found.counts[i] = best.finish(Order::similarity);
    std::copy(best.ranks(), best.ranks() + found.counts[i],
              static_cast<Rank<A>*>(found.ranks) + i * Base::most_found(p));
  }

  // The queries first ... last - 1 and the columns of a chunk that one of them may see. `end`: of
  // the range that the chunk is from. query: the first one, as it is in scratch.
  struct Part {
    int64_t first, last;
    ColumnRange columns;
    int64_t end;
    const A* query;
  };

  // What part of a chunk is seen; its `columns` are empty if nothing is.
  static Part part_of(const SelectParams& p, const ColumnRange& chunk, int64_t end,
                      const Scratch& scratch) {
    Part part = {0, 0, {}, end, nullptr};
    for (int64_t r = 0; r < p.n; ++r) {
      scratch.parts[r] = scratch.seen[r].within(chunk);
      if (scratch.parts[r].count() == 0) continue;
      if (part.last == 0) part.first = r;
      part.last = r + 1;
      part.columns.include(scratch.parts[r]);
    }
    part.query = scratch.queries + part.first * padded_stride<A>(p.d);
    return part;
  }

  static void search_range(const SelectParams& p, const SelectWork& work, int64_t b, int64_t range,
                           int64_t ranges, const Scratch& scratch) {
    const ColumnRange all = Base::seen_columns(work, b);
    const int64_t length = ceil_div(ceil_div(all.count(), ranges), kLanes<A>) * kLanes<A>;
    const int64_t begin = all.begin + range * length, end = min_of(all.end, begin + length);
    for (int64_t r = 0; r < p.n; ++r) {
      start(p, work, b, r, scratch);
      scratch.seen[r] = Base::range_of(p, work, b, r);
    }
    bool is_first = true;
    for (int64_t first = begin; first < end; first += kChunk) {
      const Part part = part_of(p, {first, min_of(end, first + kChunk)}, end, scratch);
      if (part.columns.count() == 0) continue;
      search_part(p, work, b, part, is_first, scratch);
      is_first = false;
    }
    if constexpr (std::is_same_v<A, float>) {
      for (int64_t r = 0; r < p.n; ++r) resolve(p, work, b, r, scratch);
    }
  }

  static void search_part(const SelectParams& p, const SelectWork& work, int64_t b,
                          const Part& part, bool is_first, const Scratch& scratch) {
    if constexpr (std::is_same_v<A, float>) {
      if (p.metric == Metric::cosine && p.n <= kMostScreenedRows) {
        if (screen_part(p, work, b, part, is_first, scratch)) return;
        for (int64_t r = part.first; r < part.last; ++r) resolve(p, work, b, r, scratch);
      }
    }
    const ColumnRange& columns = part.columns;
    for (int64_t c = columns.begin; c < columns.end; c += kLanes<A>) {
      const A* rows[kLanes<A>];
      read_keys(p, work, b, c, part, p.metric == Metric::cosine, rows, scratch);
      if (p.metric == Metric::euclidean) {
        multiply<true>(p, rows, part, scratch.strip + c - columns.begin, scratch);
      } else {
        multiply<false>(p, rows, part, scratch.strip + c - columns.begin, scratch);
      }
    }
    close_strip(part, scratch);
    for (int64_t r = part.first; r < part.last; ++r) {
      const A* strip = Base::part_of_strip(r, columns, scratch.parts[r], scratch);
      scratch.best[r].survey(strip, scratch.parts[r].count());
      scratch.best[r].collect(strip, scratch.parts[r].begin, scratch.parts[r].count());
    }
  }

  // Selects from a part of a chunk by screened cosines. Returns false, with nothing collected, if
  // there is no bound for their error or they rule out too little.
  static bool screen_part(const SelectParams& p, const SelectWork& work, int64_t b,
                          const Part& part, bool is_first, const Scratch& scratch) {
    bool bounded = true;
    const ColumnRange& columns = part.columns;
    for (int64_t c = columns.begin; c < columns.end && bounded; c += kLanes<A>) {
      const A* rows[kLanes<A>];
      A* strip = scratch.strip + c - columns.begin;
      read_keys(p, work, b, c, part, false, rows, scratch);
      multiply<false>(p, rows, part, strip, scratch);
      const V squares = squared_norms(p, rows);
      for (int i = 0; i < kLanes<A>; ++i) {
        bounded = bounded && squares[i] >= kLeastSquare && squares[i] <= kLargestSquare;
      }
      V inverse;
      for (int i = 0; i < kLanes<A>; ++i) inverse[i] = 1 / std::sqrt(squares[i]);
      for (int64_t r = part.first; r < part.last; ++r) {
        A* to = strip + r * kStripStride<A>;
        store(to, load(to) * inverse);
      }
    }
    if (!bounded) return false;
    // Each of the d additions of either product has an error of at most 2^-24, and normalized rows
    // may be a little longer than 1. 2^-22 also covers the division by a norm and the rounding of
    // what is computed from this bound.
    const ScreenError error = {0x1p-22f * 1.001f * float(p.d + 64), 0, 1};
    close_strip(part, scratch);
    int64_t open = 0, most = 0;
    for (int64_t r = part.first; r < part.last; ++r) {
      const A* row = Base::part_of_strip(r, columns, scratch.parts[r], scratch);
      scratch.best[r].survey_screened(StripRow<A>{row}, scratch.parts[r].count(), error);
      open += scratch.best[r].open_groups();
      most += Base::most_open(p, scratch.parts[r].count(), is_first);
    }
    if (open > most) return false;
    for (int64_t r = part.first; r < part.last; ++r) {
      const A* row = Base::part_of_strip(r, columns, scratch.parts[r], scratch);
      scratch.best[r].collect_screened(StripRow<A>{row}, scratch.parts[r].begin,
                                       scratch.parts[r].count(),
                                       [&] { resolve(p, work, b, r, scratch); });
    }
    return true;
  }

  static void close_strip(const Part& part, const Scratch& scratch) {
    Base::close_strip(part.columns.begin, scratch.parts, part.first, part.last,
                      scratch.self_columns, scratch);
  }

  // Computes the cosines of query r and the columns that were collected with an error.
  static void resolve(const SelectParams& p, const SelectWork& work, int64_t b, int64_t r,
                      const Scratch& scratch) {
    BestColumns<A>& best = scratch.best[r];
    const int64_t stride = padded_stride<A>(p.d), count = best.unresolved();
    Rank<A>* const ranks = best.ranks();
    for (int64_t first = 0; first < count; first += kLanes<A>) {
      const A* rows[kLanes<A>];
      for (int64_t i = 0; i < kLanes<A>; ++i) {
        const int64_t column = ranks[min_of(first + i, count - 1)].column();
        Base::read_row(p, Base::key_at(p, work, b, column), scratch.rows + i * stride);
        rows[i] = scratch.rows + i * stride;
      }
      const V cosines = product<false>(p, rows, scratch.queries + r * stride);
      for (int64_t i = 0; i < min_of(kLanes<A>, count - first); ++i) {
        ranks[first + i] = Rank<A>(cosines[i], ranks[first + i].column());
      }
    }
    best.end_resolve();
  }

  // The sums of the squares of kLanes keys.
  static V squared_norms(const SelectParams& p, const A* const* rows) {
    V sums[2] = {};
    for (int64_t t = 0; t < p.d; t += kLanes<A>) {
      V columns[kLanes<A>];
      read_columns(rows, t, columns);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes<A>; ++j) sums[j % 2] += columns[j] * columns[j];
    }
    return sums[0] + sums[1];
  }

  // Finds the keys of columns first ... first + kLanes - 1, or those of `part`, as rows that can be
  // read in whole vectors, with zeros from element d on; normalized or as they are.
  static void read_keys(const SelectParams& p, const SelectWork& work, int64_t b, int64_t first,
                        const Part& part, bool normalized, const A** rows, const Scratch& scratch) {
    const T* keys[kLanes<A>];
    locate(p, work, b, first + kLanes<A>, part.end, keys);
    prefetch(p, keys);
    locate(p, work, b, first, part.columns.end, keys);
    if constexpr (std::is_same_v<T, A>) {
      if (!normalized && p.d % kLanes<A> == 0) {
        std::copy(keys, keys + kLanes<A>, rows);
        return;
      }
    }
    for (int i = 0; i < kLanes<A>; ++i) {
      A* row = scratch.rows + i * padded_stride<A>(p.d);
      if (normalized) {
        Base::read_row(p, keys[i], row);
      } else {
        for (int64_t t = 0; t < p.d; ++t) row[t] = widen(keys[i][t]);
        Base::pad_row(p, row, p.d);
      }
      rows[i] = row;
    }
  }

  // The rows of key of columns first ... first + kLanes - 1; behind the last column, its own.
  static void locate(const SelectParams& p, const SelectWork& work, int64_t b, int64_t first,
                     int64_t end, const T** keys) {
    const T* key = p.key.at<T>(work.first_batch + b);
    if (!work.columns && first + kLanes<A> <= end) {
      for (int i = 0; i < kLanes<A>; ++i) keys[i] = key + (first + i) * p.key.row_stride;
    } else {
      for (int i = 0; i < kLanes<A>; ++i) {
        keys[i] = key + Base::key_row(work, b, min_of(first + i, end - 1)) * p.key.row_stride;
      }
    }
  }

  static void prefetch(const SelectParams& p, const T* const* keys) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(T));
    for (int64_t t = 0; t < p.d; t += kLine) {
      for (int i = 0; i < kLanes<A>; ++i) __builtin_prefetch(keys[i] + t);
    }
  }

  // c [n, kStripStride]: the similarities of the queries of `part`.
  // rows: kLanes keys, which can be read in whole vectors, with zeros from element d on.
  template <bool SquaredDifference>
  static void multiply(const SelectParams& p, const A* const* rows, const Part& part, A* c,
                       const Scratch& scratch) {
    if (part.last - part.first == 1) {
      store(c + part.first * kStripStride<A>, product<SquaredDifference>(p, rows, part.query));
      return;
    }
    const int64_t stride = padded_stride<A>(p.d);
    if (p.d == 0) {
      for (int64_t r = part.first; r < part.last; ++r) store(c + r * kStripStride<A>, V{});
    }
    for (int64_t t = 0; t < p.d; t += kLanes<A>) {
      V columns[kLanes<A>];
      read_columns(rows, t, columns);
      const bool begins = t % kSummedSteps == 0;
      const bool ends = (t + kLanes<A>) % kSummedSteps == 0 || t + kLanes<A> >= p.d;
      const auto add = [&](auto count, int64_t r) {
        constexpr int kRows = decltype(count)::value;
        V sum[kRows];
        for (int i = 0; i < kRows; ++i) {
          sum[i] = begins ? V{} : load(scratch.sums + (r + i) * kLanes<A>);
        }
        add_products<SquaredDifference>(columns, scratch.queries + r * stride + t, stride, sum);
        for (int i = 0; i < kRows; ++i) {
          A* to = c + (r + i) * kStripStride<A>;
          if (!ends) {
            store(scratch.sums + (r + i) * kLanes<A>, sum[i]);
          } else {
            store(to, t < kSummedSteps ? sum[i] : load(to) + sum[i]);
          }
        }
      };
      int64_t r = part.first;
      for (; r + kRowsAtOnce <= part.last; r += kRowsAtOnce) {
        add(std::integral_constant<int, kRowsAtOnce>(), r);
      }
      for (; r < part.last; ++r) add(std::integral_constant<int, 1>(), r);
    }
  }

  // The similarities of one query to kLanes keys.
  template <bool SquaredDifference>
  static V product(const SelectParams& p, const A* const* rows, const A* query) {
    V total = {};
    for (int64_t t = 0; t < p.d;) {
      V sum[1] = {};
      const int64_t stop = min_of(t + kSummedSteps, p.d);
      const bool first = t == 0;
      for (; t < stop; t += kLanes<A>) {
        V columns[kLanes<A>];
        read_columns(rows, t, columns);
        add_products<SquaredDifference>(columns, query + t, 0, sum);
      }
      total = first ? sum[0] : total + sum[0];
    }
    return total;
  }

  // Elements t ... t + kLanes - 1 of kLanes keys: columns[i] has element t + i of all of them.
  static void read_columns(const A* const* rows, int64_t t, V (&columns)[kLanes<A>]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) columns[i] = load(rows[i] + t);
    transpose<A>(columns);
  }

  // Adds the products of Rows queries with kLanes steps of kLanes keys.
  template <bool SquaredDifference, int Rows>
  static void add_products(const V (&columns)[kLanes<A>], const A* queries, int64_t stride,
                           V (&sum)[Rows]) {
#pragma GCC unroll 16
    for (int j = 0; j < kLanes<A>; ++j) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        if constexpr (SquaredDifference) {
          const V difference = columns[j] - queries[r * stride + j];
          sum[r] -= difference * difference;
        } else {
          sum[r] += columns[j] * queries[r * stride + j];
        }
      }
    }
  }
};

template <class T>
FewQueriesKernel few_queries_kernel() {
  return {SelectFew<T>::pays,          SelectFew<T>::ranges, SelectFew<T>::found_bytes,
          SelectFew<T>::scratch_bytes, SelectFew<T>::search, SelectFew<T>::merge};
}

}  // namespace convnn::CONVNN_ISA
