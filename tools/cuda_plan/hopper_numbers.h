// SPDX-License-Identifier: MIT
// What hopper.cu tells of a launch.
#pragma once

#include "../../csrc/cuda/hopper_keys.cuh"
#include "execution.h"

namespace convnn::cuda {

template <class T>
void describe(const KeysWork<T>& w, size_t) {
  using execution::number;
  number("copies", w.copy != nullptr), number("cosine", w.cosine), number("vectors", w.vectors);
  number("sampled", w.inverse_sample != nullptr);
}

}  // namespace convnn::cuda
