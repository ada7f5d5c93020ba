// SPDX-License-Identifier: MIT
// The gradients of aggregate on the CPU, from G = grad_output. With P_ij the gradient that reaches
// the gathered, modulated neighbor (none: G_i; depthwise: W[:, j] G_i; dense: G_i W[:, :, j]):
//
//   grad_rho_ij  = P_ij . V[I_ij]          then through rho to grad_similarities
//   grad_value_m = sum over (i, j) with I_ij = m of rho_ij P_ij
//   grad_weight  = sum over i of G_i (x) rho_ij V[I_ij], for each slot j
//   grad_bias    = sum over i of G_i
//
// P is never stored beyond a block of rows. Nothing is scattered: grad_value is gathered through
// the inverse neighbor list; grad_weight is a sum over parts of the rows, each by one task, which
// are then added up; grad_bias is divided by element. So every sum is taken in one order. Sums over
// the rows of the whole batch are in float64, except within the blocks of kWeightRows rows that a
// dense weight gradient multiplies as tiles.
//
// Without a dense convolution, a task takes some query rows. G_i * V[I_ij] enters grad_rho_ij and
// grad_weight[:, j], so both come from one pass over the pairs, slot by slot: the sums of a slot
// stay in registers for kSlotRows rows.
//
// A dense P is a matrix product, computed once for both gradients: a task takes some pairs (i, j),
// ordered by the keys that they chose, and multiplies those of one slot together. If the pairs of a
// key are divided between tasks, their partial sums are added up afterwards.
#pragma once

#include <algorithm>

#include "aggregate.h"

namespace convnn::CONVNN_ISA {

constexpr int64_t kChannels = 64;    // channels of one grad_bias task, and of a dense key
constexpr int64_t kSlotRows = 16;    // query rows of one pass over a slot
constexpr int64_t kFewestRows = 32;  // of a task of query rows
constexpr int64_t kQueryTasks = 64;  // at most, if each has a part of a depthwise grad_weight,
constexpr int64_t kFewestParts = 4;  // and at least if there are rows, for any size of it
constexpr int64_t kMostPartElements = 1 << 18;  // of all those parts, if there are more
constexpr int64_t kPackedOutputs = 16;  // of a panel of channels of the weight, packed by one task
constexpr int64_t kWeightRows = 256;    // dense: rows of one product of grad_weight
constexpr int64_t kSummedRows = 32;     // of grad_bias, before their sum is added to the total
constexpr int64_t kWeightChannels = 128;  // dense: input channels of one grad_weight task
constexpr int64_t kWeightTasks = 32;      // dense: about as many grad_weight tasks

// dense: elements of P that a task of `pairs` stores, in the L2 cache; more if k is so large that
// there would be too few pairs of a slot to fill tiles, up to a fixed workspace.
constexpr int64_t kPairElements = 1 << 15;
constexpr int64_t kPairsOfSlot = 32;
constexpr int64_t kMostPairElements = 1 << 20;
constexpr int64_t kPairChannels = 64;  // channels are padded to at most a multiple of this
constexpr int64_t kMostWeightElements = 1 << 20;  // dense: of all parts of grad_weight, if several

template <class T>
class AggregateBackward {
  using A = accumulate_t<T>;
  static constexpr int64_t kPanel = kTileColumns<A>;

  struct Scratch {
    double* rho;         // [kSlotRows, k]
    double* grad_rho;    // [kSlotRows, k]
    double* wide;        // not dense: [kSlotRows, c] rows of grad_output
    int64_t* slots;      // dense: [k + 1] the first row of each slot in `product`
    int64_t* queries;    // dense: [pair_rows] the query row of each row of `product`
    int64_t* rows;       // dense: [pairs_per_task] the slot of each pair, then its row in `product`
    int64_t* positions;  // dense: [pairs_per_task] where each pair is in rho [n, k]
    double* pair_rho;    // dense: [pairs_per_task] rho of each pair
    double* pair_grad;   // dense: [pairs_per_task] grad_rho of each pair
    A* gathered;         // dense: [kBlockRows, padded_stride of o]
    A* product;          // dense: [pair_rows, padded_channels]
    A* outputs;          // dense: [kWeightRows, o padded to whole tiles]
    A* channels;         // dense: [panels of kWeightChannels, kWeightRows, kPanel]
    A* tiles;            // dense: [o padded to whole tiles, kPanel]
    size_t bytes;

