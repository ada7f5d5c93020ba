// SPDX-License-Identifier: MIT
// The k nearest keys of every query: S = Q K^T (Eq. 3), s_i = k-max and I_i = k-argmax (Eq. 4, 5).
//
// S is never stored. The columns of a row of S (keys, or candidates in ascending order) are divided
// into groups of 8 to 64 consecutive columns:
//
// 1. scale_rows_kernel (cosine only): the norm of each row. One warp per row.
// 2. group_maxima_kernel: tiles of S, of which only the maximum of each group is stored. A block
//    computes 64 rows and a range of columns; the tile of S stays in registers.
// 3. top_groups_kernel: the k groups of each query with the largest maxima, ties by group number.
//    One warp per row, with its list in shared memory.
// 4. exact_topk_kernel: the similarities of the members of those groups, each summed over D in one
//    fixed order, and the k largest of them. One warp per row, one similarity per lane at a time.
//
// Every neighbor is a member of one of the k groups: a group ranked before the neighbor's group
// contains, because of its maximum or, in a tie, its lower columns, a key that precedes the
// neighbor, and fewer than k keys do. Ties and constant rows need no special case. In float32 the
// products of step 2 are split, so this holds up to their rounding, which is within the tolerance
// of a selection; exact sums remain exact under the conditions of matmul_tile.cuh. A float32 sum
// that is not finite in step 2 is recomputed in the order of step 4.
//
// With exclude_self, the token itself is one more key that precedes, so k + 1 groups are taken.
//
// With key_range, step 2 skips the tiles of columns that none of its 64 rows sees, and writes no
// maxima of their groups. Step 3 reads those of the groups of which a row sees a column. Step 4
// scores the members that the row sees.
//
// With few columns, and for float64, steps 2 and 3 are skipped and exact_topk_kernel scores all
// columns, or those that the row sees. So it does for k beyond the longest list, in several rounds:
// each fills the list with the keys that follow the last one of the round before.
#pragma once

#include "matmul_tile.cuh"
#include "normalize.cuh"
#include "order.cuh"
#include "select_columns.cuh"

