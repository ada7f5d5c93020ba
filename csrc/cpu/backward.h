// SPDX-License-Identifier: MIT
// The backward operators on an inverse neighbor list that the caller computed, so that
// forward_backward can give one list to both. Without one where it is not needed.
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
