// SPDX-License-Identifier: MIT
// What kernels for sm_90a use beyond device.cuh: barriers in shared memory, copies by the bulk
// engine, the asynchronous matrix instruction, registers moved between warpgroups, dependent
// launches. Kernels that use it have a body for sm_90a only (__CUDA_ARCH_FEAT_SM90_ALL), and for
// other architectures these functions compile to nothing.
//
// Without nvcc, tests/host_cuda/hopper.h stands in for all of it, and detects misuse.
//
// A barrier is 8 bytes of shared memory. It completes a phase when `count` arrivals and all bytes
// expected have come; the phase of number i, from 0, has parity i & 1. Initialise it in one thread,
// then fence_barrier_init(), then __syncthreads().
//
// A warpgroup is 128 threads, from a multiple of 128 on. All of them execute what is named wgmma,
// in this order: wgmma_fence() once the registers are written, products, wgmma_commit(); then,
// after wgmma_wait<left>() for all groups but the last `left`, hold(d), and only then d may be
// read, and shared memory and registers that the products read may be overwritten.
#pragma once

#include "device.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstdio>

#include "wgmma.cuh"
#else
#include <hopper.h>
#endif

namespace convnn::cuda {

constexpr int kWarpgroup = 128;

#ifdef __CUDACC__

using TensorMap = CUtensorMap;

// Never compiled for a kernel that runs on another architecture.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CONVNN_PTX(...) asm volatile(__VA_ARGS__)
#else
#define CONVNN_PTX(...)
#endif

// The block's dynamic shared memory, aligned to the 1024 bytes that the swizzle repeats after.
__device__ inline unsigned char* swizzled_shared_memory() {
  extern __shared__ __align__(1024) unsigned char swizzled_memory[];
  return swizzled_memory;
}
// The address of p in shared memory, as instructions and descriptors take it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Barriers

__device__ __forceinline__ void barrier_init([[maybe_unused]] uint64_t* bar,
                                             [[maybe_unused]] int count) {
  CONVNN_PTX("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
}
__device__ __forceinline__ void barrier_arrive([[maybe_unused]] uint64_t* bar) {
  CONVNN_PTX("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives, and lets the phase wait for `bytes` of copies, too.
__device__ __forceinline__ void barrier_expect([[maybe_unused]] uint64_t* bar,
                                               [[maybe_unused]] int bytes) {
  CONVNN_PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
             "r"(bytes) : "memory");
}
// Whether the phase of this parity is complete, after waiting for a while.
__device__ __forceinline__ bool barrier_test([[maybe_unused]] uint64_t* bar,
                                             [[maybe_unused]] int parity) {
  uint32_t complete = 1;
  CONVNN_PTX(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n" : "=r"(complete) : "r"(shared_address(bar)),
      "r"(parity) : "memory");
  return complete != 0;
}
// Waits for the phase of this parity. With CONVNN_BOUNDED_WAITS, a wait of two seconds is reported
// with the line that waits, and ends the kernel.
__device__ __forceinline__ void barrier_wait(uint64_t* bar, int parity,
                                             [[maybe_unused]] int line = __builtin_LINE()) {
#ifdef CONVNN_BOUNDED_WAITS
  uint64_t start, now;
  CONVNN_PTX("mov.u64 %0, %%globaltimer;" : "=l"(start));
  while (!barrier_test(bar, parity)) {
    CONVNN_PTX("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (now - start < 2000000000u) continue;
    printf("convnn: line %d: block %d, warp %d, lane %d: barrier at %u, parity %d: no end\n", line,
           int(blockIdx.x), warp(), lane(), shared_address(bar), parity);
    __trap();
  }
#else
#pragma unroll 1
  while (!barrier_test(bar, parity)) {
  }
#endif
}
// Makes barrier_init() visible to the bulk engine.
__device__ __forceinline__ void fence_barrier_init() {
  CONVNN_PTX("fence.mbarrier_init.release.cluster;" :: : "memory");
}
// Makes what this thread stored to shared memory visible to products and copies of the engine that
// begin after it (after a barrier, if another thread begins them).
__device__ __forceinline__ void fence_async_shared() {
  CONVNN_PTX("fence.proxy.async.shared::cta;" :: : "memory");
}
// Waits for `threads` threads, a multiple of 32. Barrier 0 is that of __syncthreads().
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Copies by the bulk engine, from global to shared memory. They complete at `bar`. One thread
// issues them.

// A box of the tensor, from column x, row y, batch element z on, with zeros outside the tensor.
// target is aligned to 1024 bytes.
__device__ __forceinline__ void load_box([[maybe_unused]] void* target,
                                         [[maybe_unused]] const TensorMap* map,
                                         [[maybe_unused]] int x, [[maybe_unused]] int y,
                                         [[maybe_unused]] int z, [[maybe_unused]] uint64_t* bar) {
  CONVNN_PTX(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z) : "memory");
}
// target, source and bytes are multiples of 16.
__device__ __forceinline__ void bulk_copy([[maybe_unused]] void* target,
                                          [[maybe_unused]] const void* source,
                                          [[maybe_unused]] int bytes,
                                          [[maybe_unused]] uint64_t* bar) {
  CONVNN_PTX(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(bar)) : "memory");
}

// The matrix instruction

__device__ __forceinline__ void wgmma_fence() {
  CONVNN_PTX("wgmma.fence.sync.aligned;" :: : "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  CONVNN_PTX("wgmma.commit_group.sync.aligned;" :: : "memory");
}
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  CONVNN_PTX("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from reading d before this point, and from writing to it after it.
template <int kCount>
__device__ __forceinline__ void hold([[maybe_unused]] float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// d = a b^T, + d if `add`: a [64, 16], b [kColumns, 16], d [64, kColumns] float32. a is in
// registers, each warp of the warpgroup having 16 rows, as multiply_accumulate_16() has them, or in
// shared memory; d as there, its tiles of 8 columns one after another.
template <class T, int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool add) {
  wgmma_instruction<T, kColumns>(d, a, b, add);
}
template <class T, int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  wgmma_instruction<T, kColumns>(d, a, b, add);
}

// Registers. A block has those of its launch: each warpgroup gives or takes some, a multiple of 8
// per thread, all of its warps together. ptxas ignores this unless __launch_bounds__ has its second
// number, too.

// Waits until the block has that many free.
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  CONVNN_PTX("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  CONVNN_PTX("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Dependent launches, which devices of compute capability 9.0 and newer have

// Lets a dependent launch behind this kernel begin once every block has come here or ended. A
// kernel that writes what the launch before it reads, as a sweep does with the hits that the finish
// before it takes, must be behind one that does not call this: waiting for that one, it waits for
// all before. So only sweeps call it.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// In a dependent launch, waits until the kernel before it has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#undef CONVNN_PTX

// a b rounded down, and a b + c rounded once.
__device__ __forceinline__ float multiply_down(float a, float b) { return __fmul_rd(a, b); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}

// The function of the driver that encodes a tensor map; null if there is none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

#endif  // __CUDACC__

// Tensor maps: how load_box() sees rows [batch, count, columns] of 16 bits, contiguous and aligned
// to 16 bytes: in boxes of 64 columns and box_rows (at most 256) rows, each row 128 bytes, with the
// swizzle of 128 bytes.
template <class T>
TensorMap map_rows(const T* rows, int64_t batch, int64_t count, int64_t columns, int box_rows) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDACC__
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  if (!encode) throw std::runtime_error("convnn: this driver cannot encode tensor maps");
  TensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(count), cuuint64_t(batch)};
  const cuuint64_t strides[] = {cuuint64_t(columns) * 2, cuuint64_t(count * columns) * 2};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows), 1}, steps[] = {1, 1, 1};
  const CUresult error =
      encode(&map,
             std::is_same_v<T, Float16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             3, const_cast<T*>(rows), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error("convnn: a tensor map was refused, error " +
                             std::to_string(int(error)));
  }
  return map;
#else
  return execution::map_rows(rows, batch, count, columns, box_rows);
#endif
}

// The descriptor of a matrix of products in shared memory: rows of 64 elements, 128 bytes, as
// load_box() writes them, from `address` on. Columns 16 i to 16 i + 15 of the 64: address + 32 i.
// More rows: address + 128 per row, a multiple of 8 rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32;
  return kSwizzle128 | kEightRows | uint64_t(1) << 16 | (address & 0x3FFFF) / 16;
}

// As launch(), but of `threads` threads, and if `dependent` begun before the kernel before it has
// ended: see wait_for_previous().
template <class... Parameters, class... Arguments>
void launch_hopper(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                   size_t shared_bytes, bool dependent, [[maybe_unused]] Context& context,
                   const Arguments&... arguments) {
  if (blocks == 0) return;
  check_blocks(name, blocks);
#ifdef __CUDACC__
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(context.stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  check_launch(name, error);
#else
  execution::launch_kernel(name, kernel, blocks, threads, shared_bytes, dependent, arguments...);
#endif
}

}  // namespace convnn::cuda
