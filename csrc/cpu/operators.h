// SPDX-License-Identifier: MIT
// The operators on the CPU, as C++ functions without PyTorch. They choose the instruction set,
// allocate the workspace, and run the passes of kernels.h in parallel.
#pragma once

#include <cstdint>
#include <functional>

#include "../params.h"

namespace convnn::cpu {

// Calls body(begin, end) for ranges that together cover [0, tasks), each of at least `grain` tasks
// where possible, on as many threads as the caller likes.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = void (*)(int64_t tasks, int64_t grain, const Body& body);

void select(const SelectParams& params, ParallelFor parallel_for);
void select_backward(const SelectBackwardParams& params, ParallelFor parallel_for);
void aggregate(const AggregateParams& params, ParallelFor parallel_for);
void aggregate_backward(const AggregateBackwardParams& params, ParallelFor parallel_for);
void forward_backward(const ForwardBackwardParams& params, ParallelFor parallel_for);

// The name of the instruction set in use; see kernels() in instruction_sets.h.
const char* instruction_set();

}  // namespace convnn::cpu
