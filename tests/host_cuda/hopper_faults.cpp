// SPDX-License-Identifier: MIT
// A sound kernel of the kind that csrc/cuda/hopper.cuh is for, and the same with one fault, named
// by the argument, to test that the execution layer detects it. Arguments: a seed of scheduling,
// the fault ("none").
//
// C = (A B^T) f: A [kBlocks * 128, 64], B [kCount, 64], f [kCount], 16 and 32 bits. A block has 128
// rows of A. Warp 0 copies tiles of 128 rows of B, and of f, to a ring of stages. Warpgroup 1
// multiplies its 64 rows of A from registers, warpgroup 2 from shared memory. A second kernel,
// launched dependent, adds 1. All are small integers, so that the results are exact.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/hopper.cuh"

namespace {

using namespace convnn::cuda;

constexpr int kThreadsHere = 384, kBlocks = 2, kRows = 128, kDepth = 64, kTile = 128, kStages = 2;
constexpr int kCount = 600, kTiles = (kCount + kTile - 1) / kTile;

constexpr execution::Site kHere = {__FILE__, __LINE__};

const char* fault = "none";
bool has(const char* name) { return std::strcmp(fault, name) == 0; }

struct Shared {
  alignas(1024) unsigned char tiles[kStages][kTile * 128];
  alignas(1024) unsigned char rows[64 * 128];
  alignas(16) float factors[kStages][kTile];
  uint64_t full[kStages], empty[kStages], never;
};
Shared& shared() { return *reinterpret_cast<Shared*>(swizzled_shared_memory()); }

struct Params {
  const BFloat16* a;     // [kBlocks * kRows, kDepth]
  const float* factors;  // [kTiles * kTile]
  float* c;              // [kBlocks * kRows, kTiles * kTile]
};

void start() {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared().full[i], 1);
      barrier_init(&shared().empty[i], 8);
    }
    if (!has("no_fence_barrier_init")) fence_barrier_init();
    if (has("barrier_initialized_again")) barrier_init(&shared().full[0], 1);
    if (has("barrier_overwritten")) shared().full[1] = 0;
  }
  if (!has("no_barrier_after_init")) __syncthreads();
}

void copy_tile(const TensorMap& map, const Params& p, int tile, int stage) {
  Shared& sh = shared();
  uint64_t* full = &sh.full[stage];
  int bytes = kTile * 128 + kTile * 4;
  if (has("more_bytes_expected")) bytes += 16;
  if (has("fewer_bytes_expected")) bytes -= kTile * 4;
  if (has("no_bytes_expected")) bytes = 0;
  barrier_expect(full, bytes);
  load_box(sh.tiles[stage], &map, 0, tile * kTile, 0, full);
  if (has("copy_not_aligned")) bulk_copy(sh.factors[stage] + 1, p.factors, kTile * 4, full);
  if (has("copy_of_odd_size")) bulk_copy(sh.factors[stage], p.factors, kTile * 4 - 8, full);
  if (has("source_not_aligned")) bulk_copy(sh.factors[stage], p.factors + 1, kTile * 4, full);
  if (has("source_ends")) tile += kTiles;
  bulk_copy(sh.factors[stage], p.factors + tile * kTile, kTile * 4, full);
  if (has("target_written_in_flight")) sh.factors[stage][5] = 1;
  if (has("too_many_arrivals")) barrier_arrive(full);
}

void produce(const TensorMap& map, const Params& p) {
  Shared& sh = shared();
  if (has("registers_not_multiple_of_8")) execution::set_registers(42, false, kHere);
  if (has("registers_of_part_of_warpgroup") && warp() > 0) return;
  if (!has("no_registers_released")) release_registers<40>();
  if (threadIdx.x != 0) return;
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2;
    if (!has("no_wait_for_empty")) barrier_wait(&sh.empty[stage], parity ^ 1);
    copy_tile(map, p, tile, stage);
  }
  if (has("copy_not_waited_for")) {
    barrier_wait(&sh.empty[kTiles % kStages], kTiles / kStages % 2 ^ 1);
    copy_tile(map, p, 0, kTiles % kStages);
  }
  if (has("copy_without_expect")) {
    barrier_wait(&sh.empty[kTiles % kStages], kTiles / kStages % 2 ^ 1);
    bulk_copy(sh.factors[kTiles % kStages], p.factors, 16, &sh.full[kTiles % kStages]);
  }
}

