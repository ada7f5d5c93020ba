// SPDX-License-Identifier: MIT
// What gradients.cu tells of a launch.
#pragma once

#include "../../csrc/cuda/key_side.cuh"
#include "../../csrc/cuda/query_side.cuh"
#include "execution.h"

namespace convnn::cuda {

template <class T>
void describe(const QuerySideWork<T>& w, size_t) {
  using execution::number;
  number("rows", w.rows), number("n", w.n), number("processors", w.processors), number("m", w.m),
      number("c", w.c), number("d", w.d);
  number("k", w.k), number("cosine", w.metric == Metric::cosine), number("part", w.size_of_part());
  number("through_rho", w.through_rho), number("parts_are_shared", w.parts_are_shared);
  number("of_weight", w.of_weight), number("of_bias", w.of_bias);
  number("direct", w.direct != nullptr), number("similarities", w.grad_similarities != nullptr);
}
template <class T>
void describe(const KeySideWork<T>& w, size_t) {
  using execution::number;
  number("keys", w.keys), number("c", w.c), number("d", w.d), number("pairs", w.list.count);
  number("chunks", w.chunks), number("of_value", w.grad_value != nullptr);
  number("of_key", w.grad_key != nullptr), number("key_sums", w.key_sums != nullptr);
  number("cosine", w.metric == Metric::cosine), number("weight", w.weight != nullptr);
}

}  // namespace convnn::cuda
