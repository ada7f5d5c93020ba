// SPDX-License-Identifier: MIT
#include "forward_backward.cuh"

#include "backward.h"

namespace convnn::cuda {
namespace {

// The gradient of the similarities [batch, n, k] from both sources. A: their type.
template <class A>
const A* similarity_gradient(AggregateBackwardParams p, const void* direct,
                             const InverseList& inverse, Context& context) {
  const int64_t count = p.forward.batch * p.forward.n * p.forward.k;
  A* grad = allocate<A>(context, count);
  p.grad_similarities = grad;
  aggregate_backward(p, inverse, context);
  if (direct) {
    launch("add_kernel", add_kernel<A>, strided_blocks(count), 0, context, grad,
           static_cast<const A*>(direct), count);
  }
  return grad;
}

}  // namespace

void forward_backward(const ForwardBackwardParams& params, Context& context) {
  AggregateBackwardParams aggregate = params.aggregate;
  SelectBackwardParams select = params.select;
  InverseList inverse = {};
  if (aggregate.grad_value || select.grad_key) inverse = invert(aggregate.forward, context);
  const bool needs_select = select.grad_query || select.grad_key;
  if (!needs_select || aggregate.forward.rho == Rho::ones) {
    aggregate_backward(aggregate, inverse, context);
  } else if (aggregate.forward.similarity_dtype == DType::float64) {
    select.grad_similarities =
        similarity_gradient<double>(aggregate, select.grad_similarities, inverse, context);
  } else {
    select.grad_similarities =
        similarity_gradient<float>(aggregate, select.grad_similarities, inverse, context);
  }
  if (needs_select) select_backward(select, inverse, context);
}

}  // namespace convnn::cuda
