// SPDX-License-Identifier: MIT
// What the backward operators share.
#pragma once

#include "operators.h"

namespace convnn::cuda {

// Gradients of a convolution that is not dense, of select, or of one after the other, in which case
// the dtypes are equal; either may be null.
void gradients(const AggregateBackwardParams* output, const SelectBackwardParams* search,
               Context& context);

}  // namespace convnn::cuda
