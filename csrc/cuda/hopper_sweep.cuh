// SPDX-License-Identifier: MIT
// The hits of every query: the columns of S = Q K^T (Eq. 3) that may be among its k nearest.
//
// s = rn(a inv_q) with a = rd(acc inv_k): acc is the product of 16-bit rows summed in float32, and
// rd rounds down. Then the sign of fma(acc, inv_k, -T) says exactly whether a >= T, and S is never
// stored. T is a lower bound of the k-th largest a of the row:
//
// 1. The sampled sweep over every step-th tile of 128 columns keeps the maxima of 64 groups of
//    columns for each row. The k-th largest of these is T, lowered by a few ulp because different a
//    may give equal s.
// 2. The main sweep over all tiles writes the hits to four lists per row, one of each lane that
//    holds columns of the row. When a list is full, the k nearest of the row stay and T rises to
//    the least a that still enters (hopper_lists.cuh).
//
// A block takes 256 queries and a range of tiles (a split), then the next such item. One thread
// lets the bulk engine load tiles of keys into a ring of stages; two warpgroups have 128 queries
// each, in registers, as two halves of 64: the products of one half run while the accumulators of
// the other are looked at. Accumulators do not leave registers, but for four at a time, 2 rows by 2
// columns, of which one is a hit: they wait in slots in shared memory until a lane has many.
#pragma once

#include "hopper_lists.cuh"
#include "hopper_slots.cuh"

namespace convnn::cuda {

constexpr int kSweepRows = 256;    // queries of a block
constexpr int kTileColumns = 128;  // columns of a tile of keys
constexpr int kSweepThreads = 3 * kWarpgroup;
constexpr int kSweepWarps = 8;  // that have queries

// Where column c lies within inv_k: a lane finds its four factors of 16 columns side by side.
inline __host__ __device__ int64_t place_of(int64_t c) {
  return (c & ~int64_t(15)) + c % 8 / 2 * 4 + c / 8 % 2 * 2 + c % 2;
}

// Room for the hits of one row in one of its four lists. Of a sample of a quarter of the tiles
// about 1.1 k are expected in each (k <= 32; for k = 64, of a sample of all of them), so that a
// list is seldom full. Then at most k stay in it, and there is room for at least 14 more. Even, so
// that the finish can read two hits at a time.
inline __host__ __device__ constexpr int hits_per_list(int64_t k) {
  return k <= 10 ? 30 : k <= 16 ? 40 : k <= 32 ? 64 : 128;
}

// The largest step between sampled tiles for which the lists are seldom full.
inline int most_sample_step(int64_t k) { return k <= 16 ? 4 : k <= 32 ? 3 : k <= 48 ? 2 : 1; }

// A launch takes `blocks` blocks of 256 queries; block b of all, counted from first_block, has the
// batch element b / ceil(n / 256) and its rows from b % ceil(n / 256) * 256 on. Row r of the launch
// is row r % 256 of its block r / 256; rows beyond n of a batch element have no hits.
struct SweepParams {
  const void* query;          // [batch, n, d] Float16 or BFloat16
  const float* inv_k;         // [batch, m_padded] in the order of place_of(); dot: 1; a column that
                              // may not be a neighbor: -0.0f, a key that counts as zero: +0.0f
  const float* inv_k_sample;  // [batch, m_padded] the same, but NaN instead of -0.0f
  float* inv_q;               // [batch, n] written: the factor of a row: s = rn(a * inv_q); dot: 1
  uint64_t* hits;             // [splits, blocks * 256, 4, hits_per_list(k)]; entry i of list t of a
                              // row at [t][i]: bits of a = rd(acc * inv_k) << 32 | column
  uint8_t* counts;            // [splits, blocks * 256, 4] entries of each list
  int64_t n, d, m_padded;     // m_padded = 128 * tiles
  int64_t first_block;
  int blocks;
  int tiles;   // of 128 columns
  int splits;  // 1..tiles; split s has the tiles from s * tiles / splits on; at most 32767 each
  int step;    // every step-th tile of a split is sampled
  int k;       // 1..64
  int list;    // hits_per_list(k)
  bool cosine;
  bool pairs;  // d is even and query aligned to 4 bytes
};

// What a block works on at a time.
struct SweepItem {
  int number;
  int block, split;  // of the launch
  int64_t batch, first_row;
  int first_tile, tiles;
};
__device__ inline SweepItem sweep_item(const SweepParams& p, int item) {
  const int block = item / p.splits, split = item % p.splits;
  const int64_t blocks_each = (p.n + kSweepRows - 1) / kSweepRows, b = p.first_block + block;
  const int first = int(int64_t(p.tiles) * split / p.splits);
  const int end = int(int64_t(p.tiles) * (split + 1) / p.splits);
  return {item, block, split, b / blocks_each, b % blocks_each * kSweepRows, first, end - first};
}

template <int kD>
struct SweepShared {
  static constexpr int kStages = kD == 64 ? 4 : 3;
  static constexpr int kSlots = kD == 64 ? 28 : 22;  // of a lane

