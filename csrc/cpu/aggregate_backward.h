// SPDX-License-Identifier: MIT
// The gradients of aggregate on the CPU, from G = grad_output. With P_ij the gradient that reaches
// the gathered, modulated neighbor (none: G_i; depthwise: W[:, j] G_i; dense: G_i W[:, :, j]):
//
//   grad_rho_ij  = P_ij . V[I_ij]          then through rho to grad_similarities
//   grad_value_m = sum over (i, j) with I_ij = m of rho_ij P_ij
//   grad_weight  = sum over i of G_i (x) rho_ij V[I_ij], for each slot j
//   grad_bias    = sum over i of G_i
//
// P is never stored beyond a block of rows. Nothing is scattered: grad_value is a gather over the
// inverse of the neighbor list, and the weight and the bias are split by output element, so every
// sum has one owner and one order. Sums over the rows of the whole batch are taken in float64, but
// for the dense weight's, whose blocks of kWeightRows rows are products of tiles.
#pragma once

#include "aggregate.h"

namespace convnn::CONVNN_ISA {

constexpr int64_t kWeightRows = 256;      // dense: rows of one product of grad_weight
constexpr int64_t kSummedRows = 32;       // rows summed before the sum is added to the total
constexpr int64_t kWeightChannels = 128;  // dense: input channels of one grad_weight task

template <class T>
class AggregateBackward {
  using A = accumulate_t<T>;
  static constexpr int64_t kPanel = kTileColumns<A>;

  struct Scratch {
    double* rho;       // [kBlockRows, k]
    double* grad_rho;  // [kBlockRows, k]
    A* gathered;       // dense: [kBlockRows, padded_stride of slots_at_once * o]
    A* product;        // dense: [kBlockRows, padded_channels]
    int64_t* cursors;  // [kBlockRows]
    double* slot_sum;  // dense: [o]
    A* outputs;        // dense: [kWeightRows, o padded to whole tiles]
    A* channels;       // dense: [panels of kWeightChannels, kWeightRows, kPanel]
    A* tiles;          // dense: [o padded to whole tiles, kPanel]
    double* weight;    // dense: [o tiles * kTileRows, kWeightChannels padded]
    size_t bytes;

    Scratch(const AggregateParams& p, void* base) {
      const int64_t dense = p.convolution == Convolution::dense;
      const int64_t padded = ceil_div(min_of(kWeightChannels, p.c), kPanel) * kPanel;
      const int64_t padded_outputs = ceil_div(p.o, kTileRows) * kTileRows;
      Arena arena(base);
      rho = arena.take<double>(kBlockRows * p.k);
      grad_rho = arena.take<double>(kBlockRows * p.k);
      gathered = arena.take<A>(dense * kBlockRows * padded_stride<A>(slots_at_once(p) * p.o));
      product = arena.take<A>(dense * kBlockRows * padded_channels(p));
      cursors = arena.take<int64_t>(kBlockRows);
      slot_sum = arena.take<double>(dense * p.o);
      outputs = arena.take<A>(dense * padded_outputs * kWeightRows);
      channels = arena.take<A>(dense * padded * kWeightRows);
      tiles = arena.take<A>(dense * padded_outputs * kPanel);
      weight = arena.take<double>(dense * padded_outputs * padded);
      bytes = arena.used();
    }
  };

  static int64_t slots_at_once(const AggregateParams& p) {
    return min_of(p.k, max_of(1, kGatheredDepth / max_of(1, p.o)));
  }
  static int64_t padded_channels(const AggregateParams& p) {
    return ceil_div(p.c, kPanel) * kPanel;
  }

 public:
  // Depthwise: [k, c]. Dense: [c panels, k * o, kPanel].
  static size_t packed_weight_bytes(const AggregateBackwardParams& p) {
    const AggregateParams& f = p.forward;
    if (f.convolution == Convolution::dense) {
      return size_t(padded_channels(f) * f.k * f.o) * sizeof(A);
    }
    return Aggregate<T>::packed_weight_bytes(f);
  }

