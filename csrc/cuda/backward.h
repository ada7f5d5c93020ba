// SPDX-License-Identifier: MIT
// The backward operators with an inverse neighbor list from the caller, so that forward_backward
// computes one list for both. An operator that does not need the list does not read it.
#pragma once

#include "inverse_list.h"
#include "operators.h"

namespace convnn::cuda {

void aggregate_backward(const AggregateBackwardParams& params, const InverseList& inverse,
                        Context& context);
void select_backward(const SelectBackwardParams& params, const InverseList& inverse,
                     Context& context);

}  // namespace convnn::cuda
