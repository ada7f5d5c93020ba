// SPDX-License-Identifier: MIT
// What hopper_finish.cu tells of a launch.
#pragma once

#include "../../csrc/cuda/hopper_finish.cuh"
#include "execution.h"

namespace convnn::cuda {

template <class T>
void describe(const FinishWork<T>& w, size_t) {
  using execution::number;
  number("row_blocks", w.blocks), number("n", w.n), number("k", w.k), number("splits", w.splits);
  number("c", w.c), number("m", w.m), number("processors", w.processors),
      number("aggregates", w.value != nullptr), number("by_index", w.by_index);
  number("weight_staged", w.weight_staged), number("vectors", w.vectors);
  number("bias", w.bias != nullptr), number("list", hits_per_list(w.k));
}

}  // namespace convnn::cuda
