// SPDX-License-Identifier: MIT
#include "aggregate.cuh"

#include "modulate.cuh"

namespace convnn::cuda {
namespace {

template <class T>
void aggregate_as(const AggregateParams& p, Context& context) {
  AggregateWork<T> w = {};
  w.p = p;
  w.rho = modulate<Accumulate<T>>(p, context);
  if (p.convolution == Convolution::dense) {
    w.weight = permute_weight<T>(p, /*outputs_last=*/false, context);
    const int64_t blocks = ceil_div(p.batch * p.n, kTile) * ceil_div(p.o, kTile);
    launch("aggregate_dense_kernel", aggregate_dense_kernel<T>, blocks,
           2 * kTileElements<T> * sizeof(T), context, w);
  } else {
    w.weight = static_cast<const T*>(p.weight);
    launch("aggregate_depthwise_kernel", aggregate_depthwise_kernel<T>,
           strided_blocks(p.batch * p.n * p.c), 0, context, w);
  }
}

}  // namespace

void aggregate(const AggregateParams& p, Context& context) {
  if (p.batch == 0 || p.n == 0) return;
  with_type(p.dtype, [&](auto t) { aggregate_as<decltype(t)>(p, context); });
}

}  // namespace convnn::cuda
