// SPDX-License-Identifier: MIT
// How the processor treats denormal numbers and rounds. torch.set_flush_denormal sets it for the
// calling thread only; the results of an operator must not depend on the number of threads.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace convnn::cpu {

#if defined(__SSE2__)
constexpr uint32_t kExceptionFlags = 0x3f;  // of MXCSR: state, not mode

inline uint64_t floating_point_mode() { return _mm_getcsr() & ~kExceptionFlags; }
inline void set_floating_point_mode(uint64_t mode) {
  _mm_setcsr(uint32_t(mode) | (_mm_getcsr() & kExceptionFlags));
}
#elif defined(__aarch64__)
inline uint64_t floating_point_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_floating_point_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
inline uint64_t floating_point_mode() { return 0; }
inline void set_floating_point_mode(uint64_t) {}
#endif

// Sets the mode of this thread for the lifetime of the guard.
class FloatingPointModeGuard {
 public:
  explicit FloatingPointModeGuard(uint64_t mode) : before_(floating_point_mode()) {
    if (mode != before_) set_floating_point_mode(mode);
    changed_ = mode != before_;
  }
  FloatingPointModeGuard(const FloatingPointModeGuard&) = delete;
  FloatingPointModeGuard& operator=(const FloatingPointModeGuard&) = delete;
  ~FloatingPointModeGuard() {
    if (changed_) set_floating_point_mode(before_);
  }

 private:
  uint64_t before_;
  bool changed_ = false;
};

}  // namespace convnn::cpu
