// SPDX-License-Identifier: MIT
// The sweep of sweep.cuh by the matrix instruction that every device of compute capability 8.0 or
// newer has.
//
// A block takes one item: 256 queries and a range of tiles (a split). Each of its eight warps has
// 32 queries in registers, as two halves of 16, so that what it reads of a key serves both. All
// threads copy keys into shared memory, 16 KB at a time, into one of two stages while the products
// of the other are computed. A row of keys lies in shared memory as 16-byte pieces, piece i of row
// r where piece i ^ r % 8 would be, so that neither copies nor products meet bank conflicts.
#pragma once

#include "matrices.cuh"
#include "thread_copies.cuh"
#include "warp_sweep.cuh"

namespace convnn::cuda {

constexpr int kMmaSweepThreads = kSweepWarps * kWarp;

// Where the keys are read from.
struct KeyRows {
  const void* rows;  // [batch, count, 64 or 128] Float16 or BFloat16, aligned to 16 bytes
  int64_t count;     // what is beyond counts as zeros
};

// Behind it lie slots [kSweepWarps][slots][kWarp][4] and headers [kSweepWarps][slots][kWarp], as in
// SweepShared of hopper_sweep.cuh.
template <int kD>
struct MmaSweepShared {
  static constexpr int kStages = 2, kRowBytes = 2 * kD;
  static constexpr int kColumns = (16 << 10) / kRowBytes;  // of a stage
  static constexpr int kReserve = 4;
  static constexpr int kSampled = kD == 64 ? 64 : 16;  // more take too many registers
  static constexpr int kHalfRows = 16;
  static __device__ __forceinline__ int first_row(int warp) { return warp * 32; }

  alignas(128) unsigned char keys[kStages][kColumns][kRowBytes];
  alignas(16) float inv_k[kStages][kColumns];
  alignas(16) uint32_t ends[kSweepWarps][kWarp][4];
  alignas(16) float negative[kSweepWarps][kWarp][4], before[kSweepWarps][kWarp][4];
  alignas(16) float inv_q[kSweepRows];
  SweepItem items[kSweepWarps];
  int rows[kSweepWarps];
};
constexpr int kSlotSetBytes = kSweepWarps * (kSlotBytes + kHeaderBytes);  // one of every lane
template <int kD>
constexpr size_t mma_sweep_bytes(int slots) {
  return sizeof(MmaSweepShared<kD>) + size_t(slots) * kSlotSetBytes;
}
constexpr int kMostSlots = 28;  // more gain nothing

template <class T, int kD>
class MmaSweep : WarpSweep<MmaSweep<T, kD>, T, kD, MmaSweepShared<kD>> {
  using Shared = MmaSweepShared<kD>;
  using Base = WarpSweep<MmaSweep<T, kD>, T, kD, Shared>;
  friend Base;
  using Base::a_, Base::item, Base::kPart, Base::kSteps, Base::left_, Base::p_, Base::shared_,
      Base::warp_;

 public:
  __device__ __forceinline__ MmaSweep(Shared& shared, const SweepParams& p, const KeyRows& keys,
                                      int slots)
      : MmaSweep(shared, p, keys, slots, shared_address(&shared + 1)) {}

  __device__ __forceinline__ void run() {
    this->begin(blockIdx.x);
    this->load_queries();
    this->sample_tiles();
    find_hits();
    this->drain(true);
    this->store_counts();
  }

 private:
  // `behind` is the address behind `shared`.
  __device__ __forceinline__ MmaSweep(Shared& shared, const SweepParams& p, const KeyRows& keys,
                                      int slots, uint32_t behind)
      : Base(shared, p, warp(), behind + (warp() * slots * kWarp + lane()) * 16,
             behind + (kSweepWarps * slots * kWarp) * 16 + (warp() * slots * kWarp + lane()) * 4,
             slots),
        keys_(keys) {}

  __device__ __forceinline__ void park() {}
  __device__ __forceinline__ void unpark() {}

  struct Factors {
    const float* first;  // of the part
    __device__ __forceinline__ const float4& operator()(int n) const {
      return *reinterpret_cast<const float4*>(first + n * 8 + lane() % 4 * 4);
    }
  };

  // Copies columns of the item to the stages, kColumns of them at a time. A thread copies a piece
  // of every kCopied-th column of keys, and some threads factors, too.
  class Copies {
    static constexpr int kPieces = kD / 8, kCopied = kMmaSweepThreads / kPieces;

