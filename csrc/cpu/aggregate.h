// SPDX-License-Identifier: MIT
// aggregate on the CPU: the gathered, modulated neighbors X_nn,i = diag(rho(s_i)) V[I_i, :]
// (Eq. 6) under a convolution of kernel k and stride k, without X_nn.
//
//   none       y_i    = b    + sum_j rho_ij V[I_ij]
//   depthwise  y_i[c] = b[c] + sum_j W[c, j] rho_ij V[I_ij, c]
//   dense      y_i[o] = b[o] + sum_j sum_c W[o, c, j] rho_ij V[I_ij, c]
//
// A task computes kBlockRows query rows. Without a dense convolution a row is a sum of k scaled
// rows of V, in registers, kChannels at a time. The sum is in float64, since k may be large; it
// costs no more than reading V. A dense convolution is a matrix product over depth (j, c): a task
// gathers the scaled rows of a few slots j at a time as one operand of the tile; the other operand
// is the weight, packed once.
#pragma once

#include "kernels.h"
#include "modulate.h"

namespace convnn::CONVNN_ISA {

constexpr int64_t kChannels = 64;        // channels of a row in registers at a time
constexpr int64_t kGatheredDepth = 512;  // depth gathered at a time, but at least one slot

// sum[c] += term(c), c < channels <= kChannels. With its constant trip count, a full block stays in
// registers.
template <class Term>
inline void add_channels(double* sum, int64_t channels, const Term& term) {
  if (channels == kChannels) {
    for (int64_t c = 0; c < kChannels; ++c) sum[c] += term(c);
  } else {
    for (int64_t c = 0; c < channels; ++c) sum[c] += term(c);
  }
}

template <class T>
class Aggregate {
  using A = accumulate_t<T>;
  static constexpr int64_t kPanel = kTileColumns<A>;

  struct Scratch {
    double* rho;  // [kBlockRows, k]
    A* gathered;  // dense: [kBlockRows, padded_stride of slots_at_once * c]
    A* output;    // dense: [kBlockRows, padded_outputs]
    size_t bytes;

    Scratch(const AggregateParams& p, void* base) {
      const bool dense = p.convolution == Convolution::dense;
      Arena arena(base);
      rho = arena.take<double>(kBlockRows * p.k);
      gathered = arena.take<A>(dense ? kBlockRows * padded_stride<A>(slots_at_once(p) * p.c) : 0);
      output = arena.take<A>(dense ? kBlockRows * padded_outputs(p) : 0);
      bytes = arena.used();
    }
  };

  static int64_t slots_at_once(const AggregateParams& p) {
    return min_of(p.k, max_of(1, kGatheredDepth / max_of(1, p.c)));
  }
  static int64_t padded_outputs(const AggregateParams& p) { return ceil_div(p.o, kPanel) * kPanel; }

 public:
  // Depthwise: [k, c]. Dense: [o panels, k * c, kPanel].
  static size_t packed_weight_bytes(const AggregateParams& p) {
    if (p.convolution == Convolution::none) return 0;
    if (p.convolution == Convolution::depthwise) return size_t(p.k * p.c) * sizeof(A);
    return size_t(padded_outputs(p) * p.k * p.c) * sizeof(A);
  }

  static void pack_weight(const AggregateParams& p, void* packed) {
    if (p.convolution == Convolution::none) return;
    const T* weight = static_cast<const T*>(p.weight);
    A* to = static_cast<A*>(packed);
    if (p.convolution == Convolution::depthwise) {
      for (int64_t c = 0; c < p.c; ++c) {
        for (int64_t j = 0; j < p.k; ++j) to[j * p.c + c] = widen(weight[c * p.k + j]);
      }
      return;
    }
    for (int64_t o = 0; o < padded_outputs(p); ++o) {
      A* panel = to + o / kPanel * kPanel * p.k * p.c + o % kPanel;
      for (int64_t c = 0; c < p.c; ++c) {
        for (int64_t j = 0; j < p.k; ++j) {
          panel[(j * p.c + c) * kPanel] =
              o < p.o ? A(widen(weight[(o * p.c + c) * p.k + j])) : A(0);
        }
      }
    }
  }

