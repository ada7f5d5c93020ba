// SPDX-License-Identifier: MIT
// The operators on the CPU, as C++ functions that know no torch. They choose the instruction set,
// hold the workspace, and run the passes of kernels.h in parallel.
#pragma once

#include <cstdint>
#include <functional>

#include "../params.h"

namespace convnn::cpu {

// Runs body(begin, end) over ranges that together make up [0, tasks), each of at least `grain`
// tasks where possible, on as many threads as the caller likes.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = void (*)(int64_t tasks, int64_t grain, const Body& body);

void select(const SelectParams& params, ParallelFor parallel_for);
void select_backward(const SelectBackwardParams& params, ParallelFor parallel_for);
void aggregate(const AggregateParams& params, ParallelFor parallel_for);
void aggregate_backward(const AggregateBackwardParams& params, ParallelFor parallel_for);

// The instruction set in use: the best that was built and that the processor has, or the one that
// the environment variable CONVNN_CPU_ISA names. Throws std::runtime_error where that cannot run.
const char* instruction_set();

}  // namespace convnn::cpu
