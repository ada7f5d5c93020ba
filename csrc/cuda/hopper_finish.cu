// SPDX-License-Identifier: MIT
#include "hopper_finish.cuh"

#include "hopper_launches.h"

namespace convnn::cuda {
namespace {

template <class T, int kMostNeighbors, bool kSplits>
void launch_as(FinishWork<T> w, int multiprocessors, bool dependent, Context& context) {
  using Shape = FinishShape<kMostNeighbors, kSplits>;
  const size_t bytes =
      Shape::kBytes + (w.value && w.weight_staged ? staged_bytes(w.weight ? w.k : 1, w.c) : 0);
  const int64_t units = int64_t(w.blocks) * (kSweepRows / kFinishUnit);
  w.processors = int(std::min<int64_t>(units, multiprocessors));
  w.range = int(units / w.processors), w.longer = int(units % w.processors);
  launch_hopper("hopper_finish_kernel", hopper_finish_kernel<T, kMostNeighbors, kSplits>,
                int64_t(w.processors) * kFinishBlocks, kThreads, bytes, dependent, context, w);
}

template <class T, int kMostNeighbors>
void launch_for(const FinishWork<T>& w, int multiprocessors, bool dependent, Context& context) {
  if (w.splits == 1) {
    launch_as<T, kMostNeighbors, false>(w, multiprocessors, dependent, context);
  } else {
    launch_as<T, kMostNeighbors, true>(w, multiprocessors, dependent, context);
  }
}

}  // namespace

template <class T>
void launch_finish(const FinishWork<T>& w, int multiprocessors, bool dependent, Context& context) {
  if (w.k <= 10) {
    launch_for<T, 10>(w, multiprocessors, dependent, context);
  } else if (w.k <= 16) {
    launch_for<T, 16>(w, multiprocessors, dependent, context);
  } else if (w.k <= 32) {
    launch_for<T, 32>(w, multiprocessors, dependent, context);
  } else {
    launch_for<T, 64>(w, multiprocessors, dependent, context);
  }
}
template void launch_finish(const FinishWork<Float16>&, int, bool, Context&);
template void launch_finish(const FinishWork<BFloat16>&, int, bool, Context&);

}  // namespace convnn::cuda
