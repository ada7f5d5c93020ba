// SPDX-License-Identifier: MIT
// The operators on a CUDA device, as C++ functions without PyTorch. They take workspace from the
// caller, launch kernels in a stream, and return without waiting for it.
#pragma once

#include <cstddef>

#include "../params.h"

namespace convnn::cuda {

// Where an operator runs. The current device must be that of the pointers in its parameters.
class Context {
 public:
  // A cudaStream_t.
  explicit Context(void* stream) : stream(stream) {}
  virtual ~Context() = default;

  // Device memory, aligned to 256 bytes, that work in the stream may use until the context is
  // destroyed.
  virtual void* allocate(size_t bytes) = 0;

  void* const stream;
  // Limit of the workspace for group maxima and top groups; more rows are split between launches.
  int64_t most_bytes = int64_t(64) << 20;
};

// Each throws std::runtime_error if a launch fails, and select() if there are 2^32 or more rows of
// key, except in float64. Index values out of range are ignored.
void select(const SelectParams& params, Context& context);
// select(), and aggregate() of its results.
void forward(const SelectParams& select, const AggregateParams& aggregate, Context& context);
void select_backward(const SelectBackwardParams& params, Context& context);
void aggregate(const AggregateParams& params, Context& context);
void aggregate_backward(const AggregateBackwardParams& params, Context& context);
void forward_backward(const ForwardBackwardParams& params, Context& context);

}  // namespace convnn::cuda
