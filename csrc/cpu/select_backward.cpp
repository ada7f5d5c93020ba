// SPDX-License-Identifier: MIT
#include "backward.h"
#include "instruction_sets.h"
#include "inverse_list.h"
#include "parallel.h"

namespace convnn::cpu {

bool needs_inverse_list(const SelectBackwardParams& p) { return p.grad_key; }

void select_backward(const SelectBackwardParams& p, const InverseList& inverse,
                     ParallelFor parallel_for) {
  if (p.batch == 0 || !(p.grad_query || p.grad_key)) return;
  const SelectBackwardKernel& kernel = kernels().select_backward[int(p.dtype)];
  const bool cosine = p.metric == Metric::cosine;
  const bool same = p.query == p.key && p.n == p.m;
  const Workspace query_workspace(cosine ? bytes_of(p.batch, p.n, sizeof(double)) : 0,
                                  "the norms of query");
  const Workspace key_workspace(cosine && !same ? bytes_of(p.batch, p.m, sizeof(double)) : 0,
                                "the norms of key");
  double* const query_norms = query_workspace.as<double>();
  double* const key_norms = same ? query_norms : key_workspace.as<double>();
  if (cosine) {
    run(parallel_for, p.batch * p.n, double(p.d),
        [&](int64_t begin, int64_t end) { kernel.query_norms(p, query_norms, begin, end); });
  }
  if (cosine && !same) {
    run(parallel_for, p.batch * p.m, double(p.d),
        [&](int64_t begin, int64_t end) { kernel.key_norms(p, key_norms, begin, end); });
  }
  const size_t scratch_bytes = kernel.scratch_bytes(p);
  const double row_work = double(p.d) * double(p.k);
  if (p.grad_query) {
    run(parallel_for, p.batch * p.n, row_work, scratch_bytes,
        [&](int64_t begin, int64_t end, void* scratch) {
          kernel.query_rows(p, query_norms, key_norms, begin, end, scratch);
        });
  }
  if (p.grad_key) {
    run(parallel_for, p.batch * p.m, row_work, scratch_bytes,
        [&](int64_t begin, int64_t end, void* scratch) {
          kernel.key_rows(p, inverse, query_norms, key_norms, begin, end, scratch);
        });
  }
}

void select_backward(const SelectBackwardParams& p, ParallelFor parallel_for) {
  OwnedInverseList inverse;
  if (needs_inverse_list(p)) inverse = invert(p, parallel_for);
  select_backward(p, inverse.view(), parallel_for);
}

}  // namespace convnn::cpu
