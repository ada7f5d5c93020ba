// SPDX-License-Identifier: MIT
#include "select.cuh"

#include "hopper.h"
#include "sort.h"

namespace convnn::cuda {
namespace {

// Blocks of group_maxima_kernel that fill a device.
constexpr int64_t kFullDevice = 1024;
// Columns in a group, or 0 if exact_topk_kernel scores all columns. Larger groups mean fewer maxima
// and more members in the chosen groups.
int64_t group_size(DType dtype, int64_t columns, int64_t chosen) {
  const int64_t group = columns < 4096 ? 8 : columns < 16384 ? 16 : columns < (1 << 18) ? 32 : 64;
  const bool few = columns <= std::max<int64_t>(256, 2 * chosen * group);
  return dtype == DType::float64 || chosen > kLongestList || few ? 0 : group;
}

template <class T>
struct Rows {
  const T* rows;
  const Accumulate<T>* inverse;
};

// The rows that the similarities are computed from: for the cosine the scaled rows [count, d].
template <class T>
Rows<T> prepare(const SelectParams& p, const void* x, int64_t count, Context& context) {
  const T* rows = static_cast<const T*>(x);
  if (p.metric != Metric::cosine) return {rows, nullptr};
  T* scaled = std::is_same_v<T, Float16> ? nullptr : allocate<T>(context, count * p.d);
  const Norms<Accumulate<T>> norms = norms_of(rows, scaled, count, p.d, context);
  return {scaled ? scaled : rows, norms.inverse};
}

template <class T, bool kHasRanges>
void select_as(const SelectParams& p, Context& context) {
  using A = Accumulate<T>;
  SelectWork<T> w = {};
  w.p = p;
  const Rows<T> query = prepare<T>(p, p.query.data, p.batch * p.n, context);
  const bool same = p.query == p.key && p.n == p.m;
  const Rows<T> key = same ? query : prepare<T>(p, p.key.data, p.batch * p.m, context);
  w.query = query.rows;
  w.inverse_query = query.inverse;
  w.key = key.rows;
  w.inverse_key = key.inverse;
  w.columns = p.candidates ? p.r : p.m;
  w.chosen = p.k + p.exclude_self;
  w.group = group_size(p.dtype, w.columns, w.chosen);
  w.rows = p.candidates;
  w.rows_stride = p.candidates_stride;
  const bool long_by_index = p.order == Order::index && p.k > kLongestList;
  if (p.candidates && (w.group || long_by_index || p.key_range)) {
    w.rows = sort_rows(p.candidates, p.candidates_stride ? p.batch : 1, p.r, p.m, context);
  }

  const int64_t blocks = p.batch * ceil_div(p.n, kTile);
  const size_t list_bytes = kWarps * NearestList<A>::bytes(std::min<int64_t>(p.k, kLongestList));
  constexpr int64_t kBlocksOfTile = kTile / kWarps;
  if (!w.group) {
    launch("exact_topk_kernel", exact_topk_kernel<T, kHasRanges>, ceil_div(p.batch * p.n, kWarps),
           list_bytes, context, w);
    return;
  }
  if constexpr (!std::is_same_v<T, double>) {
    w.groups = ceil_div(w.columns, w.group);
    while ((int64_t(1) << w.log_group) < w.group) ++w.log_group;
    w.without_mma =
        p.metric == Metric::euclidean || (std::is_same_v<T, float> && p.d < kFewestSplitTerms);
    const int64_t row_bytes = kTile * (w.groups + w.chosen) * int64_t(sizeof(uint32_t));
    const int64_t at_once = std::clamp<int64_t>(context.most_bytes / row_bytes, 1, blocks);
    w.maxima = allocate<uint32_t>(context, at_once * kTile * w.groups);
    w.top_groups = allocate<uint32_t>(context, at_once * kTile * w.chosen);
    const size_t tile_bytes = 2 * kTileElements<T> * sizeof(T) + kTile * 2 * sizeof(float);
    const size_t top_groups_bytes = kWarps * NearestList<float>::bytes(w.chosen);
    for (w.first = 0; w.first < blocks; w.first += at_once) {
      const int64_t count = std::min(at_once, blocks - w.first);
      w.splits = std::min(ceil_div(w.columns, kTile), ceil_div(kFullDevice, count));
      launch("group_maxima_kernel", group_maxima_kernel<T, kHasRanges>, count * w.splits,
             tile_bytes, context, w);
      launch("top_groups_kernel", top_groups_kernel<T, kHasRanges>, count * kBlocksOfTile,
             top_groups_bytes, context, w);
      launch("exact_topk_kernel", exact_topk_kernel<T, kHasRanges>, count * kBlocksOfTile,
             list_bytes, context, w);
    }
  }
}

}  // namespace

void select(const SelectParams& p, Context& context) {
  // The number of a row must fit into a key of order.cuh.
  constexpr int64_t kMostRows = std::numeric_limits<uint32_t>::max();
  if (p.dtype != DType::float64 && p.m > kMostRows) {
    throw std::runtime_error("convnn: key must have at most " + std::to_string(kMostRows) +
                             " rows unless it is float64, got " + std::to_string(p.m));
  }
  if (p.batch == 0 || p.n == 0) return;
  if (!hopper_refuses(p, nullptr)) {
    HopperChoices choices;
    choices.portable = true;
    hopper_forward(p, nullptr, context, choices);
    return;
  }
  with_type(p.dtype, [&](auto t) {
    if (p.key_range) {
      select_as<decltype(t), true>(p, context);
    } else {
      select_as<decltype(t), false>(p, context);
    }
  });
}

}  // namespace convnn::cuda
