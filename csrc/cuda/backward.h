// SPDX-License-Identifier: MIT
// The backward operators on an inverse neighbor list that the caller computed, so that
// forward_backward can give one list to both. It is not read where it is not needed.
#pragma once

#include "inverse_list.h"
#include "operators.h"

namespace convnn::cuda {

void aggregate_backward(const AggregateBackwardParams& params, const InverseList& inverse,
                        Context& context);
void select_backward(const SelectBackwardParams& params, const InverseList& inverse,
                     Context& context);

}  // namespace convnn::cuda
