// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "instruction_sets.h"
#include "key_ranges.h"
#include "operators.h"
#include "parallel.h"

namespace convnn::cpu {
namespace {

// Packed keys and lists of columns in memory at a time, but at least those of one batch element.
constexpr size_t kPackedBytes = size_t(16) << 20;

// What the queries cost beside their products, in columns: reading them, sorting their neighbors.
constexpr int64_t kColumnsPerRow = 256;

// The rows of key that may be neighbors in one batch element, ascending. Returns how many.
// sorted_candidates: those of the whole batch, empty if each batch element has its own.
int64_t list_columns(const SelectParams& p, const std::vector<int64_t>& sorted_candidates,
                     const KeyRanges& ranges, int64_t batch, int64_t* columns) {
  const uint8_t* mask = p.key_mask ? p.key_mask + batch * p.m : nullptr;
  const KeyRanges::Rows seen = ranges.exist() ? ranges.seen(batch) : KeyRanges::Rows{0, p.m};
  int64_t count = 0;
  const auto add = [&](int64_t row) {
    if (!mask || mask[row]) columns[count++] = row;
  };
  if (!p.candidates) {
    for (int64_t row = seen.begin; row < seen.end; ++row) add(row);
    return count;
  }
  const int64_t* sorted = sorted_candidates.data();
  if (p.candidates_stride) {
    const int64_t* candidates = p.candidates + batch * p.candidates_stride;
    std::copy(candidates, candidates + p.r, columns);
    std::sort(columns, columns + p.r);
    sorted = columns;
  }
  const int64_t* end = std::lower_bound(sorted, sorted + p.r, seen.end);
  for (const int64_t* row = std::lower_bound(sorted, end, seen.begin); row < end; ++row) add(*row);
  return count;
}

// How many columns lie in so many rows of key, on average.
int64_t columns_in(const SelectParams& p, int64_t rows) {
  if (!p.candidates || p.m == 0) return rows;
  return int64_t(std::ceil(double(p.r) * double(rows) / double(p.m)));
}

// Packs the keys of `count` batch elements and selects the neighbors of their queries.
void select_batches(const SelectParams& p, const SelectKernel& kernel, const SelectWork& work,
                    int64_t count, const KeyRanges& ranges, ParallelFor parallel_for) {
  const size_t scratch_bytes = kernel.scratch_bytes(p);
  run(parallel_for, count * ceil_div(work.max_columns, kernel.columns_per_panel),
      double(p.d * kernel.columns_per_panel), scratch_bytes,
      [&](int64_t begin, int64_t end, void* scratch) {
        kernel.pack(p, work, begin, end, scratch);
      });
  const auto rows = [&](int64_t begin, int64_t end, void* scratch) {
    kernel.rows(p, work, begin, end, scratch);
  };
  const int64_t blocks = ceil_div(p.n, kernel.rows_per_task);
  if (!ranges.exist()) {
    run(parallel_for, count * blocks,
        double(p.d) * double(work.max_columns) * double(kernel.rows_per_task), scratch_bytes, rows);
    return;
  }
  std::vector<double> costs = zeros<double>(size_t(count * blocks), "the costs of tasks");
  for (int64_t task = 0; task < count * blocks; ++task) {
    const int64_t pairs = ranges.pairs(work.first_batch + task / blocks, task % blocks);
    const int64_t others = kernel.rows_per_task * kColumnsPerRow;
    costs[size_t(task)] = double(p.d + 1) * double(columns_in(p, pairs) + others);
  }
  run(parallel_for, costs, scratch_bytes, rows);
}

// Selects the neighbors of a few queries in each of `count` batch elements. columns: how many are
// needed, of the one that needs most.
void select_few(const SelectParams& p, const FewQueriesKernel& kernel, const SelectWork& work,
                int64_t columns, int64_t count, ParallelFor parallel_for) {
  const int64_t ranges = kernel.ranges(p, columns);
  const int64_t entries = ranges > 1 ? count * p.n * ranges : 0;
  const Workspace ranks(bytes_of(entries, kernel.found_bytes(p)), "the neighbors in each range");
  const Workspace counts(bytes_of(entries, sizeof(int64_t)), "the neighbors in each range");
  const FoundInRanges found = {ranges, ranks.get(), counts.as<int64_t>()};
  const size_t scratch_bytes = kernel.scratch_bytes(p);
  const auto search = [&](int64_t begin, int64_t end, void* scratch) {
    kernel.search(p, work, found, begin, end, scratch);
  };
  if (!work.seen) {
    run(parallel_for, count * ranges, double(p.n * p.d) * double(columns / ranges), scratch_bytes,
        search);
  } else {
    std::vector<double> costs = zeros<double>(size_t(count * ranges), "the costs of tasks");
    for (int64_t task = 0; task < count * ranges; ++task) {
      const int64_t* seen = work.seen + task / ranges * 2;
      costs[size_t(task)] = double(p.n * (p.d + 1)) * double((seen[1] - seen[0]) / ranges + 1);
    }
    run(parallel_for, costs, scratch_bytes, search);
  }
  if (ranges == 1) return;
  run(parallel_for, count * p.n, double(ranges) * double(p.k), scratch_bytes,
      [&](int64_t begin, int64_t end, void* scratch) {
        kernel.merge(p, work, found, begin, end, scratch);
      });
}

// How many consecutive batch elements have the same keys, if all groups of as many have.
int64_t batches_per_keys(const SelectParams& p) {
  const auto same = [&](int64_t a, int64_t b) {
    return p.key.offset(a) == p.key.offset(b) &&
           (!p.key_mask ||
            std::memcmp(p.key_mask + a * p.m, p.key_mask + b * p.m, size_t(p.m)) == 0) &&
           (!p.candidates_stride || std::equal(p.candidates + a * p.candidates_stride,
                                               p.candidates + a * p.candidates_stride + p.r,
                                               p.candidates + b * p.candidates_stride));
  };
  int64_t shared = 1;
  while (shared < p.batch && same(0, shared)) ++shared;
  if (shared == 1 || p.batch % shared) return 1;
  for (int64_t b = shared; b < p.batch; ++b) {
    if (b % shared && !same(b - 1, b)) return 1;
  }
  return shared;
}

size_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// A selection whose batch elements with the same keys are one with more queries, so that the keys
// are packed once.
class Folded {
 public:
  Folded(const SelectParams& p, int64_t shared) : params_(p) {
    params_.batch = p.batch / shared, params_.n = p.n * shared;
    fold_queries(p, shared);
    if (p.key.offsets) {
      for (int64_t b = 0; b < p.batch; b += shared) key_offsets_.push_back(p.key.offsets[b]);
      params_.key.offsets = key_offsets_.data();
    }
    if (p.key_mask) {
      key_mask_ = Workspace(bytes_of(params_.batch, p.m), "key_mask");
      for (int64_t b = 0; b < params_.batch; ++b) {
        std::copy_n(p.key_mask + b * shared * p.m, p.m, key_mask_.as<uint8_t>() + b * p.m);
      }
      params_.key_mask = key_mask_.as<uint8_t>();
    }
    params_.candidates_stride *= shared;
    params_.self_indices =
        fold_rows(p.self_indices, p.n, shared, params_.self_stride, self_indices_);
    params_.key_range = fold_rows(p.key_range, 2 * p.n, shared, params_.range_stride, key_range_);
  }
  const SelectParams& params() const { return params_; }