   public:
    __device__ __forceinline__ Copies(const MmaSweep& sweep, const float* inv_k)
        : sweep_(sweep), inv_k_(inv_k), first_(sweep.item().first_tile * kTileColumns) {
      const int piece = int(threadIdx.x) % kPieces, column = int(threadIdx.x) / kPieces;
      const int64_t row = sweep.item().batch * sweep.keys_.count + first_ + column;
      from_ = static_cast<const char*>(sweep.keys_.rows) + row * Shared::kRowBytes + piece * 16;
      to_ =
          shared_address(&sweep.shared_.keys[0][column][0]) + uint32_t((piece ^ (column & 7)) * 16);
    }
    __device__ __forceinline__ void begin(int stage) const {
      Shared& shared = sweep_.shared_;
      const uint32_t to = to_ + uint32_t(stage) * uint32_t(sizeof(shared.keys[0]));
      const int left = int(sweep_.keys_.count) - first_;
#pragma unroll
      for (int i = 0; i < Shared::kColumns; i += kCopied) {
        const int at = i * Shared::kRowBytes;
        const bool exists = i + int(threadIdx.x) / kPieces < left;
        copy_async16(to + uint32_t(at), from_ + at, exists);
      }
      if (threadIdx.x < Shared::kColumns / 4) {
        const int64_t column = sweep_.item().batch * sweep_.p_.m_padded + first_;
        copy_async16(shared_address(&shared.inv_k[stage][threadIdx.x * 4]),
                     inv_k_ + column + threadIdx.x * 4, true);
      }
      copy_commit();
    }
    __device__ __forceinline__ void skip(int columns) {
      from_ += columns * Shared::kRowBytes;
      first_ += columns;
    }

   private:
    const MmaSweep& sweep_;
    const float* inv_k_;  // [batch, m_padded]
    const char* from_;
    uint32_t to_;
    int first_;  // of the next columns
  };

  // The products of both halves with columns of a stage, from address `keys` on.
  template <int kColumns>
  __device__ __forceinline__ void multiply(float (&acc)[2][kColumns / 2], uint32_t keys) const {
    // Each of eight lanes names a row of one of the four pieces that a warp reads at a time.
    const uint32_t of_lane = uint32_t(lane() % 8 * Shared::kRowBytes);
    const uint32_t piece = uint32_t((lane() / 8 ^ lane() % 8) * 16);
    const uint32_t even = keys + of_lane + piece, odd = keys + of_lane + (piece ^ 64);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      float d[2][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {
        uint32_t x[4];
        const uint32_t at = uint32_t(n * 8 * Shared::kRowBytes + s / 4 * 128);
        load_matrices(x, (s % 4 == 0 ? even : odd) + at);
        const uint32_t first[2] = {x[0], x[1]}, second[2] = {x[2], x[3]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply_accumulate_16<T>(d[half], a_[half][s], first);
          multiply_accumulate_16<T>(d[half], a_[half][s + 1], second);
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[e / 4][4 * n + e % 4] = d[e / 4][e % 4];
    }
  }

  // Calls body(keys, factors, part) for every kPart columns of every step-th of the left_ last
  // tiles: the address of their keys, their factors, and which part of the tile they are.
  template <class Body>
  __device__ __forceinline__ void sweep_parts(const float* inv_k, int step, const Body& body) {
    constexpr int kPartsOfStage = Shared::kColumns / kPart;
    // The rows of a warp, as far as they exist, come first.
    const bool has_rows = this->exists(shared_.rows[warp_]);
    Copies copies(*this, inv_k);
    copies.begin(0);
    int stage = 0, part = 0;
#pragma unroll 1
    while (left_ > 0) {
      copy_wait<0>();
      __syncthreads();
      const bool ends = part + kPartsOfStage == kTileColumns / kPart;
      copies.skip(ends ? (step - 1) * kTileColumns + Shared::kColumns : Shared::kColumns);
      if (!ends || left_ > step) copies.begin(stage ^ 1);
      if (has_rows) {
#pragma unroll 1
        for (int i = 0; i < kPartsOfStage; ++i) {
          const Factors factors = {&shared_.inv_k[stage][i * kPart]};
          body(shared_address(&shared_.keys[stage][i * kPart][0]), factors, part + i);
        }
      }
      stage ^= 1;
      part = ends ? 0 : part + kPartsOfStage;
      left_ -= ends ? step : 0;
    }
    __syncthreads();  // before the next sweep fills stage 0
  }

  template <int kColumns, class Body>
  __device__ __forceinline__ void sweep_tiles(const float* inv_k, int step, const Body& body) {
    sweep_parts(inv_k, step, [&](uint32_t keys, const Factors& factors, int part) {
#pragma unroll
      for (int j = 0; j < kPart / kColumns; ++j) {
        // Otherwise the compiler computes all products first, and runs out of registers.
        if (j) __syncwarp();
        float acc[2][kColumns / 2];
        multiply<kColumns>(acc, keys + j * kColumns * Shared::kRowBytes);
        const Factors of_columns = {factors.first + j * kColumns};
        body(acc, of_columns, part * (kPart / kColumns) + j);
      }
    });
  }

  // The main sweep.
  __device__ __forceinline__ void find_hits() {
    left_ = item().tiles;
    sweep_parts(p_.inv_k, 1, [&](uint32_t keys, const Factors& factors, int part) {
      float acc[2][kPart / 2];
      multiply<kPart>(acc, keys);
      this->look(acc, factors, part);
    });
  }

  const KeyRows& keys_;
};

// `slots` of each lane. One block for each of p.blocks * p.splits items.
template <class T, int kD>
__global__ __launch_bounds__(kMmaSweepThreads,
                             1) void mma_sweep_kernel(const __grid_constant__ SweepParams p,
                                                      const __grid_constant__ KeyRows keys,
                                                      int slots) {
  using Shared = MmaSweepShared<kD>;
  MmaSweep<T, kD>(*reinterpret_cast<Shared*>(swizzled_shared_memory()), p, keys, slots).run();
}

}  // namespace convnn::cuda
