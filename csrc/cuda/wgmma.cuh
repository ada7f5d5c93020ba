// SPDX-License-Identifier: MIT
// The asynchronous matrix instruction of sm_90a, for hopper.cuh, which says what it computes. An
// inline assembler statement needs its registers one by one, hence the macros.
#pragma once

#include "device.cuh"

namespace convnn::cuda {

// "+f" operands d[i] to d[i + 7], and how the text of the instruction names 32 and 64 of them.
#define CONVNN_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define CONVNN_D32(i) CONVNN_D8(i), CONVNN_D8(i + 8), CONVNN_D8(i + 16), CONVNN_D8(i + 24)
#define CONVNN_NAMES_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CONVNN_NAMES_64                                                                \
  CONVNN_NAMES_32                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// The text: d is d_names, a and b the operands named, and d counts as zero unless `add`.
#define CONVNN_WGMMA(columns, type, d_names, a, b, add, last)                                      \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add                                                          \
  ", 0;\n"                                                                                         \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" d_names "}, " a ", " b \
  ", p, 1, 1, " last ";\n}\n"
// A from registers: `last` says that B is K-major. A from shared memory: that both are.
#define CONVNN_WGMMA_64(type)                                                          \
  CONVNN_WGMMA("64", type, CONVNN_NAMES_32, "{%32, %33, %34, %35}", "%36", "%37", "0") \
      : CONVNN_D32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add))
#define CONVNN_WGMMA_128(type)                                                          \
  CONVNN_WGMMA("128", type, CONVNN_NAMES_64, "{%64, %65, %66, %67}", "%68", "%69", "0") \
      : CONVNN_D32(0),                                                                  \
        CONVNN_D32(32)                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add))
#define CONVNN_WGMMA_SHARED_64(type)                                     \
  CONVNN_WGMMA("64", type, CONVNN_NAMES_32, "%32", "%33", "%34", "0, 0") \
      : CONVNN_D32(0) : "l"(a), "l"(b), "r"(int(add))
#define CONVNN_WGMMA_SHARED_128(type)                                     \
  CONVNN_WGMMA("128", type, CONVNN_NAMES_64, "%64", "%65", "%66", "0, 0") \
      : CONVNN_D32(0), CONVNN_D32(32) : "l"(a), "l"(b), "r"(int(add))

template <class T, int kColumns>
__device__ __forceinline__ void wgmma_instruction(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                                  uint64_t b, bool add) {
  static_assert(kColumns == 64 || kColumns == 128);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kColumns == 64 && std::is_same_v<T, Float16>) {
    asm volatile(CONVNN_WGMMA_64("f16"));
  } else if constexpr (kColumns == 64) {
    asm volatile(CONVNN_WGMMA_64("bf16"));
  } else if constexpr (std::is_same_v<T, Float16>) {
    asm volatile(CONVNN_WGMMA_128("f16"));
  } else {
    asm volatile(CONVNN_WGMMA_128("bf16"));
  }
#endif
}

template <class T, int kColumns>
__device__ __forceinline__ void wgmma_instruction(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                                                  bool add) {
  static_assert(kColumns == 64 || kColumns == 128);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kColumns == 64 && std::is_same_v<T, Float16>) {
    asm volatile(CONVNN_WGMMA_SHARED_64("f16"));
  } else if constexpr (kColumns == 64) {
    asm volatile(CONVNN_WGMMA_SHARED_64("bf16"));
  } else if constexpr (std::is_same_v<T, Float16>) {
    asm volatile(CONVNN_WGMMA_SHARED_128("f16"));
  } else {
    asm volatile(CONVNN_WGMMA_SHARED_128("bf16"));
  }
#endif
}

#undef CONVNN_D8
#undef CONVNN_D32
#undef CONVNN_NAMES_32
#undef CONVNN_NAMES_64
#undef CONVNN_WGMMA
#undef CONVNN_WGMMA_64
#undef CONVNN_WGMMA_128
#undef CONVNN_WGMMA_SHARED_64
#undef CONVNN_WGMMA_SHARED_128

}  // namespace convnn::cuda
