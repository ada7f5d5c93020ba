// SPDX-License-Identifier: MIT
// The dense convolution over modulated neighbors (Eq. 6) on sm_90a, in float16 and bfloat16:
//
//   y_i[o] = b[o] + sum_j rho_ij sum_c W[o, c, j] V[I_ij, c]
//
// A block computes tiles of 128 or 256 queries (of any batch elements) and 64 or 128 outputs, one
// after the other, whose sums stay in registers of two warpgroups, each with half of the queries.
// The chunks of hopper_dense_inputs.cuh go through a ring in shared memory: a third warpgroup
// gathers the pieces of V, and the bulk engine loads those of W and rho. X_nn [n, k, c] is never
// stored.
//
// rho is applied in float32 to the product of a chunk, so rows reach the tensor cores unchanged:
// rho V in 16 bits would be rounded once more. If rho is 1, products are summed by the tensor
// cores. An output that is not finite is computed again, neighbor by neighbor: V W may overflow
// where rho V W does not, and the row of zeros that stands for a missing neighbor gives NaN with a
// weight that is not finite.
#pragma once

#include "hopper_dense_inputs.cuh"
#include "thread_copies.cuh"

namespace convnn::cuda {

// A warpgroup that gathers, and those that multiply.
constexpr int kDenseWarpgroups = 2;
constexpr int kDenseWarps = kDenseWarpgroups * kWarpgroup / kWarp;
constexpr int kDenseThreads = (1 + kDenseWarpgroups) * kWarpgroup;
// Rows of a product, and of a warp in it.
constexpr int kUnitRows = 64;
constexpr int kWarpRows = 16;
// Bytes of a row of a chunk, and of a row of 64 outputs on its way to memory: with the padding, the
// lanes of a warp store to different banks.
constexpr int kChunkBytes = 2 * kChunkColumns;
constexpr int kOutputBytes = kChunkBytes + 16;

template <class T>
struct HopperDense {
  AggregateWork<T> w;         // rho [batch, n, k] or null, for outputs that are not finite
  const uint4* value;         // [batch, m, pieces]
  const uint32_t* neighbors;  // [k, rows_padded]: the first piece of a row of V, or kNoPieces
  const float* rho;           // [k, rows_padded], or null: 1
  const float* bias;          // [output_blocks, kColumns]
  int64_t rows_padded;        // batch n rounded up to whole tiles
  DenseChunks chunks;
  int64_t output_blocks, tiles;
  bool stores_pieces;  // whether rows of the output are aligned to 16 bytes
};

template <int kUnits, int kColumns>
struct DenseShared {
  static constexpr int kRows = kDenseWarpgroups * kUnits * kUnitRows;
  // As many as leave a third of the memory to L1.
  static constexpr int kStages = 147456 / ((kRows + kColumns) * kChunkBytes) < 4 ? 3 : 4;

  unsigned char value[kStages][kRows * kChunkBytes];      // pieces of V, swizzled as by load_box()
  unsigned char weight[kStages][kColumns * kChunkBytes];  // pieces of W
  float rho[kStages][kRows];
  unsigned char output[kDenseWarps][kWarpRows * kOutputBytes];
  uint64_t full[kStages], empty[kStages];
};

struct DenseStage {
  int index = 0, parity = 0;

  template <int kStages>
  __device__ __forceinline__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// What gathers: a thread has one piece of several rows of each chunk.
template <class T, int kUnits, int kColumns>
class DenseProducer {
 public:
  using Shared = DenseShared<kUnits, kColumns>;
  static constexpr int kRowsOfThread = Shared::kRows * kChunkPieces / kWarpgroup;

  __device__ __forceinline__ DenseProducer(Shared& shared, const HopperDense<T>& p,
                                           const TensorMap& weight)
      : shared_(shared),
        p_(p),
        weight_(weight),
        first_(int(threadIdx.x) / kChunkPieces * kRowsOfThread),
        x_(int(threadIdx.x) % kChunkPieces) {}

