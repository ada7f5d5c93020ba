// SPDX-License-Identifier: MIT
#include "backward.h"
#include "inverse_list.h"
#include "parallel.h"

namespace convnn::cpu {
namespace {

// sums [count] += addends [count]
template <class A>
void add(void* sums, const void* addends, int64_t count, ParallelFor parallel_for) {
  A* const sum = static_cast<A*>(sums);
  const A* const addend = static_cast<const A*>(addends);
  run(parallel_for, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum[i] += addend[i];
  });
}

}  // namespace

void forward_backward(const ForwardBackwardParams& params, ParallelFor parallel_for) {
  AggregateBackwardParams aggregate = params.aggregate;
  SelectBackwardParams select = params.select;
  const AggregateParams& f = aggregate.forward;
  const bool needs_select = select.grad_query || select.grad_key;
  const bool is_float64 = f.similarity_dtype == DType::float64;
  const int64_t similarities = f.batch * f.n * f.k;
  // The output does not depend on the similarities if rho is ones.
  const bool through_output = needs_select && f.rho != Rho::ones;
  const size_t bytes = bytes_of(similarities, is_float64 ? sizeof(double) : sizeof(float));
  const Workspace grad_similarities(through_output ? bytes : 0, "grad_similarities");
  aggregate.grad_similarities = grad_similarities.get();

  OwnedInverseList inverse;
  if (needs_inverse_list(aggregate) || needs_inverse_list(select)) {
    inverse = invert(select, parallel_for);
  }
  aggregate_backward(aggregate, inverse.view(), parallel_for);
  if (!needs_select) return;
  if (through_output) {
    const void* const others = select.grad_similarities;
    if (others && is_float64) {
      add<double>(grad_similarities.get(), others, similarities, parallel_for);
    } else if (others) {
      add<float>(grad_similarities.get(), others, similarities, parallel_for);
    }
    select.grad_similarities = grad_similarities.get();
  }
  select_backward(select, inverse.view(), parallel_for);
}

}  // namespace convnn::cpu
