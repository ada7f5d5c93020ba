// SPDX-License-Identifier: MIT
// The arguments of the kernels of select.cuh, and which columns of S its rows see.
#pragma once

#include "matmul_tile.cuh"

namespace convnn::cuda {

// The arguments of the kernels in one call.
template <class T>
struct SelectWork {
  using A = Accumulate<T>;

  SelectParams p;
  const T* query;          // [batch, n, d], scaled for the cosine
  const T* key;            // [batch, m, d], likewise
  const A* inverse_query;  // [batch, n]: 1 / norm of the scaled row, cosine only
  const A* inverse_key;    // [batch, m]
  // [columns] or [batch, columns] rows of key, or null: all of them. Ascending if groups, ranges or
  // an order by index require it. Values out of range are ignored.
  const int64_t* rows;
  int64_t rows_stride;  // columns, or 0
  int64_t columns;
  int64_t group;         // columns in a group, or 0: no groups
  int log_group;         // group = 2^log_group
  int64_t groups;        // ceil(columns / group)
  int64_t chosen;        // groups whose members are scored
  bool without_mma;      // group maxima without the matrix instruction
  int64_t splits;        // blocks that share the column tiles of one row of tiles
  int64_t first;         // the launch's first block of 64 rows; blocks do not cross batch elements
  uint32_t* maxima;      // [blocks * 64, groups] order_of() the maximum, kNothing of an empty group
  uint32_t* top_groups;  // [blocks * 64, chosen] groups, kNoGroup where there is none
};
constexpr uint32_t kNoGroup = 0xFFFFFFFFu;

struct QueryRow {
  int64_t batch, row;  // row within the batch element; n or more if there is none
};
// The query of row `local` of a launch. Without groups, rows are consecutive.
template <class T>
__device__ inline QueryRow query_row(const SelectWork<T>& w, int64_t local) {
  if (!w.group) {
    const bool exists = local < w.p.batch * w.p.n;
    return {exists ? local / w.p.n : 0, exists ? local % w.p.n : w.p.n};
  }
  const int64_t block = w.first + local / kTile, blocks_each = (w.p.n + kTile - 1) / kTile;
  return {block / blocks_each, block % blocks_each * kTile + local % kTile};
}

struct Range {
  int64_t begin, end;
};
// The rows of key that a query sees: a part of all, also of values out of range.
template <bool kHasRanges, class T>
__device__ inline Range visible_rows(const SelectWork<T>& w, QueryRow at) {
  if constexpr (!kHasRanges) return {0, w.p.m};
  const int64_t* range = w.p.key_range + at.batch * w.p.range_stride + 2 * at.row;
  return {max(range[0], int64_t(0)), min(range[1], w.p.m)};
}
// Their columns; from 0 to 0 if there are none.
template <bool kHasRanges, class T>
__device__ inline Range visible_columns(const SelectWork<T>& w, QueryRow at) {
  if constexpr (!kHasRanges) return {0, w.columns};
  Range columns = visible_rows<kHasRanges>(w, at);
  if (w.rows) {
    // The first column whose row is not below `row`.
    const auto find = [&](int64_t row) {
      const int64_t* rows = w.rows + at.batch * w.rows_stride;
      int64_t low = 0, high = w.columns;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (rows[middle] < row) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return low;
    };
    columns = {find(columns.begin), find(columns.end)};
  }
  return columns.begin < columns.end ? columns : Range{0, 0};
}
// The groups of those columns.
template <bool kHasRanges, class T>
__device__ inline Range visible_groups(const SelectWork<T>& w, QueryRow at) {
  if constexpr (!kHasRanges) return {0, w.groups};
  const Range columns = visible_columns<kHasRanges>(w, at);
  return {columns.begin >> w.log_group, (columns.end + w.group - 1) >> w.log_group};
}

// The row of key in `column`, or -1: none, masked or not among `rows`, which are a part of all.
template <class T>
__device__ inline int64_t key_row(const SelectWork<T>& w, int64_t batch, int64_t column,
                                  Range rows) {
  if (column >= w.columns) return -1;
  const int64_t row = w.rows ? w.rows[batch * w.rows_stride + column] : column;
  if (row < rows.begin || row >= rows.end) return -1;
  return !w.p.key_mask || w.p.key_mask[batch * w.p.m + row] ? row : -1;
}

// The columns that the rows of a tile see: those that any of its 64 rows does, and of each tile of
// columns those of the two rows whose products a thread holds. Without ranges, all of them.
template <class T, bool kHasRanges>
class TileColumns {
 public:
  // Columns first to first + count - 1 of a tile.
  struct Part {
    int first, count;
    __device__ bool has(int column) const {
      return !kHasRanges || unsigned(column - first) < unsigned(count);
    }
  };

  // The query of row 0 is that of row `first_row` of a launch. All threads of a block call this
  // together, with shared memory for 2 * kWarps numbers.
  __device__ TileColumns(const SelectWork<T>& w, int64_t first_row, int64_t* bounds)
      : all_{0, w.columns} {
    if constexpr (kHasRanges) {
      all_ = {w.columns, 0};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const QueryRow at = query_row(w, first_row + tile_row(h));
        const Range columns = at.row < w.p.n ? visible_columns<kHasRanges>(w, at) : Range{0, 0};
        if (columns.end > 0) include(columns);
        begin_[h] = uint32_t(columns.begin);
        end_[h] = uint32_t(columns.end);
      }
      for (int span = kWarp / 2; span > 0; span /= 2) {
        include({__shfl_xor_sync(kAllLanes, all_.begin, span),
                 __shfl_xor_sync(kAllLanes, all_.end, span)});
      }
      if (lane() == 0) {
        bounds[2 * warp()] = all_.begin;
        bounds[2 * warp() + 1] = all_.end;
      }
      __syncthreads();
      for (int i = 0; i < kWarps; ++i) include({bounds[2 * i], bounds[2 * i + 1]});
      __syncthreads();
    }
  }

  // The first of every splits-th tile, from tile `own` on, where any row may see a column.
  __device__ int64_t first_tile(int64_t own, int64_t splits) const {
    const int64_t skipped = kHasRanges ? all_.begin / kTile - own : 0;
    return skipped > 0 ? own + (skipped + splits - 1) / splits * splits : own;
  }
  // One past the last column.
  __device__ int64_t end() const { return all_.end; }
  // What row tile_row(h) sees.
  __device__ Part of_row(int h, int64_t tile) const {
    if constexpr (!kHasRanges) return {0, kTile};
    const auto within = [&](uint32_t column) {
      return int(min(max(column - tile * kTile, int64_t(0)), int64_t(kTile)));
    };
    const int first = within(begin_[h]);
    return {first, within(end_[h]) - first};
  }

 private:
  __device__ void include(Range more) {
    all_ = {min(all_.begin, more.begin), max(all_.end, more.end)};
  }

  Range all_;
  uint32_t begin_[2], end_[2];  // of the two rows
};

}  // namespace convnn::cuda
