// SPDX-License-Identifier: MIT
// A warp of a sweep: 32 queries in registers, what is done with their accumulators, and their
// lists.
#pragma once

#include "hit_lists.cuh"
#include "slots.cuh"
#include "sweep.cuh"

namespace convnn::cuda {

// Where the next hits of the rows of a lane and half go.
struct alignas(8) RowEnds {
  uint32_t row_0, row_1;
};

// A warp with 2 halves of 16 queries. With g = lane / 4 and t = lane % 4, a lane has rows g + 8 r,
// r = 0, 1, of each half, and of every eight columns 2 t and 2 t + 1.
//
// Derived computes the products. It has
//
//   sweep_tiles<kColumns>(inv_k, step, body)
//
// which calls body(acc, factors, part) for every step-th of the left_ last tiles of the item, part
// by part of kColumns columns: acc [2, kColumns / 2] are the products of both halves as the matrix
// instruction leaves them, and Derived::Factors has the factors of this lane's columns:
// factors(n), n even, are those of columns 8 n + 2 t, + 1, 8 n + 8 + 2 t and + 1 of the part.
// Meanwhile left_ counts the tiles from this one on. park() and unpark() stand around what needs
// many registers.
//
// Shared has slots, headers, ends, negative, before, inv_q, items and rows as SweepShared of
// hopper_sweep.cuh; first_row(warp), the first row of a warp in the block, and kHalfRows, how far
// the second half is from it; kReserve, the slots that may be filled between two looks at how many
// are left; and kSampled, the columns whose maxima are taken at a time.
template <class Derived, class T, int kD, class Shared>
class WarpSweep {
 protected:
  static constexpr int kSteps = kD / 16;
  static constexpr int kGroups = 16;  // maxima of a lane for each row
  static constexpr int kFewNeighbors = 8, kBisections = 9;
  static constexpr int kPart = 64;  // columns that are looked at at a time
  // Slots of a lane that are moved to the lists when one has few left. More keep lanes waiting for
  // the one that has most.
  static constexpr int kMoved = 12;

  // The addresses of the first slot and header of this lane, which has `slots` of either.
  __device__ __forceinline__ WarpSweep(Shared& shared, const SweepParams& p, int warp,
                                       uint32_t slot, uint32_t header, int slots)
      : shared_(shared),
        p_(p),
        warp_(warp),
        slots_(slots),
        first_slot_(slot),
        slot_(slot),
        header_(header) {}

  __device__ __forceinline__ Derived& self() { return static_cast<Derived&>(*this); }
  // Row of the block. Below, i = 2 * half + r stands for one of the four rows of a lane.
  __device__ __forceinline__ int row(int i) const {
    return shared_.rows[warp_] + i / 2 * Shared::kHalfRows + lane() / 4 + i % 2 * 8;
  }
  __device__ __forceinline__ const SweepItem& item() const { return shared_.items[warp_]; }
  __device__ __forceinline__ bool exists(int row) const { return item().first_row + row < p_.n; }
  // Row of the launch, counted over the splits.
  __device__ __forceinline__ int64_t launch_row(int row) const {
    return (int64_t(item().split) * p_.blocks + item().block) * kSweepRows + row;
  }
  // Where the list of this lane for row i begins, in hits.
  __device__ __forceinline__ uint32_t list_begin(int i) const {
    return (uint32_t(launch_row(row(i))) * 4 + lane_again() % 4) * uint32_t(p_.list);
  }
  __device__ __forceinline__ uint32_t (&ends() const)[4] { return shared_.ends[warp_][lane()]; }
  __device__ __forceinline__ float (&negative() const)[4] {
    return shared_.negative[warp_][lane()];
  }
  __device__ __forceinline__ float (&before() const)[4] { return shared_.before[warp_][lane()]; }

