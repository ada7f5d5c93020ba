// SPDX-License-Identifier: MIT
// Temporary memory of one call of an operator on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

namespace convnn::cpu {

// Uninitialized memory, aligned to 64 bytes; null for zero bytes. malloc with some slack takes a
// fraction of the time of an aligned allocation, which matters in a small call.
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(size_t bytes) : block_(bytes ? std::malloc(bytes + 63) : nullptr) {
    if (bytes && !block_) {
      throw std::runtime_error("convnn: cannot allocate " + std::to_string(bytes) +
                               " bytes of workspace");
    }
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
