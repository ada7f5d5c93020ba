// SPDX-License-Identifier: MIT
// Memory that cannot be had is reported by its size and what it is for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace convnn {

class OutOfMemory : public std::runtime_error {
 public:
  // what_for: "similarities of shape [2, 3]"
  OutOfMemory(size_t bytes, const std::string& what_for)
      : std::runtime_error("cannot allocate " + text_of(bytes) + " bytes for " + what_for) {}

 private:
  static std::string text_of(size_t bytes) {
    const bool is_known = bytes < std::numeric_limits<size_t>::max();
    return (is_known ? "" : "more than ") + std::to_string(bytes);
  }
};

// The product of sizes, none of which is negative; the largest size_t if that is exceeded.
template <class... Sizes>
size_t bytes_of(Sizes... sizes) {
  size_t product = 1;
  bool is_exceeded = false;
  ((is_exceeded |= __builtin_mul_overflow(product, size_t(sizes), &product)), ...);
  if ((false || ... || (sizes == 0))) return 0;
  return is_exceeded ? std::numeric_limits<size_t>::max() : product;
}

// A vector of `count` elements that are zero.
template <class T>
std::vector<T> zeros(size_t count, const char* what_for) {
  try {
    return std::vector<T>(count);
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {
  }
  throw OutOfMemory(bytes_of(count, sizeof(T)), what_for);
}

}  // namespace convnn