    Scratch(const AggregateParams& p, void* base) {
      const int64_t dense = p.convolution == Convolution::dense;
      const int64_t padded = ceil_div(min_of(kWeightChannels, p.c), kPanel) * kPanel;
      const int64_t padded_outputs = ceil_div(p.o, kTileRows) * kTileRows;
      Arena arena(base);
      rho = arena.take<double>(kSlotRows * p.k);
      grad_rho = arena.take<double>(kSlotRows * p.k);
      wide = arena.take<double>(dense ? 0 : kSlotRows * p.c);
      slots = arena.take<int64_t>(dense * (p.k + 1));
      queries = arena.take<int64_t>(dense * pair_rows(p));
      rows = arena.take<int64_t>(dense * pairs_per_task(p));
      positions = arena.take<int64_t>(dense * pairs_per_task(p));
      pair_rho = arena.take<double>(dense * pairs_per_task(p));
      pair_grad = arena.take<double>(dense * pairs_per_task(p));
      gathered = arena.take<A>(dense * kBlockRows * padded_stride<A>(p.o));
      product = arena.take<A>(dense * pair_rows(p) * padded_channels(p));
      outputs = arena.take<A>(dense * padded_outputs * kWeightRows);
      channels = arena.take<A>(dense * padded * kWeightRows);
      tiles = arena.take<A>(dense * padded_outputs * kPanel);
      bytes = arena.used();
    }
  };

  static_assert(kPairChannels % kPanel == 0);
  static int64_t padded_channels(const AggregateParams& p) {
    return ceil_div(p.c, kPanel) * kPanel;
  }
  // The same for all instruction sets: sums are divided where tasks are.
  static int64_t pairs_per_task(const AggregateParams& p) {
    const int64_t width = max_of(1, ceil_div(p.c, kPairChannels) * kPairChannels);
    const int64_t pairs =
        min_of(max_of(kPairElements / width, kPairsOfSlot * p.k), kMostPairElements / width);
    return max_of(1, min_of(pairs, p.n * p.k));
  }
  static int64_t pair_rows(const AggregateParams& p) {  // each slot begins with a whole tile
    return pairs_per_task(p) + p.k * (kTileRows - 1);
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

  // Dense: blocks of kPackedOutputs outputs for each panel of channels.
  static int64_t pack_tasks(const AggregateBackwardParams& p) {
    const AggregateParams& f = p.forward;
    if (f.convolution != Convolution::dense) return Aggregate<T>::pack_tasks(f);
    return padded_channels(f) / kPanel * ceil_div(f.o, kPackedOutputs);
  }

  static void pack_weight(const AggregateBackwardParams& p, void* packed, int64_t begin,
                          int64_t end) {
    const AggregateParams& f = p.forward;
    if (f.convolution != Convolution::dense) {
      return Aggregate<T>::pack_weight(f, packed, begin, end);
    }
    const T* weight = static_cast<const T*>(f.weight);
    const int64_t blocks = ceil_div(f.o, kPackedOutputs);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / blocks * kPanel, from = task % blocks * kPackedOutputs;
      for (int64_t o = from; o < min_of(from + kPackedOutputs, f.o); ++o) {
        A* panel = static_cast<A*>(packed) + first * f.k * f.o + o * kPanel - first;
        for (int64_t c = first; c < first + kPanel; c += kLanes<A>) {
          for (int64_t j = 0; j < f.k; j += kLanes<A>) {
            const int64_t at = (o * f.c + c) * f.k + j;
            pack_block<A>(weight + at, f.k, f.o * f.c * f.k - at, f.c - c,
                          min_of(kLanes<A>, f.k - j),
                          [&](int64_t t) { return panel + (j + t) * f.o * kPanel + c; });
          }
        }
      }
    }
  }

  static size_t scratch_bytes(const AggregateBackwardParams& p) {
    return Scratch(p.forward, nullptr).bytes;
  }

