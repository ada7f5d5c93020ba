// SPDX-License-Identifier: MIT
#include "select_backward.cuh"

#include "backward.h"

namespace convnn::cuda {
namespace {

// Blocks of a kernel with one block per key row or chunk; with more of those, a block takes
// several.
constexpr int64_t kMostBlocks = int64_t(1) << 30;

template <class T>
void select_backward_as(const SelectBackwardParams& p, const InverseList& inverse,
                        Context& context) {
  using A = Accumulate<T>;
  SelectBackwardWork<T> w = {};
  w.p = p;
  if (p.metric == Metric::cosine) {
    T* const unscaled = nullptr;
    w.query_norms =
        norms_of(static_cast<const T*>(p.query.data), unscaled, p.batch * p.n, p.d, context);
    const bool same = p.query == p.key && p.n == p.m;
    w.key_norms =
        same ? w.query_norms
             : norms_of(static_cast<const T*>(p.key.data), unscaled, p.batch * p.m, p.d, context);
  }
  if (p.grad_query) {
    launch("query_grad_kernel", query_grad_kernel<T>, ceil_div(p.batch * p.n, kWarps), 0, context,
           w);
  }
  if (p.grad_key) {
    w.inverse = in_chunks(inverse, p.d + 1);
    w.chunk_sums = allocate<A>(context, w.inverse.chunks * (p.d + 1));
    launch("key_chunks_kernel", key_chunks_kernel<T>, std::min(w.inverse.chunks, kMostBlocks),
           2 * kThreads * sizeof(A), context, w);
    launch("key_grad_kernel", key_grad_kernel<T>, std::min(p.batch * p.m, kMostBlocks),
           2 * kThreads * sizeof(A), context, w);
  }
}

}  // namespace

void select_backward(const SelectBackwardParams& p, const InverseList& inverse, Context& context) {
  if (p.batch == 0) return;
  with_type(p.dtype, [&](auto t) { select_backward_as<decltype(t)>(p, inverse, context); });
}

void select_backward(const SelectBackwardParams& p, Context& context) {
  InverseList inverse = {};
  if (p.batch && p.grad_key) inverse = invert(p, context);
  select_backward(p, inverse, context);
}

}  // namespace convnn::cuda
