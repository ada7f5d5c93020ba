// SPDX-License-Identifier: MIT
// Gaps between arrays that share a block of memory. AddressSanitizer reports what reads or writes
// them; without it there are none.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define CONVNN_GUARDS
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CONVNN_GUARDS
#endif
#endif

#if defined(CONVNN_GUARDS)
#include <sanitizer/asan_interface.h>
#endif

namespace convnn {

// Functions here have internal linkage: no code of one instruction set may be linked into another.
#if defined(CONVNN_GUARDS)
constexpr size_t kGap = 64;  // the bytes between two arrays, at least
static inline void guard(const char* begin, const char* end) {
  ASAN_POISON_MEMORY_REGION(begin, size_t(end - begin));
}
static inline void release(const char* begin, const char* end) {
  ASAN_UNPOISON_MEMORY_REGION(begin, size_t(end - begin));
}
#else
constexpr size_t kGap = 0;
static inline void guard(const char*, const char*) {}
static inline void release(const char*, const char*) {}
#endif

}  // namespace convnn
