// SPDX-License-Identifier: MIT
// Random numbers that depend on nothing but a seed, and memory that ends where an array does.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

namespace sanitized {

class Draw {
 public:
  explicit Draw(uint64_t seed) : generator_(seed) {}

  int64_t below(int64_t count) { return int64_t(generator_() % uint64_t(count)); }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  bool chance(double share) { return uniform() < share; }
  double uniform() { return double(generator_() >> 11) * 0x1p-53; }
  // About normally distributed.
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * 1.732; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(int64_t(values.size()))];
  }
  template <class T>
  const T& one_of(const std::vector<T>& values) {
    return values[size_t(below(int64_t(values.size())))];
  }

 private:
  std::mt19937_64 generator_;
};

// An allocation of its own for `count` elements, so that AddressSanitizer sees one too many; what
// is not written has the bytes that the sanitizer fills new memory with.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t count) : data_(static_cast<T*>(std::malloc(size_t(count) * sizeof(T)))) {}

  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace sanitized
