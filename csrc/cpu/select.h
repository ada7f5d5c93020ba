// SPDX-License-Identifier: MIT
// select on the CPU: s_i = k-max(S)[i, :], I_i = k-argmax(S)[i, :] with S = Q^ K^T (Eq. 3 to 5),
// without S.
//
// The keys that may be neighbors are prepared once: normalized and packed into panels of tile
// columns. A task is a block of kBlockRows query rows; a thread takes up to kBlocksTogether of them
// and walks the panels in chunks of kChunk columns. For each chunk, which stays in the L2 cache,
// and each block it fills a strip [kBlockRows, kChunk] of S, which stays there, too, and selects
// from it row by row (best_columns.h).
//
// With key ranges, it walks only the columns that one of its rows may see, and rows whose ranges
// have little in common one after the other (column_ranges.h). From a strip, each row selects
// within its own range.
//
// If the processor multiplies 16-bit numbers faster than float32, in vectors or on AMX tiles, the
// strip first holds approximate similarities, a screen of S (screen.h, screen_amx.h). A chunk in
// which the screen rules out too few keys, such as one of many nearly equal keys, is computed in
// full.
//
// Few queries are selected without packed keys (select_few.h).
#pragma once

#include "column_ranges.h"
#include "kernels.h"
#include "normalize.h"
#include "screen.h"
#include "screen_amx.h"

namespace convnn::CONVNN_ISA {

// A screen is used if it leaves at most k plus one in this many groups of a chunk undecided, and at
// most half of them, or three quarters in the first chunk, which has only its own bound. More mean
// that the columns are too similar for a screen, and those still undecided at the end are computed
// one by one, each at the cost of about eight pairs of a full tile.
constexpr int64_t kGroupsPerOpen = 4;

// A screen pays from this many query rows and columns on and up to this many neighbors: measured.
constexpr int64_t kScreenedRows = 192;
constexpr int64_t kScreenedColumns = 512;
constexpr int64_t kMostScreened = 96;

// Blocks that walk the chunks together, so that a chunk is read from the outer cache once for all.
// For many neighbors, of which each block needs a list, only one does.
constexpr int64_t kBlocksTogether = 4;

// The rows of a strip are not a multiple of a page apart: they would map to the same few sets of
// the L1 cache.
template <class A>
constexpr int64_t kStripStride = kChunk + max_of(kTileColumns<A>, kScanColumns<A>);

// The screen for rows of T.
struct NoScreen {
  struct Extent {};
  struct Session {
    explicit Session(int64_t) {}
  };
  using Row = StripRow<float>;
  static constexpr int64_t kTileRows = 1;
  static constexpr bool kHasScales = false;
  static int64_t words(int64_t) { return 0; }
};
#if defined(__AMX_BF16__)
template <class T>
using ScreenOf = std::conditional_t<std::is_same_v<T, double>, NoScreen, AmxScreen<T>>;
#elif defined(__AVX2__)
template <class T>
using ScreenOf = std::conditional_t<std::is_same_v<T, double>, NoScreen, FixedPointScreen>;
#else
template <class T>
using ScreenOf = NoScreen;
#endif

template <class T>
class Select {
 protected:
  using A = accumulate_t<T>;
  using Screen = ScreenOf<T>;
  using Extent = typename Screen::Extent;
  static constexpr bool kScreens = !std::is_same_v<Screen, NoScreen>;
  static constexpr int64_t kPanel = kTileColumns<A>;
  static constexpr int64_t kQueryGroups = (kBlockRows + kLanes<A> - 1) / kLanes<A>;

  // The prepared keys of one batch element.
  struct Keys {
    bool screened;
    A* panels;        // not screened: [panels, d, kPanel]
    A* rows;          // screened: [panels * kPanel, padded_stride of d]
    uint32_t* words;  // screened: [panels, words of d, kPanel]
    // Screened: [panels + 1, kPanel], 0 in panels that nothing sees. Rows are scanned in whole
    // vectors of groups, and so up to a panel beyond their last column.
    float* scales;
    Extent* extents;  // screened: [panels]
    size_t bytes;

