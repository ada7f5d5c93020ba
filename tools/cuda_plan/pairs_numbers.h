// SPDX-License-Identifier: MIT
// What pairs.cu tells of a launch.
#pragma once

#include "../../csrc/cuda/pairs.cuh"
#include "execution.h"

namespace convnn::cuda {

inline void describe(const PairSort& p, size_t) {
  using execution::number;
  number("n", p.n), number("m", p.m), number("k", p.k), number("each", p.each);
  number("tiles", p.tiles), number("ranges", p.ranges);
}

}  // namespace convnn::cuda
