// SPDX-License-Identifier: MIT
// The total order of neighbors as one unsigned number, and the largest of a stream of such numbers.
//
// The key of a neighbor (s, index) has its similarity in the upper half, mapped so that larger is
// nearer (NaN above every number, -0 equal to +0), and the complement of its index in the lower
// half, so that among equal similarities the lower index has the larger key. All keys of a row
// differ, so the largest ones do not depend on the order in which they are found.
#pragma once

#include "device.cuh"

namespace convnn::cuda {

// For float32: 32 bits each; indices up to 2^32 - 2.
using NarrowKey = uint64_t;
// For float64: 64 bits each.
struct WideKey {
  uint64_t high, low;
};
template <class A>
using Key = std::conditional_t<std::is_same_v<A, double>, WideKey, NarrowKey>;

__device__ inline bool precedes(NarrowKey a, NarrowKey b) { return a > b; }
__device__ inline bool precedes(WideKey a, WideKey b) {
  return a.high > b.high || (a.high == b.high && a.low > b.low);
}

// Half of a key: as wide as the similarity.
template <class A>
using Half = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;
// Below every neighbor.
template <class A>
constexpr Half<A> kNothing = 0;
// The order of the token itself, even above NaN.
template <class A>
constexpr Half<A> kOrderOfSelf = ~Half<A>(0) - 1;
template <class A>
constexpr Half<A> kOrderOfNan = ~Half<A>(0) - 2;

__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline uint64_t bits_of(double x) { return uint64_t(__double_as_longlong(x)); }
__device__ inline float from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline double from_bits(uint64_t bits) { return __longlong_as_double(int64_t(bits)); }

// Increases with x, and is above kNothing even for -inf.
template <class A>
__device__ inline Half<A> order_of(A x) {
  if (x != x) return kOrderOfNan<A>;
  constexpr Half<A> sign = Half<A>(1) << (8 * sizeof(A) - 1);
  const Half<A> bits = bits_of(x == 0 ? A(0) : x);
  return bits & sign ? ~bits : bits | sign;
}
// The inverse of order_of.
template <class A>
__device__ inline A similarity_of(Half<A> order) {
  constexpr Half<A> sign = Half<A>(1) << (8 * sizeof(A) - 1);
  if (order == kOrderOfNan<A>) return kNan<A>;
  return from_bits(Half<A>(order & sign ? order ^ sign : ~order));
}

__device__ inline NarrowKey pack(uint32_t high, uint32_t low) { return uint64_t(high) << 32 | low; }
__device__ inline WideKey pack(uint64_t high, uint64_t low) { return {high, low}; }
__device__ inline uint32_t high_of(NarrowKey key) { return uint32_t(key >> 32); }
__device__ inline uint64_t high_of(WideKey key) { return key.high; }
__device__ inline uint32_t low_of(NarrowKey key) { return uint32_t(key); }
__device__ inline uint64_t low_of(WideKey key) { return key.low; }

template <class A>
__device__ inline Key<A> no_key() {
  return pack(kNothing<A>, kNothing<A>);
}
// Above every neighbor.
template <class A>
__device__ inline Key<A> highest_key() {
  return pack(Half<A>(~kNothing<A>), Half<A>(~kNothing<A>));
}
template <class A>
__device__ inline Key<A> key_of(Half<A> order, int64_t index) {
  return pack(order, Half<A>(~Half<A>(index)));
}
template <class A>
__device__ inline bool is_nothing(Key<A> key) {
  return high_of(key) == 0 && low_of(key) == 0;
}
template <class A>
__device__ inline int64_t index_of(Key<A> key) {
  return int64_t(Half<A>(~low_of(key)));
}

// The k largest of the keys that are pushed, k <= kLongestList, in shared memory of one warp. Every
// function that changes the list first waits for lanes that still read it.
//
// Keys above the lowest one of the list are collected in a buffer behind it. A full buffer is
// sorted by a bitonic network, and its largest keys are merged into the list.
constexpr int kLongestList = 256;

// Lengths of the list and of its buffer: powers of two.
inline __host__ __device__ int list_length(int64_t k) {
  int length = kWarp;
  while (length < k && length < kLongestList) length *= 2;
  return length;
}
inline __host__ __device__ int buffer_length(int64_t k) {
  return list_length(k) < 2 * kWarp ? 2 * kWarp : list_length(k);
}

template <class A>
class NearestList {
 public:
  // Shared memory of one warp.
  static __host__ __device__ size_t bytes(int64_t k) {
    return size_t(list_length(k) + buffer_length(k)) * sizeof(Key<A>);
  }

