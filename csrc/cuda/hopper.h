// SPDX-License-Identifier: MIT
// The forward for Hopper, compiled for sm_90a: selection in 16 bits by the asynchronous matrix
// instruction, with the aggregation behind it.
#pragma once

#include "operators.h"

namespace convnn::cuda {

// How the work is divided; 0: chosen from the sizes.
struct HopperChoices {
  int multiprocessors = 0;  // of the device
  int splits = 0;           // parts of the columns that different blocks sweep
  int step = 0;             // every step-th tile of columns is sampled for a threshold
};
// `given`, with what is 0 chosen.
HopperChoices choose(const SelectParams& select, HopperChoices given);

// Why select(), or select() and aggregate(), cannot run here, or null if they can. Pointers to
// results are not looked at.
const char* hopper_refuses(const SelectParams& select, const AggregateParams* aggregate);

// select(), and aggregate() of its results unless that is null. The arguments must not be refused.
// The device must be of compute capability 9.0.
void hopper_forward(const SelectParams& select, const AggregateParams* aggregate, Context& context,
                    HopperChoices choices = {});

}  // namespace convnn::cuda
