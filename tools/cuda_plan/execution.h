// SPDX-License-Identifier: MIT
// What the host code of csrc/cuda would launch, written down instead of launched: stands in for
// tests/host_cuda/execution.h, from which it takes all but launch().
#pragma once

#include <type_traits>

#define launch launch_on_fibers
#include "../../tests/host_cuda/execution.h"
#undef launch

namespace execution {

// Writes down a launch; what describe() is called with until the next one belongs to it.
void planned(const char* name, intptr_t address, int64_t blocks, int threads, size_t shared_bytes);
void number(const char* name, int64_t value);

// An argument of a kernel. Structures that have something to tell have an overload in numbers.h.
template <class T>
void describe(const T& argument) {
  if constexpr (std::is_integral_v<T>) number("count", int64_t(argument));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, const Arguments&... arguments) {
  planned(name, reinterpret_cast<intptr_t>(kernel), blocks, threads, shared_bytes);
  (describe(arguments), ...);
}

}  // namespace execution
