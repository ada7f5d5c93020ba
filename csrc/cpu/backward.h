// SPDX-License-Identifier: MIT
// The backward operators with an inverse neighbor list from the caller, so that forward_backward
// computes one list for both. An operator that does not need the list does not read it.
#pragma once

#include "kernels.h"
#include "operators.h"

namespace convnn::cpu {

bool needs_inverse_list(const AggregateBackwardParams& params);
bool needs_inverse_list(const SelectBackwardParams& params);

void aggregate_backward(const AggregateBackwardParams& params, const InverseList& inverse,
                        ParallelFor parallel_for);
void select_backward(const SelectBackwardParams& params, const InverseList& inverse,
                     ParallelFor parallel_for);

}  // namespace convnn::cpu