  // Nothing that these depend on differs between instruction sets, because sums are divided where
  // tasks are.
  static int64_t query_tasks(const AggregateBackwardParams& p) {
    return ceil_div(p.forward.batch * p.forward.n, rows_of_query_task(p));
  }
  static int64_t rows_of_query_task(const AggregateBackwardParams& p) {
    const AggregateParams& f = p.forward;
    if (!p.grad_weight || f.convolution != Convolution::depthwise) return kFewestRows;
    const int64_t parts = max_of(kFewestParts, kMostPartElements / max_of(1, f.k * f.c));
    return max_of(kFewestRows, ceil_div(f.batch * f.n, min_of(kQueryTasks, parts)));
  }

  static void query_rows(const AggregateBackwardParams& p, const void* packed_weight,
                         double* all_rho, double* weight_parts, int64_t begin, int64_t end,
                         void* base) {
    const AggregateParams& f = p.forward;
    const Scratch scratch(f, base);
    const int64_t task_rows = rows_of_query_task(p);
    for (int64_t task = begin; task < end; ++task) {
      double* sums = weight_parts ? weight_parts + task * f.k * f.c : nullptr;
      if (sums) std::fill_n(sums, f.k * f.c, 0);
      const int64_t last = min_of((task + 1) * task_rows, f.batch * f.n);
      for (int64_t row = task * task_rows; row < last; row += kSlotRows) {
        const int64_t rows = min_of(kSlotRows, last - row);
        double* rho = all_rho ? all_rho + row * f.k : scratch.rho;
        modulate(f, row, rows, rho);
        const bool ones = f.rho == Rho::ones;
        if (f.convolution != Convolution::dense) {
          if (sums || (p.grad_similarities && !ones)) {
            slot_products(p, static_cast<const double*>(packed_weight), row, rows, rho, sums,
                          scratch);
          }
        } else if (!ones) {
          continue;
        }
        for (int64_t r = 0; r < rows && p.grad_similarities; ++r) {
          modulate_backward(p, (row + r) * f.k, rho + r * f.k, scratch.grad_rho + r * f.k);
        }
      }
    }
  }

  static void similarities(const AggregateBackwardParams& p, const double* rho,
                           const double* grad_rho, int64_t begin, int64_t end) {
    const int64_t k = p.forward.k;
    for (int64_t row = begin; row < end; ++row) {
      modulate_backward(p, row * k, rho + row * k, grad_rho + row * k);
    }
  }

  static void key_rows(const AggregateBackwardParams& p, const InverseList& inverse,
                       const void* packed_weight, const double* all_rho, int64_t begin,
                       int64_t end) {
    const AggregateParams& f = p.forward;
    const int64_t blocks = ceil_div(f.m, kBlockRows);
    const double* weight = static_cast<const double*>(packed_weight);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first_row = task % blocks * kBlockRows;
      const int64_t rows = min_of(kBlockRows, f.m - first_row);
      const Chosen chosen = {inverse.offsets + b * (f.m + 1) + first_row,
                             inverse.pairs + b * f.n * f.k, all_rho + b * f.n * f.k,
                             static_cast<const T*>(p.grad_output) + b * f.n * f.o};
      T* grad_value = static_cast<T*>(p.grad_value) + (b * f.m + first_row) * f.c;
      for (int64_t r = 0; r < rows; ++r) {
        grad_value_row(f, inverse, chosen, weight, r, grad_value + r * f.c);
      }
    }
  }

  static int64_t pair_tasks(const AggregateBackwardParams& p) {
    return max_of(1, ceil_div(p.forward.n * p.forward.k, pairs_per_task(p.forward)));
  }

  static void pairs(const AggregateBackwardParams& p, const InverseList& inverse,
                    const void* packed_weight, const double* rho, double* grad_rho, double* cuts,
                    int64_t begin, int64_t end, void* base) {
    const AggregateParams& f = p.forward;
    const Scratch scratch(f, base);
    const A* weight = static_cast<const A*>(packed_weight);
    const int64_t tasks = pair_tasks(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tasks;
      if (task % tasks >= tasks_with_pairs(f, inverse, b)) continue;
      const Pairs pairs = pairs_of(f, inverse, b, task % tasks);
      const int64_t count = pairs.last - pairs.first, first_entry = b * f.n * f.k;
      sort_pairs_by_slot(f, inverse, pairs, rho + first_entry, scratch);
      multiply_pairs_by_slot(p, b, weight, scratch);
      std::fill_n(scratch.pair_grad, count, 0.0);
      for (int64_t key = first_key(f, pairs); key < f.m && !pairs.end_before(key); ++key) {
        dense_key(p, pairs, b, key, grad_rho != nullptr, cuts ? cuts + task * 2 * f.c : nullptr,
                  scratch);
      }
      for (int64_t i = 0; grad_rho && i < count; ++i) {
        grad_rho[first_entry + scratch.positions[i]] = scratch.pair_grad[i];
      }
    }
  }

