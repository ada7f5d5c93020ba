// SPDX-License-Identifier: MIT
// Replaces what csrc/cuda/hopper.cuh declares for sm_90a; each function is described there.
//
// Copies and products complete late and in any order. Until a copy completes, its target is 0xFF
// bytes; its source, and the shared memory that products read, are read only then. Accumulators are
// NaN from the first product until hold() after a wait. A misuse is an error that names the kernel,
// the block and the warp, and so is a block in which no thread can continue.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <type_traits>

#include "execution.h"

#define __grid_constant__

namespace execution {

// Rows [batch, count, columns] of 16 bits, contiguous, in boxes of box_rows rows and 64 columns.
struct TensorMap {
  const uint16_t* rows;
  int64_t batch, count, columns;
  int box_rows;
};
TensorMap map_rows(const void* rows, int64_t batch, int64_t count, int64_t columns, int box_rows);

uint32_t shared_address(const void* p, Site site);
void barrier_init(uint64_t* bar, int count, Site site);
void barrier_arrive(uint64_t* bar, Site site);
void barrier_expect(uint64_t* bar, int bytes, Site site);
void barrier_wait(uint64_t* bar, int parity, Site site);
void fence_barrier_init();
void fence_async_shared();
void named_barrier(int id, int threads, Site site);
void load_box(void* target, const TensorMap& map, int x, int y, int z, uint64_t* bar, Site site);
void bulk_copy(void* target, const void* source, int bytes, uint64_t* bar, Site site);

// One product as a thread issues it. a_registers is null if A is in shared memory.
struct Product {
  bool is_half;
  int columns;
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool add;
  Site site;
};
void wgmma(const Product& product);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int left, Site site);
void hold(float* d, int count, Site site);

void set_registers(int registers, bool claim, Site site);
void launch_dependents();
void wait_for_previous(Site site);

// As launch(). `dependent`: every thread must call wait_for_previous(), or wait for one that has,
// before it touches what `written_by_kernels` was told of.
void launch_kernel(intptr_t address, const char* name, int64_t blocks, int threads,
                   size_t shared_bytes, bool dependent, const std::function<void()>& body);
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                   size_t shared_bytes, bool dependent, const Arguments&... arguments) {
  launch_kernel(reinterpret_cast<intptr_t>(kernel), name, blocks, threads, shared_bytes, dependent,
                [&] { kernel(arguments...); });
}
// Memory for results of kernels: outputs and workspace, until it is freed.
void written_by_kernels(void* memory, size_t bytes);
void forget_memory();

}  // namespace execution

namespace convnn::cuda {

using execution::Site;
using execution::TensorMap;
struct Float16;

inline unsigned char* swizzled_shared_memory() { return execution::shared_memory(); }
inline uint32_t shared_address(const void* p, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  return execution::shared_address(p, site);
}

inline void barrier_init(uint64_t* bar, int count,
                         Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::barrier_init(bar, count, site);
}
inline void barrier_arrive(uint64_t* bar, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::barrier_arrive(bar, site);
}
inline void barrier_expect(uint64_t* bar, int bytes,
                           Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::barrier_expect(bar, bytes, site);
}
inline void barrier_wait(uint64_t* bar, int parity,
                         Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::barrier_wait(bar, parity, site);
}
inline void fence_barrier_init() { execution::fence_barrier_init(); }
inline void fence_async_shared() { execution::fence_async_shared(); }
inline void named_barrier(int id, int threads, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::named_barrier(id, threads, site);
}
inline void load_box(void* target, const TensorMap* map, int x, int y, int z, uint64_t* bar,
                     Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::load_box(target, *map, x, y, z, bar, site);
}
inline void bulk_copy(void* target, const void* source, int bytes, uint64_t* bar,
                      Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::bulk_copy(target, source, bytes, bar, site);
}

inline void wgmma_fence(Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::wgmma_fence(site);
}
inline void wgmma_commit(Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::wgmma_commit(site);
}
template <int kLeft>
void wgmma_wait(Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::wgmma_wait(kLeft, site);
}
template <int kCount>
void hold(float (&d)[kCount], Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::hold(d, kCount, site);
}
template <class T, int kColumns>
void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add,
           Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::wgmma({std::is_same_v<T, Float16>, kColumns, d, a, 0, b, add, site});
}
template <class T, int kColumns>
void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add,
           Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::wgmma({std::is_same_v<T, Float16>, kColumns, d, nullptr, a, b, add, site});
}

template <int kRegisters>
void claim_registers(Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::set_registers(kRegisters, true, site);
}
template <int kRegisters>
void release_registers(Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::set_registers(kRegisters, false, site);
}
inline void launch_dependents() { execution::launch_dependents(); }
inline void wait_for_previous(Site site = {__builtin_FILE(), __builtin_LINE()}) {
  execution::wait_for_previous(site);
}

// As on the device, a NaN is the positive one with all bits set.
inline float multiply_down(float a, float b) {
  const double exact = double(a) * double(b);
  if (std::isnan(exact)) return __uint_as_float(0x7FFFFFFFu);
  const float nearest = float(exact);
  return double(nearest) > exact ? std::nextafterf(nearest, -INFINITY) : nearest;
}
inline float multiply_add(float a, float b, float c) {
  const float sum = std::fma(a, b, c);
  return std::isnan(sum) ? __uint_as_float(0x7FFFFFFFu) : sum;
}

}  // namespace convnn::cuda
