// SPDX-License-Identifier: MIT
// How fast the kernels of each instruction set are on this processor.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace convnn::cpu {

struct Measurement {
  std::vector<int64_t> picoseconds;  // [sets] per similarity
  int64_t microseconds;              // that measuring took
};

// Times these sets on the calling thread. All times are CPU time of this thread.
Measurement measure(const std::vector<const Kernels*>& sets);

}  // namespace convnn::cpu
