// SPDX-License-Identifier: MIT
// What one instruction set provides: for each operator and dtype, a set of passes over ranges of
// tasks. A pass is called from many threads, each with its own range and scratch memory, and its
// results depend on neither.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace convnn {

// The keys of some consecutive batch elements, packed for selection.
struct SelectWork {
  int64_t first_batch;     // the batch element at position 0 of the arrays below
  int64_t max_columns;     // m, or the number of candidates
  const int64_t* columns;  // [batches, max_columns] ascending rows of key; null: 0, 1, 2, ...
  const int64_t* counts;   // [batches] how many of those; null: max_columns
  const int64_t* seen;     // [batches, 2] begin and end of what some query may see; null: all
  bool screened;           // whether what is packed contains a screen
  void* packed;            // [batches, packed_bytes]
};

struct SelectKernel {
  int64_t rows_per_task;
  int64_t columns_per_panel;
  bool (*screen_pays)(const SelectParams&, int64_t columns);  // columns in the range of a query
  size_t (*packed_bytes)(const SelectParams&, int64_t columns, bool screened);
  size_t (*scratch_bytes)(const SelectParams&);
  // Tasks: panels of columns of each batch element of the work.
  void (*pack)(const SelectParams&, const SelectWork&, int64_t begin, int64_t end, void* scratch);
  // Tasks: blocks of query rows of each batch element of the work.
  void (*rows)(const SelectParams&, const SelectWork&, int64_t begin, int64_t end, void* scratch);
};

// The neighbors of each query in each of several ranges of the columns of its batch element.
struct FoundInRanges {
  int64_t ranges;   // of each batch element
  void* ranks;      // [batches, n, ranges, found_bytes]
  int64_t* counts;  // [batches, n, ranges]
};

// Selection for few queries. `packed` of the work is not used.
struct FewQueriesKernel {
  bool (*pays)(const SelectParams&, int64_t columns);
  int64_t (*ranges)(const SelectParams&, int64_t columns);
  size_t (*found_bytes)(const SelectParams&);  // the ranks of a query in a range
  size_t (*scratch_bytes)(const SelectParams&);
  // Tasks: ranges of each batch element of the work. Writes the results if there is one range.
  void (*search)(const SelectParams&, const SelectWork&, const FoundInRanges&, int64_t begin,
                 int64_t end, void* scratch);
  // Tasks: query rows of each batch element of the work. Writes the results of several ranges.
  void (*merge)(const SelectParams&, const SelectWork&, const FoundInRanges&, int64_t begin,
                int64_t end, void* scratch);
};

// The inverse of `indices`: for each key row of each batch element the pairs (slot, query row) that
// chose it, in ascending order of (slot, query row), without missing neighbors.
struct InverseList {
  const int64_t* offsets;  // [batch, m + 1] into the pairs of the batch element
  const int64_t* pairs;    // [batch, n * k] slot << row_bits | query row
  int row_bits;            // 2^row_bits >= n

  int64_t slot(int64_t pair) const { return pair >> row_bits; }
  int64_t row(int64_t pair) const { return pair & ((int64_t(1) << row_bits) - 1); }
};

struct SelectBackwardKernel {
  size_t (*scratch_bytes)(const SelectBackwardParams&);
  // Tasks: query rows or key rows of all batch elements. The norms are written by the first two
  // passes and read by the last two; they are null unless the metric is cosine.
  void (*query_norms)(const SelectBackwardParams&, double* inverse_norms, int64_t begin,
                      int64_t end);
  void (*key_norms)(const SelectBackwardParams&, double* inverse_norms, int64_t begin, int64_t end);
  void (*query_rows)(const SelectBackwardParams&, const double* query_norms,
                     const double* key_norms, int64_t begin, int64_t end, void* scratch);
  void (*key_rows)(const SelectBackwardParams&, const InverseList&, const double* query_norms,
                   const double* key_norms, int64_t begin, int64_t end, void* scratch);
};

