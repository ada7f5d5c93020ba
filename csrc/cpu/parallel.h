// SPDX-License-Identifier: MIT
// Runs the passes of kernels.h in parallel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

#include "operators.h"
#include "workspace.h"

namespace convnn::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls pass(begin, end, scratch) for ranges that together cover [0, tasks), each with its own
// scratch memory. work_per_task is in multiply-adds; less than kMinimumWork of them is not worth a
// thread.
template <class Pass>
void run(ParallelFor parallel_for, int64_t tasks, double work_per_task, size_t scratch_bytes,
         const Pass& pass) {
  constexpr int64_t kMinimumWork = 1 << 15;
  const auto run_range = [&](int64_t begin, int64_t end) {
    const Workspace scratch(scratch_bytes, "the scratch memory of a thread");
    pass(begin, end, scratch.get());
  };
  const int64_t grain = std::max<int64_t>(1, int64_t(kMinimumWork / std::max(1.0, work_per_task)));
  if (tasks <= grain) {
    if (tasks > 0) run_range(0, tasks);
    return;
  }
  // PyTorch's stable ABI loses the message of an exception that leaves its parallel region.
  std::mutex mutex;
  std::exception_ptr failure;
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    try {
      run_range(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// The same for tasks of unequal cost: threads get ranges of tasks that cost about the same. costs:
// the multiply-adds of each task, more than 0.
template <class Pass>
void run(ParallelFor parallel_for, const std::vector<double>& costs, size_t scratch_bytes,
         const Pass& pass) {
  const int64_t tasks = int64_t(costs.size());
  // The cost of all tasks before each.
  std::vector<double> before = zeros<double>(costs.size(), "the costs of tasks");
  double total = 0;
  for (size_t task = 0; task < costs.size(); ++task) {
    before[task] = total;
    total += costs[task];
  }
  // The first task of one of as many equal shares of the cost as there are tasks.
  const auto first_task = [&](int64_t share) {
    const double cost = total * (double(share) / double(tasks));
    return int64_t(std::lower_bound(before.begin(), before.end(), cost) - before.begin());
  };
  run(parallel_for, tasks, total / std::max(1.0, double(tasks)), scratch_bytes,
      [&](int64_t begin, int64_t end, void* scratch) {
        pass(first_task(begin), first_task(end), scratch);
      });
}

// A pass without scratch memory: pass(begin, end).
template <class Pass>
void run(ParallelFor parallel_for, int64_t tasks, double work_per_task, const Pass& pass) {
  run(parallel_for, tasks, work_per_task, 0,
      [&](int64_t begin, int64_t end, void*) { pass(begin, end); });
}

}  // namespace convnn::cpu
