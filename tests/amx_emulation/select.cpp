// SPDX-License-Identifier: MIT
// select on the AMX tiles of amx_emulation.h, as a function for tests/test_amx_emulation.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../../csrc/cpu/select.h"

using namespace convnn;

namespace {

// The memory to which the keys of such a chunk are copied, which is the same for all types.
struct ChunkInFull : amx::Select<float> {
  static float* keys(const SelectParams& p, void* scratch) { return Scratch(p, 0, scratch).panel; }
};

}  // namespace

// How many products of tiles have been computed.
extern "C" int64_t products_of_tiles() { return amx_emulation::products; }

// query [batch, n, d], key [batch, m, d], similarities and indices [batch, n, k]. metric: 0 cosine,
// 1 dot. self_indices [n] or null; key_range [n, 2] or null. Returns whether a chunk was computed
// in full, because its screen rules out too little or has no bound; without own rows.
extern "C" bool select_on_tiles(DType dtype, int64_t batch, int64_t n, int64_t m, int64_t d,
                                int64_t k, int metric, const void* query, const void* key,
                                const int64_t* self_indices, const int64_t* key_range,
                                float* similarities, int64_t* indices) {
  SelectParams p = {};
  p.batch = batch, p.n = n, p.m = m, p.d = d, p.k = k;
  p.dtype = dtype, p.metric = Metric(metric), p.order = Order::similarity;
  p.query = {query, d, n * d}, p.key = {key, d, m * d};
  p.self_indices = self_indices, p.key_range = key_range;
  p.similarities = similarities, p.indices = indices;
  const SelectKernel kernel = dtype == DType::float32   ? amx::select_kernel<float>()
                              : dtype == DType::float16 ? amx::select_kernel<amx::half>()
                                                        : amx::select_kernel<amx::bfloat16>();
  const auto allocate = [](size_t bytes) {
    return std::unique_ptr<void, decltype(&std::free)>(
        std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free);
  };
  SelectWork work = {};
  work.max_columns = m;
  work.screened = kernel.screen_pays(p, m);
  const auto packed = allocate(size_t(batch) * kernel.packed_bytes(p, m, work.screened));
  const auto scratch = allocate(kernel.scratch_bytes(p));
  work.packed = packed.get();
  const auto tasks = [batch](int64_t items, int64_t per_task) {
    return batch * ((items + per_task - 1) / per_task);
  };
  std::fill_n(static_cast<float*>(scratch.get()), kernel.scratch_bytes(p) / sizeof(float),
              std::numeric_limits<float>::quiet_NaN());
  kernel.pack(p, work, 0, tasks(m, kernel.columns_per_panel), scratch.get());
  kernel.rows(p, work, 0, tasks(n, kernel.rows_per_task), scratch.get());
  return !std::isnan(*ChunkInFull::keys(p, scratch.get()));
}