  static size_t scratch_bytes(const AggregateParams& p) { return Scratch(p, nullptr).bytes; }

  static void rows(const AggregateParams& p, const void* packed_weight, int64_t begin, int64_t end,
                   void* base) {
    const Scratch scratch(p, base);
    const int64_t blocks = ceil_div(p.n, kBlockRows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first_row = task % blocks * kBlockRows;
      const int64_t rows = min_of(kBlockRows, p.n - first_row);
      const int64_t first = b * p.n + first_row;  // row of the flattened batch
      const T* value = p.value.at<T>(b);
      for (int64_t r = 0; r < rows; ++r) modulate(p, (first + r) * p.k, scratch.rho + r * p.k);
      const A* weight = static_cast<const A*>(packed_weight);
      if (p.convolution == Convolution::dense) {
        dense(p, value, weight, first, rows, scratch);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          weighted_sum(p, value, weight, first + r, scratch.rho + r * p.k);
        }
      }
    }
  }

 private:
  // One row without a dense convolution. weight [k, c] or null.
  static void weighted_sum(const AggregateParams& p, const T* value, const A* weight, int64_t row,
                           const double* rho) {
    const int64_t* indices = p.indices + row * p.k;
    T* output = static_cast<T*>(p.output) + row * p.o;
    for (int64_t first = 0; first < p.c; first += kChannels) {
      const int64_t channels = min_of(kChannels, p.c - first);
      double sum[kChannels] = {};
      for (int64_t j = 0; j < p.k; ++j) {
        if (is_missing(similarity_at(p, row * p.k + j))) continue;
        const T* v = value + indices[j] * p.value.row_stride + first;
        const double scale = rho[j];
        if (weight) {
          const A* w = weight + j * p.c + first;
          add_channels(sum, channels,
                       [&](int64_t c) { return scale * double(w[c]) * double(widen(v[c])); });
        } else {
          add_channels(sum, channels, [&](int64_t c) { return scale * double(widen(v[c])); });
        }
      }
      const T* bias = static_cast<const T*>(p.bias);
      for (int64_t c = 0; c < channels; ++c) {
        const double shift = bias ? double(widen(bias[first + c])) : 0.0;
        narrow(A(sum[c] + shift), output[first + c]);
      }
    }
  }

  // At most kBlockRows rows, starting at `first`. weight [o panels, k * c, kPanel].
  static void dense(const AggregateParams& p, const T* value, const A* weight, int64_t first,
                    int64_t rows, const Scratch& scratch) {
    const int64_t tiles = ceil_div(rows, kTileRows);
    const int64_t width = padded_outputs(p);
    for (int64_t slot = 0; slot < p.k; slot += slots_at_once(p)) {
      const int64_t slots = min_of(slots_at_once(p), p.k - slot);
      const int64_t depth = slots * p.c, stride = padded_stride<A>(depth);
      for (int64_t r = 0; r < tiles * kTileRows; ++r) {
        A* to = scratch.gathered + r * stride;
        for (int64_t j = 0; j < slots; ++j, to += p.c) {
          const int64_t entry = (first + r) * p.k + slot + j;
          if (r >= rows || is_missing(similarity_at(p, entry))) {
            for (int64_t c = 0; c < p.c; ++c) to[c] = 0;
          } else {
            const T* v = value + p.indices[entry] * p.value.row_stride;
            const double scale = scratch.rho[r * p.k + slot + j];
            for (int64_t c = 0; c < p.c; ++c) to[c] = A(scale * double(widen(v[c])));
          }
        }
      }
      for (int64_t o = 0; o < width; o += kPanel) {
        const A* panel = weight + o * p.k * p.c + slot * p.c * kPanel;
        multiply<A>({scratch.gathered, stride, 1}, rows, panel, depth, kPanel, scratch.output + o,
                    width, slot > 0);
      }
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
};

template <class T>
AggregateKernel aggregate_kernel() {
  return {kBlockRows, Aggregate<T>::packed_weight_bytes, Aggregate<T>::pack_weight,
          Aggregate<T>::scratch_bytes, Aggregate<T>::rows};
}

}  // namespace convnn::CONVNN_ISA