    Keys(const SelectParams& p, int64_t columns, bool has_screen, void* base) {
      const int64_t count = ceil_div(columns, kPanel);
      screened = has_screen;
      Arena arena(base);
      panels = arena.take<A>(screened ? 0 : count * p.d * kPanel);
      rows = arena.take<A>(screened ? count * kPanel * padded_stride<A>(p.d) : 0);
      words = arena.take<uint32_t>(screened ? count * words_of(p) * kPanel : 0);
      scales = arena.take<float>(screened && Screen::kHasScales ? (count + 1) * kPanel : 0);
      extents = arena.take<Extent>(screened ? count : 0);
      bytes = arena.used();
    }
  };

  struct Scratch {
    // Of all blocks that walk the chunks together.
    A* strip;      // [kBlockRows, kStripStride]
    A* group_max;  // [kBlockRows, kGroups]
    A* rows;       // [kLanes, padded_stride of d]
    A* panel;      // [d, kPanel]
    A* tile;       // [kTileRows, kPanel]
    // Of this block.
    A* queries;             // [kQueryGroups * kLanes, padded_stride of d]; kBlockRows are used
    uint32_t* words;        // screened: [kBlockRows, padded_stride of words]
    float* scales;          // screened: [kBlockRows]
    A* lanes;               // screened: [kQueryGroups, d, kLanes], the queries with lanes for rows
    Extent* extents;        // screened: [kBlockRows]
    ColumnRange* ranges;    // [kBlockRows] the columns that each row may see
    ColumnRange* parts;     // [kBlockRows] those of them that are in the current chunk
    int64_t* self_columns;  // [kBlockRows]
    A* self_similarities;   // [kBlockRows]
    Rank<A>* ranks;         // [rows, capacity]
    BestColumns<A>* best;   // [rows]
    size_t bytes;

    Scratch(const SelectParams& p, int64_t block, void* base) {
      const int64_t most_rows = min_of(kBlockRows, p.n);
      Arena arena(base);
      strip = arena.take<A>(kBlockRows * kStripStride<A>);
      group_max = arena.take<A>(kBlockRows * kGroups);
      rows = arena.take<A>(kLanes<A> * padded_stride<A>(p.d));
      panel = arena.take<A>(p.d * kPanel);
      tile = arena.take<A>(kTileRows * kPanel);
      for (int64_t i = 0; i <= block; ++i) {
        queries = arena.take<A>(kQueryGroups * kLanes<A> * padded_stride<A>(p.d));
        words = arena.take<uint32_t>(kScreens ? kBlockRows * word_stride(p) : 0);
        scales = arena.take<float>(kScreens ? kBlockRows : 0);
        lanes = arena.take<A>(kScreens ? kQueryGroups * p.d * kLanes<A> : 0);
        extents = arena.take<Extent>(kScreens ? kBlockRows : 0);
        ranges = arena.take<ColumnRange>(kBlockRows);
        parts = arena.take<ColumnRange>(kBlockRows);
        self_columns = arena.take<int64_t>(kBlockRows);
        self_similarities = arena.take<A>(kBlockRows);
        ranks = arena.take<Rank<A>>(most_rows * BestColumns<A>::capacity(most_found(p)));
        best = arena.take<BestColumns<A>>(most_rows);
      }
      bytes = arena.used();
    }
  };

  // Whether a query may be its own neighbor beside those that are selected.
  static bool includes_self(const SelectParams& p) { return p.self_indices && !p.exclude_self; }

  // The most neighbors that a query can have: k may exceed the number of keys.
  static int64_t most_found(const SelectParams& p) {
    return min_of(p.k, (p.candidates ? p.r : p.m) + (includes_self(p) ? 1 : 0));
  }

  // The most blocks of queries that walk the chunks together.
  static int64_t most_blocks(const SelectParams& p) {
    return p.k > kMostScreened ? 1 : min_of(kBlocksTogether, ceil_div(p.n, kBlockRows));
  }

  static int64_t words_of(const SelectParams& p) { return Screen::words(p.d); }
  static int64_t word_stride(const SelectParams& p) { return padded_stride<uint32_t>(words_of(p)); }

  static Keys keys_of(const SelectParams& p, const SelectWork& work, int64_t b) {
    const size_t bytes = packed_bytes(p, work.max_columns, work.screened);
    return Keys(p, work.max_columns, work.screened, static_cast<char*>(work.packed) + b * bytes);
  }

