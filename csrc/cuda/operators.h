// SPDX-License-Identifier: MIT
// The operators on a CUDA device, as C++ functions that know no torch: they choose the launches,
// take workspace from the caller, and return as soon as everything is in the stream.
#pragma once

#include <cstddef>

#include "../params.h"

namespace convnn::cuda {

// Where an operator runs. The current device is that of the pointers in its parameters.
class Context {
 public:
  // A cudaStream_t.
  explicit Context(void* stream) : stream(stream) {}
  virtual ~Context() = default;

  // Device memory, aligned to 256 bytes, that the stream may use until the context is gone.
  virtual void* allocate(size_t bytes) = 0;

  void* const stream;
  // Workspace for group maxima and top_groups: with more rows, the launches are several.
  int64_t most_bytes = int64_t(64) << 20;
};

// Each throws std::runtime_error where a launch fails, and select() where there are 2^32 or more
// rows of key, but of float64. Index values out of range are left out.
void select(const SelectParams& params, Context& context);
void select_backward(const SelectBackwardParams& params, Context& context);
void aggregate(const AggregateParams& params, Context& context);
void aggregate_backward(const AggregateBackwardParams& params, Context& context);
void forward_backward(const ForwardBackwardParams& params, Context& context);

}  // namespace convnn::cuda
