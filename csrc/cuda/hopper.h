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
// Rows of query of one block, and columns of one tile of keys.
HopperChoices choose(const SelectParams& select, HopperChoices given);

// Why these arguments cannot run, or null if they can. For `aggregate` there is no reason beyond
// those of `select`: what the finish cannot do is left to aggregate().
const char* hopper_refuses(const SelectParams& select);

// select(), and aggregate() of its results unless that is null. The arguments must not be refused.
void hopper_forward(const SelectParams& select, const AggregateParams* aggregate, Context& context,
                    HopperChoices choices = {});

}  // namespace convnn::cuda
