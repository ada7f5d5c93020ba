// SPDX-License-Identifier: MIT
#include <algorithm>
#include <vector>

#include "instruction_sets.h"
#include "operators.h"
#include "parallel.h"

namespace convnn::cpu {
namespace {

// Packed keys in memory at a time, but at least those of one batch element.
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

}  // namespace

void select(const SelectParams& p, ParallelFor parallel_for) {
  if (p.batch == 0 || p.n == 0) return;
  const SelectKernel& kernel = kernels().select[int(p.dtype)];
  std::vector<int64_t> candidates(p.candidates, p.candidates + (p.candidates ? p.r : 0));
  std::sort(candidates.begin(), candidates.end());

  const int64_t columns = p.candidates ? p.r : p.m;
  const size_t packed_bytes = kernel.packed_bytes(p, columns);
  const int64_t batches =
      std::clamp<int64_t>(int64_t(kPackedBytes / std::max<size_t>(packed_bytes, 1)), 1, p.batch);
  const Workspace packed(size_t(batches) * packed_bytes);
  const bool listed = p.candidates || p.key_mask;
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
    select_batches(p, kernel, work, count, parallel_for);
  }
}

}  // namespace convnn::cpu
