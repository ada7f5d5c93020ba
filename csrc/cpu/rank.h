// SPDX-License-Identifier: MIT
// The total order of neighbors: similarity descending, NaN first, -0 equal to +0, then column
// ascending.
#pragma once

#include <algorithm>

#include "vector.h"

namespace convnn::CONVNN_ISA {

// A similarity and its column as one number; the better one is less.
template <class A>
struct RankCode;
template <>
struct RankCode<float> {
  using Bits = uint32_t;
  using Code = uint64_t;
};
template <>
struct RankCode<double> {
  using Bits = uint64_t;
  __extension__ typedef unsigned __int128 Code;
};

template <class A>
class Rank {
  using Bits = typename RankCode<A>::Bits;
  using Code = typename RankCode<A>::Code;
  static constexpr int kBits = 8 * sizeof(Bits);
  static constexpr Bits kSign = Bits(1) << (kBits - 1);

 public:
  Rank() = default;
  Rank(A similarity, int64_t column) {
    Bits key = 0;  // NaN: before every number
    if (similarity == similarity) {
      const A plus_zero = similarity + A(0);
      std::memcpy(&key, &plus_zero, sizeof key);
      key = key & kSign ? key : ~(key | kSign);
    }
    code_ = Code(key) << kBits | Bits(column);
  }
  int64_t column() const { return int64_t(Bits(code_)); }
  A similarity() const {
    Bits key = Bits(code_ >> kBits);
    if (key == 0) return std::numeric_limits<A>::quiet_NaN();
    key = key & kSign ? key : ~key & ~kSign;
    A similarity;
    std::memcpy(&similarity, &key, sizeof similarity);
    return similarity;
  }
  bool operator<(const Rank& other) const { return code_ < other.code_; }