struct AggregateKernel {
  int64_t rows_per_task;
  size_t (*packed_weight_bytes)(const AggregateParams&);  // 0 without a weight: null below
  // Tasks: pack_tasks(), 0 without a weight.
  int64_t (*pack_tasks)(const AggregateParams&);
  void (*pack_weight)(const AggregateParams&, void* packed, int64_t begin, int64_t end);
  size_t (*scratch_bytes)(const AggregateParams&);
  // Tasks: blocks of query rows of the flattened batch.
  void (*rows)(const AggregateParams&, const void* packed_weight, int64_t begin, int64_t end,
               void* scratch);
};

struct AggregateBackwardKernel {
  int64_t key_rows_per_task;
  // As for AggregateKernel.
  size_t (*packed_weight_bytes)(const AggregateBackwardParams&);
  int64_t (*pack_tasks)(const AggregateBackwardParams&);
  void (*pack_weight)(const AggregateBackwardParams&, void* packed, int64_t begin, int64_t end);
  size_t (*scratch_bytes)(const AggregateBackwardParams&);
  // Tasks: query_tasks(), each some query rows of the flattened batch. Writes rho [batch, n, k] for
  // the passes below if it is not null, grad_similarities if it is needed, except that of a dense
  // convolution whose rho is not ones, and the parts of a depthwise grad_weight if they are not
  // null.
  int64_t (*query_tasks)(const AggregateBackwardParams&);
  void (*query_rows)(const AggregateBackwardParams&, const void* packed_weight, double* rho,
                     double* weight_parts, int64_t begin, int64_t end, void* scratch);
  // Tasks: query rows. Writes grad_similarities from grad_rho [batch, n, k].
  void (*similarities)(const AggregateBackwardParams&, const double* rho, const double* grad_rho,
                       int64_t begin, int64_t end);
  // Tasks: blocks of key rows of each batch element. Writes grad_value, except that of a dense
  // convolution.
  void (*key_rows)(const AggregateBackwardParams&, const InverseList&, const void* packed_weight,
                   const double* rho, int64_t begin, int64_t end);
  // Dense convolution only. Tasks: pair_tasks() for each batch element. Writes grad_rho if it is
  // not null, and grad_value if it is needed; of key rows whose pairs are split between tasks, the
  // partial sums, to cuts [batch, pair_tasks, 2, c].
  int64_t (*pair_tasks)(const AggregateBackwardParams&);
  void (*pairs)(const AggregateBackwardParams&, const InverseList&, const void* packed_weight,
                const double* rho, double* grad_rho, double* cuts, int64_t begin, int64_t end,
                void* scratch);
  // Tasks: batch elements. Adds up the partial sums in cuts.
  void (*cut_keys)(const AggregateBackwardParams&, const InverseList&, const double* cuts,
                   int64_t begin, int64_t end);
  // Partial sums of grad_weight, each over some of the rows: parts [weight_parts, k, o, c], or
  // [weight_parts, k, c] of a depthwise convolution.
  int64_t (*weight_parts)(const AggregateBackwardParams&);
  // Dense convolution only. Tasks: weight_tasks(). Writes the parts.
  int64_t (*weight_tasks)(const AggregateBackwardParams&);
  void (*weight)(const AggregateBackwardParams&, const double* rho, double* parts, int64_t begin,
                 int64_t end, void* scratch);
  // Tasks: elements of [o, c], or [c]. Adds up the parts.
  void (*sum_weight)(const AggregateBackwardParams&, const double* parts, int64_t begin,
                     int64_t end);
  // Tasks: bias_tasks(). Writes grad_bias.
  int64_t (*bias_tasks)(const AggregateBackwardParams&);
  void (*bias)(const AggregateBackwardParams&, int64_t begin, int64_t end);
};

// Indexed by DType.
struct Kernels {
  const char* instruction_set;
  SelectKernel select[4];
  FewQueriesKernel select_few[4];
  SelectBackwardKernel select_backward[4];
  AggregateKernel aggregate[4];
  AggregateBackwardKernel aggregate_backward[4];
};

namespace portable {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512vnni {
const Kernels& kernels();
}
namespace amx {
const Kernels& kernels();
}

}  // namespace convnn
