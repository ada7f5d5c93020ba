// SPDX-License-Identifier: MIT
// The dense convolution over chosen neighbors on sm_90a.
#pragma once

#include "operators.h"

namespace convnn::cuda {

// Why hopper_aggregate_dense() cannot run it; null if it can.
const char* hopper_dense_refuses(const AggregateParams& params);
// As aggregate(), on a device of compute capability 9.0. The arguments must not be refused.
// `multiprocessors`: those of the device; 0 if unknown.
void hopper_aggregate_dense(const AggregateParams& params, Context& context,
                            int multiprocessors = 0);

}  // namespace convnn::cuda