  alignas(1024) unsigned char keys[kStages][kD / 64][kTileColumns][128];
  float inv_k[kStages][kTileColumns];
  alignas(16) float slots[kSweepWarps][kSlots][kWarp][4];
  // What fills the slots of a lane, a word for those of 64 columns: bit 16 + 2 i + h: columns
  // 8 i + 2 t and 8 i + 2 t + 1 and half h of the rows; below, how many times 64 columns are left
  // in the split, themselves included.
  uint32_t headers[kSweepWarps][kSlots][kWarp];
  // Of each lane, by half and row: where its next hit goes, in fours of hits from all on.
  alignas(16) uint32_t ends[kSweepWarps][kWarp][4];
  // -T of half and row, and what it was when no slot waited.
  alignas(16) float negative[kSweepWarps][kWarp][4], before[kSweepWarps][kWarp][4];
  alignas(16) uint32_t parked[kSweepWarps][kWarp][4];  // see park()
  float inv_q[kSweepRows];
  // Of each warp: its item, and its first row in the block. Here, not in registers.
  SweepItem items[kSweepWarps];
  int rows[kSweepWarps];
  uint64_t full[kStages], empty[kStages];
};

static_assert(sizeof(SweepShared<64>) <= 227 << 10 && sizeof(SweepShared<128>) <= 227 << 10);

// Of a lane and half.
struct alignas(8) RowEnds {
  uint32_t row_0, row_1;
};

// A position in the ring of stages.
template <int kD>
struct Stage {
  int index = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == SweepShared<kD>::kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// A warp with 2 halves of 16 queries. With g = lane / 4 and t = lane % 4, a lane has rows g + 8 r,
// r = 0, 1, of each half, and of every eight columns 2 t and 2 t + 1.
template <class T, int kD>
class Sweep {
  using Shared = SweepShared<kD>;
  static constexpr int kSteps = kD / 16;
  static constexpr int kGroups = 16;  // maxima of a lane for each row
  static constexpr int kFewNeighbors = 12, kBisections = 9;
  // Columns that are looked at at a time; slots that may be filled between two looks at how many
  // are left.
  static constexpr int kPart = 64, kReserve = 8;
  // Slots of a lane that are moved to the lists when one has few left. More keep lanes waiting for
  // the one that has most.
  static constexpr int kMoved = 12;

 public:
  __device__ __forceinline__ Sweep(Shared& shared, const SweepParams& p)
      : shared_(shared),
        p_(p),
        warp_(warp() - kWarpgroup / kWarp),
        first_slot_(shared_address(&shared.slots[warp_][0][lane()][0])),
        slot_(first_slot_),
        header_(shared_address(&shared.headers[warp_][0][lane()])) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (begin(blockIdx.x); item().number < p_.blocks * p_.splits;
         begin(item().number + int(gridDim.x))) {
      if (p_.pairs) {
        load_queries<true>();
      } else {
        load_queries<false>();
      }
      normalize_queries();
      sample_tiles();
      find_hits();
      store_counts();
    }
  }

 private:
  // Row of the block. Below, i = 2 * half + r stands for one of the four rows of a lane.
  __device__ __forceinline__ int row(int i) const {
    return shared_.rows[warp_] + i / 2 * 64 + lane() / 4 + i % 2 * 8;
  }
  __device__ __forceinline__ const SweepItem& item() const { return shared_.items[warp_]; }
  __device__ __forceinline__ bool exists(int row) const { return item().first_row + row < p_.n; }
  // Row of the launch, counted over the splits.
  __device__ __forceinline__ int64_t launch_row(int row) const {
    return (int64_t(item().split) * p_.blocks + item().block) * kSweepRows + row;
  }
  // Where the list of this lane for row i begins, in hits.
  __device__ __forceinline__ uint32_t list_begin(int i) const {
    return (uint32_t(launch_row(row(i))) * 4 + uint32_t(lane() % 4)) * uint32_t(p_.list);
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
      shared_.rows[warp_] = warp_ / 4 * 128 + warp_ % 4 * 16;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) ends()[i] = list_begin(i);
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

