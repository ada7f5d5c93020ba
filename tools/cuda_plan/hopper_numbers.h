// SPDX-License-Identifier: MIT
// The numbers in the arguments of kernels on which it depends how often their loops run.
#pragma once

#include "../../csrc/cuda/hopper_sweep.cuh"
#include "execution.h"

namespace convnn::cuda {

inline void describe(const SweepParams& p, size_t) {
  using execution::number;
  number("n", p.n), number("d", p.d), number("m_padded", p.m_padded), number("k", p.k);
  number("items", p.blocks * p.splits), number("tiles", p.tiles), number("splits", p.splits);
  number("step", p.step), number("cosine", p.cosine), number("pairs", p.pairs);
}

}  // namespace convnn::cuda
