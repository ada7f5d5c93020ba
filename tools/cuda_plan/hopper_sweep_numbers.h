// SPDX-License-Identifier: MIT
// What hopper_sweep.cu tells of a launch.
#pragma once

#include "../../csrc/cuda/hopper_sweep.cuh"
#include "execution.h"

namespace convnn::cuda {

inline void describe(const SweepParams& p, size_t) {
  using execution::number;
  number("n", p.n), number("d", p.d), number("columns", p.m_padded), number("k", p.k);
  number("items", int64_t(p.blocks) * p.splits), number("tiles", p.tiles);
  number("splits", p.splits), number("step", p.step), number("cosine", p.cosine);
  number("pairs", p.pairs), number("list", hits_per_list(p.k));
  number("slots", p.d <= 64 ? SweepShared<64>::kSlots : SweepShared<128>::kSlots);
}

}  // namespace convnn::cuda