  __device__ __forceinline__ void run() {
    stage_.parity = 1;
#pragma unroll 1
    for (int64_t tile = blockIdx.x; tile < p_.tiles; tile += gridDim.x) {
      const int64_t first_row = tile / p_.output_blocks * Shared::kRows;
      const int first_output = int(tile % p_.output_blocks) * kColumns;
      int number = 0;
#pragma unroll 1
      for (int block = 0; block < p_.chunks.blocks(); ++block) {
#pragma unroll 1
        for (int i = 0; i < p_.chunks.in_block(block); ++i) {
          load(block, i, number++, first_row, first_output);
        }
      }
    }
    copy_wait<0>();
    hand_over();
  }

 private:
  // Begins the copies of a chunk. Those of the one before it are waited for.
  __device__ __forceinline__ void load(int block, int chunk, int number, int64_t first_row,
                                       int first_output) {
    const DensePiece of = p_.chunks.piece(block, chunk, x_);
    uint32_t rows[kRowsOfThread];
    const uint32_t* neighbors =
        p_.neighbors + (of.j < 0 ? 0 : of.j) * p_.rows_padded + first_row + first_;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; i += 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(neighbors + i));
      rows[i] = four.x, rows[i + 1] = four.y, rows[i + 2] = four.z, rows[i + 3] = four.w;
    }
    barrier_wait(&shared_.empty[stage_.index], stage_.parity);
    if (threadIdx.x == 0) load_rest(chunk, number, first_row, first_output);
    const uint32_t target =
        shared_address(shared_.value[stage_.index]) + uint32_t(first_ * kChunkBytes);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const bool valid = of.j >= 0 && rows[i] != kNoPieces;
      const uint4* source = p_.value + (rows[i] + uint32_t(of.piece));
      copy_async16(target + uint32_t(i * kChunkBytes + ((x_ ^ (i & 7)) << 4)), source, valid);
    }
    copy_commit();
    if (filled_) {
      copy_wait<1>();
      hand_over();
    }
    filled_ = &shared_.full[stage_.index];
    stage_.template advance<Shared::kStages>();
  }
  // Lets products read what this warp has copied.
  __device__ __forceinline__ void hand_over() {
    fence_async_shared();
    __syncwarp();
    if (lane() == 0) barrier_arrive(filled_);
  }
  // W, and rho of a chunk of one neighbor.
  __device__ __forceinline__ void load_rest(int j, int number, int64_t first_row,
                                            int first_output) {
    uint64_t* full = &shared_.full[stage_.index];
    const int rho_bytes = p_.rho ? int(sizeof(shared_.rho[0])) : 0;
    barrier_expect(full, int(sizeof(shared_.weight[0])) + rho_bytes);
    load_box(shared_.weight[stage_.index], &weight_, number * kChunkColumns, first_output, 0, full);
    if (p_.rho) {
      bulk_copy(shared_.rho[stage_.index], p_.rho + j * p_.rows_padded + first_row, rho_bytes,
                full);
    }
  }

  Shared& shared_;
  const HopperDense<T>& p_;
  const TensorMap& weight_;
  const int first_, x_;  // the first of the rows of this thread in a tile, and its piece of them
  DenseStage stage_;
  uint64_t* filled_ = nullptr;  // where to arrive once the copies of the last chunk are there
};

// Two outputs, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_outputs(float a, float b) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, Float16>) {
    const __half2 two = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
  } else {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
#else
  T first, second;
  narrow(a, first), narrow(b, second);
  return uint32_t(first.bits) | uint32_t(second.bits) << 16;
#endif
}

// A warp of those that multiply. Of its unit u it has rows g and g + 8, and of those the columns 2
// t and 2 t + 1 of each 8, with g = lane / 4 and t = lane % 4.
template <class T, int kUnits, int kColumns, bool kModulated>
class DenseConsumer {
 public:
  using Shared = DenseShared<kUnits, kColumns>;

