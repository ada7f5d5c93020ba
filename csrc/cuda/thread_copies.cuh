// SPDX-License-Identifier: MIT
// Copies of 16 bytes from global to shared memory that a thread issues and then waits for, in
// groups. They go through L1, unlike those of the bulk engine, and a thread may gather with them.
//
// Products see what they wrote after copy_wait() and fence_async_shared() of the thread that issued
// them.
#pragma once

#include "hopper.cuh"

#ifndef __CUDACC__
#include <thread_copies.h>
#endif

namespace convnn::cuda {

#ifdef __CUDACC__

// Copies to the address `target` of shared memory; zeros if not `valid`, and then source is not
// read. Both are aligned to 16 bytes.
__device__ __forceinline__ void copy_async16(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(target),
               "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
               : "memory");
}
// Ends a group of the copies of this thread.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread but the last `kLeft`.
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif  // __CUDACC__

}  // namespace convnn::cuda
