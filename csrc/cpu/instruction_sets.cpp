// SPDX-License-Identifier: MIT
#include "instruction_sets.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "operators.h"

#if defined(CONVNN_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(CONVNN_WITH_AMX)
// Whether the processor has AMX for bfloat16, Linux lets this process use it, and a test product
// comes out right.
bool try_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & kBfloat16) || !(d & kTiles)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && amx::multiplies_correctly();
}
bool has_amx() {
  static const bool has = try_amx();
  return has;
}
#endif

// Best first.
constexpr InstructionSet kInstructionSets[] = {
#if defined(CONVNN_WITH_AMX)
    {"amx", has_amx, amx::kernels},
#endif
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

// The instruction set of this name if it runs here, or null. Calls runs_here() of no other: for AMX
// it executes instructions.
const InstructionSet* find(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(name, set.name) == 0) return set.runs_here() ? &set : nullptr;
  }
  return nullptr;
}

const Kernels& choose_kernels() {
  const char* requested = std::getenv("CONVNN_CPU_ISA");
  if (!requested || !*requested) return find(usable_instruction_sets()[0].c_str())->kernels();
  if (const InstructionSet* set = find(requested)) return set->kernels();
  std::string names;
  for (const std::string& name : usable_instruction_sets()) {
    names += (names.empty() ? "" : ", ") + name;
  }
  throw std::runtime_error("CONVNN_CPU_ISA must be one of the instruction sets that run here (" +
                           names + "), got " + requested);
}

// What use_instruction_set() named, or null.
std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const std::vector<std::string>& usable_instruction_sets() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    for (const InstructionSet& set : kInstructionSets) {
      if (set.runs_here()) found.push_back(set.name);
    }
    return found;
  }();
  return names;
}

bool use_instruction_set(const char* name, const char** before) {
  const InstructionSet* const set = name ? find(name) : nullptr;
  if (name && !set) return false;
  const Kernels* const replaced = forced.exchange(set ? &set->kernels() : nullptr);
  *before = replaced ? replaced->instruction_set : nullptr;
  return true;
}

const Kernels& kernels() {
  if (const Kernels* named = forced.load()) return *named;
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

const char* instruction_set() { return kernels().instruction_set; }

}  // namespace convnn::cpu
