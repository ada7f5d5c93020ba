// SPDX-License-Identifier: MIT
// The forward in 16 bits: a sweep over all similarities that leaves the hits of every query, and a
// kernel behind it that ranks them and aggregates. One sweep is for Hopper, compiled for sm_90a, by
// the asynchronous matrix instruction; the other is portable.
#pragma once

#include "operators.h"

namespace convnn::cuda {

// How the work is divided; 0: chosen from the sizes.
struct HopperChoices {
  int multiprocessors = 0;  // of the device
  int splits = 0;           // parts of the columns that different blocks sweep
  int step = 0;             // every step-th tile of columns is sampled for a threshold
  bool portable = false;    // the sweep that runs on any device
};
// `given`, with what is 0 chosen.
HopperChoices choose(const SelectParams& select, HopperChoices given);

// Why hopper_forward() cannot run a call, or null if it can. Pointers to results are not looked
// at.
const char* hopper_refuses(const SelectParams& select, const AggregateParams* aggregate);

// select(), and aggregate() of its results unless that is null. The arguments must not be refused.
// Unless `portable`, the device must be of compute capability 9.0.
void hopper_forward(const SelectParams& select, const AggregateParams* aggregate, Context& context,
                    HopperChoices choices = {});

}  // namespace convnn::cuda
