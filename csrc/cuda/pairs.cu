// SPDX-License-Identifier: MIT
#include "pairs.cuh"

namespace convnn::cuda {
namespace {

// A tile has at least so many pairs, and as many as there are keys; a batch element has at most so
// many tiles.
constexpr int64_t kFewestOfTile = 4096;
constexpr int64_t kMostTiles = 256;

int shift_of(int64_t k) {
  int shift = 0;
  while ((int64_t(1) << shift) < k) ++shift;
  return shift;
}

template <class Id>
void sort(PairSort p, Context& context) {
  p.ranges = std::max<int64_t>(1, ceil_div(p.m, kRange<Id>));
  p.counts = allocate<Id>(context, p.batch * p.tiles * p.m);
  p.sums = allocate<Id>(context, p.batch * p.blocks);
  p.starts = allocate<Id>(context, p.batch * p.m);
  p.stops = allocate<Id>(context, p.batch * p.m);
  const int64_t blocks = p.batch * p.tiles * p.ranges;
  const int64_t keys = std::clamp<int64_t>(p.m, kThreads, kRange<Id>);
  const size_t bytes = size_t(keys) * sizeof(Id);
  launch("count_pairs_kernel", count_pairs_kernel<Id>, blocks, bytes, context, p);
  launch("place_keys_kernel", place_keys_kernel<Id>, p.batch * p.blocks, kThreads * sizeof(Id),
         context, p);
  launch("scatter_pairs_kernel", scatter_pairs_kernel<Id>, blocks, bytes, context, p);
}

}  // namespace

bool fit_narrow_pairs(int64_t batch, int64_t n, int64_t m, int64_t k) {
  constexpr int64_t kMost = int64_t(1) << 30;
  return batch * m < kMost && batch * n < kMost >> shift_of(k);
}

PairList sort_pairs(int64_t batch, int64_t n, int64_t m, int64_t k, bool is_narrow,
                    const void* similarities, DType similarity_dtype, const int64_t* indices,
                    Context& context) {
  const int64_t count = batch * n * k, bytes = is_narrow ? sizeof(Narrow) : sizeof(Wide);
  PairSort p = {};
  p.batch = batch, p.n = n, p.m = m, p.k = k;
  p.each = std::max({kFewestOfTile, m, ceil_div(n * k, kMostTiles)});
  p.tiles = std::max<int64_t>(1, ceil_div(n * k, p.each));
  p.blocks = ceil_div(m, kThreads);
  p.shift = shift_of(k);
  p.similarities = similarities, p.similarity_dtype = similarity_dtype, p.indices = indices;
  p.pairs = allocate<char>(context, count * bytes);
  p.begins = allocate<char>(context, batch * m * bytes);
  p.ends = allocate<char>(context, batch * m * bytes);
  if (is_narrow) {
    sort<Narrow>(p, context);
  } else {
    sort<Wide>(p, context);
  }
  return {is_narrow, p.shift, p.pairs, p.begins, p.ends, count};
}

}  // namespace convnn::cuda
