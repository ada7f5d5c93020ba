// SPDX-License-Identifier: MIT
// Defines the operators of the library convnn and registers them for the CPU dispatch key.
#include "../torch_operators.h"

#include <string>

#include "floating_point_mode.h"
#include "forked.h"
#include "instruction_sets.h"
#include "operators.h"

namespace convnn::torch_operators {
namespace {

void parallel_for(int64_t tasks, int64_t grain, const cpu::Body& body) {
  if (cpu::is_forked_from_threads()) return body(0, tasks);
  const auto mode = cpu::floating_point_mode();
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const cpu::FloatingPointModeGuard guard(mode);
    body(begin, end);
  });
}

struct Cpu {
  static constexpr bool kReadsIndices = true;
  static constexpr bool kReadsStrides = true;

  explicit Cpu(const Tensor&) {}
  void select(const SelectParams& params) { cpu::select(params, parallel_for); }
  void forward(const SelectParams& selecting, const AggregateParams& aggregating) {
    select(selecting);
    aggregate(aggregating);
  }
  void select_backward(const SelectBackwardParams& params) {
    cpu::select_backward(params, parallel_for);
  }
  void aggregate(const AggregateParams& params) { cpu::aggregate(params, parallel_for); }
  void aggregate_backward(const AggregateBackwardParams& params) {
    cpu::aggregate_backward(params, parallel_for);
  }
  void forward_backward(const ForwardBackwardParams& params) {
    cpu::forward_backward(params, parallel_for);
  }
};

}  // namespace
}  // namespace convnn::torch_operators

STABLE_TORCH_LIBRARY(convnn, library) { convnn::torch_operators::define(library); }

STABLE_TORCH_LIBRARY_IMPL(convnn, CPU, library) {
  convnn::torch_operators::implement<convnn::torch_operators::Cpu>(library);
}

#define CONVNN_EXPORTED extern "C" __attribute__((visibility("default")))

// The instruction set in use, or null if the one that CONVNN_CPU_ISA names cannot run.
CONVNN_EXPORTED const char* convnn_cpu_instruction_set() {
  try {
    return convnn::cpu::instruction_set();
  } catch (const std::exception&) {
    return nullptr;
  }
}

// See use_instruction_set() in instruction_sets.h.
CONVNN_EXPORTED bool convnn_cpu_use_instruction_set(const char* name, const char** before) {
  return convnn::cpu::use_instruction_set(name, before);
}

// The instruction sets that run here, preferred first, with commas between them.
CONVNN_EXPORTED const char* convnn_cpu_usable_instruction_sets() {
  static const std::string list = [] {
    std::string names;
    for (const std::string& name : convnn::cpu::usable_instruction_sets()) {
      names += (names.empty() ? "" : ",") + name;
    }
    return names;
  }();
  return list.c_str();
}

// See can_choose() and describe_choice() there. Null where kernels() raises.
CONVNN_EXPORTED bool convnn_cpu_can_choose() { return convnn::cpu::can_choose(); }
CONVNN_EXPORTED const char* convnn_cpu_describe_choice() {
  try {
    return convnn::cpu::describe_choice().c_str();
  } catch (const std::exception&) {
    return nullptr;
  }
}