  static void pack_weight(const AggregateBackwardParams& p, void* packed) {
    const AggregateParams& f = p.forward;
    if (f.convolution != Convolution::dense) return Aggregate<T>::pack_weight(f, packed);
    const T* weight = static_cast<const T*>(f.weight);
    A* to = static_cast<A*>(packed);
    for (int64_t o = 0; o < f.o; ++o) {
      for (int64_t c = 0; c < padded_channels(f); ++c) {
        A* panel = to + (c / kPanel * f.k * f.o + o) * kPanel + c % kPanel;
        for (int64_t j = 0; j < f.k; ++j) {
          panel[j * f.o * kPanel] = c < f.c ? A(widen(weight[(o * f.c + c) * f.k + j])) : A(0);
        }
      }
    }
  }

  static size_t scratch_bytes(const AggregateBackwardParams& p) {
    return Scratch(p.forward, nullptr).bytes;
  }

  static void query_rows(const AggregateBackwardParams& p, const void* packed_weight,
                         double* all_rho, int64_t begin, int64_t end, void* base) {
    const AggregateParams& f = p.forward;
    const Scratch scratch(f, base);
    const int64_t blocks = ceil_div(f.n, kBlockRows);
    const A* weight = static_cast<const A*>(packed_weight);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first_row = task % blocks * kBlockRows;
      const int64_t rows = min_of(kBlockRows, f.n - first_row);
      const int64_t first = b * f.n + first_row;
      double* rho = all_rho ? all_rho + first * f.k : scratch.rho;
      for (int64_t r = 0; r < rows; ++r) modulate(f, (first + r) * f.k, rho + r * f.k);
      if (!p.grad_similarities) continue;
      if (f.rho != Rho::ones) {
        const T* value = static_cast<const T*>(f.value) + b * f.m * f.c;
        if (f.convolution == Convolution::dense) {
          dense_grad_rho(p, value, weight, first, rows, scratch);
        } else {
          for (int64_t r = 0; r < rows; ++r) {
            grad_rho(p, value, weight, first + r, scratch.grad_rho + r * f.k);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        modulate_backward(p, (first + r) * f.k, rho + r * f.k, scratch.grad_rho + r * f.k);
      }
    }
  }

  static void key_rows(const AggregateBackwardParams& p, const InverseNeighbors& inverse,
                       const void* packed_weight, const double* all_rho, int64_t begin, int64_t end,
                       void* base) {
    const AggregateParams& f = p.forward;
    const Scratch scratch(f, base);
    const int64_t blocks = ceil_div(f.m, kBlockRows);
    const A* weight = static_cast<const A*>(packed_weight);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first_row = task % blocks * kBlockRows;
      const int64_t rows = min_of(kBlockRows, f.m - first_row);
      const Chosen chosen = {inverse.offsets + b * (f.m + 1) + first_row,
                             inverse.places + b * f.n * f.k, all_rho + b * f.n * f.k,
                             static_cast<const T*>(p.grad_output) + b * f.n * f.o};
      T* grad_value = static_cast<T*>(p.grad_value) + (b * f.m + first_row) * f.c;
      if (f.convolution == Convolution::dense) {
        dense_grad_value(f, chosen, weight, rows, grad_value, scratch);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          grad_value_row(f, chosen, weight, r, grad_value + r * f.c);
        }
      }
    }
  }

  static int64_t weight_tasks(const AggregateBackwardParams& p) {
    const AggregateParams& f = p.forward;
    return f.k * ceil_div(f.c, f.convolution == Convolution::dense ? kWeightChannels : kChannels);
  }