namespace convnn::cuda {

// The similarity of query q [d] and key k [d], without the norms: eight interleaved sums, the same
// for every pair and in every path. With kEndsAtNan it returns as soon as a sum is NaN, which no
// later term changes.
template <bool kEndsAtNan, class T>
__device__ inline Accumulate<T> raw_similarity(Metric metric, const T* q, const T* k, int64_t d) {
  using A = Accumulate<T>;
  constexpr int kSums = 8;
  A sum[kSums] = {};
  int64_t i = 0;
  const bool aligned = is_aligned16(q) && is_aligned16(k);
  for (; i < d; i += kSums) {
    alignas(16) T of_q[kSums] = {}, of_k[kSums] = {};
    if (aligned && i + kSums <= d) {
      constexpr int kStep = 16 / sizeof(T);
#pragma unroll
      for (int j = 0; j < kSums; j += kStep) {
        copy16(of_q + j, q + i + j);
        copy16(of_k + j, k + i + j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        if (i + j < d) {
          of_q[j] = q[i + j];
          of_k[j] = k[i + j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      const A a = widen(of_q[j]), b = widen(of_k[j]);
      if (metric == Metric::euclidean) {
        sum[j] -= (a - b) * (a - b);
      } else {
        sum[j] += a * b;
      }
    }
    if constexpr (kEndsAtNan) {
      bool is_nan = false;
#pragma unroll
      for (int j = 0; j < kSums; ++j) is_nan = is_nan || sum[j] != sum[j];
      if (is_nan) return kNan<A>;
    }
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// Maxima of the groups of S for 64 rows and every splits-th tile of 64 columns. A maximum only
// decides which groups are scored again, so 1 / ||q|| is applied to it rather than to S.
template <class T, bool kHasRanges>
__global__ __launch_bounds__(kThreads) void group_maxima_kernel(const SelectWork<T> w) {
  static_assert(!std::is_same_v<T, double>);
  T* tile_a = reinterpret_cast<T*>(shared_memory());
  T* tile_b = tile_a + kTileElements<T>;
  float* factors = reinterpret_cast<float*>(tile_b + kTileElements<T>);  // [kTile]
  int* allowed = reinterpret_cast<int*>(factors + kTile);                // [kTile]

  const SelectParams& p = w.p;
  const int64_t local = blockIdx.x / w.splits;
  const bool cosine = p.metric == Metric::cosine;
  const QueryRow loaded = query_row(w, local * kTile + loaded_row());
  const T* q = loaded.row < p.n ? w.query + (loaded.batch * p.n + loaded.row) * p.d : nullptr;
  const T* keys = w.key + loaded.batch * p.m * p.d;

  const TileColumns<T, kHasRanges> seen(w, local * kTile, reinterpret_cast<int64_t*>(tile_a));

  for (int64_t tile = seen.first_tile(blockIdx.x % w.splits, w.splits); tile * kTile < seen.end();
       tile += w.splits) {
    const int64_t loaded_key = key_row(w, loaded.batch, tile * kTile + loaded_row(), Range{0, p.m});
    const T* k = loaded_key < 0 ? nullptr : keys + loaded_key * p.d;
    if (threadIdx.x % 2 == 0) {
      allowed[loaded_row()] = loaded_key >= 0;
      factors[loaded_row()] =
          cosine && loaded_key >= 0 ? w.inverse_key[loaded.batch * p.m + loaded_key] : 1;
    }
    TileValues<float> s;
    for (int64_t d = 0; d < p.d; d += kDepth) {
      load_tile(tile_a, q, d, p.d);
      load_tile(tile_b, k, d, p.d);
      __syncthreads();
      if (!w.without_mma) {
        multiply_tile(tile_a, tile_b, s);
      } else if (p.metric == Metric::euclidean) {
        multiply_tile_without_mma<true>(tile_a, tile_b, int(min(p.d - d, int64_t(kDepth))), s);
      } else {
        multiply_tile_without_mma<false>(tile_a, tile_b, int(min(p.d - d, int64_t(kDepth))), s);
      }
      __syncthreads();
    }
    if (p.d == 0) __syncthreads();

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const QueryRow at = query_row(w, local * kTile + tile_row(h));
      const bool exists = at.row < p.n;
      const int64_t row = at.batch * p.n + at.row;
      const float factor = cosine && exists ? w.inverse_query[row] : 1;
      const auto visible = seen.of_row(h, tile);
      uint32_t* maxima = w.maxima + (local * kTile + tile_row(h)) * w.groups;
      uint32_t largest = kNothing<float>;
#pragma unroll
      for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = tile_column(n, e);
          const bool counts = allowed[column] && visible.has(column);
          float x = s.value[n][2 * h + e];
          if constexpr (std::is_same_v<T, float>) {
            // Whether a sum overflows or is NaN may depend on its order: use exact_topk_kernel's.
            // Sums of scaled rows are finite unless a row is not, whose factor is then NaN.
            if (!cosine && !isfinite(x) && exists && counts) {
              const int64_t key = key_row(w, at.batch, tile * kTile + column, Range{0, p.m});
              x = raw_similarity<true>(p.metric, w.query + row * p.d, keys + key * p.d, p.d);
            }
          }
          const uint32_t order = order_of(x * factors[column] * factor);
          if (counts && order > largest) largest = order;
        }
        if ((n + 1) * 8 % w.group == 0) {
          for (int span = 1; span < 4; span *= 2) {
            const uint32_t other = __shfl_xor_sync(kAllLanes, largest, span);
            if (other > largest) largest = other;
          }
          const int64_t group = (tile * kTile + 8 * n) / w.group;
          if (lane() % 4 == 0 && exists && group < w.groups) maxima[group] = largest;
          largest = kNothing<float>;
        }
      }
    }
    __syncthreads();
  }
}

// The groups with the largest maxima of each row, among those of which it sees a column.
template <class T, bool kHasRanges>
__global__ __launch_bounds__(kThreads) void top_groups_kernel(const SelectWork<T> w) {
  const int64_t local = grid_warp();
  const QueryRow at = query_row(w, local);
  if (at.row >= w.p.n) return;
  const int chosen = int(w.chosen);
  NearestList<float> list(shared_memory() + warp() * NearestList<float>::bytes(chosen), chosen);
  list.clear();
  const uint32_t* maxima = w.maxima + local * w.groups;
  const Range groups = visible_groups<kHasRanges>(w, at);
  for (int64_t first = groups.begin; first < groups.end; first += kWarp) {
    const int64_t group = first + lane();
    const uint32_t order = group < groups.end ? maxima[group] : kNothing<float>;
    list.push(order == kNothing<float> ? no_key<float>() : key_of<float>(order, group));
  }
  list.finish();
  for (int i = lane(); i < chosen; i += kWarp) {
    const NarrowKey key = list[i];
    w.top_groups[local * chosen + i] =
        is_nothing<float>(key) ? kNoGroup : uint32_t(index_of<float>(key));
  }
}

// The members that exact_topk_kernel scores for one query, and their similarities.
template <class T, bool kHasRanges>
class ScoredRow {
  using A = Accumulate<T>;

 public:
  __device__ ScoredRow(const SelectWork<T>& w, QueryRow at, int64_t local)
      : w_(w),
        at_(at),
        local_(local),
        visible_(visible_rows<kHasRanges>(w, at)),
        members_(w.group ? Range{0, w.chosen * w.group} : visible_columns<kHasRanges>(w, at)),
        own_row_(w.p.self_indices ? w.p.self_indices[at.batch * w.p.self_stride + at.row] : -1),
        is_own_neighbor_(!w.p.exclude_self && own_row_ >= visible_.begin &&
                         own_row_ < visible_.end &&
                         (!w.p.key_mask || w.p.key_mask[at.batch * w.p.m + own_row_])),
        self_similarity_(is_own_neighbor_ ? similarity(own_row_) : 0) {}

  // The row of key that is the token itself, or -1 if that is no neighbor, and its similarity.
  __device__ int64_t self_row() const { return is_own_neighbor_ ? own_row_ : -1; }
  __device__ A self_similarity() const { return self_similarity_; }

  // The members: those of the top groups, or all columns that the query sees.
  __device__ Range members() const { return members_; }
  // The row of key of a member, or -1. Never the token itself.
  __device__ int64_t row(int64_t member) const {
    int64_t column = member;
    if (member >= members_.end) return -1;
    if (w_.group) {
      const uint32_t group = w_.top_groups[local_ * w_.chosen + (member >> w_.log_group)];
      if (group == kNoGroup) return -1;
      column = group * w_.group + (member & (w_.group - 1));
    }
    const int64_t row = key_row(w_, at_.batch, column, visible_);
    return row == own_row_ ? -1 : row;
  }
  __device__ A similarity(int64_t row) const {
    const int64_t i = at_.batch * w_.p.n + at_.row, j = at_.batch * w_.p.m + row;
    const A s =
        raw_similarity<false>(w_.p.metric, w_.query + i * w_.p.d, w_.key + j * w_.p.d, w_.p.d);
    return w_.p.metric == Metric::cosine ? s * (w_.inverse_query[i] * w_.inverse_key[j]) : s;
  }
  __device__ Key<A> key(int64_t member) const {
    const int64_t row = this->row(member);
    return row < 0 ? no_key<A>() : key_of<A>(order_of(similarity(row)), row);
  }
  __device__ Key<A> self_key() const {
    return is_own_neighbor_ ? key_of<A>(kOrderOfSelf<A>, own_row_) : no_key<A>();
  }

 private:
  const SelectWork<T>& w_;
  const QueryRow at_;
  const int64_t local_;
  const Range visible_, members_;
  const int64_t own_row_;
  const bool is_own_neighbor_;
  const A self_similarity_;
};

// The neighbors of each row, from its top groups or from all columns.
template <class T, bool kHasRanges>
__global__ __launch_bounds__(kThreads, 4) void exact_topk_kernel(const SelectWork<T> w) {
  using A = Accumulate<T>;
  const SelectParams& p = w.p;
  const int64_t local = grid_warp();
  const QueryRow at = query_row(w, local);
  if (at.row >= p.n) return;
  const int longest = int(min(p.k, int64_t(kLongestList)));
  NearestList<A> list(shared_memory() + warp() * NearestList<A>::bytes(longest), longest);
  const ScoredRow<T, kHasRanges> row(w, at, local);
  A* similarities = static_cast<A*>(p.similarities) + (at.batch * p.n + at.row) * p.k;
  int64_t* indices = p.indices + (at.batch * p.n + at.row) * p.k;
  const bool by_index = p.order == Order::index;
  const auto store = [&](int64_t slot, Key<A> key) {
    const bool missing = is_nothing<A>(key);
    const bool is_self = !missing && high_of(key) == kOrderOfSelf<A>;
    similarities[slot] = missing   ? -kInfinity<A>
                         : is_self ? row.self_similarity()
                                   : similarity_of<A>(high_of(key));
    indices[slot] = missing ? 0 : index_of<A>(key);
  };

  // The last key of the round before: this round finds those that follow it.
  Key<A> last = highest_key<A>();
  for (int64_t slot = 0; slot < p.k; slot += longest) {
    list.clear();
    for (int64_t first = row.members().begin; first < row.members().end; first += kWarp) {
      const Key<A> key = row.key(first + lane());
      list.push(precedes(last, key) ? key : no_key<A>());
    }
    list.push(lane() == 0 && precedes(last, row.self_key()) ? row.self_key() : no_key<A>());
    list.finish();
    const int count = int(min(p.k - slot, int64_t(longest)));
    last = list[count - 1];
    if (by_index && p.k > longest) continue;
    if (by_index) {
      // Similarity and index swapped.
      list.reorder(count, [](Key<A> key) { return pack(low_of(key), high_of(key)); });
    }
    for (int i = lane(); i < count; i += kWarp) {
      const Key<A> key = list[i];
      store(slot + i, by_index ? pack(low_of(key), high_of(key)) : key);
    }
  }
  if (!by_index || p.k <= longest) return;

  // Store, in ascending order of columns, every key that does not follow the last neighbor, with
  // the token itself in between. Candidates that are not distinct may give more than k: those are
  // dropped.
  int64_t written = 0, before_self = 0;
  for (int64_t first = row.members().begin; first < row.members().end; first += kWarp) {
    const int64_t index = row.row(first + lane());
    const Key<A> key = row.key(first + lane());
    const bool keeps = index >= 0 && !precedes(last, key);
    const unsigned lanes = __ballot_sync(kAllLanes, keeps);
    if (keeps) {
      const bool after_self = row.self_row() >= 0 && index > row.self_row();
      const int64_t slot = written + __popc(lanes & ((1u << lane()) - 1)) + after_self;
      if (slot < p.k) store(slot, key);
    }
    before_self += __popc(__ballot_sync(kAllLanes, keeps && index < row.self_row()));
    written += __popc(lanes);
  }
  if (row.self_row() >= 0) {
    if (lane() == 0 && before_self < p.k) store(before_self, row.self_key());
    ++written;
  }
  for (int64_t i = written + lane(); i < p.k; i += kWarp) store(i, no_key<A>());
}

}  // namespace convnn::cuda
