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

// The last of the best `wanted` of `count` ranks that are all different; may reorder them.
template <class A>
inline Rank<A> last_of_best(Rank<A>* ranks, int64_t wanted, int64_t count) {
  std::nth_element(ranks, ranks + wanted - 1, ranks + count);
  return ranks[wanted - 1];
}

// Moves those of `count` ranks that are not after `last` to the front. Returns how many.
template <class A>
inline int64_t move_to_front(Rank<A>* ranks, int64_t count, const Rank<A>& last) {
  return std::partition(ranks, ranks + count, [&](const Rank<A>& rank) { return !(last < rank); }) -
         ranks;
}

// Ranks as vectors of signed numbers, which vectors compare. Up to a multiple of eight can be
// accessed.
class RankCodes {
  typedef int64_t Codes __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kCodes = kVectorBytes / 8;
  static constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
  static constexpr int64_t kGreatest = std::numeric_limits<int64_t>::max();
  static constexpr int kInterpolations = 6;

 public:
  RankCodes(Rank<float>* ranks, int64_t count) : ranks_(ranks), count_(count) {}

  // The last of the best `wanted`: searched between the least and the greatest rank as if those
  // between were evenly spread, and by bisection if they are not, without branches that depend on
  // single ranks.
  Rank<float> last_of_best(int64_t wanted) const {
    int64_t low, high, below = 0, reached = count_;  // of these, how many are below `low`
    find_extremes(low, high);
    fill_up(kGreatest);
    for (int step = 0; low < high && reached > wanted; ++step) {
      const double part =
          step < kInterpolations ? (double(wanted - below) - 0.5) / double(reached - below) : 0.5;
      const uint64_t range = uint64_t(high) - uint64_t(low);
      const uint64_t offset = std::min(uint64_t(double(range) * part), range - 1);
      const int64_t middle = int64_t(uint64_t(low) + offset);
      const int64_t found = count_until(middle);
      if (found >= wanted) {
        high = middle, reached = found;
      } else {
        low = middle + 1, below = found;
      }
    }
    return to_rank(greatest_until(high));
  }

  int64_t move_to_front(const Rank<float>& last) const {
    const int64_t most = code_of(last);
    fill_up(kGreatest);
    int64_t front = 0;
    for (int64_t i = 0; i < count_; i += kCodes) {
      front += compress(i, codes(i) <= most, front);
    }
    return min_of(front, count_);  // if the last rank of all is `last`
  }

 private:
  static int64_t code_of(const Rank<float>& rank) {
    int64_t code;
    std::memcpy(&code, &rank, sizeof code);
    return code ^ kLeast;
  }
  static Rank<float> to_rank(int64_t code) {
    Rank<float> rank;
    code ^= kLeast;
    std::memcpy(static_cast<void*>(&rank), &code, sizeof rank);
    return rank;
  }
  Codes codes(int64_t i) const {
    Codes codes;
    std::memcpy(&codes, ranks_ + i, sizeof codes);
    return codes ^ kLeast;
  }
  static uint32_t bits(Codes comparison) {
    Vector<double> lanes;
    std::memcpy(&lanes, &comparison, sizeof lanes);
    return lane_bits(lanes);
  }

  // Fills the last vector up with this.
  void fill_up(int64_t code) const {
    for (int64_t i = count_; i % kCodes; ++i) ranks_[i] = to_rank(code);
  }

  void find_extremes(int64_t& least, int64_t& greatest) const {
    least = greatest = code_of(ranks_[0]);
    fill_up(least);
    Codes low = Codes{} + least, high = low;
    for (int64_t i = 0; i < count_; i += kCodes) {
      const Codes x = codes(i);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    for (int64_t lane = 0; lane < kCodes; ++lane) {
      least = low[lane] < least ? low[lane] : least;
      greatest = high[lane] > greatest ? high[lane] : greatest;
    }
  }

  // The greatest code that is at most this.
  int64_t greatest_until(int64_t most) const {
    Codes lanes = Codes{} + kLeast;
    for (int64_t i = 0; i < count_; i += kCodes) {
      const Codes x = codes(i), allowed = x <= most ? x : kLeast + Codes{};
      lanes = allowed > lanes ? allowed : lanes;
    }
    int64_t result = kLeast;
    for (int64_t lane = 0; lane < kCodes; ++lane) {
      result = lanes[lane] > result ? lanes[lane] : result;
    }
    return result;
  }

  // How many codes are at most this, which is less than the greatest.
  int64_t count_until(int64_t most) const {
    int64_t count = 0;
    for (int64_t i = 0; i < count_; i += kCodes) {
      count += __builtin_popcount(bits(codes(i) <= most));
    }
    return count;
  }

  // Moves the chosen ones of the vector of ranks at i to `front`, which is at most i; what follows
  // them there is overwritten. Returns how many.
  int64_t compress(int64_t i, Codes chosen, int64_t front) const {
    const uint32_t lanes = bits(chosen);
#if defined(__AVX512F__)
    const __m512i x = _mm512_loadu_si512(ranks_ + i);
    _mm512_storeu_si512(ranks_ + front, _mm512_maskz_compress_epi64(__mmask8(lanes), x));
#elif defined(__AVX2__)
    // The halves of a rank are two lanes of 32 bits.
    const uint32_t halves = (lanes & 1) * 3 | (lanes & 2) * 6 | (lanes & 4) * 12 | (lanes & 8) * 24;
    int64_t positions;
    std::memcpy(&positions, kSetBits.positions[halves], sizeof positions);
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ranks_ + i));
    const __m256i to_front = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(positions));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ranks_ + front),
                        _mm256_permutevar8x32_epi32(x, to_front));
#else
    for (int64_t lane = 0; lane < kCodes; ++lane) {
      ranks_[front] = ranks_[i + lane];
      front += lanes >> lane & 1;
    }
#endif
    return __builtin_popcount(lanes);
  }

  Rank<float>* ranks_;
  int64_t count_;
};

template <>
inline Rank<float> last_of_best(Rank<float>* ranks, int64_t wanted, int64_t count) {
  return RankCodes(ranks, count).last_of_best(wanted);
}

template <>
inline int64_t move_to_front(Rank<float>* ranks, int64_t count, const Rank<float>& last) {
  return RankCodes(ranks, count).move_to_front(last);
}

}  // namespace convnn::CONVNN_ISA
