// SPDX-License-Identifier: MIT
#include "hopper_launches.h"

namespace convnn::cuda {
namespace {

template <class T, int kD>
void launch_as(const TensorMap& keys, const SweepParams& p, int multiprocessors, Context& context) {
  const int64_t blocks = std::min<int64_t>(int64_t(p.blocks) * p.splits, multiprocessors);
  launch_hopper("hopper_sweep_kernel", hopper_sweep_kernel<T, kD>, blocks, kSweepThreads,
                sizeof(SweepShared<kD>), /*dependent=*/true, context, keys, p);
}

}  // namespace

template <class T>
void launch_sweep(const TensorMap& keys, const SweepParams& p, int multiprocessors,
                  Context& context) {
  if (p.d <= 64) {
    launch_as<T, 64>(keys, p, multiprocessors, context);
  } else {
    launch_as<T, 128>(keys, p, multiprocessors, context);
  }
}
template void launch_sweep<Float16>(const TensorMap&, const SweepParams&, int, Context&);
template void launch_sweep<BFloat16>(const TensorMap&, const SweepParams&, int, Context&);

}  // namespace convnn::cuda