  static int64_t columns_of(const SelectWork& work, int64_t b) {
    return work.counts ? work.counts[b] : work.max_columns;
  }
  static int64_t key_row(const SelectWork& work, int64_t b, int64_t column) {
    return work.columns ? work.columns[b * work.max_columns + column] : column;
  }

  // The columns that any query of batch element b of the work may see.
  static ColumnRange seen_columns(const SelectWork& work, int64_t b) {
    if (!work.seen) return {0, columns_of(work, b)};
    return {work.seen[2 * b], work.seen[2 * b + 1]};
  }

  // The key row [d] of a column of batch element b of the work; null after the last one.
  static const T* key_at(const SelectParams& p, const SelectWork& work, int64_t b, int64_t column) {
    if (column >= columns_of(work, b)) return nullptr;
    return p.key.at<T>(work.first_batch + b, key_row(work, b, column));
  }

  // Copies x [d], null for zeros, to row, normalized for the cosine and padded with zeros to whole
  // vectors. Returns the scale of x in this: its inverse norm, or 1.
  static double read_row(const SelectParams& p, const T* x, A* row) {
    if (!x) {
      pad_row(p, row, 0);
      return 1;
    }
    const A* wide;  // converted once
    if constexpr (std::is_same_v<T, A>) {
      wide = x;
    } else {
      for (int64_t t = 0; t < p.d; ++t) row[t] = widen(x[t]);
      wide = row;
    }
    Normalizer normalizer;
    if (p.metric == Metric::cosine) {
      normalizer = normalizer_of(wide, p.d);
      normalizer.normalize(wide, p.d, row);
    } else if (wide != row) {
      std::copy_n(wide, p.d, row);
    }
    pad_row(p, row, p.d);
    return normalizer.inverse_norm();
  }
  static void pad_row(const SelectParams& p, A* row, int64_t from) {
    for (int64_t t = from; t < padded_stride<A>(p.d); ++t) row[t] = 0;
  }

  // The similarities of rows of queries to the first `columns` of a panel.
  static void similarities(const SelectParams& p, const A* queries, int64_t rows, const A* panel,
                           int64_t columns, A* c, int64_t ldc) {
    const TileRows<A> of = {queries, padded_stride<A>(p.d), 1};
    if (p.metric == Metric::euclidean) {
      multiply<A, true>(of, rows, panel, p.d, columns, c, ldc);
    } else {
      multiply<A, false>(of, rows, panel, p.d, columns, c, ldc);
    }
  }

 public:
  // Whether a screen pays for these shapes and as many columns in the range of a query. With few
  // queries or columns, preparing the keys costs more than the product; with many neighbors or
  // short rows, the selection does.
  static bool screen_pays(const SelectParams& p, int64_t columns) {
    return kScreens && p.metric != Metric::euclidean && p.n >= kScreenedRows &&
           columns >= kScreenedColumns && p.d >= 16 && p.k <= min_of(kMostScreened, columns / 4) &&
           screen_fits(p);
  }

  // Whether prepared keys take at most eight bytes for each element of key and, where a screen has
  // as many bytes as the rows themselves, of query.
  static bool screen_fits(const SelectParams& p) {
    const int64_t keys = p.candidates ? p.r : p.m, queries = Screen::kHasScales ? 0 : p.n;
    const int64_t words = padded_stride<A>(p.d) + words_of(p) + Screen::kHasScales;
    return double(words) * double(keys) <= 2 * double(p.d) * double(keys + queries);
  }

  static size_t packed_bytes(const SelectParams& p, int64_t columns, bool screened) {
    return Keys(p, columns, screened, nullptr).bytes;
  }

  static size_t scratch_bytes(const SelectParams& p) {
    return Scratch(p, most_blocks(p) - 1, nullptr).bytes;
  }

