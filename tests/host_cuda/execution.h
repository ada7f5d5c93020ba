// SPDX-License-Identifier: MIT
// Runs the CUDA kernels on the host, for tests: replaces what csrc/cuda/device.cuh uses of CUDA.
//
// A block's threads are fibers, one of which runs at a time until it must wait for others, at a
// barrier or an instruction of its warp. Which one continues is random, and so is the order of
// blocks, to reveal results that depend on either. Threads that wait at different points, or for
// one that has ended, are an error. Shared memory has exactly the size of the launch and is filled
// with 0xFF bytes at the start of every block, so that AddressSanitizer detects accesses outside
// it, and NaN or -1 reveals reads before a write.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace execution {

struct Dimension {
  unsigned x;
};

// The point in the source where a thread waits. Threads that wait for each other must be at the
// same one.
struct Site {
  const char* file;
  int line;
};

void seed(uint64_t value);
// The kernels that ran, by address and name.
struct Launches {
  int64_t count = 0;
  int64_t collectives = 0;  // instructions that warps executed together: about how long they took
  size_t most_shared_bytes = 0;
};
using Launched = std::map<std::pair<intptr_t, std::string>, Launches>;
const Launched& launched();
void run(intptr_t address, const char* name, int64_t blocks, int threads, size_t shared_bytes,
         const std::function<void()>& body);
unsigned char* shared_memory();
void barrier(Site site);
// Waits until all lanes of the warp have arrived with their operands, then calls combine(lanes)
// once.
void collective(Site site, void* operand, void (*combine)(void* const* lanes));

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, const Arguments&... arguments) {
  run(reinterpret_cast<intptr_t>(kernel), name, blocks, threads, shared_bytes,
      [&] { kernel(arguments...); });
}

template <size_t kBytes>
void copy(void* target, const void* source) {
  // As on the device, a misaligned address is an error.
  struct alignas(kBytes) Block {
    unsigned char bytes[kBytes];
  };
  *static_cast<Block*>(target) = *static_cast<const Block*>(source);
}

float float_from_half(uint16_t bits);
uint16_t half_from_float(float x);
uint16_t bfloat16_from_float(float x);
void multiply_accumulate_16(bool is_half, float (&d)[4], const uint32_t (&a)[4],
                            const uint32_t (&b)[2],
                            Site site = {__builtin_FILE(), __builtin_LINE()});

}  // namespace execution

extern execution::Dimension threadIdx, blockIdx, gridDim;

using std::isfinite;

inline void __syncthreads(execution::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::barrier(site);
}

inline void __syncwarp(execution::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::collective(site, nullptr, [](void* const*) {});
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask,
                  execution::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  struct Operand {
    T value, result;
    int lane_mask;
  } operand = {value, value, lane_mask};
  execution::collective(site, &operand, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Operand& mine = *static_cast<Operand*>(lanes[i]);
      mine.result = static_cast<Operand*>(lanes[(i ^ mine.lane_mask) & 31])->value;
    }
  });
  return operand.result;
}

template <class T>
unsigned __match_any_sync(unsigned, T value,
                          execution::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  struct Operand {
    T value;
    unsigned result;
  } operand = {value, 0};
  execution::collective(site, &operand, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Operand& mine = *static_cast<Operand*>(lanes[i]);
      for (int j = 0; j < 32; ++j) {
        const bool same = static_cast<Operand*>(lanes[j])->value == mine.value;
        mine.result |= unsigned(same) << j;
      }
    }
  });
  return operand.result;
}

template <class T>
T __shfl_sync(unsigned, T value, int source,
              execution::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  struct Operand {
    T value, result;
    int source;
  } operand = {value, value, source};
  execution::collective(site, &operand, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Operand& mine = *static_cast<Operand*>(lanes[i]);
      mine.result = static_cast<Operand*>(lanes[mine.source & 31])->value;
    }
  });
  return operand.result;
}

inline unsigned __ballot_sync(unsigned, bool vote,
                              execution::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  struct Operand {
    bool vote;
    unsigned result;
  } operand = {vote, 0};
  execution::collective(site, &operand, [](void* const* lanes) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned(static_cast<Operand*>(lanes[i])->vote) << i;
    for (int i = 0; i < 32; ++i) static_cast<Operand*>(lanes[i])->result = votes;
  });
  return operand.result;
}
inline bool __any_sync(unsigned lanes, bool vote,
                       execution::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  return __ballot_sync(lanes, vote, site) != 0;
}
inline bool __all_sync(unsigned lanes, bool vote,
                       execution::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  return __ballot_sync(lanes, vote, site) == 0xFFFFFFFFu;
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return b > a ? b : a; }
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
inline uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }
inline double __longlong_as_double(int64_t bits) { return same_bits<double>(bits); }
inline int64_t __double_as_longlong(double x) { return same_bits<int64_t>(x); }
