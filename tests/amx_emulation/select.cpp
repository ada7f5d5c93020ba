// SPDX-License-Identifier: MIT
// select for bfloat16 on the tiles of amx_emulation.h, as a function for the tests, and the
// library's check of AMX.
#include <memory>

#include "../../csrc/cpu/select.h"

using namespace convnn;

extern "C" bool multiplies_correctly() { return amx::AmxScreen::multiplies_correctly(); }

// How many products of tiles have been computed.
extern "C" int64_t products_of_tiles() { return amx_emulation::products; }

// query [batch, n, d], key [batch, m, d], similarities and indices [batch, n, k]. metric: 0 cosine,
// 1 dot.
extern "C" void select_bfloat16(int64_t batch, int64_t n, int64_t m, int64_t d, int64_t k,
                                int metric, const void* query, const void* key, float* similarities,
                                int64_t* indices) {
  const StridedRows queries = {query, d, n * d}, keys = {key, d, m * d};
  const SelectParams params = {
      batch,   n,    m,       d, k,       DType::bfloat16, Metric(metric), Order::similarity,
      queries, keys, nullptr, 0, nullptr, nullptr,         similarities,   indices};
  const SelectKernel kernel = amx::select_kernel<amx::bfloat16>();
  const auto allocate = [](size_t bytes) {
    return std::unique_ptr<void, decltype(&std::free)>(
        std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free);
  };
  const auto packed = allocate(size_t(batch) * kernel.packed_bytes(params, m));
  const auto scratch = allocate(kernel.scratch_bytes(params));
  const SelectWork work = {0, m, nullptr, nullptr, packed.get()};
  const auto tasks = [batch](int64_t items, int64_t per_task) {
    return batch * ((items + per_task - 1) / per_task);
  };
  kernel.pack(params, work, 0, tasks(m, kernel.columns_per_panel), scratch.get());
  kernel.rows(params, work, 0, tasks(n, kernel.rows_per_task), scratch.get());
}
