// SPDX-License-Identifier: MIT
// What the kernels use of CUDA: element types, shared memory, the matrix instruction, launches.
//
// The kernels are also compiled as plain C++ for tests on machines without a GPU; then
// tests/host_cuda/execution.h stands in for CUDA.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <execution.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "operators.h"

namespace convnn::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
// Threads of every block. A second number in __launch_bounds__, of blocks per multiprocessor, keeps
// the compiler from spilling registers for a higher occupancy.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// As constants, because device code cannot call these functions.
template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNan = std::numeric_limits<A>::quiet_NaN();

// The type of sums over elements of T.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(Float16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  return execution::float_from_half(x.bits);
#endif
}

__device__ inline void narrow(double x, double& result) { result = x; }
__device__ inline void narrow(float x, float& result) { result = x; }
__device__ inline void narrow(float x, Float16& result) {
#ifdef __CUDACC__
  result.bits = __half_as_ushort(__float2half_rn(x));
#else
  result.bits = execution::half_from_float(x);
#endif
}
__device__ inline void narrow(float x, BFloat16& result) {
#ifdef __CUDACC__
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  result.bits = execution::bfloat16_from_float(x);
#endif
}

__device__ inline int lane() { return int(threadIdx.x) % kWarp; }
__device__ inline int warp() { return int(threadIdx.x) / kWarp; }
// The index of this warp, and of this thread, in the grid.
__device__ inline int64_t grid_warp() { return int64_t(blockIdx.x) * kWarps + warp(); }
__device__ inline int64_t grid_thread() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t grid_threads() { return int64_t(gridDim.x) * kThreads; }

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#else
  return execution::shared_memory();
#endif
}

// Copy 16 or 4 bytes between addresses with that alignment.
__device__ inline void copy16(void* target, const void* source) {
#ifdef __CUDACC__
  *static_cast<uint4*>(target) = *static_cast<const uint4*>(source);
#else
  execution::copy<16>(target, source);
#endif
}
__device__ inline void copy4(void* target, const void* source) {
#ifdef __CUDACC__
  *static_cast<uint32_t*>(target) = *static_cast<const uint32_t*>(source);
#else
  execution::copy<4>(target, source);
#endif
}
__host__ __device__ inline bool is_aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// The sum over the lanes of a warp, in one fixed order, in every lane.
template <class A>
__device__ inline A warp_sum(A x) {
  for (int span = kWarp / 2; span > 0; span /= 2) x += __shfl_xor_sync(kAllLanes, x, span);
  return x;
}
template <class A>
__device__ inline A warp_max(A x) {
  for (int span = kWarp / 2; span > 0; span /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, span);
    x = other > x ? other : x;
  }
  return x;
}

// A sum of many terms, taken in short runs because rounding errors grow with the length of a sum.
template <class A>
class RunningSum {
 public:
  __device__ void add(A x) {
    run_ += x;
    if (++terms_ == 32) {
      total_ += run_;
      run_ = 0;
      terms_ = 0;
    }
  }
  __device__ A value() const { return total_ + run_; }

 private:
  A total_ = 0, run_ = 0;
  int terms_ = 0;
};

// d += a b for a warp: a [16, 16], b [16, 8], d [16, 8] float32. With g = lane / 4 and t = lane % 4
// a lane holds two elements of a in each register, rows g, g + 8, g, g + 8, columns from 2 t, 2 t,
// 2 t + 8, 2 t + 8; of b column g, rows from 2 t and 2 t + 8; of d rows g, g, g + 8, g + 8, columns
// 2 t, 2 t + 1, 2 t, 2 t + 1.
template <class T>
__device__ inline void multiply_accumulate_16(float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, Float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  execution::multiply_accumulate_16(std::is_same_v<T, Float16>, d, a, b);
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of `count` elements of T from the context.
template <class T>
T* allocate(Context& context, int64_t count) {
  return static_cast<T*>(context.allocate(size_t(std::max<int64_t>(count, 1)) * sizeof(T)));
}

#ifdef __CUDACC__
inline void check_launch(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  // Or the next launch would find this error, too.
  [[maybe_unused]] const cudaError_t last = cudaGetLastError();
  throw std::runtime_error(std::string("convnn: the launch of ") + name +
                           " failed: " + cudaGetErrorString(error));
}
#endif

inline void check_blocks(const char* name, int64_t blocks) {
  if (blocks <= std::numeric_limits<int32_t>::max()) return;
  throw std::runtime_error(std::string("convnn: ") + name + " would need " +
                           std::to_string(blocks) + " blocks, more than a launch can have");
}

// Launches `blocks` blocks of kThreads threads. Zero blocks are no launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, size_t shared_bytes,
            [[maybe_unused]] Context& context, const Arguments&... arguments) {
  if (blocks == 0) return;
  check_blocks(name, blocks);
#ifdef __CUDACC__
  kernel<<<unsigned(blocks), kThreads, shared_bytes, static_cast<cudaStream_t>(context.stream)>>>(
      arguments...);
  check_launch(name, cudaGetLastError());
#else
  execution::launch(name, kernel, blocks, kThreads, shared_bytes, arguments...);
#endif
}

// Blocks for a grid-stride loop over `threads` items.
inline int64_t strided_blocks(int64_t threads) {
  return std::min<int64_t>(ceil_div(threads, kThreads), 1 << 16);
}

// Calls body(T()) with the element type of `dtype`.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float64:
      return body(double());
    case DType::float32:
      return body(float());
    case DType::float16:
      return body(Float16());
    case DType::bfloat16:
      return body(BFloat16());
  }
}

}  // namespace convnn::cuda