 private:
  Code code_;
};

// Up to so many ranks are sorted by counting, which takes fewer cycles up to here: it has no
// branches that depend on them, but compares all pairs.
template <class A>
constexpr int64_t kMostCounted = sizeof(A) == 4 ? 64 : 16;

// For the ranks i < count, at most kMostCounted and all different, writes to places[i] how many of
// them precede it; then `count`, up to a multiple of eight. As many ranks can be read.
template <class A>
inline void count_preceding(const Rank<A>* ranks, int64_t count, int64_t* places) {
  for (int64_t i = 0; i < count; ++i) {
    places[i] = 0;
    for (int64_t j = 0; j < count; ++j) places[i] += ranks[j] < ranks[i];
  }
  for (int64_t i = count; i % 8; ++i) places[i] = count;
}

template <>
inline void count_preceding(const Rank<float>* ranks, int64_t count, int64_t* places) {
  typedef int64_t Codes __attribute__((vector_size(kVectorBytes)));
  constexpr int64_t kCodes = kVectorBytes / 8;
  static_assert(sizeof(Rank<float>) == sizeof(int64_t) && 8 % kCodes == 0);
  // The codes as signed numbers, which vectors compare, filled up with the largest.
  int64_t codes[kMostCounted<float>];
  const int64_t filled = ceil_div(count, 8) * 8;
  Codes index;
  for (int64_t lane = 0; lane < kCodes; ++lane) index[lane] = lane;
  for (int64_t i = 0; i < filled; i += kCodes) {
    Codes code;
    std::memcpy(&code, ranks + i, sizeof code);
    code = index < count - i ? code ^ std::numeric_limits<int64_t>::min()
                             : Codes{} + std::numeric_limits<int64_t>::max();
    std::memcpy(codes + i, &code, sizeof code);
  }
  for (int64_t i = 0; i < filled; i += kCodes) {
    Codes code, place = {};
    std::memcpy(&code, codes + i, sizeof code);
    for (int64_t j = 0; j < filled; j += 8) {
#pragma GCC unroll 8
      for (int64_t of = 0; of < 8; ++of) {
        place = Codes{} + codes[j + of] < code ? place + 1 : place;
      }
    }
    std::memcpy(places + i, &place, sizeof place);
  }
}

// Sorts ranks that are all different. Up to a multiple of eight can be accessed.
template <class A>
inline void sort_ranks(Rank<A>* ranks, int64_t count) {
  if (count > kMostCounted<A>) {
    std::sort(ranks, ranks + count);
    return;
  }
  int64_t places[kMostCounted<A>];
  Rank<A> sorted[kMostCounted<A> + 1];
  count_preceding(ranks, count, places);
  for (int64_t i = 0; i < count; i += 8) {
    for (int64_t of = 0; of < 8; ++of) sorted[places[i + of]] = ranks[i + of];
  }
  for (int64_t i = 0; i < count; i += 8) std::memcpy(ranks + i, sorted + i, 8 * sizeof *ranks);
}

// Moves those of ranks first ... count - 1 for which is_chosen(position) to the front of them,
// without branches that depend on it. Returns the position behind the last of those.
template <class A, class IsChosen>
inline int64_t move_to_front(Rank<A>* ranks, int64_t first, int64_t count,
                             const IsChosen& is_chosen) {
  int64_t front = first;
  for (int64_t i = first; i < count; ++i) {
    const Rank<A> rank = ranks[i];
    const bool chosen = is_chosen(i);
    ranks[i] = ranks[front];
    ranks[front] = rank;
    front += chosen;
  }
  return front;
}

// Moves the best `wanted` of `count` ranks that are all different to the front, in any order.
// Returns the last of them.
template <class A>
inline Rank<A> move_best_to_front(Rank<A>* ranks, int64_t wanted, int64_t count) {
  std::nth_element(ranks, ranks + wanted - 1, ranks + count);
  return ranks[wanted - 1];
}

// By bisection between the least and the greatest rank, which has no branches that depend on single
// ranks.
template <>
inline Rank<float> move_best_to_front(Rank<float>* ranks, int64_t wanted, int64_t count) {
  typedef int64_t Codes __attribute__((vector_size(kVectorBytes)));
  constexpr int64_t kCodes = kVectorBytes / 8, kLeast = std::numeric_limits<int64_t>::min();
  // The codes as signed numbers, which vectors compare.
  const auto code_at = [&](int64_t i) {
    int64_t code;
    std::memcpy(&code, ranks + i, sizeof code);
    return code ^ kLeast;
  };
  const auto reached = [&](int64_t most) {  // how many codes are at most this
    Codes counts = {};
    int64_t i = 0;
    for (; i + kCodes <= count; i += kCodes) {
      Codes codes;
      std::memcpy(&codes, ranks + i, sizeof codes);
      counts = (codes ^ kLeast) <= most ? counts + 1 : counts;
    }
    int64_t sum = 0;
    for (int64_t lane = 0; lane < kCodes; ++lane) sum += counts[lane];
    for (; i < count; ++i) sum += code_at(i) <= most;
    return sum;
  };
  int64_t low = code_at(0), high = low;
  for (int64_t i = 1; i < count; ++i) {
    low = code_at(i) < low ? code_at(i) : low;
    high = code_at(i) > high ? code_at(i) : high;
  }
  while (low < high) {
    const int64_t middle = low + int64_t((uint64_t(high) - uint64_t(low)) / 2);
    const int64_t found = reached(middle);
    if (found >= wanted) high = middle;
    if (found == wanted) break;
    if (found < wanted) low = middle + 1;
  }
  move_to_front(ranks, 0, count, [&](int64_t i) { return code_at(i) <= high; });
  int64_t last = low;
  for (int64_t i = 0; i < wanted; ++i) last = code_at(i) > last ? code_at(i) : last;
  Rank<float> result;
  last ^= kLeast;
  std::memcpy(static_cast<void*>(&result), &last, sizeof result);
  return result;
}

}  // namespace convnn::CONVNN_ISA
