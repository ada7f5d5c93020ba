// SPDX-License-Identifier: MIT
// What the host code of csrc/cuda would launch, written down instead of launched: stands in for
// tests/host_cuda/execution.h and hopper.h, from which it takes all but the launches.
#pragma once

#include <type_traits>

#define launch launch_on_fibers
#define launch_kernel launch_kernel_on_fibers
#include "../../tests/host_cuda/hopper.h"
#undef launch_kernel
#undef launch

namespace execution {

// Writes down a launch; what number() is called with until the next one belongs to it.
void planned(const char* name, intptr_t address, int64_t blocks, int threads, size_t shared_bytes);
void number(const char* name, int64_t value);
// The argument in that place of a kernel.
void number(size_t place, int64_t value);

// An argument of a kernel. Structures that have something to tell have an overload in
// NAME_numbers.h, for NAME.cu.
template <class T>
void describe(const T& argument, size_t place) {
  if constexpr (std::is_integral_v<T>) number(place, int64_t(argument));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, const Arguments&... arguments) {
  planned(name, reinterpret_cast<intptr_t>(kernel), blocks, threads, shared_bytes);
  size_t place = 0;
  (describe(arguments, place++), ...);
}
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                   size_t shared_bytes, bool, const Arguments&... arguments) {
  launch(name, kernel, blocks, threads, shared_bytes, arguments...);
}

}  // namespace execution
