// SPDX-License-Identifier: MIT
#include "forward_backward.cuh"

#include "backward.h"

namespace convnn::cuda {
namespace {

// The gradient of the similarities [batch, n, k] from both sources. A: their type.
template <class A>
const A* similarity_gradient(AggregateBackwardParams p, const void* direct, Context& context) {
  const int64_t count = p.forward.batch * p.forward.n * p.forward.k;
  A* grad = allocate<A>(context, count);
  p.grad_similarities = grad;
  aggregate_backward(p, context);
  if (direct) {
    launch("add_kernel", add_kernel<A>, strided_blocks(count), 0, context, grad,
           static_cast<const A*>(direct), count);
  }
  return grad;
}

}  // namespace

void forward_backward(const ForwardBackwardParams& params, Context& context) {
  const AggregateBackwardParams& aggregate = params.aggregate;
  SelectBackwardParams select = params.select;
  const AggregateParams& forward = aggregate.forward;
  if (forward.convolution != Convolution::dense && forward.dtype == select.dtype) {
    gradients(&aggregate, &select, context);
    return;
  }
  const bool needs_select = select.grad_query || select.grad_key;
  if (!needs_select || forward.rho == Rho::ones) {
    aggregate_backward(aggregate, context);
  } else if (forward.similarity_dtype == DType::float64) {
    select.grad_similarities =
        similarity_gradient<double>(aggregate, select.grad_similarities, context);
  } else {
    select.grad_similarities =
        similarity_gradient<float>(aggregate, select.grad_similarities, context);
  }
  if (needs_select) select_backward(select, context);
}

}  // namespace convnn::cuda