  static void pack(const SelectParams& p, const SelectWork& work, int64_t begin, int64_t end,
                   void* base) {
    const Scratch scratch(p, 0, base);
    const int64_t panels = ceil_div(work.max_columns, kPanel);
    const int64_t stride = padded_stride<A>(p.d);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / panels, panel = task % panels;
      const ColumnRange seen = seen_columns(work, b);
      const Keys keys = keys_of(p, work, b);
      if (keys.screened && Screen::kHasScales) {
        std::fill_n(keys.scales + panel * kPanel, kPanel * (panel + 1 == panels ? 2 : 1), 0);
      }
      if (panel * kPanel >= seen.end || (panel + 1) * kPanel <= seen.begin) continue;
      Extent extent;
      for (int64_t first = 0; first < kPanel; first += kLanes<A>) {
        A* rows = keys.screened ? keys.rows + (panel * kPanel + first) * stride : scratch.rows;
        double scales[kLanes<A>];
        for (int64_t i = 0; i < kLanes<A>; ++i) {
          const T* x = key_at(p, work, b, panel * kPanel + first + i);
          scales[i] = read_row(p, x, rows + i * stride);
        }
        if (keys.screened) {
          if constexpr (kScreens) {
            for (int64_t i = 0; i < kLanes<A>; ++i) {
              const T* x = key_at(p, work, b, panel * kPanel + first + i);
              const auto rounded = round(p, x, rows + i * stride, scales[i], i, scratch);
              if (Screen::kHasScales) keys.scales[panel * kPanel + first + i] = rounded.scale;
              extent.include(rounded.extent);
            }
            interleave(scratch.words, word_stride(p), words_of(p),
                       keys.words + panel * words_of(p) * kPanel + first);
          }
        } else {
          interleave(rows, stride, p.d, keys.panels + panel * p.d * kPanel + first);
        }
      }
      if (keys.screened) keys.extents[panel] = extent;
    }
  }

  static void rows(const SelectParams& p, const SelectWork& work, int64_t begin, int64_t end,
                   void* scratch) {
    const typename Screen::Session session(work.screened ? p.d : 0);
    const int64_t blocks = ceil_div(p.n, kBlockRows);
    for (int64_t count, task = begin; task < end; task += count) {
      const int64_t b = task / blocks, block = task % blocks;
      count = min_of(most_blocks(p), min_of(end - task, blocks - block));
      const int64_t first = block * kBlockRows;
      const int64_t last = min_of(first + count * kBlockRows, p.n);
      ColumnRange ranges[kBlocksTogether * kBlockRows];
      for (int64_t row = first; row < last; ++row) ranges[row - first] = range_of(p, work, b, row);
      for (int64_t rows, row = first; row < last; row += rows) {
        rows = p.key_range ? rows_together(ranges + row - first, last - row) : last - row;
        search(p, work, b, row, rows, ranges + row - first, scratch);
      }
    }
  }

 protected:
  // Rounds row [d], which is x (null for zeros) times this scale, to row r of scratch.words, padded
  // with zeros to whole vectors.
  static auto round(const SelectParams& p, const T* x, const A* row, double scale, int64_t r,
                    const Scratch& scratch) {
    uint32_t* words = scratch.words + r * word_stride(p);
    for (int64_t t = words_of(p); t < word_stride(p); ++t) words[t] = 0;
    return Screen::round(x, row, p.d, p.metric, scale, words);
  }

  // Reads `rows` query rows for a block, zeros after them up to whole tiles, and rounds them if
  // they are screened.
  static void read_queries(const SelectParams& p, int64_t batch, int64_t first_row, int64_t rows,
                           bool screened, const Scratch& scratch) {
    const int64_t stride = padded_stride<A>(p.d);
    const auto whole = [&](int64_t tile) { return ceil_div(rows, tile) * tile; };
    const int64_t read = max_of(whole(kTileRows), whole(Screen::kTileRows));
    const auto query_at = [&](int64_t r) {
      return r < rows ? p.query.at<T>(batch, first_row + r) : nullptr;
    };
    double scales[kBlockRows];
    for (int64_t r = 0; r < read; ++r) {
      scales[r] = read_row(p, query_at(r), scratch.queries + r * stride);
    }
    // After all of them are read, because each step waits for sums.
    for (int64_t r = 0; screened && r < read; ++r) {
      if constexpr (kScreens) {
        const auto rounded =
            round(p, query_at(r), scratch.queries + r * stride, scales[r], r, scratch);
        scratch.extents[r] = rounded.extent;
        scratch.scales[r] = rounded.scale;
      }
    }
    if constexpr (kScreens) {
      for (int64_t group = 0; screened && group < ceil_div(rows, kLanes<A>); ++group) {
        to_lanes(scratch.queries + group * kLanes<A> * stride, stride, p.d,
                 scratch.lanes + group * p.d * kLanes<A>);
      }
    }
  }