 private:
  void fold_queries(const SelectParams& p, int64_t shared) {
    const int64_t row_stride = p.n == 1 ? p.query.batch_stride : p.query.row_stride;
    if (!p.query.offsets && p.query.batch_stride == p.n * row_stride) {
      params_.query.row_stride = row_stride;
      params_.query.batch_stride = shared * p.query.batch_stride;
      return;
    }
    const size_t size = element_size(p.dtype), bytes = size_t(p.d) * size;
    queries_ = Workspace(bytes_of(p.batch * p.n, bytes), "a copy of query");
    char* to = queries_.as<char>();
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t row = 0; row < p.n; ++row, to += bytes) {
        const int64_t first = p.query.offset(b) + row * p.query.row_stride;
        std::copy_n(static_cast<const char*>(p.query.data) + first * int64_t(size), bytes, to);
      }
    }
    params_.query = dense_rows(queries_.get(), params_.n, p.d);
  }

  // Numbers for each query, `count` for a batch element. Those of batch elements that become one
  // are adjacent already; those that the batch shares are repeated.
  static const int64_t* fold_rows(const int64_t* numbers, int64_t count, int64_t shared,
                                  int64_t& stride, std::vector<int64_t>& repeated) {
    stride *= shared;
    if (!numbers || stride) return numbers;
    for (int64_t i = 0; i < shared; ++i) {
      repeated.insert(repeated.end(), numbers, numbers + count);
    }
    return repeated.data();
  }

