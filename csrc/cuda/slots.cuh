// SPDX-License-Identifier: MIT
// Steps of a sweep that must not become branches: accumulators into slots in shared
// memory, and from there into lists in global memory. Predicated instructions on the device; their
// addresses in shared memory are numbers, because a pointer would be taken for a generic one.
#pragma once

#include "hopper.cuh"
#include "order.cuh"

namespace convnn::cuda {

// lane(), as a value that the compiler does not keep in a register for later.
__device__ __forceinline__ uint32_t lane_again() {
#ifdef __CUDACC__
  uint32_t result;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(result));
  return result;
#else
  return uint32_t(lane());
#endif
}

// Words in shared memory, by address.
__device__ __forceinline__ void store_word(uint32_t address, uint32_t x) {
#ifdef __CUDACC__
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
#else
  copy4(swizzled_shared_memory() + address, &x);
#endif
}
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t x;
#ifdef __CUDACC__
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
#else
  copy4(&x, swizzled_shared_memory() + address);
#endif
  return x;
}
__device__ __forceinline__ float4 load_slot(uint32_t address) {
  float4 x;
#ifdef __CUDACC__
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
#else
  copy16(&x, swizzled_shared_memory() + address);
#endif
  return x;
}
// From a slot, or a header, of a lane to its next.
constexpr int kSlotBytes = kWarp * 16, kHeaderBytes = kWarp * 4;

// Stores the accumulators x [4] in the next slot, and the bit in the mask, if one of the signs of
// `above` is clear: a hit. NaN is one, too.
__device__ __forceinline__ void append(uint32_t& slot, uint32_t& mask, uint32_t bit,
                                       const float (&above)[4], const float* x) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 t;\n"
      "and.b32 t, %2, %3;\nand.b32 t, t, %4;\nand.b32 t, t, %5;\nand.b32 t, t, 0x80000000;\n"
      "setp.eq.u32 p, t, 0;\n"
      "@p st.shared.v4.f32 [%0], {%6, %7, %8, %9};\n"
      "@p add.u32 %0, %0, 512;\n"
      "@p or.b32 %1, %1, %10;\n}\n"
      : "+r"(slot), "+r"(mask)
      : "r"(__float_as_uint(above[0])), "r"(__float_as_uint(above[1])),
        "r"(__float_as_uint(above[2])), "r"(__float_as_uint(above[3])), "f"(x[0]), "f"(x[1]),
        "f"(x[2]), "f"(x[3]), "r"(bit)
      : "memory");
#else
  const uint32_t signs = __float_as_uint(above[0]) & __float_as_uint(above[1]) &
                         __float_as_uint(above[2]) & __float_as_uint(above[3]);
  if (signs >> 31) return;
  const float4 four = {x[0], x[1], x[2], x[3]};
  copy16(swizzled_shared_memory() + slot, &four);
  slot += kSlotBytes;
  mask |= bit;
#endif
}
static_assert(kSlotBytes == 512);

// The number of the highest bit.
__device__ __forceinline__ uint32_t highest_bit(uint32_t x) {
#ifdef __CUDACC__
  uint32_t bit;
  asm("bfind.u32 %0, %1;" : "=r"(bit) : "r"(x));
  return bit;
#else
  return 31 - uint32_t(__builtin_clz(x));
#endif
}

// Clears the bits of x from `bit` on.
__device__ __forceinline__ uint32_t bits_below(uint32_t x, uint32_t bit) {
#ifdef __CUDACC__
  uint32_t mask;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(mask) : "r"(bit));
  return x & mask;
#else
  return x & ((1u << bit) - 1);
#endif
}
// Takes the header before `header` if `word`, the one in use, has no bit of a slot left.
__device__ __forceinline__ void next_header(uint32_t& header, uint32_t& word) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.lt.u32 p, %1, 0x10000;\n"
      "@p ld.shared.b32 %1, [%0 + -128];\n@p sub.u32 %0, %0, 128;\n}\n"
      : "+r"(header), "+r"(word)::"memory");
#else
  if (word >= 0x10000u) return;
  header -= kHeaderBytes;
  word = load_word(header);
#endif
}
static_assert(kHeaderBytes == 128);

// Writes a over the column to entry `end` of the lists from `hits` on, and moves the end on, unless
// a is below the bound or the factor is the mark of a column that may not be a neighbor. Without a
// branch.
__device__ __forceinline__ void put_hit(uint64_t* hits, uint32_t& end, float a, uint32_t column,
                                        float bound, float factor) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 t;\n"
      "setp.ne.u32 p, %5, 0x80000000;\nsetp.geu.and.f32 p, %1, %3, p;\n"
      "mad.wide.u32 t, %0, 8, %4;\n"
      "@p st.global.v2.b32 [t], {%2, %6};\n"
      "@p add.u32 %0, %0, 1;\n}\n"
      : "+r"(end)
      : "f"(a), "r"(column), "f"(bound), "l"(hits), "r"(__float_as_uint(factor)),
        "r"(__float_as_uint(a))
      : "memory");
#else
  if (a < bound || __float_as_uint(factor) == 0x80000000u) return;
  hits[end++] = pack(__float_as_uint(a), column);
#endif
}

}  // namespace convnn::cuda