  __device__ __forceinline__ DenseConsumer(Shared& shared, const HopperDense<T>& p, int warpgroup)
      : shared_(shared), p_(p), first_unit_(warpgroup * kUnits) {}

  __device__ __forceinline__ void run() {
    const int chunks = p_.chunks.count();
#pragma unroll 1
    for (int64_t tile = blockIdx.x; tile < p_.tiles; tile += gridDim.x) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) y_[u][i] = 0;
      }
#pragma unroll 1
      for (int i = 0; i < chunks; ++i) {
        barrier_wait(&shared_.full[stage_.index], stage_.parity);
        if constexpr (kModulated) {
          add_modulated();
        } else {
          add();
        }
        __syncwarp();
        if (lane() == 0) barrier_arrive(&shared_.empty[stage_.index]);
        stage_.template advance<Shared::kStages>();
      }
      store(tile / p_.output_blocks * Shared::kRows, tile % p_.output_blocks * kColumns);
    }
  }

 private:
  // d = V W^T of a chunk, + d if `sum`.
  __device__ __forceinline__ void multiply(float (&d)[kColumns / 2], int u, bool sum) {
    const uint32_t v = shared_address(shared_.value[stage_.index]) +
                       uint32_t((first_unit_ + u) * kUnitRows * kChunkBytes);
    const uint32_t w = shared_address(shared_.weight[stage_.index]);
#pragma unroll
    for (int s = 0; s < kChunkColumns / 16; ++s) {
      wgmma<T, kColumns>(d, descriptor(v + 32 * s), descriptor(w + 32 * s), sum || s > 0);
    }
  }
  __device__ __forceinline__ void add() {
    wgmma_fence();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) multiply(y_[u], u, true);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) hold(y_[u]);
  }
  // While this warpgroup applies rho, products of the other are computed.
  __device__ __forceinline__ void add_modulated() {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const float* rho = shared_.rho[stage_.index] + row_in_tile(u) + lane() / 4;
      const float of_row[2] = {rho[0], rho[8]};
      float product[kColumns / 2];
      wgmma_fence();
      multiply(product, u, false);
      wgmma_commit();
      wgmma_wait<0>();
      hold(product);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) {
        y_[u][i] = multiply_add(of_row[i / 2 % 2], product[i], y_[u][i]);
      }
    }
  }

  // The first row of this warp in unit u.
  __device__ __forceinline__ int row_in_tile(int u) const {
    return (first_unit_ + u) * kUnitRows + warp() % 4 * kWarpRows;
  }
  // Stores the sums, with the bias. 64 outputs of the warp's 16 rows at a time go through shared
  // memory, to be stored in whole sectors.
  __device__ __forceinline__ void store(int64_t first_row, int64_t first_output) {
    unsigned char* staged = shared_.output[warp() % kDenseWarps];
    float not_finite = 0;
#pragma unroll
    for (int x = 0; x < kColumns / kChunkColumns; ++x) {
      const int64_t first = first_output + x * kChunkColumns;
      float2 bias[kChunkColumns / 8];
#pragma unroll
      for (int n = 0; n < kChunkColumns / 8; ++n) {
        const float* source = p_.bias + first + lane() % 4 * 2 + n * 8;
        bias[n] = __ldg(reinterpret_cast<const float2*>(source));
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        stage_outputs(staged, u, x, bias, not_finite);
        __syncwarp();
        store_outputs(staged, first_row + row_in_tile(u), first);
        __syncwarp();
      }
    }
    if (__any_sync(kAllLanes, !(not_finite == 0))) repair(first_row, first_output);
  }
  // not_finite: NaN once there was an output that is not finite.
  __device__ __forceinline__ void stage_outputs(unsigned char* staged, int u, int x,
                                                const float2 (&bias)[kChunkColumns / 8],
                                                float& not_finite) {
    unsigned char* target = staged + lane() / 4 * kOutputBytes + lane() % 4 * 4;
#pragma unroll
    for (int n = 0; n < kChunkColumns / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = (x * (kChunkColumns / 8) + n) * 4 + 2 * h;
        not_finite = multiply_add(y_[u][i], 0, not_finite);
        not_finite = multiply_add(y_[u][i + 1], 0, not_finite);
        *reinterpret_cast<uint32_t*>(target + 8 * h * kOutputBytes + n * 16) =
            pack_outputs<T>(y_[u][i] + bias[n].x, y_[u][i + 1] + bias[n].y);
      }
    }
  }
  __device__ __forceinline__ void store_outputs(const unsigned char* staged, int64_t first_row,
                                                int64_t first_output) {
    const AggregateParams& p = p_.w.p;
    const int64_t o = first_output + lane() % kChunkPieces * kPieceChannels;
    constexpr int kRowsAtOnce = kWarp / kChunkPieces;
#pragma unroll
    for (int i = 0; i < kWarpRows; i += kRowsAtOnce) {
      const int row = i + lane() / kChunkPieces;
      const unsigned char* source = staged + row * kOutputBytes + lane() % kChunkPieces * 16;
      if (first_row + row >= p.batch * p.n || o >= p.o) continue;
      T* target = static_cast<T*>(p.output) + (first_row + row) * p.o + o;
      if (p_.stores_pieces) {
        copy16(target, source);
        continue;
      }
#pragma unroll 1
      for (int e = 0; e < kPieceChannels && o + e < p.o; ++e) {
        target[e] = reinterpret_cast<const T*>(source)[e];
      }
    }
  }
  // Computes the outputs of the warp that are not finite again.
  __device__ __forceinline__ void repair(int64_t first_row, int64_t first_output) {
    const AggregateParams& p = p_.w.p;
#pragma unroll 1
    for (int i = lane(); i < kUnits * kWarpRows * kColumns; i += kWarp) {
      const int64_t o = first_output + i % kColumns;
      const int of_warp = i / kColumns;
      const int64_t row = first_row + row_in_tile(of_warp / kWarpRows) + of_warp % kWarpRows;
      if (row >= p.batch * p.n || o >= p.o) continue;
      T& output = static_cast<T*>(p.output)[row * p.o + o];
      if (isfinite(widen(output))) continue;
      const T* weight = static_cast<const T*>(p.weight) + o * p.c * p.k;
      const float sum =
          plain_output(p_.w, row, [&](int64_t j, int64_t c) { return weight[c * p.k + j]; });
      narrow(sum + p_.bias[o], output);
    }
  }

  Shared& shared_;
  const HopperDense<T>& p_;
  const int first_unit_;
  DenseStage stage_;
  float y_[kUnits][kColumns / 2];
};

// weight [o, chunks 64], in boxes of kColumns rows. Blocks of kDenseThreads threads, as many as
// there are tiles or multiprocessors.
template <class T, int kUnits, int kColumns, bool kModulated>
__global__ __launch_bounds__(kDenseThreads,
                             1) void hopper_dense_kernel(const __grid_constant__ TensorMap weight,
                                                         const __grid_constant__ HopperDense<T> p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = DenseShared<kUnits, kColumns>;
  Shared& shared = *reinterpret_cast<Shared*>(swizzled_shared_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      barrier_init(&shared.full[i], kWarpgroup / kWarp + 1);  // warps that gather, and W
      barrier_init(&shared.empty[i], kDenseWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  // The same in all lanes, as the compiler sees it.
  const int warpgroup = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    release_registers<72>();
    DenseProducer<T, kUnits, kColumns>(shared, p, weight).run();
  } else {
    claim_registers<216>();
    DenseConsumer<T, kUnits, kColumns, kModulated>(shared, p, warpgroup - 1).run();
  }
#endif
}

}  // namespace convnn::cuda
