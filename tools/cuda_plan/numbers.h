// SPDX-License-Identifier: MIT
// The numbers in the arguments of kernels on which it depends how often their loops run.
#pragma once

#include "../../csrc/cuda/select.cuh"
#include "execution.h"

namespace convnn::cuda {

template <class T>
void describe(const SelectWork<T>& w) {
  using execution::number;
  number("batch", w.p.batch), number("n", w.p.n), number("d", w.p.d), number("k", w.p.k);
  number("columns", w.columns), number("group", w.group), number("splits", w.splits);
}

}  // namespace convnn::cuda