  // Begins the products of both halves with the first columns of a stage from `keys` on, a
  // descriptor.
  __device__ __forceinline__ void multiply_both(float (&acc)[2][kPart / 2], uint64_t keys) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      constexpr int kBox = kTileColumns * 128;
      const uint64_t of_step = keys + (s / 4 * kBox + s % 4 * 32) / 16;
      wgmma<T, kPart>(acc[0], a_[0][s], of_step, s != 0);
      wgmma<T, kPart>(acc[1], a_[1][s], of_step, s != 0);
    }
    wgmma_commit();
  }

  // The descriptor of the keys of a stage.
  __device__ __forceinline__ uint64_t stage_keys() const {
    const uint32_t address = shared_address(shared_.keys[stage_.index]);
    // The same in all lanes, as the compiler sees it.
    return descriptor(__shfl_sync(kAllLanes, address, 0));
  }
  __device__ __forceinline__ void release_stage() {
    __syncwarp();
    if (lane() == 0) barrier_arrive(&shared_.empty[stage_.index]);
    stage_.advance();
  }

  // The factors of this lane's columns n * 8 + 2 t, + 1, and n * 8 + 8 + 2 t, + 1; n is even.
  __device__ __forceinline__ const float4& factors(int n) const {
    return *reinterpret_cast<const float4*>(&shared_.inv_k[stage_.index][n * 8 + lane() % 4 * 4]);
  }

  // most [2, 2 * kGroups]: of each half, by group, the maxima.
  __device__ __forceinline__ void keep_maxima(const float (&acc)[2][kPart / 2], int part,
                                              float (&most)[2][2 * kGroups]) const {
#pragma unroll
    for (int n = 0; n < kPart / 8; n += 2) {
      const float4 f = factors(part * (kPart / 8) + n);
      const float factor[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int half = i / 8, at = 4 * n + i % 8;
        float& largest = most[half][at];
        largest = fmaxf(largest, multiply_down(acc[half][at], factor[i % 8 / 4 * 2 + i % 2]));
      }
    }
  }

  // The sampled sweep: sets T.
  __device__ __forceinline__ void sample_tiles() {
    // Of half and row r, the maximum of group i is at 4 * (i / 2) + 2 * r + i % 2, like the
    // accumulators; NaN as long as there is none.
    float most[2][2 * kGroups];
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) most[0][i] = most[1][i] = kNan<float>;
    // The products of the other warpgroup run while this one looks.