// The rows of A of a warpgroup, row by row 64 elements.
const BFloat16* own_rows(const Params& p) {
  return p.a + (int64_t(blockIdx.x) * kRows + (warp() / 4 - 1) * 64) * kDepth;
}
void load_registers(const Params& p, uint32_t (&a)[4][4]) {
  const BFloat16* rows = own_rows(p) + warp() % 4 * 16 * kDepth;
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane() / 4 + i % 2 * 8, column = step * 16 + i / 2 * 8 + lane() % 4 * 2;
      copy4(&a[step][i], rows + row * kDepth + column);
    }
  }
}
// Ordinary stores, with the swizzle.
void store_rows(const Params& p) {
  const BFloat16* rows = own_rows(p);
  for (int i = int(threadIdx.x) % kWarpgroup; i < 64 * 8; i += kWarpgroup) {
    const int row = i / 8, chunk = i % 8;
    copy16(shared().rows + row * 128 + (chunk ^ row % 8) * 16, rows + row * kDepth + chunk * 8);
  }
  if (!has("no_fence_async_shared")) fence_async_shared();
  if (has("named_barrier_never_full")) named_barrier(1, 256);
  if (has("named_barrier_of_too_few")) named_barrier(1, 64);
  if (has("named_barrier_of_half_a_warp")) named_barrier(1, 48);
  named_barrier(1, kWarpgroup);
}

uint64_t descriptor_of_tile(int stage, int step) {
  const uint32_t address = shared_address(shared().tiles[stage]);
  uint64_t b = descriptor(address) + uint64_t(step) * 2;
  if (has("descriptor_without_swizzle")) b &= ~(uint64_t(3) << 62);
  if (has("descriptor_with_other_stride")) b += uint64_t(1) << 32;
  if (has("descriptor_not_aligned")) b += 1;
  if (has("descriptor_of_second_row")) b += 8;
  if (has("descriptor_outside")) b += sizeof(Shared) / 16;
  if (has("products_differ") && warp() == 6) b = descriptor(address);
  if (has("product_by_one_thread_differs") && threadIdx.x == 300) b = descriptor(address);
  return b;
}

void multiply(float (&d)[kTile / 2], uint32_t (&a)[4][4], int stage) {
  if (!has("no_wgmma_fence")) wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    const uint64_t b = descriptor_of_tile(stage, step);
    if (has("lanes_at_different_products") && threadIdx.x == 140) {
      wgmma<BFloat16, kTile>(d, a[step], b, step > 0);
    } else if (warp() < 8) {
      wgmma<BFloat16, kTile>(d, a[step], b, step > 0);
    } else {
      const uint64_t rows = descriptor(shared_address(shared().rows)) + uint64_t(step) * 2;
      wgmma<BFloat16, kTile>(d, rows, b, step > 0);
    }
  }
  if (has("accumulators_written_in_flight")) d[3] = 0;
  if (!has("no_wgmma_commit") && !(has("lane_does_not_commit") && threadIdx.x == 140)) {
    wgmma_commit();
  }
  if (has("a_written_in_flight")) a[0][0] ^= 1;
  if (has("stage_released_early") && lane() == 0) barrier_arrive(&shared().empty[stage]);
  if (!has("no_wgmma_wait")) wgmma_wait<0>();
  if (has("written_before_hold")) d[0] += 1;
  if (!has("no_hold")) hold(d);
}

void store_tile(const float (&d)[kTile / 2], float* c, int stage) {
  for (int i = 0; i < kTile / 2; ++i) {
    const int row = warp() % 4 * 16 + lane() / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
    c[row * kTiles * kTile + column] = d[i] * shared().factors[stage][column];
  }
}