  SelectParams params_;
  Workspace queries_, key_mask_;
  std::vector<int64_t> key_offsets_, self_indices_, key_range_;
};

void select_unfolded(const SelectParams& p, ParallelFor parallel_for) {
  const SelectKernel& kernel = kernels().select[int(p.dtype)];
  const FewQueriesKernel& few_kernel = kernels().select_few[int(p.dtype)];
  const KeyRanges ranges(p, kernel.rows_per_task, parallel_for);
  const bool shared = p.candidates && !p.candidates_stride;
  std::vector<int64_t> candidates = zeros<int64_t>(size_t(shared ? p.r : 0), "sorted candidates");
  std::copy(p.candidates, p.candidates + candidates.size(), candidates.begin());
  std::sort(candidates.begin(), candidates.end());

  const int64_t columns = p.candidates ? p.r : p.m;
  const int64_t most_seen = ranges.exist() ? columns_in(p, ranges.most_seen()) : columns;
  const bool listed = p.candidates || p.key_mask;
  const bool few = few_kernel.pays(p, most_seen);
  const bool screened =
      kernel.screen_pays(p, ranges.exist() ? columns_in(p, ranges.average()) : columns);
  // The workspace of a batch element.
  const size_t packed_bytes = few ? 0 : kernel.packed_bytes(p, columns, screened);
  const size_t bytes = packed_bytes + (listed ? bytes_of(columns, sizeof(int64_t)) : 0);
  const int64_t batches =
      std::clamp<int64_t>(int64_t(kPackedBytes / std::max<size_t>(bytes, 1)), 1, p.batch);
  const Workspace packed(bytes_of(batches, packed_bytes), "packed keys");
  const auto numbers = [](bool needed, int64_t count) {
    return zeros<int64_t>(needed ? size_t(count) : 0, "the rows of key that may be neighbors");
  };
  // One more than needed: where no column is listed, the pointer must still not be null.
  std::vector<int64_t> rows = numbers(listed, batches * columns + 1);
  std::vector<int64_t> counts = numbers(listed, batches);
  std::vector<int64_t> seen = numbers(ranges.exist(), 2 * batches);

  for (int64_t first = 0; first < p.batch; first += batches) {
    const int64_t count = std::min(batches, p.batch - first);
    if (listed) {
      run(parallel_for, count, double(columns), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          counts[size_t(b)] =
              list_columns(p, candidates, ranges, first + b, rows.data() + b * columns);
        }
      });
    }
    for (int64_t b = 0; ranges.exist() && b < count; ++b) {
      const KeyRanges::Rows of = ranges.seen(first + b);
      seen[size_t(2 * b)] = listed ? 0 : of.begin;
      seen[size_t(2 * b + 1)] = listed ? counts[size_t(b)] : of.end;
    }
    const SelectWork work = {first,
                             columns,
                             listed ? rows.data() : nullptr,
                             listed ? counts.data() : nullptr,
                             ranges.exist() ? seen.data() : nullptr,
                             screened,
                             packed.get()};
    if (few) {
      select_few(p, few_kernel, work, most_seen, count, parallel_for);
    } else {
      select_batches(p, kernel, work, count, ranges, parallel_for);
    }
  }
}

}  // namespace

void select(const SelectParams& p, ParallelFor parallel_for) {
  if (p.batch == 0 || p.n == 0) return;
  const int64_t shared = batches_per_keys(p);
  if (shared == 1) {
    select_unfolded(p, parallel_for);
  } else {
    select_unfolded(Folded(p, shared).params(), parallel_for);
  }
}

}  // namespace convnn::cpu
