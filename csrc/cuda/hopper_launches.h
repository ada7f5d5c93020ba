// SPDX-License-Identifier: MIT
// The launches of the kernels for Hopper, each compiled in a file of its own.
#pragma once

#include "hopper_finish.cuh"
#include "hopper_keys.cuh"
#include "hopper_sweep.cuh"

namespace convnn::cuda {

// T is Float16 or BFloat16. Both depend on the launch before them: the sweep on that of the keys or
// on a finish, the finish on a sweep.
template <class T>
void launch_sweep(const TensorMap& keys, const SweepParams& params, int multiprocessors,
                  Context& context);
template <class T>
void launch_finish(const FinishWork<T>& work, int multiprocessors, Context& context);

}  // namespace convnn::cuda
