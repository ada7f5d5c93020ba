// SPDX-License-Identifier: MIT
#include "hopper_launches.h"

namespace convnn::cuda {
namespace {

// Slots of a lane: what the shared memory of the device has room for.
int slots_beside(size_t bytes) {
#ifdef __CUDACC__
  int device = 0, most = 0;
  check_launch("mma_sweep_kernel", cudaGetDevice(&device));
  check_launch("mma_sweep_kernel",
               cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
#else
  const int most = 99 << 10;  // the least that a device has
#endif
  return int(std::min<int64_t>((most - int64_t(bytes)) / kSlotSetBytes, kMostSlots));
}

template <class T, int kD>
void launch_as(const KeyRows& keys, const SweepParams& p, Context& context) {
  const int slots = slots_beside(mma_sweep_bytes<kD>(0));
  launch_hopper("mma_sweep_kernel", mma_sweep_kernel<T, kD>, int64_t(p.blocks) * p.splits,
                kMmaSweepThreads, mma_sweep_bytes<kD>(slots), /*dependent=*/false, context, p, keys,
                slots);
}

}  // namespace

template <class T>
void launch_mma_sweep(const KeyRows& keys, const SweepParams& p, Context& context) {
  if (p.d <= 64) {
    launch_as<T, 64>(keys, p, context);
  } else {
    launch_as<T, 128>(keys, p, context);
  }
}
template void launch_mma_sweep<Float16>(const KeyRows&, const SweepParams&, Context&);
template void launch_mma_sweep<BFloat16>(const KeyRows&, const SweepParams&, Context&);

}  // namespace convnn::cuda
