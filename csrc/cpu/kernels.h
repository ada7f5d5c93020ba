// SPDX-License-Identifier: MIT
// What one instruction set offers to the host code of launch.cpp: for each operator and dtype, a
// set of passes over ranges of tasks. A pass is called from many threads, each with a range and a
// scratch of its own, and its results depend on neither.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace convnn {

// The keys of some consecutive batch elements, made ready for selection.
struct SelectWork {
  int64_t first_batch;     // the batch element at position 0 of the arrays below
  int64_t max_columns;     // m, or the number of candidates
  const int64_t* columns;  // [batches, max_columns] ascending rows of key; null: 0, 1, 2, ...
  const int64_t* counts;   // [batches] how many of those; null: max_columns
  void* packed;            // [batches, packed_bytes]
};

struct SelectKernel {
  int64_t rows_per_task;
  int64_t columns_per_panel;
  size_t (*packed_bytes)(const SelectParams&, int64_t columns);
  size_t (*scratch_bytes)(const SelectParams&);
  // Tasks: panels of columns of each batch element of the work.
  void (*pack)(const SelectParams&, const SelectWork&, int64_t begin, int64_t end, void* scratch);
  // Tasks: blocks of query rows of each batch element of the work.
  void (*rows)(const SelectParams&, const SelectWork&, int64_t begin, int64_t end, void* scratch);
};

// The inverse of `indices`: for each key row of each batch element the places (slot, query row)
// that chose it, in ascending order of (slot, query row), missing neighbors left out.
struct InverseNeighbors {
  const int64_t* offsets;  // [batch, m + 1] into the places of the batch element
  const int64_t* places;   // [batch, n * k] slot * n + query row
};

struct SelectBackwardKernel {
  size_t (*scratch_bytes)(const SelectBackwardParams&);
  // Tasks: query rows, then key rows, of all batch elements. Both arrays are written by the first
  // two passes and read by the last two; they are null unless the metric is cosine.
  void (*query_norms)(const SelectBackwardParams&, double* inverse_norms, int64_t begin,
                      int64_t end);
  void (*key_norms)(const SelectBackwardParams&, double* inverse_norms, int64_t begin, int64_t end);
  void (*query_rows)(const SelectBackwardParams&, const double* query_norms,
                     const double* key_norms, int64_t begin, int64_t end, void* scratch);
  void (*key_rows)(const SelectBackwardParams&, const InverseNeighbors&, const double* query_norms,
                   const double* key_norms, int64_t begin, int64_t end, void* scratch);
};

struct AggregateKernel {
  int64_t rows_per_task;
  size_t (*packed_weight_bytes)(const AggregateParams&);  // 0, and then null below: no weight
  void (*pack_weight)(const AggregateParams&, void* packed);
  size_t (*scratch_bytes)(const AggregateParams&);
  // Tasks: blocks of query rows of each batch element.
  void (*rows)(const AggregateParams&, const void* packed_weight, int64_t begin, int64_t end,
               void* scratch);
};

struct AggregateBackwardKernel {
  int64_t rows_per_task;                                          // of both query and key rows
  size_t (*packed_weight_bytes)(const AggregateBackwardParams&);  // as for AggregateKernel
  void (*pack_weight)(const AggregateBackwardParams&, void* packed);
  size_t (*scratch_bytes)(const AggregateBackwardParams&);
  // Tasks: blocks of query rows of each batch element. Writes rho [batch, n, k] for the passes
  // below where it is not null, and grad_similarities where it is needed; not of a dense
  // convolution, unless rho is ones.
  void (*query_rows)(const AggregateBackwardParams&, const void* packed_weight, double* rho,
                     int64_t begin, int64_t end, void* scratch);
  // Tasks: query rows. Writes grad_similarities from grad_rho [batch, n, k].
  void (*similarities)(const AggregateBackwardParams&, const double* rho, const double* grad_rho,
                       int64_t begin, int64_t end);
  // Tasks: blocks of key rows of each batch element. Writes grad_value; not of a dense convolution.
  void (*key_rows)(const AggregateBackwardParams&, const InverseNeighbors&,
                   const void* packed_weight, const double* rho, int64_t begin, int64_t end,
                   void* scratch);
  // A dense convolution. Tasks: as many as pair_tasks says, for each batch element. Writes grad_rho
  // where it is not null, and, where it is needed, grad_value; for key rows that more than one task
  // has a part of, the parts to cuts [batch, pair_tasks, 2, c].
  int64_t (*pair_tasks)(const AggregateBackwardParams&);
  void (*pairs)(const AggregateBackwardParams&, const InverseNeighbors&, const void* packed_weight,
                const double* rho, double* grad_rho, double* cuts, int64_t begin, int64_t end,
                void* scratch);
  // Tasks: batch elements. Adds up the parts.
  void (*cut_keys)(const AggregateBackwardParams&, const InverseNeighbors&, const double* cuts,
                   int64_t begin, int64_t end);
  // Tasks: as many as weight_tasks says. Writes the parts [weight_parts, k, o, c] of grad_weight,
  // [weight_parts, k, c] of a depthwise convolution, each of some of the rows.
  int64_t (*weight_parts)(const AggregateBackwardParams&);
  int64_t (*weight_tasks)(const AggregateBackwardParams&);
  void (*weight)(const AggregateBackwardParams&, const double* rho, double* parts, int64_t begin,
                 int64_t end, void* scratch);
  // Tasks: elements of [o, c], or c. Adds up the parts.
  void (*sum_weight)(const AggregateBackwardParams&, const double* parts, int64_t begin,
                     int64_t end);
  // Tasks: as many as bias_tasks says. Writes grad_bias.
  int64_t (*bias_tasks)(const AggregateBackwardParams&);
  void (*bias)(const AggregateBackwardParams&, int64_t begin, int64_t end);
};

// Indexed by DType.
struct Kernels {
  const char* instruction_set;
  SelectKernel select[4];
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
bool tiles_multiply();  // whether they do, seen by a product of whole numbers
}  // namespace amx

}  // namespace convnn
