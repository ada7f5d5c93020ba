// SPDX-License-Identifier: MIT
// aggregate on the CPU: the gathered, modulated neighbors X_nn,i = diag(rho(s_i)) V[I_i, :]
// (Eq. 6) under a convolution of kernel k and stride k, without X_nn.
//
//   none       y_i    = b    + sum_j rho_ij V[I_ij]
//   depthwise  y_i[c] = b[c] + sum_j W[c, j] rho_ij V[I_ij, c]
//   dense      y_i[o] = b[o] + sum_j sum_c W[o, c, j] rho_ij V[I_ij, c]
//
// A task computes kBlockRows query rows. Without a dense convolution a row is a sum of k scaled
// rows of V, in registers, a block of channels at a time (wide_rows.h). The sum is in float64,
// since k may be large. A dense convolution is a matrix product over depth (j, c): a task
// gathers the scaled rows of a few slots j at a time as one operand of the tile; the other operand
// is the weight, packed once, by tasks of their own.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "modulate.h"
#include "register_tile.h"
#include "wide_rows.h"

namespace convnn::CONVNN_ISA {

constexpr int64_t kGatheredDepth = 512;  // depth gathered at a time, but at least one slot
constexpr int64_t kNearDepth = 128;      // depth that all panels use while it is in the L1 cache
// Blocks of rows at once if the weight is too large for a near cache, which then reads it less
// often.
constexpr int64_t kNearWeightBytes = 1 << 18;
constexpr int64_t kFarWeightBlocks = 4;
constexpr int64_t kPackedColumns = 256;  // of a panel of the weight, packed by one task

// Transposes a block of a weight of one channel or output per lane. Element t < count <= kLanes of
// row i, from[i * stride + t], goes to to(t)[i]; lanes from `rows` on become 0. `readable` elements
// of the weight begin at `from`: whole vectors are read where there are that many.
template <class A, class T, class To>
inline void pack_block(const T* from, int64_t stride, int64_t readable, int64_t rows, int64_t count,
                       const To& to) {
  Vector<A> block[kLanes<A>] = {};
  for (int64_t i = 0; i < min_of(rows, kLanes<A>); ++i) {
    const T* row = from + i * stride;
    A wide[kLanes<A>] = {};
    if (i * stride + kLanes<A> <= readable) {
      for (int t = 0; t < kLanes<A>; ++t) wide[t] = widen(row[t]);
    } else {
      for (int64_t t = 0; t < count; ++t) wide[t] = widen(row[t]);
    }
    block[i] = load(wide);
  }
  transpose<A>(block);
  for (int64_t t = 0; t < count; ++t) store(to(t), block[t]);
}

// Multiplies rows [rows, stride], whole tiles of them, by panels [depth, kTileColumns<A>] that lie
// panel_stride apart, of `columns` columns together. c [rows, ldc]; ldc has whole panels.
template <class A>
inline void multiply_panels(const A* a, int64_t stride, int64_t rows, const A* panels,
                            int64_t panel_stride, int64_t depth, int64_t columns, A* c, int64_t ldc,
                            bool accumulate = false) {
  constexpr int64_t kPanel = kTileColumns<A>;
  static_assert(kNearDepth % kDenseSummedSteps == 0, "the sums are those of one product");
  int64_t t = 0;
  do {
    const int64_t steps = min_of(kNearDepth, depth - t);
    for (int64_t j = 0; j < columns; j += kPanel) {
      multiply<A, false, kDenseSummedSteps>(
          {a + t, stride, 1}, rows, panels + j / kPanel * panel_stride + t * kPanel, steps,
          min_of(kPanel, columns - j), c + j, ldc, accumulate || t > 0);
    }
    t += steps;
  } while (t < depth);
}

// Begins to read a row that is gathered later; of a long row only the beginning, as processors read
// ahead of what is read in order.
template <class T>
inline void prefetch_row(const T* row, int64_t count) {
  constexpr int64_t kBytes = 256, kLine = 64;
  const int64_t bytes = min_of(count * int64_t(sizeof(T)), kBytes);
  for (int64_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + at);
  }
}

// to[c] = from[c], in the type of sums
template <class T>
inline void copy_row(const T* __restrict from, int64_t count, accumulate_t<T>* __restrict to) {
  for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c]);
}

