// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstring>
#include <vector>

#include "instruction_sets.h"
#include "operators.h"
#include "parallel.h"

namespace convnn::cpu {
namespace {

// Packed keys and lists of columns in memory at a time, but at least those of one batch element.
constexpr size_t kPackedBytes = size_t(16) << 20;

// The rows of key that may be neighbors in one batch element, ascending. Returns how many.
int64_t list_columns(const SelectParams& p, const std::vector<int64_t>& sorted_candidates,
                     int64_t batch, int64_t* columns) {
  const bool* mask = p.key_mask ? p.key_mask + batch * p.m : nullptr;
  int64_t count = 0;
  const int64_t choices = p.candidates ? p.r : p.m;
  for (int64_t i = 0; i < choices; ++i) {
    const int64_t row = p.candidates ? sorted_candidates[size_t(i)] : i;
    if (!mask || mask[row]) columns[count++] = row;
  }
  return count;
}

// Packs the keys of `count` batch elements and selects the neighbors of their queries.
void select_batches(const SelectParams& p, const SelectKernel& kernel, const SelectWork& work,
                    int64_t count, ParallelFor parallel_for) {
  const size_t scratch_bytes = kernel.scratch_bytes(p);
  run(parallel_for, count * ceil_div(work.max_columns, kernel.columns_per_panel),
      double(p.d * kernel.columns_per_panel), scratch_bytes,
      [&](int64_t begin, int64_t end, void* scratch) {
        kernel.pack(p, work, begin, end, scratch);
      });
  run(parallel_for, count * ceil_div(p.n, kernel.rows_per_task),
      double(p.d) * double(work.max_columns) * double(kernel.rows_per_task), scratch_bytes,
      [&](int64_t begin, int64_t end, void* scratch) {
        kernel.rows(p, work, begin, end, scratch);
      });
}

// Selects the neighbors of a few queries in each of `count` batch elements.
void select_few(const SelectParams& p, const FewQueriesKernel& kernel, const SelectWork& work,
                int64_t count, ParallelFor parallel_for) {
  const int64_t ranges = kernel.ranges(p, work.max_columns);
  const int64_t entries = ranges > 1 ? count * p.n * ranges : 0;
  const Workspace ranks(size_t(entries) * kernel.found_bytes(p));
  const Workspace counts(size_t(entries) * sizeof(int64_t));
  const FoundInRanges found = {ranges, ranks.get(), counts.as<int64_t>()};
  const size_t scratch_bytes = kernel.scratch_bytes(p);
  run(parallel_for, count * ranges, double(p.n * p.d) * double(work.max_columns / ranges),
      scratch_bytes, [&](int64_t begin, int64_t end, void* scratch) {
        kernel.search(p, work, found, begin, end, scratch);
      });
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
            std::memcmp(p.key_mask + a * p.m, p.key_mask + b * p.m, size_t(p.m)) == 0);
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
      key_mask_ = Workspace(size_t(params_.batch * p.m));
      for (int64_t b = 0; b < params_.batch; ++b) {
        std::memcpy(key_mask_.as<bool>() + b * p.m, p.key_mask + b * shared * p.m, size_t(p.m));
      }
      params_.key_mask = key_mask_.as<bool>();
    }
    if (p.self_indices) {
      for (int64_t i = 0; i < shared; ++i) {
        self_indices_.insert(self_indices_.end(), p.self_indices, p.self_indices + p.n);
      }
      params_.self_indices = self_indices_.data();
    }
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
    queries_ = Workspace(size_t(p.batch * p.n) * bytes);
    char* to = queries_.as<char>();
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t row = 0; row < p.n; ++row, to += bytes) {
        const int64_t first = p.query.offset(b) + row * p.query.row_stride;
        std::memcpy(to, static_cast<const char*>(p.query.data) + first * int64_t(size), bytes);
      }
    }
    params_.query = dense_rows(queries_.get(), params_.n, p.d);
  }

  SelectParams params_;
  Workspace queries_, key_mask_;
  std::vector<int64_t> key_offsets_, self_indices_;
};

void select_unfolded(const SelectParams& p, ParallelFor parallel_for) {
  const SelectKernel& kernel = kernels().select[int(p.dtype)];
  const FewQueriesKernel& few_kernel = kernels().select_few[int(p.dtype)];
  std::vector<int64_t> candidates(p.candidates, p.candidates + (p.candidates ? p.r : 0));
  std::sort(candidates.begin(), candidates.end());

  const int64_t columns = p.candidates ? p.r : p.m;
  const bool listed = p.candidates || p.key_mask;
  const bool few = few_kernel.pays(p, columns);
  // The workspace of a batch element.
  const size_t packed_bytes = few ? 0 : kernel.packed_bytes(p, columns);
  const size_t bytes = packed_bytes + (listed ? size_t(columns) * sizeof(int64_t) : 0);
  const int64_t batches =
      std::clamp<int64_t>(int64_t(kPackedBytes / std::max<size_t>(bytes, 1)), 1, p.batch);
  const Workspace packed(size_t(batches) * packed_bytes);
  std::vector<int64_t> rows(listed ? size_t(batches * columns) : 0);
  std::vector<int64_t> counts(listed ? size_t(batches) : 0);

  for (int64_t first = 0; first < p.batch; first += batches) {
    const int64_t count = std::min(batches, p.batch - first);
    if (listed) {
      run(parallel_for, count, double(columns), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          counts[size_t(b)] = list_columns(p, candidates, first + b, rows.data() + b * columns);
        }
      });
    }
    const SelectWork work = {first, columns, listed ? rows.data() : nullptr,
                             listed ? counts.data() : nullptr, packed.get()};
    if (few) {
      select_few(p, few_kernel, work, count, parallel_for);
    } else {
      select_batches(p, kernel, work, count, parallel_for);
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
