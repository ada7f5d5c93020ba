// SPDX-License-Identifier: MIT
// How fast the kernels of each instruction set are on this processor.
#pragma once

#include <vector>

#include "choice.h"
#include "kernels.h"

namespace convnn::cpu {

struct Measurement {
  Times times;
  double milliseconds;  // that it took
  bool is_steady;       // whether there was time for enough rounds to rely on
};

// Times these sets on the calling thread.
Measurement measure(const std::vector<const Kernels*>& sets);

}  // namespace convnn::cpu
