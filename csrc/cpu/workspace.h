// SPDX-License-Identifier: MIT
// Temporary memory of one call of an operator on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>

#include "../memory.h"
#include "guard.h"

namespace convnn::cpu {

// Uninitialized memory, aligned to 64 bytes; null for zero bytes. malloc with some slack takes a
// fraction of the time of an aligned allocation, which matters in a small call.
class Workspace {
 public:
  Workspace() = default;
  Workspace(size_t bytes, const char* what_for) {
    if (bytes == 0) return;
    constexpr size_t kSlack = 63;
    if (bytes <= std::numeric_limits<size_t>::max() - kSlack) {
      block_.reset(std::malloc(bytes + kSlack));
    }
    if (!block_) throw OutOfMemory(bytes, what_for);
    const char* const block = static_cast<const char*>(block_.get());
    const char* const begin = as<const char>();
    guard(block, begin);
    guard(begin + bytes, block + bytes + kSlack);
  }

  void* get() const {
    return reinterpret_cast<void*>((uintptr_t(block_.get()) + 63) & ~uintptr_t(63));
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(get());
  }

 private:
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  std::unique_ptr<void, Free> block_;
};

}  // namespace convnn::cpu