#pragma unroll 1
    for (int tile = 0; tile < item().tiles; tile += p_.step) {
      barrier_wait(&shared_.full[stage_.index], stage_.parity);
#pragma unroll 1
      for (int part = 0; part < kTileColumns / kPart; ++part) {
        float acc[2][kPart / 2];
        multiply_both(acc, stage_keys() + part * (kPart * 128 / 16));
        wgmma_wait<0>();
        hold(acc[0]);
        hold(acc[1]);
        keep_maxima(acc, part, most);
      }
      release_stage();
    }
    if (p_.k <= kFewNeighbors) {
      // Half of the groups leave a few hits more, and cost less.
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

  // The main sweep until `end` tiles are left: the products of the second half of a tile run while
  // the accumulators of the first are looked at.
  __device__ __forceinline__ void look_at_tiles(int end) {
#pragma unroll 1
    while (left_ > end) {
      float acc_0[2][kPart / 2], acc_1[2][kPart / 2];
      barrier_wait(&shared_.full[stage_.index], stage_.parity);
      const uint64_t keys = stage_keys();
      multiply_both(acc_0, keys);
      multiply_both(acc_1, keys + kPart * 128 / 16);
      wgmma_wait<1>();
      hold(acc_0[0]);
      hold(acc_0[1]);
      look(acc_0, 0);
      wgmma_wait<0>();
      hold(acc_1[0]);
      hold(acc_1[1]);
      look(acc_1, 1);
      release_stage();
      --left_;
    }
  }

  // The main sweep. At D = 64 slots are moved after every `period` tiles even if none is needed
  // yet: by the four warps of a warpgroup together, because each of their products waits for all of
  // them, and by the two warpgroups in turn. At D = 128 the products leave time for it.
  __device__ __forceinline__ void find_hits() {
    constexpr bool kTogether = kD == 64;
    left_ = item().tiles;
    int period = 1, end = 0;
    if constexpr (kTogether) {
      // About one hit for each k * step columns is expected, so that half of the slots are filled.
      while (2 * period * p_.k * p_.step <= (Shared::kSlots - kReserve) / 2 * left_) period *= 2;
      end = left_ - (warp_ < 4 ? period : (period + 1) / 2);
    }
#pragma unroll 1
    do {
      look_at_tiles(end > 0 ? end : 0);
      drain(!kTogether || left_ == 0);
      end -= period;
    } while (kTogether && left_ > 0);
  }

  // Puts the accumulators of hits into slots: those of both halves with 64 columns, since they need
  // the same factors.
  __device__ __forceinline__ void look(const float (&acc)[2][kPart / 2], int part) {
    float n[4];
    copy16(n, negative());
#pragma unroll
    for (int first = 0; first < kPart / 8; first += kReserve / 2) {
      if (__any_sync(kAllLanes, slot_ > first_slot_ + (Shared::kSlots - kReserve) * kSlotBytes)) {
        push_header(part);
        drain(false);
      }
#pragma unroll
      for (int i = first; i < first + kReserve / 2; i += 2) {
        const float4 f = factors(part * (kPart / 8) + i);
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
      if constexpr (kD == 64) {
        make_room();
      } else {
        park();
        make_room();
        unpark();
      }
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
      const float2 f = __ldg(reinterpret_cast<const float2*>(inv_k + place));
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
      const uint32_t limit = limit_0 + (second ? 4u * 64u * uint32_t(p_.list) : 0);
      full = end_0 > limit || end_1 - 4u * 8u * uint32_t(p_.list) > limit;
      last = full ? slot_ : last;
    }
    if (word >= 0x10000u) {
      store_word(header_, word);
      header_ += kHeaderBytes;
    }
    return full;
  }

  // At D = 128, what a warp carries through a sweep would not fit into registers beside
  // make_room(): the compiler would keep it in local memory all the time.
  __device__ __forceinline__ void park() {
    const uint32_t kept[4] = {slot_, header_, uint32_t(left_),
                              uint32_t(stage_.index * 2 + stage_.parity)};
    copy16(shared_.parked[warp_][lane()], kept);
  }
  __device__ __forceinline__ void unpark() {
    asm volatile("" ::: "memory");  // or the compiler would know what was stored
    uint32_t kept[4];
    copy16(kept, shared_.parked[warp_][lane()]);
    slot_ = kept[0];
    header_ = kept[1];
    left_ = int(kept[2]);
    stage_.index = int(kept[3] / 2);
    stage_.parity = int(kept[3] % 2);
    mask_ = 0;
    first_slot_ = shared_address(&shared_.slots[warp_][0][lane()][0]);
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
  const int warp_;  // of those that have queries
  Stage<kD> stage_;
  int left_;                  // tiles of the split, with the one that is looked at
  uint32_t a_[2][kSteps][4];  // queries of each half
  // Addresses in shared memory of the first and the next slot and the next header of this lane.
  uint32_t first_slot_, slot_, header_;
  uint32_t mask_ = 0;  // of the slots filled since the last header
};

// Loads what the warps with queries look at. One thread.
template <int kD>
__device__ __forceinline__ void load_tiles(SweepShared<kD>& shared, const TensorMap& keys,
                                           const SweepParams& p) {
  Stage<kD> stage;
  stage.parity = 1;
#pragma unroll 1
  for (int i = blockIdx.x; i < p.blocks * p.splits; i += gridDim.x) {
    const SweepItem item = sweep_item(p, i);
#pragma unroll 1
    for (int sweep = 0; sweep < 2; ++sweep) {
      const float* inv_k = (sweep ? p.inv_k : p.inv_k_sample) + item.batch * p.m_padded;
#pragma unroll 1
      for (int tile = 0; tile < item.tiles; tile += sweep ? 1 : p.step) {
        const int first = (item.first_tile + tile) * kTileColumns;
        uint64_t* full = &shared.full[stage.index];
        barrier_wait(&shared.empty[stage.index], stage.parity);
        barrier_expect(full, sizeof(shared.keys[0]) + sizeof(shared.inv_k[0]));
#pragma unroll
        for (int x = 0; x < kD / 64; ++x) {
          load_box(shared.keys[stage.index][x], &keys, x * 64, first, int(item.batch), full);
        }
        bulk_copy(shared.inv_k[stage.index], inv_k + first, sizeof(shared.inv_k[0]), full);
        stage.advance();
      }
    }
  }
}

// keys [batch, m_padded, kD] in boxes of 128 rows. Blocks of kSweepThreads threads, as many as
// there are items or multiprocessors.
template <class T, int kD>
__global__ __launch_bounds__(kSweepThreads,
                             1) void hopper_sweep_kernel(const __grid_constant__ TensorMap keys,
                                                         const __grid_constant__ SweepParams p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = SweepShared<kD>;
  Shared& shared = *reinterpret_cast<Shared*>(swizzled_shared_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kSweepWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  launch_dependents();
  wait_for_previous();
  // The same in all lanes, as the compiler sees it.
  const int warpgroup = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    release_registers<24>();
    if (threadIdx.x == 0) load_tiles<kD>(shared, keys, p);
  } else {
    claim_registers<240>();
    Sweep<T, kD>(shared, p).run();
  }
#endif
}

}  // namespace convnn::cuda