  // Selects the neighbors of `rows` query rows of batch element b of the work, from first_row on:
  // a part of a block, or several blocks, whose scratch memory begins at base. ranges [rows]: the
  // columns that each row may see.
  static void search(const SelectParams& p, const SelectWork& work, int64_t b, int64_t first_row,
                     int64_t rows, const ColumnRange* ranges, void* base) {
    const Keys keys = keys_of(p, work, b);
    const auto each_row_block = [&](const auto& visit) {
      for (int64_t block = 0, r = 0; r < rows; ++block, r += kBlockRows) {
        visit(first_row + r, min_of(kBlockRows, rows - r), Scratch(p, block, base));
      }
    };
    each_row_block([&](int64_t first, int64_t count, const Scratch& scratch) {
      std::copy_n(ranges + first - first_row, count, scratch.ranges);
      start_block(p, work, b, first, count, keys.screened, scratch);
    });
    ColumnRange all;
    for (int64_t r = 0; r < rows; ++r) all.include(ranges[r]);

    // The chunk with the same relative position as these rows comes first, then the others from
    // left to right: most neighbors of a token of an image are nearby, and with those the screen
    // rules out almost everything else.
    Chunks<A> chunks(all, (first_row + rows / 2) * columns_of(work, b) / p.n);
    bool has_begun[kBlocksTogether] = {};
    for (ColumnRange chunk; chunks.next(chunk);) {
      each_row_block([&](int64_t first, int64_t count, const Scratch& scratch) {
        ColumnRange seen;
        for (int64_t r = 0; r < count; ++r) seen.include(scratch.ranges[r].within(chunk));
        if (seen.count() == 0) return;
        seen.begin = seen.begin / kLanes<A> * kLanes<A>;
        for (int64_t r = 0; r < count; ++r) scratch.parts[r] = scratch.ranges[r].within(seen);
        bool& begun = has_begun[(first - first_row) / kBlockRows];
        if (!screen_chunk(p, keys, seen, !begun, count, scratch)) {
          compute_chunk(p, keys, seen, count, scratch);
        }
        begun = true;
      });
    }
    each_row_block([&](int64_t first, int64_t count, const Scratch& scratch) {
      resolve(p, keys, 0, count, scratch);
      for (int64_t r = 0; r < count; ++r) {
        write(p, work, b, first + r, scratch.best[r], scratch.self_similarities[r]);
      }
    });
  }

  static void start_block(const SelectParams& p, const SelectWork& work, int64_t b,
                          int64_t first_row, int64_t rows, bool screened, const Scratch& scratch) {
    const int64_t batch = work.first_batch + b;
    read_queries(p, batch, first_row, rows, screened, scratch);
    if (includes_self(p)) multiply_self(p, batch, first_row, rows, scratch);
    const int64_t capacity = BestColumns<A>::capacity(most_found(p));
    for (int64_t r = 0; r < rows; ++r) {
      const bool self = has_self(p, batch, first_row + r);
      scratch.self_columns[r] = self_column(p, work, b, first_row + r);
      scratch.best[r].start(scratch.ranks + r * capacity, scratch.group_max + r * kGroups,
                            most_found(p) - self, scratch.self_columns[r]);
    }
  }

  // Selects from a chunk by its similarities.
  static void compute_chunk(const SelectParams& p, const Keys& keys, const ColumnRange& chunk,
                            int64_t rows, const Scratch& scratch) {
    resolve(p, keys, 0, rows, scratch);
    for (int64_t r = 0; r < rows; ++r) scratch.best[r].end_resolve();
    each_panel(chunk, [&](int64_t column, int64_t count) {
      similarities(p, scratch.queries, rows, panel_of(p, keys, column, count, scratch), count,
                   scratch.strip + column - chunk.begin, kStripStride<A>);
    });
    close_strip(chunk.begin, scratch.parts, 0, rows, scratch.self_columns, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      const ColumnRange part = scratch.parts[r];
      scratch.best[r].survey(part_of_strip(r, chunk, part, scratch), part.count());
    }
    for (int64_t r = 0; r < rows; ++r) {
      const ColumnRange part = scratch.parts[r];
      scratch.best[r].collect(part_of_strip(r, chunk, part, scratch), part.begin, part.count());
    }
  }