  static void weight(const AggregateBackwardParams& p, const double* rho, int64_t begin,
                     int64_t end, void* base) {
    const AggregateParams& f = p.forward;
    const Scratch scratch(f, base);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slot = task % f.k, part = task / f.k;
      if (f.convolution == Convolution::dense) {
        dense_grad_weight(p, rho, slot, part * kWeightChannels, scratch);
      } else {
        depthwise_grad_weight(p, rho, slot, part * kChannels);
      }
    }
  }

  static int64_t bias_tasks(const AggregateBackwardParams& p) {
    return ceil_div(p.forward.o, kChannels);
  }

  static void bias(const AggregateBackwardParams& p, int64_t begin, int64_t end) {
    const AggregateParams& f = p.forward;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kChannels;
      const int64_t outputs = min_of(kChannels, f.o - first);
      const T* grad_output = static_cast<const T*>(p.grad_output) + first;
      sum_rows(f.batch * f.n, outputs, static_cast<T*>(p.grad_bias) + first, 1,
               [&](int64_t row, double* sum) {
                 const T* g = grad_output + row * f.o;
                 for (int64_t o = 0; o < outputs; ++o) sum[o] += widen(g[o]);
               });
    }
  }

 private:
  // Of a block of key rows of one batch element: who chose them, and with what.
  struct Chosen {
    const int64_t* offsets;  // [rows + 1]
    const int64_t* places;   // [n * k] slot * n + query row
    const double* rho;       // [n, k]
    const T* grad_output;    // [n, o]
  };

  // grad_rho [k] of one row without a dense convolution. weight [k, c] or null.
  static void grad_rho(const AggregateBackwardParams& p, const T* value, const A* weight,
                       int64_t row, double* grad_rho) {
    const AggregateParams& f = p.forward;
    const T* grad_output = static_cast<const T*>(p.grad_output) + row * f.o;
    for (int64_t j = 0; j < f.k; ++j) {
      grad_rho[j] = 0;
      if (is_missing(similarity_at(f, row * f.k + j))) continue;
      const T* v = value + f.indices[row * f.k + j] * f.c;
      const A* w = weight + j * f.c;
      const auto product = [&](int64_t c) {
        return double(widen(grad_output[c])) * double(widen(v[c]));
      };
      grad_rho[j] = A(weight ? sum_of(f.c, [&](int64_t c) { return double(w[c]) * product(c); })
                             : sum_of(f.c, product));
    }
  }

  // grad_rho of a block of rows: P_j [rows, c] = G W_j slot by slot, then its row dots with V[I_j].
  static void dense_grad_rho(const AggregateBackwardParams& p, const T* value, const A* weight,
                             int64_t first, int64_t rows, const Scratch& scratch) {
    const AggregateParams& f = p.forward;
    const int64_t tiles = ceil_div(rows, kTileRows);
    const int64_t width = padded_channels(f);
    const T* grad_output = static_cast<const T*>(p.grad_output) + first * f.o;
    const int64_t stride = padded_stride<A>(f.o);
    for (int64_t r = 0; r < tiles * kTileRows; ++r) {
      A* to = scratch.gathered + r * stride;
      for (int64_t o = 0; o < f.o; ++o)
        to[o] = r < rows ? A(widen(grad_output[r * f.o + o])) : A(0);
    }
    for (int64_t j = 0; j < f.k; ++j) {
      for (int64_t c = 0; c < width; c += kPanel) {
        const A* panel = weight + (c * f.k + j * kPanel) * f.o;
        multiply<A>({scratch.gathered, stride, 1}, rows, panel, f.o, kPanel, scratch.product + c,
                    width);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = (first + r) * f.k + j;
        scratch.grad_rho[r * f.k + j] =
            is_missing(similarity_at(f, place))
                ? A(0)
                : A(dot(scratch.product + r * width, value + f.indices[place] * f.c, f.c));
      }
    }
  }

  // grad_value [c] of key row r of the block, without a dense convolution. weight [k, c] or null.
  static void grad_value_row(const AggregateParams& f, const Chosen& chosen, const A* weight,
                             int64_t r, T* grad_value) {
    for (int64_t first = 0; first < f.c; first += kChannels) {
      const int64_t channels = min_of(kChannels, f.c - first);
      double sum[kChannels] = {};
      for (int64_t at = chosen.offsets[r]; at < chosen.offsets[r + 1]; ++at) {
        const int64_t slot = chosen.places[at] / f.n, i = chosen.places[at] % f.n;
        const double scale = chosen.rho[i * f.k + slot];
        const T* g = chosen.grad_output + i * f.o + first;
        if (weight) {
          const A* w = weight + slot * f.c + first;
          for (int64_t c = 0; c < channels; ++c)
            sum[c] += scale * double(w[c]) * double(widen(g[c]));
        } else {
          for (int64_t c = 0; c < channels; ++c) sum[c] += scale * double(widen(g[c]));
        }
      }
      for (int64_t c = 0; c < channels; ++c) narrow(A(sum[c]), grad_value[first + c]);
    }
  }

  // grad_value [rows, c] of a block of key rows as a product over depth (slot, o): its left operand
  // is, for each key row and slot, the sum of rho_ij G_i over the query rows that chose it there.
  static void dense_grad_value(const AggregateParams& f, const Chosen& chosen, const A* weight,
                               int64_t rows, T* grad_value, const Scratch& scratch) {
    const int64_t tiles = ceil_div(rows, kTileRows);
    const int64_t width = padded_channels(f);
    for (int64_t r = 0; r < rows; ++r) scratch.cursors[r] = chosen.offsets[r];
    for (int64_t slot = 0; slot < f.k; slot += slots_at_once(f)) {
      const int64_t slots = min_of(slots_at_once(f), f.k - slot);
      const int64_t depth = slots * f.o, stride = padded_stride<A>(depth);
      for (int64_t i = rows * stride; i < tiles * kTileRows * stride; ++i) scratch.gathered[i] = 0;
      for (int64_t r = 0; r < rows; ++r) {
        A* to = scratch.gathered + r * stride;
        for (int64_t j = 0; j < slots; ++j, to += f.o) {
          sum_slot(f, chosen, slot + j, chosen.offsets[r + 1], scratch.cursors[r], scratch.slot_sum,
                   to);
        }
      }
      for (int64_t c = 0; c < width; c += kPanel) {
        const A* panel = weight + (c * f.k + slot * kPanel) * f.o;
        multiply<A>({scratch.gathered, stride, 1}, rows, panel, depth, kPanel, scratch.product + c,
                    width, slot > 0);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < f.c; ++c) {
        narrow(scratch.product[r * width + c], grad_value[r * f.c + c]);
      }
    }
  }

  // to [o] = the sum of rho_ij G_i over the query rows of one slot, from the place `at` on, which
  // moves past them. sum [o] is for two and more of them.
  static void sum_slot(const AggregateParams& f, const Chosen& chosen, int64_t slot, int64_t end,
                       int64_t& at, double* sum, A* to) {
    const int64_t first = at;
    while (at < end && chosen.places[at] < (slot + 1) * f.n) ++at;
    const auto term = [&](int64_t place) {
      const int64_t i = chosen.places[place] - slot * f.n;
      const double scale = chosen.rho[i * f.k + slot];
      const T* g = chosen.grad_output + i * f.o;
      return [=](int64_t o) { return scale * double(widen(g[o])); };
    };
    if (at == first) {
      for (int64_t o = 0; o < f.o; ++o) to[o] = 0;
    } else if (at == first + 1) {
      const auto only = term(first);
      for (int64_t o = 0; o < f.o; ++o) to[o] = A(only(o));
    } else {
      for (int64_t o = 0; o < f.o; ++o) sum[o] = 0;
      for (int64_t place = first; place < at; ++place) {
        const auto next = term(place);
        for (int64_t o = 0; o < f.o; ++o) sum[o] += next(o);
      }
      for (int64_t o = 0; o < f.o; ++o) to[o] = A(sum[o]);
    }
  }

  // to[i * stride] = sum over rows of what `add(row, sum)` adds, i < count <= kChannels.
  template <class Add>
  static void sum_rows(int64_t rows, int64_t count, T* to, int64_t stride, const Add& add) {
    double total[kChannels] = {};
    for (int64_t first = 0; first < rows; first += kSummedRows) {
      double sum[kChannels] = {};
      for (int64_t row = first; row < min_of(first + kSummedRows, rows); ++row) add(row, sum);
      for (int64_t i = 0; i < count; ++i) total[i] += sum[i];
    }
    for (int64_t i = 0; i < count; ++i) narrow(A(total[i]), to[i * stride]);
  }

  // grad_weight [c, 1, k] at one slot, kChannels channels from `first` on.
  static void depthwise_grad_weight(const AggregateBackwardParams& p, const double* rho,
                                    int64_t slot, int64_t first) {
    const AggregateParams& f = p.forward;
    const int64_t channels = min_of(kChannels, f.c - first);
    T* to = static_cast<T*>(p.grad_weight) + first * f.k + slot;
    sum_rows(f.batch * f.n, channels, to, f.k, [&](int64_t row, double* sum) {
      const int64_t place = row * f.k + slot;
      if (is_missing(similarity_at(f, place))) return;
      const T* g = static_cast<const T*>(p.grad_output) + row * f.o + first;
      const T* v = value_row(f, row, place) + first;
      const double scale = rho[place];
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += scale * double(widen(g[c])) * double(widen(v[c]));
      }
    });
  }

  // The row of value that the query row `row` of the flattened batch has at `place`.
  static const T* value_row(const AggregateParams& f, int64_t row, int64_t place) {
    return static_cast<const T*>(f.value) + (row / f.n * f.m + f.indices[place]) * f.c;
  }

  // grad_weight [o, c, k] at one slot, kWeightChannels channels from `first` on: a product over
  // the rows of the whole batch.
  static void dense_grad_weight(const AggregateBackwardParams& p, const double* rho, int64_t slot,
                                int64_t first, const Scratch& scratch) {
    const AggregateParams& f = p.forward;
    const int64_t channels = min_of(kWeightChannels, f.c - first);
    const int64_t width = ceil_div(channels, kPanel) * kPanel;
    const int64_t height = ceil_div(f.o, kTileRows) * kTileRows;
    const int64_t rows = f.batch * f.n;
    for (int64_t i = 0; i < height * width; ++i) scratch.weight[i] = 0;
    for (int64_t row = 0; row < rows; row += kWeightRows) {
      const int64_t depth = min_of(kWeightRows, rows - row);
      gather_outputs(p, slot, row, depth, height, scratch.outputs);
      gather_channels(f, rho, slot, row, depth, first, channels, scratch.channels);
      for (int64_t c = 0; c < width; c += kPanel) {
        multiply<A>({scratch.outputs, 1, height}, height, scratch.channels + c * depth, depth,
                    kPanel, scratch.tiles, kPanel);
        for (int64_t o = 0; o < height; ++o) {
          double* to = scratch.weight + o * width + c;
          for (int64_t i = 0; i < kPanel; ++i) to[i] += scratch.tiles[o * kPanel + i];
        }
      }
    }
    T* to = static_cast<T*>(p.grad_weight);
    for (int64_t o = 0; o < f.o; ++o) {
      for (int64_t c = 0; c < channels; ++c) {
        narrow(A(scratch.weight[o * width + c]), to[(o * f.c + first + c) * f.k + slot]);
      }
    }
  }

  // grad_output of `depth` rows to rows [depth, height]; zeros for a row whose neighbor at that
  // slot is missing, like those of gather_channels: neither may be infinite.
  static void gather_outputs(const AggregateBackwardParams& p, int64_t slot, int64_t row,
                             int64_t depth, int64_t height, A* rows) {
    const int64_t outputs = p.forward.o;
    const T* g = static_cast<const T*>(p.grad_output) + row * outputs;
    for (int64_t t = 0; t < depth; ++t, g += outputs, rows += height) {
      const bool missing = is_missing(similarity_at(p.forward, (row + t) * p.forward.k + slot));
      const int64_t given = missing ? 0 : outputs;
      for (int64_t o = 0; o < given; ++o) rows[o] = widen(g[o]);
      for (int64_t o = given; o < height; ++o) rows[o] = 0;
    }
  }

  // rho V[I] of `depth` rows at one slot to packed [channels / kPanel, depth, kPanel].
  static void gather_channels(const AggregateParams& f, const double* rho, int64_t slot,
                              int64_t row, int64_t depth, int64_t first, int64_t channels,
                              A* packed) {
    for (int64_t t = 0; t < depth; ++t) {
      const int64_t place = (row + t) * f.k + slot;
      const bool missing = is_missing(similarity_at(f, place));
      const T* v = missing ? nullptr : value_row(f, row + t, place) + first;
      for (int64_t panel = 0; panel < channels; panel += kPanel) {
        A* to = packed + panel * depth + t * kPanel;
        const int64_t given = missing ? 0 : min_of(kPanel, channels - panel);
        const double scale = rho[place];
        for (int64_t c = 0; c < given; ++c) to[c] = A(scale * double(widen(v[panel + c])));
        for (int64_t c = given; c < kPanel; ++c) to[c] = 0;
      }
    }
  }
};

template <class T>
AggregateBackwardKernel aggregate_backward_kernel() {
  using K = AggregateBackward<T>;
  return {kBlockRows,  K::packed_weight_bytes, K::pack_weight, K::scratch_bytes, K::query_rows,
          K::key_rows, K::weight_tasks,        K::weight,      K::bias_tasks,    K::bias};
}

}  // namespace convnn::CONVNN_ISA
