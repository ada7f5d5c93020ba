// SPDX-License-Identifier: MIT
// Copies by the bulk engine, and what the engine and products see of shared memory.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include <sanitizer/asan_interface.h>

#include "barriers.h"
#include "fibers.h"
#include "hopper.h"

namespace execution {
namespace {

constexpr int kBoxColumns = 64, kBoxRow = 128, kSwizzle = 1024;
// The contents of shared memory at the start of a block, and of a target until the copy completes.
constexpr unsigned char kUnset = 0xFF;

// Shared memory with the stores of threads up to the last fence_async_shared() only. A fence of one
// thread is taken for one of all: that some lack it is not seen.
std::vector<unsigned char> visible;

// Made when a block first uses it, since most kernels do not.
unsigned char* visible_at(uint32_t begin) {
  if (visible.empty()) visible.assign(shared_bytes(), kUnset);
  return visible.data() + begin;
}

struct Target {
  uint32_t begin;
  size_t bytes;
};
std::vector<Target> in_flight;

// Fills the target, which nothing may use before the copy completes.
void begin_target(uint32_t begin, size_t bytes, Site site) {
  check_visible(begin, bytes, site, current_thread());
  if (product_reads(begin, bytes)) fail("a copy overwrites what a product in flight reads", site);
  if (copy_writes(begin, bytes)) fail("a copy overwrites what a copy in flight writes", site);
  std::memset(shared_memory() + begin, kUnset, bytes);
  std::memset(visible_at(begin), kUnset, bytes);
  in_flight.push_back({begin, bytes});
}

// Writes the target by write().
template <class Write>
void fill_target(uint32_t begin, size_t bytes, Site site, int thread, const Write& write) {
  unsigned char* target = shared_memory() + begin;
  if (!std::all_of(target, target + bytes, [](unsigned char x) { return x == kUnset; })) {
    fail("the target of a copy in flight was written", site, thread);
  }
  write();
  std::memcpy(visible_at(begin), target, bytes);
  in_flight.erase(std::find_if(in_flight.begin(), in_flight.end(),
                               [&](const Target& each) { return each.begin == begin; }));
}

void check_range(uint32_t begin, size_t bytes, size_t alignment, Site site) {
  if (begin % alignment != 0) {
    fail("a copy to shared memory not aligned to " + std::to_string(alignment) + " bytes", site);
  }
  if (begin + bytes > shared_bytes()) fail("a copy beyond shared memory", site);
}

// The 16 bits of a row and column of the tensor, zero outside it.
uint16_t element(const TensorMap& map, int64_t x, int64_t y, int64_t z) {
  const bool inside =
      x >= 0 && x < map.columns && y >= 0 && y < map.count && z >= 0 && z < map.batch;
  return inside ? map.rows[(z * map.count + y) * map.columns + x] : uint16_t(0);
}

void write_box(const TensorMap& map, int x, int y, int z, uint32_t begin) {
  for (int row = 0; row < map.box_rows; ++row) {
    for (int column = 0; column < kBoxColumns; ++column) {
      const uint16_t value = element(map, int64_t(x) + column, int64_t(y) + row, z);
      const uint32_t at = begin + uint32_t(row * kBoxRow) + uint32_t(2 * column);
      const uint32_t swizzled = at ^ (at >> 7 & 7) << 4;
      std::memcpy(shared_memory() + swizzled, &value, 2);
    }
  }
}

}  // namespace

TensorMap map_rows(const void* rows, int64_t batch, int64_t count, int64_t columns, int box_rows) {
  if (reinterpret_cast<uintptr_t>(rows) % 16 != 0 || columns % 8 != 0) {
    fail("a tensor map of rows not aligned to 16 bytes", {});
  }
  if (box_rows < 1 || box_rows > 256) fail("a tensor map with boxes of no or over 256 rows", {});
  return {static_cast<const uint16_t*>(rows), batch, count, columns, box_rows};
}

void begin_copies() {
  visible.clear();
  in_flight.clear();
}

bool copy_writes(uint32_t begin, size_t bytes) {
  return std::any_of(in_flight.begin(), in_flight.end(), [&](const Target& each) {
    return begin < each.begin + each.bytes && each.begin < begin + bytes;
  });
}

void fence_async_shared() { std::memcpy(visible_at(0), shared_memory(), shared_bytes()); }

void check_visible(uint32_t begin, size_t bytes, Site site, int thread) {
  if (std::memcmp(visible_at(begin), shared_memory() + begin, bytes) == 0) return;
  fail("shared memory was written by threads, without fence_async_shared() since", site, thread);
}

void load_box(void* target, const TensorMap& map, int x, int y, int z, uint64_t* bar, Site site) {
  const uint32_t begin = shared_address(target, site);
  const int bytes = map.box_rows * kBoxRow;
  check_range(begin, size_t(bytes), kSwizzle, site);
  begin_target(begin, size_t(bytes), site);
  const int64_t phase = begin_copy(bar, site);
  later("a copy", site, [=, thread = current_thread()] {
    fill_target(begin, size_t(bytes), site, thread, [&] { write_box(map, x, y, z, begin); });
    complete_copy(bar, bytes, phase, site);
  });
  perhaps_switch(site);
}

void bulk_copy(void* target, const void* source, int bytes, uint64_t* bar, Site site) {
  const uint32_t begin = shared_address(target, site);
  if (bytes <= 0 || bytes % 16 != 0) fail("a copy of no multiple of 16 bytes", site);
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    fail("a copy from an address not aligned to 16 bytes", site);
  }
  check_range(begin, size_t(bytes), 16, site);
  begin_target(begin, size_t(bytes), site);
  const int64_t phase = begin_copy(bar, site);
  later("a copy", site, [=, thread = current_thread()] {
    if (__asan_region_is_poisoned(const_cast<void*>(source), size_t(bytes))) {
      fail("a copy from memory that may not be read", site, thread);
    }
    fill_target(begin, size_t(bytes), site, thread,
                [&] { std::memcpy(target, source, size_t(bytes)); });
    complete_copy(bar, bytes, phase, site);
  });
  perhaps_switch(site);
}

}  // namespace execution