  static void cut_keys(const AggregateBackwardParams& p, const InverseList& inverse,
                       const double* cuts, int64_t begin, int64_t end) {
    const AggregateParams& f = p.forward;
    const int64_t tasks = pair_tasks(p);
    for (int64_t b = begin; b < end; ++b) {
      const double* parts = cuts + b * tasks * 2 * f.c;
      const int64_t last = tasks_with_pairs(f, inverse, b) - 1;
      for (int64_t task = 0; task < last; ++task) {
        const Pairs pairs = pairs_of(f, inverse, b, task), next = pairs_of(f, inverse, b, task + 1);
        const int64_t key = first_key(f, next), from = next.offsets[key];
        if (from < pairs.first || from >= next.first)
          continue;  // no key that begins here continues
        int64_t stop = task + 1;
        while (stop * pairs_per_task(f) < next.offsets[key + 1]) ++stop;
        T* to = static_cast<T*>(p.grad_value) + (b * f.m + key) * f.c;
        for (int64_t c = 0; c < f.c; ++c) {
          double sum = parts[(2 * task + 1) * f.c + c];
          for (int64_t t = task + 1; t < stop; ++t) sum += parts[2 * t * f.c + c];
          narrow(A(sum), to[c]);
        }
      }
    }
  }

  static int64_t weight_parts(const AggregateBackwardParams& p) {
    if (p.forward.convolution != Convolution::dense) return query_tasks(p);
    const int64_t rows = p.forward.batch * p.forward.n;
    const int64_t elements = p.forward.k * p.forward.c * p.forward.o;
    const int64_t wanted = min_of(ceil_div(kWeightTasks, max_of(1, slot_tasks(p.forward))),
                                  kMostWeightElements / max_of(1, elements));
    return max_of(1, min_of(wanted, rows / kWeightRows));
  }
  static int64_t weight_tasks(const AggregateBackwardParams& p) {
    return weight_parts(p) * slot_tasks(p.forward);
  }