// to[c] = scale * v[c], rounded once.
template <class T, class A>
inline void scale_row(const T* __restrict v, double scale, int64_t channels, A* __restrict to) {
  each_block<4>(channels, [&](auto block, int64_t first) {
#pragma GCC unroll 4
    for (int i = 0; i < block.kVectors; ++i) {
      block.store(to + first, block.load(v + first, i) * scale, i);
    }
  });
}

template <class T>
class Aggregate {
  using A = accumulate_t<T>;
  static constexpr int64_t kPanel = kTileColumns<A>;

  struct Scratch {
    double* rho;  // [rows, k], kBlockRows, with a dense convolution blocks_at_once() times as many
    A* gathered;  // dense: [rows, padded_stride of slots_at_once * c]
    A* output;    // dense: [rows, padded_outputs]
    size_t bytes;

    Scratch(const AggregateParams& p, void* base) {
      const bool dense = p.convolution == Convolution::dense;
      Arena arena(base);
      const int64_t rows = dense ? blocks_at_once(p) * kBlockRows : kBlockRows;
      rho = arena.take<double>(rows * p.k);
      gathered = arena.take<A>(dense ? rows * padded_stride<A>(slots_at_once(p) * p.c) : 0);
      output = arena.take<A>(dense ? rows * padded_outputs(p) : 0);
      bytes = arena.used();
    }
  };

  static int64_t slots_at_once(const AggregateParams& p) {
    return min_of(p.k, max_of(1, kGatheredDepth / max_of(1, p.c)));
  }
  // Blocks of rows that use a weight while it is in a near cache.
  static int64_t blocks_at_once(const AggregateParams& p) {
    return p.k * p.c * p.o * int64_t(sizeof(A)) > kNearWeightBytes ? kFarWeightBlocks : 1;
  }
  static int64_t padded_outputs(const AggregateParams& p) { return ceil_div(p.o, kPanel) * kPanel; }

 public:
  // Depthwise: [k, c] in float64, because every row would be converted again. Dense:
  // [o panels, k * c, kPanel].
  static size_t packed_weight_bytes(const AggregateParams& p) {
    if (p.convolution == Convolution::none) return 0;
    if (p.convolution == Convolution::depthwise) return size_t(p.k * p.c) * sizeof(double);
    return size_t(padded_outputs(p) * p.k * p.c) * sizeof(A);
  }

  // Dense: blocks of kPackedColumns of [c, k] for each panel of outputs.
  static int64_t pack_tasks(const AggregateParams& p) {
    if (p.convolution != Convolution::dense) return p.convolution == Convolution::depthwise;
    return padded_outputs(p) / kPanel * ceil_div(p.c * p.k, kPackedColumns);
  }