  // memory [bytes(k)]
  __device__ NearestList(void* memory, int k)
      : keys_(static_cast<Key<A>*>(memory)),
        k_(k),
        length_(list_length(k)),
        buffered_(buffer_length(k)) {}

  __device__ void clear() {
    // Other lanes may still be reading.
    __syncwarp();
    for (int i = lane(); i < length_; i += kWarp) keys_[i] = no_key<A>();
    waiting_ = 0;
    lowest_ = no_key<A>();
    __syncwarp();
  }

  // Each lane pushes a key, or no_key().
  __device__ void push(Key<A> key) {
    const bool enters = precedes(key, lowest_);
    const unsigned lanes = __ballot_sync(kAllLanes, enters);
    if (!lanes) return;
    const int position = waiting_ + __popc(lanes & ((1u << lane()) - 1));
    if (enters) buffer()[position] = key;
    waiting_ += __popc(lanes);
    if (waiting_ > buffered_ - kWarp) merge();
  }

  // Merges everything pushed so far: afterwards [i] is the i-th largest key.
  __device__ void finish() {
    if (waiting_) merge();
  }
  __device__ Key<A> operator[](int position) const { return keys_[position]; }

  // Replaces the first k keys by change(key) and sorts them; the others become no_key().
  template <class Change>
  __device__ void reorder(int k, const Change& change) {
    // Other lanes may still be reading.
    __syncwarp();
    for (int i = lane(); i < length_; i += kWarp) keys_[i] = i < k ? change(keys_[i]) : no_key<A>();
    __syncwarp();
    sort(keys_, length_);
  }

 private:
  __device__ Key<A>* buffer() { return keys_ + length_; }

  __device__ __forceinline__ void merge() {
    for (int i = waiting_ + lane(); i < buffered_; i += kWarp) buffer()[i] = no_key<A>();
    __syncwarp();
    sort(buffer(), buffered_);
    // The larger of the i-th largest of one and the i-th smallest of the other, for all i, are the
    // largest of both, in a bitonic sequence.
    for (int i = lane(); i < length_; i += kWarp) {
      const Key<A> other = buffer()[length_ - 1 - i];
      if (precedes(other, keys_[i])) keys_[i] = other;
    }
    __syncwarp();
    for (int span = length_ / 2; span > 0; span /= 2) exchange(keys_, length_, span, length_);
    lowest_ = keys_[k_ - 1];
    waiting_ = 0;
    __syncwarp();
  }

  // Bitonic sort, the largest first.
  static __device__ __forceinline__ void sort(Key<A>* keys, int n) {
    for (int run = 2; run <= n; run *= 2) {
      for (int span = run / 2; span > 0; span /= 2) exchange(keys, n, span, run);
    }
  }
  // Orders keys that are `span` apart, alternately descending and ascending from run to run.
  static __device__ __forceinline__ void exchange(Key<A>* keys, int n, int span, int run) {
    for (int i = lane(); i < n / 2; i += kWarp) {
      const int low = i / span * 2 * span + i % span, high = low + span;
      const bool descending = (low & run) == 0;
      const Key<A> a = keys[low], b = keys[high];
      if (precedes(b, a) == descending) {
        keys[low] = b;
        keys[high] = a;
      }
    }
    __syncwarp();
  }

  Key<A>* keys_;
  int k_, length_, buffered_;
  int waiting_ = 0;
  Key<A> lowest_ = no_key<A>();
};

}  // namespace convnn::cuda