  static void weight(const AggregateBackwardParams& p, const double* rho, double* parts,
                     int64_t begin, int64_t end, void* base) {
    const AggregateParams& f = p.forward;
    const Scratch scratch(f, base);
    const int64_t count = weight_parts(p), rows = f.batch * f.n;
    const int64_t part_rows = ceil_div(rows, count);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / slot_tasks(f), slot = task % f.k;
      const int64_t channel = task % slot_tasks(f) / f.k * kWeightChannels;
      double* to = parts + (part * f.k + slot) * f.o * f.c + channel;
      const int64_t first = min_of(part * part_rows, rows);
      const int64_t last = min_of(first + part_rows, rows);
      dense_grad_weight(p, rho, slot, channel, first, last, to, scratch);
    }
  }

  static void sum_weight(const AggregateBackwardParams& p, const double* parts, int64_t begin,
                         int64_t end) {
    const AggregateParams& f = p.forward;
    const int64_t count = weight_parts(p);
    const int64_t elements = (f.convolution == Convolution::dense ? f.o : 1) * f.c;
    T* to = static_cast<T*>(p.grad_weight);
    for (int64_t first = begin; first < end; first += kChannels) {
      const int64_t block = min_of(kChannels, end - first);
      for (int64_t slot = 0; slot < f.k; ++slot) {
        double sum[kChannels] = {};
        for (int64_t part = 0; part < count; ++part) {
          const double* addend = parts + (part * f.k + slot) * elements + first;
          for (int64_t i = 0; i < block; ++i) sum[i] += addend[i];
        }
        for (int64_t i = 0; i < block; ++i) narrow(A(sum[i]), to[(first + i) * f.k + slot]);
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
      const T* grad_output = static_cast<const T*>(p.grad_output) + first;
      each_block<kSumVectors>(min_of(kChannels, f.o - first), [&](auto block, int64_t o) {
        constexpr int kVectors = decltype(block)::kVectors;
        Vector<double> total[kVectors] = {};
        for (int64_t stop, row = 0; row < f.batch * f.n; row = stop) {
          Vector<double> sum[kVectors] = {};
          stop = min_of(row + kSummedRows, f.batch * f.n);
          for (; row < stop; ++row) add_scaled(block, 1, grad_output + row * f.o + o, sum);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
        }
        store_sum(block, total, static_cast<T*>(p.grad_bias) + first + o);
      });
    }
  }

 private:
  // The pairs that chose a block of key rows of one batch element, and what they contribute.
  struct Chosen {
    const int64_t* offsets;  // [rows + 1]
    const int64_t* pairs;    // [n * k]
    const double* rho;       // [n, k]
    const T* grad_output;    // [n, o]
  };

  // Of at most kSlotRows query rows without a dense convolution: scratch.grad_rho and, if sums
  // [k, c] is not null, their part of grad_weight, which is added to it. weight [k, c] or null,
  // rho [rows, k].
  static void slot_products(const AggregateBackwardParams& p, const double* weight, int64_t row,
                            int64_t rows, const double* rho, double* sums, const Scratch& scratch) {
    const AggregateParams& f = p.forward;
    const T* values[kSlotRows];
    for (int64_t r = 0; r < rows; ++r) {
      values[r] = f.value.at<T>((row + r) / f.n);
      widen_row(static_cast<const T*>(p.grad_output) + (row + r) * f.o, f.c,
                scratch.wide + r * f.c);
    }
    for (int64_t slot = 0; slot < f.k; ++slot) {
      double partial[kSlotRows * kPartial] = {};
      each_block<kSumVectors>(f.c, [&](auto block, int64_t first) {
        const int64_t at = slot * f.c + first;
        Vector<double> total[decltype(block)::kVectors] = {};
        if (sums) add_scaled(block, 1, sums + at, total);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t entry = (row + r) * f.k + slot;
          if (is_missing(similarity_at(f, entry))) continue;
          add_products(block, scratch.wide + r * f.c + first,
                       values[r] + f.indices[entry] * f.value.row_stride + first,
                       weight ? weight + at : nullptr, rho[r * f.k + slot],
                       partial + r * kPartial + first % kPartial, total);
        }
        if (sums) store_sum(block, total, sums + at);
      });
      for (int64_t r = 0; r < rows; ++r) {
        scratch.grad_rho[r * f.k + slot] = A(sum_of_partial(partial + r * kPartial));
      }
    }
  }

  // For a block of channels: partial += w g v, added up as sum_of() does, without w if it is null,
  // and total += rho g v.
  template <class Block>
  static void add_products(const Block& block, const double* g, const T* v, const double* w,
                           double rho, double* partial, Vector<double> (&total)[Block::kVectors]) {
    constexpr int kVectors = Block::kVectors;
    constexpr int kParts = kVectors < kPartialVectors ? kVectors : kPartialVectors;
    Vector<double> part[kParts];
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) part[i] = load(partial + i * kLanes<double>);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const Vector<double> product = block.load(g, i) * block.load(v, i);
      total[i] += rho * product;
      if (w) {
        part[i % kParts] += block.load(w, i) * product;
      } else {
        part[i % kParts] += product;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) store(partial + i * kLanes<double>, part[i]);
  }

  // grad_value [c] of key row r of the block, without a dense convolution. weight [k, c] or null.
  static void grad_value_row(const AggregateParams& f, const InverseList& inverse,
                             const Chosen& chosen, const double* weight, int64_t r, T* grad_value) {
    each_block<kSumVectors>(f.c, [&](auto block, int64_t first) {
      Vector<double> sum[decltype(block)::kVectors] = {};
      for (int64_t at = chosen.offsets[r]; at < chosen.offsets[r + 1]; ++at) {
        const int64_t slot = inverse.slot(chosen.pairs[at]), i = inverse.row(chosen.pairs[at]);
        const double rho = chosen.rho[i * f.k + slot];
        const T* g = chosen.grad_output + i * f.o + first;
        if (weight) {
          add_scaled(block, rho, weight + slot * f.c + first, g, sum);
        } else {
          add_scaled(block, rho, g, sum);
        }
      }
      store_sum(block, sum, grad_value + first);
    });
  }

  // Consecutive pairs of one batch element, ordered by the keys that they chose.
  struct Pairs {
    const int64_t* offsets;  // [m + 1] the first pair of each key
    const int64_t* numbers;  // [offsets[m]]
    int64_t first, last;     // from `first` to before `last`
    bool to_the_end;         // whether these are the last ones; keys without pairs may follow

    bool end_before(int64_t key) const { return offsets[key] >= last && !to_the_end; }
  };

  // How many tasks of `pairs` a batch element needs: fewer than pair_tasks() if neighbors are
  // missing, but at least one, for keys without pairs.
  static int64_t tasks_with_pairs(const AggregateParams& f, const InverseList& inverse, int64_t b) {
    return max_of(1, ceil_div(inverse.offsets[b * (f.m + 1) + f.m], pairs_per_task(f)));
  }

  // The pairs of one of these tasks.
  static Pairs pairs_of(const AggregateParams& f, const InverseList& inverse, int64_t b,
                        int64_t task) {
    const int64_t* offsets = inverse.offsets + b * (f.m + 1);
    const int64_t size = pairs_per_task(f), count = offsets[f.m];
    const int64_t first = task * size;
    return {offsets, inverse.pairs + b * f.n * f.k, first, min_of(first + size, count),
            first + size >= count};
  }

  // The first key of a task: that of its first pair or, if that pair is the first of its key, the
  // first of the keys without pairs before it. So every key belongs to exactly one task unless its
  // pairs are divided.
  static int64_t first_key(const AggregateParams& f, const Pairs& pairs) {
    const int64_t key =
        std::lower_bound(pairs.offsets, pairs.offsets + f.m + 1, pairs.first) - pairs.offsets;
    return pairs.offsets[key] > pairs.first ? key - 1 : key;
  }

  // Divides scratch.product between the slots of some pairs, and finds rho of each pair here, where
  // nothing waits for it. rho [n, k]
  static void sort_pairs_by_slot(const AggregateParams& f, const InverseList& inverse,
                                 const Pairs& pairs, const double* rho, const Scratch& scratch) {
    const int64_t count = pairs.last - pairs.first;
    std::fill_n(scratch.slots, f.k + 1, 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t number = pairs.numbers[pairs.first + i], slot = inverse.slot(number);
      scratch.positions[i] = inverse.row(number) * f.k + slot;
      scratch.pair_rho[i] = rho[scratch.positions[i]];
      scratch.rows[i] = slot;
      ++scratch.slots[slot];
    }
    int64_t row = 0;
    for (int64_t slot = 0; slot <= f.k; ++slot) {
      const int64_t rows = scratch.slots[slot];
      scratch.slots[slot] = row;
      row += ceil_div(rows, kTileRows) * kTileRows;
    }
    std::fill_n(scratch.queries, row, -1);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = scratch.rows[i];
      scratch.rows[i] = scratch.slots[slot]++;
      scratch.queries[scratch.rows[i]] = inverse.row(pairs.numbers[pairs.first + i]);
    }
  }

  // Computes P of sorted pairs, slot by slot, to scratch.product [pair_rows, padded_channels].
  static void multiply_pairs_by_slot(const AggregateBackwardParams& p, int64_t b, const A* weight,
                                     const Scratch& scratch) {
    const AggregateParams& f = p.forward;
    const int64_t width = padded_channels(f), stride = padded_stride<A>(f.o);
    const T* grad_output = static_cast<const T*>(p.grad_output) + b * f.n * f.o;
    const int64_t end = scratch.slots[f.k];  // of all slots
    for (int64_t slot = 0, first = 0; slot < f.k; ++slot) {
      const int64_t stop = ceil_div(scratch.slots[slot], kTileRows) * kTileRows;
      for (; first < stop; first += min_of(kBlockRows, stop - first)) {
        const int64_t rows = min_of(kBlockRows, stop - first);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t i = scratch.queries[first + r];
          const int64_t ahead = min_of(first + r + kBlockRows, end - 1);
          prefetch_row(grad_output + max_of(0, scratch.queries[ahead]) * f.o, f.o);
          A* to = scratch.gathered + r * stride;
          if (i < 0) {
            std::fill_n(to, f.o, A(0));
          } else {
            copy_row(grad_output + i * f.o, f.o, to);
          }
        }
        multiply_panels(scratch.gathered, stride, rows, weight + slot * f.o * kPanel,
                        f.k * f.o * kPanel, f.o, f.c, scratch.product + first * width, width);
      }
    }
  }

  // grad_rho of the pairs of a key, and its grad_value. If the pairs of the key are divided between
  // tasks, the partial sum goes to cuts [2, c]: the first row is for a key that begins in an
  // earlier task, the second for one that begins here.
  static void dense_key(const AggregateBackwardParams& p, const Pairs& pairs, int64_t b,
                        int64_t key, bool grad_rho, double* cuts, const Scratch& scratch) {
    const AggregateParams& f = p.forward;
    const int64_t first = max_of(pairs.offsets[key], pairs.first);
    const int64_t last = min_of(pairs.offsets[key + 1], pairs.last);
    const T* v = f.value.at<T>(b, key);
    T* to = static_cast<T*>(p.grad_value) + (b * f.m + key) * f.c;
    const bool from_before = pairs.offsets[key] < pairs.first;
    const bool whole = !from_before && pairs.offsets[key + 1] <= pairs.last;
    for (int64_t c = 0; c < f.c; c += kChannels) {
      const int64_t channels = min_of(kChannels, f.c - c);
      double sum[kChannels] = {}, wide[kChannels];
      widen_row(v + c, channels, wide);
      const auto add_pairs = channels == kChannels ? add_whole_pairs : add_part_of_pairs;
      add_pairs(f, first - pairs.first, last - pairs.first, c, wide, grad_rho, sum, scratch);
      if (!p.grad_value) continue;
      if (whole) {
        for (int64_t j = 0; j < channels; ++j) narrow(A(sum[j]), to[c + j]);
      } else {
        std::copy_n(sum, channels, cuts + (from_before ? 0 : f.c) + c);
      }
    }
  }

  // For some pairs, of one key, and P of them from `channel` on: sum[c] += rho P[c], and
  // pair_grad += P . v if grad_rho is needed; for fewer than kChannels channels.
  static void add_part_of_pairs(const AggregateParams& f, int64_t first, int64_t last,
                                int64_t channel, const double* v, bool grad_rho, double* sum,
                                const Scratch& scratch) {
    const int64_t width = padded_channels(f), channels = f.c - channel;
    for (int64_t i = first; i < last; ++i) {
      const A* x = scratch.product + scratch.rows[i] * width + channel;
      const double scale = scratch.pair_rho[i];
      for (int64_t c = 0; c < channels; ++c) sum[c] += scale * double(x[c]);
      if (grad_rho) scratch.pair_grad[i] += dot(x, v, channels);
    }
  }

  // The same for kChannels channels, with the sums in registers where there are enough. A product
  // is added up as by dot().
  static void add_whole_pairs(const AggregateParams& f, int64_t first, int64_t last,
                              int64_t channel, const double* v, bool grad_rho, double* sum,
                              const Scratch& scratch) {
    constexpr int kWide = kLanes<double>, kVectors = kChannels / kWide;
    const int64_t width = padded_channels(f);
    Vector<double> total[kVectors] = {}, value[kVectors];
#pragma GCC unroll 32
    for (int u = 0; u < kVectors; ++u) value[u] = load(v + u * kWide);
    for (int64_t i = first; i < last; ++i) {
      const A* x = scratch.product + scratch.rows[i] * width + channel;
      const double scale = scratch.pair_rho[i];
      Vector<double> partial[kPartialVectors] = {};
#pragma GCC unroll 32
      for (int u = 0; u < kVectors; ++u) {
        const Vector<double> wide = load_wide(x + u * kWide);
        total[u] += wide * scale;
        partial[u % kPartialVectors] += wide * value[u];
      }
      if (!grad_rho) continue;
      scratch.pair_grad[i] += sum_of_partial(partial);
    }
#pragma GCC unroll 32
    for (int u = 0; u < kVectors; ++u) store(sum + u * kWide, total[u]);
  }

  // Dense: how many grad_weight tasks all slots have.
  static int64_t slot_tasks(const AggregateParams& f) {
    return f.k * ceil_div(f.c, kWeightChannels);
  }

  // The row of value at `entry` of the neighbor list, for row `row` of the flattened batch.
  static const T* value_row(const AggregateParams& f, int64_t row, int64_t entry) {
    return f.value.at<T>(row / f.n, f.indices[entry]);
  }

  // Sums grad_weight over some rows at one slot, for kWeightChannels channels from `first` on, to
  // to [o, c]: a matrix product over these rows.
  static void dense_grad_weight(const AggregateBackwardParams& p, const double* rho, int64_t slot,
                                int64_t first, int64_t first_row, int64_t last_row, double* to,
                                const Scratch& scratch) {
    const AggregateParams& f = p.forward;
    const int64_t channels = min_of(kWeightChannels, f.c - first);
    const int64_t height = ceil_div(f.o, kTileRows) * kTileRows;
    for (int64_t o = 0; o < f.o; ++o) std::fill_n(to + o * f.c, channels, 0);
    for (int64_t row = first_row; row < last_row; row += kWeightRows) {
      const int64_t depth = min_of(kWeightRows, last_row - row);
      gather_outputs(p, slot, row, depth, height, scratch.outputs);
      gather_channels(f, rho, slot, row, depth, first, channels, scratch.channels);
      for (int64_t c = 0; c < channels; c += kPanel) {
        const int64_t columns = min_of(kPanel, channels - c);
        multiply<A, false, kDenseSummedSteps>({scratch.outputs, 1, height}, height,
                                              scratch.channels + c * depth, depth, columns,
                                              scratch.tiles, kPanel);
        for (int64_t o = 0; o < f.o; ++o) {
          double* sum = to + o * f.c + c;
          for (int64_t i = 0; i < columns; ++i) sum[i] += scratch.tiles[o * kPanel + i];
        }
      }
    }
  }

  // Copies grad_output of `depth` rows to rows [depth, height], with zeros for a row whose neighbor
  // at that slot is missing. gather_channels has zeros there, too, and 0 * inf would be NaN.
  static void gather_outputs(const AggregateBackwardParams& p, int64_t slot, int64_t row,
                             int64_t depth, int64_t height, A* rows) {
    const int64_t outputs = p.forward.o;
    const T* g = static_cast<const T*>(p.grad_output) + row * outputs;
    for (int64_t t = 0; t < depth; ++t, g += outputs, rows += height) {
      const bool missing = is_missing(similarity_at(p.forward, (row + t) * p.forward.k + slot));
      const int64_t filled = missing ? 0 : outputs;
      copy_row(g, filled, rows);
      std::fill_n(rows + filled, height - filled, A(0));
    }
  }

  // Copies rho V[I] of `depth` rows at one slot to packed [channels / kPanel, depth, kPanel].
  static void gather_channels(const AggregateParams& f, const double* rho, int64_t slot,
                              int64_t row, int64_t depth, int64_t first, int64_t channels,
                              A* packed) {
    for (int64_t t = 0; t < depth; ++t) {
      const int64_t entry = (row + t) * f.k + slot;
      const bool missing = is_missing(similarity_at(f, entry));
      const T* v = missing ? nullptr : value_row(f, row + t, entry) + first;
      for (int64_t panel = 0; panel < channels; panel += kPanel) {
        A* to = packed + panel * depth + t * kPanel;
        const int64_t columns = min_of(kPanel, channels - panel);
        const int64_t filled = missing ? 0 : columns;
        scale_row(missing ? nullptr : v + panel, rho[entry], filled, to);
        for (int64_t c = filled; c < ceil_div(columns, kLanes<A>) * kLanes<A>; ++c) to[c] = 0;
      }
    }
  }
};

template <class T>
AggregateBackwardKernel aggregate_backward_kernel() {
  using K = AggregateBackward<T>;
  return {kBlockRows,       K::packed_weight_bytes,
          K::pack_tasks,    K::pack_weight,
          K::scratch_bytes, K::query_tasks,
          K::query_rows,    K::similarities,
          K::key_rows,      K::pair_tasks,
          K::pairs,         K::cut_keys,
          K::weight_parts,  K::weight_tasks,
          K::weight,        K::sum_weight,
          K::bias_tasks,    K::bias};
}

}  // namespace convnn::CONVNN_ISA
