// SPDX-License-Identifier: MIT
// The sweep of sweep.cuh by the asynchronous matrix instruction.
//
// A block takes 256 queries and a range of tiles (a split), then the next such item. One thread
// lets the bulk engine load tiles of keys into a ring of stages; two warpgroups have 128 queries
// each, in registers, as two halves of 64. They multiply both with 64 columns, whose factors both
// need; in the main sweep the products with the next 64 run while the accumulators are looked at,
// in the sampled one those of the other warpgroup. Accumulators do not leave registers, but for
// four at a time, 2 rows by 2 columns, of which one is a hit: they wait in slots in shared memory
// until a lane has many.
#pragma once

#include "warp_sweep.cuh"

namespace convnn::cuda {

constexpr int kSweepThreads = 3 * kWarpgroup;

template <int kD>
struct SweepShared {
  static constexpr int kHalfRows = 64;  // of the warps of a warpgroup
  static __device__ __forceinline__ int first_row(int warp) {
    return warp / 4 * 128 + warp % 4 * 16;
  }

  static constexpr int kStages = kD == 64 ? 4 : 3;
  static constexpr int kSlots = kD == 64 ? 28 : 22;  // of a lane
  static constexpr int kReserve = 8, kSampled = 64;

  alignas(1024) unsigned char keys[kStages][kD / 64][kTileColumns][128];
  float inv_k[kStages][kTileColumns];
  alignas(16) float slots[kSweepWarps][kSlots][kWarp][4];
  // What fills the slots of a lane, a word for those of 64 columns: bit 16 + 2 i + h: columns
  // 8 i + 2 t and 8 i + 2 t + 1 and half h of the rows; below, how many times 64 columns are left
  // in the split, themselves included.
  uint32_t headers[kSweepWarps][kSlots][kWarp];
  // Of each lane, by half and row: where its next hit goes, in hits.
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

template <class T, int kD>
class HopperSweep : WarpSweep<HopperSweep<T, kD>, T, kD, SweepShared<kD>> {
  using Shared = SweepShared<kD>;
  using Base = WarpSweep<HopperSweep<T, kD>, T, kD, Shared>;
  friend Base;
  using Base::a_, Base::first_slot_, Base::header_, Base::item, Base::kPart, Base::kSteps,
      Base::left_, Base::mask_, Base::p_, Base::shared_, Base::slot_, Base::warp_;

 public:
  __device__ __forceinline__ HopperSweep(Shared& shared, const SweepParams& p)
      : HopperSweep(shared, p, warp() - kWarpgroup / kWarp) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (this->begin(blockIdx.x); item().number < p_.blocks * p_.splits;
         this->begin(item().number + int(gridDim.x))) {
      this->load_queries();
      this->sample_tiles();
      find_hits();
      this->store_counts();
    }
  }

 private:
  __device__ __forceinline__ HopperSweep(Shared& shared, const SweepParams& p, int warp)
      : Base(shared, p, warp, shared_address(&shared.slots[warp][0][lane()][0]),
             shared_address(&shared.headers[warp][0][lane()]), Shared::kSlots) {}

  // Found anew at each use, because a stage that is parked may not be kept in a register.
  struct Factors {
    const HopperSweep& sweep;
    int first;  // column of the tile
    __device__ __forceinline__ const float4& operator()(int n) const {
      const float* factors = sweep.shared_.inv_k[sweep.stage_.index];
      return *reinterpret_cast<const float4*>(factors + first + n * 8 + lane() % 4 * 4);
    }
  };

  // Begins the products of both halves with 64 columns of a stage, from the descriptor on.
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

  // The descriptor of the keys of the stage.
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

  // The products of the other warpgroup run while body looks.
  template <int kColumns, class Body>
  __device__ __forceinline__ void sweep_tiles(const float*, int step, const Body& body) {
    static_assert(kColumns == kPart);
#pragma unroll 1
    for (; left_ > 0; left_ -= step) {
      barrier_wait(&shared_.full[stage_.index], stage_.parity);
#pragma unroll 1
      for (int part = 0; part < kTileColumns / kPart; ++part) {
        float acc[2][kPart / 2];
        multiply_both(acc, stage_keys() + part * (kPart * 128 / 16));
        wgmma_wait<0>();
        hold(acc[0]);
        hold(acc[1]);
        body(acc, Factors{*this, part * kPart}, part);
      }
      release_stage();
    }
  }

  // The main sweep until `end` tiles are left: the products of the second half of a tile run while
  // the accumulators of the first are looked at. No accumulator is alive where the loop closes: the
  // compiler would serialize the products.
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
      this->look(acc_0, Factors{*this, 0}, 0);
      wgmma_wait<0>();
      hold(acc_1[0]);
      hold(acc_1[1]);
      this->look(acc_1, Factors{*this, kPart}, 1);
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
      while (2 * period * p_.k * p_.step <= (Shared::kSlots - Shared::kReserve) / 2 * left_)
        period *= 2;
      end = left_ - (warp_ < 4 ? period : (period + 1) / 2);
    }
#pragma unroll 1
    do {
      look_at_tiles(end > 0 ? end : 0);
      this->drain(!kTogether || left_ == 0);
      end -= period;
    } while (kTogether && left_ > 0);
  }

  // At D = 128, what a warp carries through a sweep would not fit into registers beside
  // make_room(): the compiler would keep it in local memory all the time.
  __device__ __forceinline__ void park() {
    if constexpr (kD == 64) return;
    const uint32_t kept[4] = {slot_, header_, uint32_t(left_),
                              uint32_t(stage_.index * 2 + stage_.parity)};
    copy16(shared_.parked[warp_][lane()], kept);
  }
  __device__ __forceinline__ void unpark() {
    if constexpr (kD == 64) return;
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

  Stage<kD> stage_;
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
    HopperSweep<T, kD>(shared, p).run();
  }
#endif
}

}  // namespace convnn::cuda
