// SPDX-License-Identifier: MIT
// Replaces what csrc/cuda/thread_copies.cuh declares; each function is described there.
#pragma once

#include "hopper.h"

namespace execution {

void copy_async16(uint32_t target, const void* source, bool valid, Site site);
void copy_commit();
void copy_wait(int left, Site site);

}  // namespace execution

namespace convnn::cuda {

inline void copy_async16(uint32_t target, const void* source, bool valid,
                         Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::copy_async16(target, source, valid, site);
}
inline void copy_commit() { execution::copy_commit(); }
template <int kLeft>
void copy_wait(Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::copy_wait(kLeft, site);
}

}  // namespace convnn::cuda