void consume(const Params& p) {
  Shared& sh = shared();
  claim_registers<224>();
  uint32_t a[4][4];
  load_registers(p, a);
  if (warp() >= 8) {
    store_rows(p);
  } else if (has("named_barrier_of_two_warpgroups")) {
    named_barrier(1, kWarpgroup);
  }
  const int64_t row = int64_t(blockIdx.x) * kRows + (warp() / 4 - 1) * 64;
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2 ^ int(has("wrong_parity"));
    if (!has("no_wait_for_full")) barrier_wait(&sh.full[stage], parity);
    if (has("barrier_not_initialized")) barrier_wait(&sh.never, 0);
    float d[kTile / 2];
    multiply(d, a, stage);
    store_tile(d, p.c + row * kTiles * kTile + tile * kTile, stage);
    if (has("lanes_elsewhere") && lane() == 3) continue;
    if (!has("no_warp_barrier_before_release")) __syncwarp();
    if (has("no_release_of_stages") || has("stage_released_early")) continue;
    if (lane() == 0) barrier_arrive(&sh.empty[stage]);
  }
  if (has("product_in_flight_at_end")) {
    float d[kTile / 2];
    wgmma_fence();
    wgmma<BFloat16, kTile>(d, a[0], descriptor(0), false);
    wgmma_commit();
  }
}

void multiply_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ Params p) {
  start();
  if (threadIdx.x < kWarpgroup) {
    produce(map, p);
  } else {
    consume(p);
  }
  launch_dependents();
}

// result = c + 1, [size] both.
void add_one_kernel(const float* c, float* result, int64_t size) {
  if (!has("no_wait_for_previous") && !(has("some_do_not_wait") && threadIdx.x == 77)) {
    wait_for_previous();
  }
  for (int64_t i = grid_thread(); i < size; i += grid_threads()) result[i] = c[i] + 1;
}

class NoMemory : public Context {
 public:
  NoMemory() : Context(nullptr) {}
  void* allocate(size_t) override { std::abort(); }
};

float number(size_t i) { return float(int(i * 7919 % 17) - 8); }

// The values as bfloat16, aligned.
std::vector<BFloat16> numbers(size_t count, size_t seed) {
  std::vector<BFloat16> values(count);
  for (size_t i = 0; i < count; ++i) narrow(number(i + seed), values[i]);
  return values;
}

bool is_right(const std::vector<float>& result) {
  for (int64_t row = 0; row < kBlocks * kRows; ++row) {
    for (int64_t column = 0; column < kTiles * kTile; ++column) {
      float sum = 0;
      for (int64_t i = 0; i < kDepth && column < kCount; ++i) {
        sum += number(size_t(row * kDepth + i)) * number(size_t(column * kDepth + i) + 5);
      }
      const float expected = sum * number(size_t(column)) + 1;
      if (result[size_t(row * kTiles * kTile + column)] != expected) return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  execution::seed(std::stoul(arguments[1]));
  fault = arguments[2];
  const std::vector<BFloat16> a = numbers(kBlocks * kRows * kDepth, 0);
  const std::vector<BFloat16> b = numbers(kCount * kDepth, 5);
  std::vector<float> factors(kTiles * kTile);
  for (size_t i = 0; i < factors.size(); ++i) factors[i] = number(i);
  std::vector<float> c(kBlocks * kRows * kTiles * kTile), result(c.size());
  execution::written_by_kernels(c.data(), c.size() * sizeof(float));
  execution::written_by_kernels(result.data(), result.size() * sizeof(float));
  NoMemory context;
  const Params p = {a.data(), factors.data(), c.data()};
  launch_hopper("multiply", multiply_kernel, kBlocks, kThreadsHere, sizeof(Shared), false, context,
                map_rows(b.data(), 1, kCount, kDepth, kTile), p);
  launch_hopper("add_one", add_one_kernel, 4, kThreads, 0, true, context,
                static_cast<const float*>(c.data()), result.data(), int64_t(c.size()));
  if (is_right(result)) return 0;
  std::fprintf(stderr, "wrong result\n");
  return 1;
}
