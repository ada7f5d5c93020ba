// SPDX-License-Identifier: MIT
#include "select_backward.cuh"

namespace convnn::cuda {
namespace {

// Blocks of a kernel whose blocks have a key row or a chunk: each takes several where there are
// more.
constexpr int64_t kMostBlocks = int64_t(1) << 30;

template <class T>
void select_backward_as(const SelectBackwardParams& p, Context& context) {
  using A = Accumulate<T>;
  SelectBackwardWork<T> w = {};
  w.p = p;
  if (p.metric == Metric::cosine) {
    T* const unscaled = nullptr;
    w.query_norms = norms_of(static_cast<const T*>(p.query), unscaled, p.batch * p.n, p.d, context);
    w.key_norms = norms_of(static_cast<const T*>(p.key), unscaled, p.batch * p.m, p.d, context);
  }
  if (p.grad_query) {
    launch("query_grad_kernel", query_grad_kernel<T>, ceil_div(p.batch * p.n, kWarps), 0, context,
           w);
  }
  if (p.grad_key) {
    const DType dtype = p.dtype == DType::float64 ? DType::float64 : DType::float32;
    w.inverse = invert(p.batch, p.n, p.m, p.k, p.indices, p.similarities, dtype, p.d + 1, context);
    w.chunk_sums = allocate<A>(context, w.inverse.chunks * (p.d + 1));
    launch("key_chunks_kernel", key_chunks_kernel<T>, std::min(w.inverse.chunks, kMostBlocks),
           2 * kThreads * sizeof(A), context, w);
    launch("key_grad_kernel", key_grad_kernel<T>, std::min(p.batch * p.m, kMostBlocks),
           2 * kThreads * sizeof(A), context, w);
  }
}

}  // namespace

void select_backward(const SelectBackwardParams& p, Context& context) {
  if (p.batch == 0) return;
  with_type(p.dtype, [&](auto t) { select_backward_as<decltype(t)>(p, context); });
}

}  // namespace convnn::cuda
