// SPDX-License-Identifier: MIT
#include "aggregate_backward.cuh"

#include "backward.h"
#include "inverse_list.h"
#include "modulate.cuh"

namespace convnn::cuda {
namespace {

// Blocks of a kernel with one block per chunk; with more of those, a block takes several.
constexpr int64_t kMostBlocks = int64_t(1) << 30;
// Sums over queries: at most so many parts, of at least so many queries, with at most so many
// elements in all.
constexpr int64_t kMostParts = 64;
constexpr int64_t kRowsOfPart = 256;
constexpr int64_t kElementsOfParts = int64_t(1) << 24;

// Sums over all queries in parts and adds them up: run(w) fills w.parts [part_count, size]. The
// parts depend only on shapes.
template <class T, class Run>
void in_parts(AggregateBackwardWork<T> w, void* result, int64_t size, Context& context,
              const Run& run) {
  if (size == 0) return;
  const AggregateParams& p = w.forward.p;
  const int64_t rows = p.batch * p.n;
  const int64_t most = std::clamp<int64_t>(kElementsOfParts / size, 1, kMostParts);
  w.rows_each = ceil_div(std::max(kRowsOfPart, ceil_div(rows, most)), kDepth) * kDepth;
  w.part_count = ceil_div(rows, w.rows_each);
  w.parts = allocate<Accumulate<T>>(context, w.part_count * size);
  run(w);
  launch("add_parts_kernel", add_parts_kernel<T>, strided_blocks(size), 0, context,
         static_cast<const Accumulate<T>*>(w.parts), result, w.part_count, size);
}

template <class T>
void dense_backward_as(const AggregateBackwardParams& p, Context& context) {
  using A = Accumulate<T>;
  const AggregateParams& f = p.forward;
  constexpr size_t kTileBytes = 2 * kTileElements<T> * sizeof(T);
  constexpr size_t kSumTileBytes = 2 * kTileElements<A> * sizeof(A);
  AggregateBackwardWork<T> w = {};
  w.forward.p = f;
  w.grad_output = p.grad_output;
  w.grad_value = p.grad_value;
  w.forward.rho = modulate<A>(f, context);
  w.forward.weight = static_cast<const T*>(f.weight);
  if (p.grad_value || p.grad_similarities) {
    w.forward.weight = permute_weight<T>(f, /*outputs_last=*/true, context);
  }

  if (p.grad_similarities) {
    w.grad_rho = allocate<A>(context, f.batch * f.n * f.k);
    // With ones, the gradient is zero; grad_rho is not read.
    if (f.rho != Rho::ones) {
      launch("rho_grad_dense_kernel", rho_grad_dense_kernel<T>,
             ceil_div(f.batch * f.n, kTile) * f.k, kTileBytes, context, w);
    }
    launch("modulate_backward_kernel", modulate_backward_kernel<A>, ceil_div(f.batch * f.n, kWarps),
           0, context, f, w.forward.rho, static_cast<const A*>(w.grad_rho), p.grad_similarities);
  }
  if (p.grad_value) {
    w.inverse = in_chunks(invert(f, context), f.o);
    w.chunk_sums = allocate<A>(context, w.inverse.chunks * f.o);
    launch("value_chunks_kernel", value_chunks_kernel<T>, std::min(w.inverse.chunks, kMostBlocks),
           kThreads * sizeof(A), context, w);
    launch("value_grad_dense_kernel", value_grad_dense_kernel<T>,
           ceil_div(f.batch * f.m, kTile) * ceil_div(f.c, kTile),
           kSumTileBytes + 2 * kTile * sizeof(int64_t), context, w);
  }
  if (p.grad_weight) {
    in_parts(w, p.grad_weight, f.k * f.c * f.o, context,
             [&](const AggregateBackwardWork<T>& parts) {
               const int64_t tiles = ceil_div(f.c, kTile) * ceil_div(f.o, kTile);
               launch("weight_grad_dense_kernel", weight_grad_dense_kernel<T>,
                      parts.part_count * f.k * tiles, kSumTileBytes, context, parts);
             });
  }
  if (p.grad_bias) {
    in_parts(w, p.grad_bias, f.o, context, [&](const AggregateBackwardWork<T>& parts) {
      launch("bias_grad_kernel", bias_grad_kernel<T>, strided_blocks(parts.part_count * f.o), 0,
             context, parts);
    });
  }
}

}  // namespace

void aggregate_backward(const AggregateBackwardParams& p, Context& context) {
  if (p.forward.convolution != Convolution::dense) return gradients(&p, nullptr, context);
  with_type(p.forward.dtype, [&](auto t) { dense_backward_as<decltype(t)>(p, context); });
}

}  // namespace convnn::cuda