  // The similarities of row r to the columns `part` of a chunk.
  template <class AnyScratch>
  static A* part_of_strip(int64_t r, const ColumnRange& chunk, const ColumnRange& part,
                          const AnyScratch& scratch) {
    return scratch.strip + r * kStripStride<A> + part.begin - chunk.begin;
  }

  // The same of a screened strip.
  static typename Screen::Row screened_row(const Keys& keys, int64_t r, const ColumnRange& chunk,
                                           const ColumnRange& part, const Scratch& scratch) {
    return Screen::strip_row(part_of_strip(r, chunk, part, scratch), keys.scales + part.begin,
                             scratch.scales[r]);
  }

  // Writes -inf after the last column of the parts of rows begin ... end - 1 of a strip, which
  // begins at column `first`, and at the tokens themselves.
  template <class AnyScratch>
  static void close_strip(int64_t first, const ColumnRange* parts, int64_t begin, int64_t end,
                          const int64_t* self_columns, const AnyScratch& scratch) {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    for (int64_t r = begin; r < end; ++r) {
      const ColumnRange part = parts[r];
      A* strip = scratch.strip + r * kStripStride<A>;
      const int64_t scanned = ceil_div(part.count(), kScanColumns<A>) * kScanColumns<A>;
      for (int64_t c = part.end; c < part.begin + scanned; ++c) strip[c - first] = kLowest;
      const int64_t self = self_columns[r];
      if (self >= part.begin && self < part.end) strip[self - first] = kLowest;
    }
  }

  // Calls visit(column, count) for the columns of a chunk that lie in one panel.
  template <class Visit>
  static void each_panel(const ColumnRange& chunk, const Visit& visit) {
    for (int64_t count, column = chunk.begin; column < chunk.end; column += count) {
      count = min_of(kPanel - column % kPanel, chunk.end - column);
      visit(column, count);
    }
  }

