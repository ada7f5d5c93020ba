// SPDX-License-Identifier: MIT
#include "instruction_sets.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "operators.h"

namespace convnn::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  const Kernels& (*kernels)();
};

#if defined(CONVNN_WITH_AVX2)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#if defined(CONVNN_WITH_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
#endif
#if defined(CONVNN_WITH_AVX512VNNI)
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

// Best first.
constexpr InstructionSet kInstructionSets[] = {
#if defined(CONVNN_WITH_AVX512VNNI)
    {"avx512vnni", has_vnni, avx512vnni::kernels},
#endif
#if defined(CONVNN_WITH_AVX512)
    {"avx512", has_avx512, avx512::kernels},
#endif
#if defined(CONVNN_WITH_AVX2)
    {"avx2", has_avx2, avx2::kernels},
#endif
    {"portable", [] { return true; }, portable::kernels},
};

const Kernels& choose_kernels() {
  const char* requested = std::getenv("CONVNN_CPU_ISA");
  const bool any = !requested || !*requested;
  for (const InstructionSet& set : kInstructionSets) {
    if ((any || std::strcmp(requested, set.name) == 0) && set.runs_here()) return set.kernels();
  }
  std::string names;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here()) names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error("CONVNN_CPU_ISA must be one of the instruction sets that run here (" +
                           names + "), got " + requested);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

const char* instruction_set() { return kernels().instruction_set; }

}  // namespace convnn::cpu
