// SPDX-License-Identifier: MIT
// Computes the inverse neighbor list of a backward pass.
#pragma once

#include "kernels.h"
#include "operators.h"
#include "workspace.h"

namespace convnn::cpu {

// An InverseList and the memory it points to.
struct OwnedInverseList {
  Workspace offsets, pairs;
  int row_bits = 0;

  InverseList view() const { return {offsets.as<int64_t>(), pairs.as<int64_t>(), row_bits}; }
};

OwnedInverseList invert(const AggregateParams& params, ParallelFor parallel_for);
OwnedInverseList invert(const SelectBackwardParams& params, ParallelFor parallel_for);

}  // namespace convnn::cpu