  // The panel [d, kPanel] of a column, from that column on. At least `count` columns of it can be
  // read, in whole vectors.
  static const A* panel_of(const SelectParams& p, const Keys& keys, int64_t column, int64_t count,
                           const Scratch& scratch) {
    if (!keys.screened) return keys.panels + column / kPanel * kPanel * p.d + column % kPanel;
    const int64_t stride = padded_stride<A>(p.d);
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      interleave(keys.rows + (column + i) * stride, stride, p.d, scratch.panel + i);
    }
    return scratch.panel;
  }

  // Selects from a chunk by its screen. Returns false, with nothing collected, if there is none or
  // it rules out too little.
  static bool screen_chunk(const SelectParams& p, const Keys& keys, const ColumnRange& chunk,
                           bool is_first, int64_t rows, const Scratch& scratch) {
    if constexpr (kScreens) {
      if (!keys.screened) return false;
      const int64_t words = words_of(p);
      Extent keys_extent;
      each_panel(chunk, [&](int64_t column, int64_t) {
        keys_extent.include(keys.extents[column / kPanel]);
      });
      ScreenError errors[kBlockRows];
      for (int64_t r = 0; r < rows; ++r) {
        errors[r] = Screen::error(scratch.extents[r], keys_extent, p.d);
        if (!errors[r].exists()) return false;
      }
      each_panel(chunk, [&](int64_t column, int64_t count) {
        const uint32_t* panel = keys.words + column / kPanel * kPanel * words + column % kPanel;
        Screen::multiply(scratch.words, word_stride(p), scratch.scales, rows, panel, words,
                         keys.scales + column, count, scratch.strip + column - chunk.begin,
                         kStripStride<A>);
      });
      close_strip(chunk.begin, scratch.parts, 0, rows, scratch.self_columns, scratch);
      int64_t open = 0, most = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const ColumnRange part = scratch.parts[r];
        scratch.best[r].survey_screened(screened_row(keys, r, chunk, part, scratch), part.count(),
                                        errors[r]);
      }
      for (int64_t r = 0; r < rows; ++r) {
        open += scratch.best[r].open_groups();
        most += most_open(p, scratch.parts[r].count(), is_first);
      }
      if (open > most) return false;
      for (int64_t r = 0; r < rows; ++r) {
        const ColumnRange part = scratch.parts[r];
        BestColumns<A>& best = scratch.best[r];
        best.collect_screened(screened_row(keys, r, chunk, part, scratch), part.begin, part.count(),
                              [&] {
                                resolve(p, keys, r, r + 1, scratch);
                                best.end_resolve();
                              });
      }
    }
    return kScreens;
  }

  // How many groups of as many columns a screen may leave undecided for a query.
  static int64_t most_open(const SelectParams& p, int64_t columns, bool is_first) {
    const int64_t groups = BestColumns<A>::group_count(columns);
    const int64_t most = is_first ? groups - groups / 4 : groups / 2;
    return min_of(groups / kGroupsPerOpen + p.k, most);
  }

  // Computes the similarities of columns that were collected with an error, kLanes of them at a
  // time, of rows begin ... end - 1. Without a screen there are none.
  static void resolve(const SelectParams& p, const Keys& keys, int64_t begin, int64_t end,
                      const Scratch& scratch) {
    if constexpr (kScreens) {
      for (int64_t stop, from = begin; from < end; from = stop) {
        stop = min_of(end, (from / kLanes<A> + 1) * kLanes<A>);
        Unresolved pairs(p, keys, scratch.lanes + from / kLanes<A> * p.d * kLanes<A>);
        for (int64_t r = from; r < stop; ++r) {
          const int64_t count = scratch.best[r].unresolved();
          pairs.add(int32_t(r % kLanes<A>), scratch.best[r].ranks(), count);
        }
        pairs.finish();
      }
    }
  }

  // Pairs of one of kLanes queries and a column, whose similarities are computed kLanes at a time.
  class Unresolved {
   public:
    // queries [d, kLanes]
    Unresolved(const SelectParams& p, const Keys& keys, const A* queries)
        : d_(p.d), stride_(padded_stride<A>(p.d)), keys_(keys.rows), queries_(queries) {}

    // Replaces the ranks of a query, at the latest in finish(). Up to a multiple of kAdded can be
    // read.
    void add(int32_t query, Rank<A>* ranks, int64_t count) {
      for (int64_t first = 0; first < count; first += kAdded) {
        for (int64_t i = 0; i < kAdded; ++i) {
          ranks_[count_ + i] = ranks + first + i;
          columns_[count_ + i] = uint32_t(ranks[first + i].column());
          numbers_[count_ + i] = query;
        }
        count_ += min_of(kAdded, count - first);
        if (count_ >= kLanes<A>) resolve(kLanes<A>);
      }
    }

    void finish() {
      if (count_ == 0) return;
      for (int64_t i = count_; i < kLanes<A>; ++i) numbers_[i] = 0, columns_[i] = columns_[0];
      resolve(count_);
    }

   private:
    static constexpr int64_t kAdded = 8;
    static_assert(kAdded <= kLanes<A>);

    void resolve(int64_t count) {
      const A* rows[kLanes<A>];
      for (int64_t i = 0; i < kLanes<A>; ++i) rows[i] = keys_ + columns_[i] * stride_;
      const Vector<A> similarities = products(queries_, numbers_, rows, d_);
      Rank<A> ranks[kLanes<A>];
      for (int64_t i = 0; i < kLanes<A>; ++i) ranks[i] = Rank<A>(similarities[i], columns_[i]);
      for (int64_t i = 0; i < count; ++i) *ranks_[i] = ranks[i];
      count_ -= count;
      for (int64_t i = 0; i < kAdded; ++i) {
        ranks_[i] = ranks_[kLanes<A> + i];
        columns_[i] = columns_[kLanes<A> + i];
        numbers_[i] = numbers_[kLanes<A> + i];
      }
    }

    const int64_t d_, stride_;
    const A* const keys_;     // [columns, stride_]
    const A* const queries_;  // [d, kLanes]
    int64_t count_ = 0;
    // Of each pair, and of what was added after it, up to kAdded at once.
    Rank<A>* ranks_[kLanes<A> + kAdded] = {};
    uint32_t columns_[kLanes<A> + kAdded] = {};
    int32_t numbers_[kLanes<A> + kAdded] = {};  // which query
  };

  // The similarity of each query to the token itself, through the same tile as every other pair.
  template <class AnyScratch>
  static void multiply_self(const SelectParams& p, int64_t batch, int64_t first_row, int64_t rows,
                            const AnyScratch& scratch) {
    const int64_t stride = padded_stride<A>(p.d);
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int64_t stop = min_of(first + kTileRows, rows);
      for (int64_t step = first; step < stop; step += kLanes<A>) {
        const int64_t count = min_of(kLanes<A>, stop - step);
        for (int64_t i = 0; i < kLanes<A>; ++i) {
          if (i < count) {
            read_row(p, p.key.at<T>(batch, self_of(p, batch, first_row + step + i)),
                     scratch.rows + i * stride);
          } else {
            pad_row(p, scratch.rows + i * stride, 0);
          }
        }
        interleave(scratch.rows, stride, p.d, scratch.panel);
        similarities(p, scratch.queries + first * stride, kTileRows, scratch.panel, kLanes<A>,
                     scratch.tile, kPanel);
        for (int64_t i = 0; i < count; ++i) {
          scratch.self_similarities[step + i] = scratch.tile[(step - first + i) * kPanel + i];
        }
      }
    }
  }

  static int64_t self_of(const SelectParams& p, int64_t batch, int64_t row) {
    return p.self_indices[batch * p.self_stride + row];
  }
  static const int64_t* key_range_of(const SelectParams& p, int64_t batch, int64_t row) {
    return p.key_range + batch * p.range_stride + 2 * row;
  }

  // Whether the token itself is a neighbor.
  static bool has_self(const SelectParams& p, int64_t batch, int64_t row) {
    if (!includes_self(p)) return false;
    const int64_t self = self_of(p, batch, row);
    if (p.key_mask && !p.key_mask[batch * p.m + self]) return false;
    if (!p.key_range) return true;
    const int64_t* range = key_range_of(p, batch, row);
    return range[0] <= self && self < range[1];
  }

  // The column of the token itself, or -1 if it is not among the columns.
  static int64_t self_column(const SelectParams& p, const SelectWork& work, int64_t b,
                             int64_t row) {
    if (!p.self_indices) return -1;
    const int64_t self = self_of(p, work.first_batch + b, row);
    const int64_t column = first_column(work, b, self);
    return column < columns_of(work, b) && key_row(work, b, column) == self ? column : -1;
  }

  // The columns that a query may see.
  static ColumnRange range_of(const SelectParams& p, const SelectWork& work, int64_t b,
                              int64_t row) {
    if (!p.key_range) return {0, columns_of(work, b)};
    const int64_t* range = key_range_of(p, work.first_batch + b, row);
    return {first_column(work, b, range[0]), first_column(work, b, range[1])};
  }

  // The first column whose row of key is at least this one.
  static int64_t first_column(const SelectWork& work, int64_t b, int64_t row) {
    if (!work.columns) return row;
    const int64_t* columns = work.columns + b * work.max_columns;
    return std::lower_bound(columns, columns + columns_of(work, b), row) - columns;
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
    bool self_pending = has_self(p, batch, row);
    for (int64_t j = 0; j < found; ++j) {
      const int64_t index = key_row(work, b, best.ranks()[j].column());
      if (self_pending && (p.order == Order::similarity || self_of(p, batch, row) < index)) {
        put(self_similarity, self_of(p, batch, row));
        self_pending = false;
      }
      put(best.ranks()[j].similarity(), index);
    }
    if (self_pending) put(self_similarity, self_of(p, batch, row));
    while (count < p.k) put(-std::numeric_limits<A>::infinity(), 0);
  }
};

template <class T>
SelectKernel select_kernel() {
  return {kBlockRows,
          kTileColumns<accumulate_t<T>>,
          Select<T>::screen_pays,
          Select<T>::packed_bytes,
          Select<T>::scratch_bytes,
          Select<T>::pack,
          Select<T>::rows};
}

}  // namespace convnn::CONVNN_ISA