  static void pack_weight(const AggregateParams& p, void* packed, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(p.weight);
    const int64_t columns = p.c * p.k;
    if (p.convolution == Convolution::depthwise) {
      double* to = static_cast<double*>(packed);
      for (int64_t i = 0; i < columns; ++i) to[i % p.k * p.c + i / p.k] = widen(weight[i]);
      return;
    }
    A* to = static_cast<A*>(packed);
    const int64_t blocks = ceil_div(columns, kPackedColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / blocks * kPanel, from = task % blocks * kPackedColumns;
      const int64_t count = min_of(kPackedColumns, columns - from);
      A* rows[kPackedColumns];  // of the packed panel
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = (from + i) / p.k, j = (from + i) % p.k;
        rows[i] = to + first * columns + (j * p.c + c) * kPanel;
      }
      for (int64_t o = first; o < first + kPanel; o += kLanes<A>) {
        for (int64_t i = 0; i < count; i += kLanes<A>) {
          const int64_t at = o * columns + from + i;
          pack_block<A>(weight + at, columns, p.o * columns - at, p.o - o,
                        min_of(kLanes<A>, count - i),
                        [&](int64_t t) { return rows[i + t] + o - first; });
        }
      }
    }
  }

  static size_t scratch_bytes(const AggregateParams& p) { return Scratch(p, nullptr).bytes; }

  static void rows(const AggregateParams& p, const void* packed_weight, int64_t begin, int64_t end,
                   void* base) {
    const Scratch scratch(p, base);
    const bool dense = p.convolution == Convolution::dense;
    const int64_t at_once = dense ? blocks_at_once(p) : 1;
    for (int64_t task = begin; task < end; task += at_once) {
      const int64_t first = task * kBlockRows;  // row of the flattened batch
      const int64_t last = min_of(min_of(task + at_once, end) * kBlockRows, p.batch * p.n);
      modulate(p, first, last - first, scratch.rho);
      if (dense) {
        convolve(p, static_cast<const A*>(packed_weight), first, last - first, scratch);
      } else {
        const double* weight = static_cast<const double*>(packed_weight);
        for (int64_t row = first; row < last; ++row) {
          weighted_sum(p, weight, row, scratch.rho + (row - first) * p.k);
        }
      }
    }
  }

 private:
  // One row without a dense convolution. weight [k, c] or null.
  static void weighted_sum(const AggregateParams& p, const double* weight, int64_t row,
                           const double* rho) {
    const int64_t* indices = p.indices + row * p.k;
    each_block<kSumVectors>(p.c, [&](auto block, int64_t first) {
      const T* value = p.value.at<T>(row / p.n);
      Vector<double> sum[decltype(block)::kVectors] = {};
      for (int64_t j = 0; j < p.k; ++j) {
        if (is_missing(similarity_at(p, row * p.k + j))) continue;
        const T* v = value + indices[j] * p.value.row_stride + first;
        if (weight) {
          add_scaled(block, rho[j], weight + j * p.c + first, v, sum);
        } else {
          add_scaled(block, rho[j], v, sum);
        }
      }
      if (p.bias) add_scaled(block, 1, static_cast<const T*>(p.bias) + first, sum);
      store_sum(block, sum, static_cast<T*>(p.output) + row * p.o + first);
    });
  }

  // At most blocks_at_once() * kBlockRows rows with a dense convolution, starting at `first`.
  // weight [o panels, k * c, kPanel].
  static void convolve(const AggregateParams& p, const A* weight, int64_t first, int64_t rows,
                       const Scratch& scratch) {
    const int64_t width = padded_outputs(p);
    for (int64_t slot = 0; slot < p.k; slot += slots_at_once(p)) {
      const int64_t slots = min_of(slots_at_once(p), p.k - slot);
      const int64_t depth = slots * p.c, stride = padded_stride<A>(depth);
      gather(p, first, rows, slot, slots, scratch.rho, scratch.gathered);
      multiply_panels(scratch.gathered, stride, rows, weight + slot * p.c * kPanel,
                      p.k * p.c * kPanel, depth, p.o, scratch.output, width, slot > 0);
    }
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t r = 0; r < rows; ++r) {
      T* output = static_cast<T*>(p.output) + (first + r) * p.o;
      const A* sum = scratch.output + r * width;
      for (int64_t o = 0; o < p.o; ++o) {
        narrow(bias ? sum[o] + A(widen(bias[o])) : sum[o], output[o]);
      }
    }
  }

  // rho V[I] of some slots of some rows to [whole tiles of rows, padded_stride(slots * c)].
  static void gather(const AggregateParams& p, int64_t first, int64_t rows, int64_t slot,
                     int64_t slots, const double* rho, A* gathered) {
    const int64_t stride = padded_stride<A>(slots * p.c);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = (first + r) / p.n;
      const T* value = p.value.at<T>(b);
      A* to = gathered + r * stride;
      for (int64_t j = slot; j < slot + slots; ++j, to += p.c) {
        const int64_t entry = (first + r) * p.k + j;
        if (is_missing(similarity_at(p, entry))) {
          std::fill_n(to, p.c, A(0));
        } else {
          scale_row(value + p.indices[entry] * p.value.row_stride, rho[r * p.k + j], p.c, to);
        }
      }
    }
    for (int64_t r = rows; r < ceil_div(rows, kTileRows) * kTileRows; ++r) {
      std::fill_n(gathered + r * stride, slots * p.c, A(0));
    }
  }
};

template <class T>
AggregateKernel aggregate_kernel() {
  using K = Aggregate<T>;
  return {kBlockRows,     K::packed_weight_bytes, K::pack_tasks,
          K::pack_weight, K::scratch_bytes,       K::rows};
}

}  // namespace convnn::CONVNN_ISA
