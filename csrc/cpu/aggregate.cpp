// SPDX-License-Identifier: MIT
#include "instruction_sets.h"
#include "operators.h"
#include "parallel.h"

namespace convnn::cpu {

void aggregate(const AggregateParams& p, ParallelFor parallel_for) {
  if (p.batch == 0 || p.n == 0) return;
  const AggregateKernel& kernel = kernels().aggregate[int(p.dtype)];
  const Workspace weight(kernel.packed_weight_bytes(p), "the packed weight");
  const int64_t pack_tasks = kernel.pack_tasks(p);
  const double outputs = p.convolution == Convolution::dense ? double(p.o) : 1.0;
  run(parallel_for, pack_tasks, outputs * double(p.c * p.k) / double(pack_tasks),
      [&](int64_t begin, int64_t end) { kernel.pack_weight(p, weight.get(), begin, end); });
  run(parallel_for, ceil_div(p.batch * p.n, kernel.rows_per_task),
      double(kernel.rows_per_task * p.k * p.c) * outputs, kernel.scratch_bytes(p),
      [&](int64_t begin, int64_t end, void* scratch) {
        kernel.rows(p, weight.get(), begin, end, scratch);
      });
}

}  // namespace convnn::cpu