  __device__ __forceinline__ void begin(int number) {
    // Every lane has its number before the item changes.
    __syncwarp();
    if (lane() == 0) {
      shared_.items[warp_] = sweep_item(p_, number);
      shared_.rows[warp_] = Shared::first_row(warp_);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) ends()[i] = list_begin(i);
  }
  __device__ __forceinline__ void load_queries() {
    if (p_.pairs) {
      load_queries<true>();
    } else {
      load_queries<false>();
    }
    normalize_queries();
  }

  // Row of all queries.
  __device__ __forceinline__ int64_t query_row(int row) const {
    return item().batch * p_.n + item().first_row + row;
  }
  template <bool kPairs>
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* query = static_cast<const T*>(p_.query) + query_row(row(i)) * p_.d;
      load_row<kPairs>(a_[i / 2], i % 2, exists(row(i)) ? query : nullptr, int(p_.d));
    }
  }
  // Scales the rows and keeps their factors.
  __device__ __forceinline__ void normalize_queries() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float inv_q = p_.cosine ? normalize_row<T>(a_[i / 2], i % 2) : 1;
      if (lane() % 4 == 0) {
        shared_.inv_q[row(i)] = inv_q;
        if (exists(row(i)) && item().split == 0) p_.inv_q[query_row(row(i))] = inv_q;
      }
    }
    __syncwarp();
  }

  // The sampled sweep: sets T.
  __device__ __forceinline__ void sample_tiles() {
    // Of half and row r, the maximum of group i is at 4 * (i / 2) + 2 * r + i % 2, like the
    // accumulators; NaN as long as there is none.
    float most[2][2 * kGroups];
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) most[0][i] = most[1][i] = kNan<float>;
    constexpr int kColumns = Shared::kSampled;
    left_ = item().tiles;
    self().template sweep_tiles<kColumns>(
        p_.inv_k_sample, p_.step,
        [&](const float (&acc)[2][kColumns / 2], const typename Derived::Factors& factors,
            int part) {
          const uint32_t first = uint32_t(part) * (kColumns / 2) % (2 * kGroups);
#pragma unroll
          for (int n = 0; n < kColumns / 8; n += 2) {
            const float4 f = factors(n);
            const float factor[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
            for (int i = 0; i < 16; ++i) {
              const int half = i / 8, at = 4 * n + i % 8;
              float& largest = most[half][first + at];
              largest = fmaxf(largest, multiply_down(acc[half][at], factor[i % 8 / 4 * 2 + i % 2]));
            }
          }
        });
    if (p_.k <= kFewNeighbors) {
      // Half of the 64 groups leave a few hits more, and cost less.
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        most[0][i] = fmaxf(most[0][i], most[0][i + kGroups]);
        most[1][i] = fmaxf(most[1][i], most[1][i + kGroups]);
      }
      set_thresholds<kGroups / 2>(most);
    } else {
      set_thresholds<kGroups>(most);
    }
  }
  // Thresholds from the first kCount maxima of each row: lower bounds of the k-th largest of them
  // in the quad, by bisection, for all four rows at a time.
  template <int kCount>
  __device__ __forceinline__ void set_thresholds(const float (&most)[2][2 * kGroups]) {
    const auto maximum = [&](int i, int j) { return most[i / 2][j / 2 * 4 + i % 2 * 2 + j % 2]; };
    float found[4], high[4], middle[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      middle[i] = high[i] = maximum(i, 0);
#pragma unroll
      for (int j = 1; j < kCount; ++j) {
        middle[i] = fminf(middle[i], maximum(i, j));
        high[i] = fmaxf(high[i], maximum(i, j));
      }
      found[i] = -kInfinity<float>;
      middle[i] = quad_min(middle[i]);
      high[i] = quad_max(high[i]);
    }
#pragma unroll 1
    for (int step = 0; step < kBisections; ++step) {
      uint32_t reached = 0;  // 8 bits for each row
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) reached += maximum(i, j) >= middle[i] ? 1u << 8 * i : 0;
      }
      reached = quad_sum(reached);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool enough = int(reached >> 8 * i & 0xFF) >= p_.k;
        found[i] = enough ? middle[i] : found[i];
        high[i] = enough ? high[i] : middle[i];
        middle[i] = 0.5f * found[i] + 0.5f * high[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float most_finite = fminf(found[i], kLargest);
      const float bound = most_finite - (fabsf(most_finite) * 0x1p-21f + 0x1p-120f);
      // +0 rather than -0, so that a product of -0 reaches a threshold of 0.
      negative()[i] = 0 - (exists(row(i)) ? bound : kInfinity<float>);
    }
  }

  // Puts the accumulators of hits into slots: those of both halves with 64 columns, since they need
  // the same factors.
  template <class Factors>
  __device__ __forceinline__ void look(const float (&acc)[2][kPart / 2], const Factors& factors,
                                       int part) {
    constexpr int kReserve = Shared::kReserve;
    float n[4];
    copy16(n, negative());
#pragma unroll
    for (int first = 0; first < kPart / 8; first += kReserve / 2) {
      if (__any_sync(kAllLanes, slot_ > first_slot_ + (slots_ - kReserve) * kSlotBytes)) {
        push_header(part);
        drain(false);
      }
#pragma unroll
      for (int i = first; i < first + kReserve / 2; i += 2) {
        const float4 f = factors(i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* x = acc[half] + 4 * i;
          const float above[4] = {
              multiply_add(x[0], f.x, n[2 * half]), multiply_add(x[1], f.y, n[2 * half]),
              multiply_add(x[2], f.x, n[2 * half + 1]), multiply_add(x[3], f.y, n[2 * half + 1])};
          append(slot_, mask_, 0x10000u << (2 * i + half), above, x);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* x = acc[half] + 4 * i + 4;
          const float above[4] = {
              multiply_add(x[0], f.z, n[2 * half]), multiply_add(x[1], f.w, n[2 * half]),
              multiply_add(x[2], f.z, n[2 * half + 1]), multiply_add(x[3], f.w, n[2 * half + 1])};
          append(slot_, mask_, 0x40000u << (2 * i + half), above, x);
        }
      }
    }
    push_header(part);
  }
  // Describes the slots that were filled since the last header.
  __device__ __forceinline__ void push_header(int part) {
    if (mask_) {
      store_word(header_, mask_ | uint32_t(2 * left_ - part));
      header_ += kHeaderBytes;
    }
    mask_ = 0;
  }

  // Slots of this lane that are filled.
  __device__ __forceinline__ int waiting() const { return int(slot_ - first_slot_) / kSlotBytes; }
  // Moves slots to the lists: some, or all. Where a list is full, all; T rises only when no slot is
  // left that it would have to be compared with, because at an equal s the lower column is nearer.
  __device__ __forceinline__ void drain(bool all) {
    copy16(before(), negative());
    int move = all || waiting() < kMoved ? waiting() : kMoved;
    bool crowded = false;
#pragma unroll 1
    do {
      const bool full = move_slots(move);
      crowded = crowded || __any_sync(kAllLanes, full);
      if (!crowded) break;
      __syncwarp();
      self().park();
      make_room();
      self().unpark();
      move = waiting();
    } while (__any_sync(kAllLanes, move > 0));
  }

  // Moves the last `count` slots of this lane to its lists, until one of these has no room for two
  // more hits. Returns whether one has not.
  __device__ __forceinline__ bool move_slots(int count) {
    const uint32_t t = lane_again() % 4;
    uint32_t last = slot_ - uint32_t(count * kSlotBytes);
    // The last end of row 0 with room for two hits.
    const uint32_t limit_0 = list_begin(0) + uint32_t(p_.list) - 2;
    bool full = false;
    // Eight columns, counted from the end of the split.
    const int64_t end_column = int64_t(item().first_tile + item().tiles) * kTileColumns;
    const uint32_t column_0 = uint32_t(end_column) + 2 * t - 8 * 8;
    const char* inv_k =
        reinterpret_cast<const char*>(p_.inv_k + item().batch * p_.m_padded + end_column + 4 * t) -
        8 * 32;
    uint64_t* all = p_.hits;
    uint32_t word = 0;
#pragma unroll 1
    while (slot_ != last) {
      next_header(header_, word);
      slot_ -= kSlotBytes;
      const float4 x = load_slot(slot_);
      const uint32_t bit = highest_bit(word), eight = bit / 2 - (word & 0xFFFFu) * 8;
      const uint32_t column = column_0 + eight * 8;
      const int32_t place = int32_t(eight * 32 - (bit / 2 & 1) * 24);
      const float2 f = *reinterpret_cast<const float2*>(inv_k + place);
      const bool second = (bit & 1) != 0;
      word = bits_below(word, bit);
      RowEnds& ends = *reinterpret_cast<RowEnds*>(&this->ends()[2 * second]);
      uint32_t end_0 = ends.row_0, end_1 = ends.row_1;
      const float2 negative = *reinterpret_cast<const float2*>(&before()[2 * second]);
      const float bound_0 = -negative.x, bound_1 = -negative.y;
      put_hit(all, end_0, multiply_down(x.x, f.x), column, bound_0, f.x);
      put_hit(all, end_1, multiply_down(x.z, f.x), column, bound_1, f.x);
      put_hit(all, end_0, multiply_down(x.y, f.y), column + 1, bound_0, f.y);
      put_hit(all, end_1, multiply_down(x.w, f.y), column + 1, bound_1, f.y);
      ends = {end_0, end_1};
      const uint32_t limit = limit_0 + (second ? uint32_t(4 * Shared::kHalfRows * p_.list) : 0);
      full = end_0 > limit || end_1 - 4u * 8u * uint32_t(p_.list) > limit;
      last = full ? slot_ : last;
    }
    if (word >= 0x10000u) {
      store_word(header_, word);
      header_ += kHeaderBytes;
    }
    return full;
  }

  // Where a list is full, the k nearest of the row stay, and T rises. T was -before when no slot
  // waited.
  __device__ __forceinline__ void make_room() {
    const int most = p_.list;
    constexpr float kClosed = -kInfinity<float>;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const uint32_t begin = list_begin(i);
      const int count = int(ends()[i] - begin);
      // Nothing that counts enters a closed row: one that does not exist, or has k NaN, which are
      // the first in its lists since the slots that waited then have been moved and cut, too.
      const bool closed = before()[i] == kClosed;
      const bool closing = !closed && negative()[i] == kClosed;
      const unsigned full = __ballot_sync(kAllLanes, closing || count > most - 2);
      const bool cut = (full >> (lane() & 28) & 15) && !closed;
      if (closed && count > p_.k) ends()[i] = begin + uint32_t(p_.k);
      if (!__any_sync(kAllLanes, cut)) continue;
      HitList list = {p_.hits + begin, count, shared_.inv_q[row(i)]};
      const float bound = keep_nearest(list, p_.k, !cut);
      if (!cut) continue;
      negative()[i] = 0 - bound;
      ends()[i] = begin + uint32_t(list.count);
    }
  }

  __device__ __forceinline__ void store_counts() const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t count = ends()[i] - list_begin(i);
      p_.counts[launch_row(row(i)) * 4 + lane() % 4] = uint8_t(count);
    }
  }

  Shared& shared_;
  const SweepParams& p_;
  const int warp_;            // of those that have queries
  const int slots_;           // of a lane
  int left_;                  // tiles of the split, with the one that is looked at
  uint32_t a_[2][kSteps][4];  // queries of each half
  // Addresses in shared memory of the first and the next slot and the next header of this lane.
  uint32_t first_slot_, slot_, header_;
  uint32_t mask_ = 0;  // of the slots filled since the last header
};

}  // namespace convnn::cuda
