// SPDX-License-Identifier: MIT
// The launches of the kernels for Hopper, each compiled in a file of its own.
#pragma once

#include "hopper_finish.cuh"
#include "hopper_keys.cuh"
#include "hopper_sweep.cuh"
#include "mma_sweep.cuh"

namespace convnn::cuda {

// T is Float16 or BFloat16. The sweep for Hopper depends on the launch before it, that of the keys
// or a finish; so does a finish that is `dependent`, on a sweep.
template <class T>
void launch_sweep(const TensorMap& keys, const SweepParams& params, int multiprocessors,
                  Context& context);
template <class T>
void launch_mma_sweep(const KeyRows& keys, const SweepParams& params, Context& context);
template <class T>
void launch_finish(const FinishWork<T>& work, int multiprocessors, bool dependent,
                   Context& context);

}  // namespace convnn::cuda
