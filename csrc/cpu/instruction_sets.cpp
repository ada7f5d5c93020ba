// SPDX-License-Identifier: MIT
#include "instruction_sets.h"

#include <pthread.h>
#if defined(CONVNN_WITH_AVX2)
#include <cpuid.h>
#endif
#if defined(CONVNN_WITH_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "choice.h"
#include "operators.h"
#include "remembered.h"
#include "timing.h"

namespace convnn::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  const Kernels& (*kernels)();
};

#if defined(CONVNN_WITH_AVX2)
// Whether the processor converts float16. Older compilers do not know it by name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
#endif
#if defined(CONVNN_WITH_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && has_f16c();
}
#endif
#if defined(CONVNN_WITH_AVX512VNNI)
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif
#if defined(CONVNN_WITH_AMX)
// Whether the processor has AMX for bfloat16 and Linux lets this process use it, which it asks for.
// From then on, alternate signal stacks must have room for tiles.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & kBfloat16) || !(d & kTiles)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Preferred first, where several are equally fast.
constexpr InstructionSet kInstructionSets[] = {
#if defined(CONVNN_WITH_AVX512VNNI)
    {"avx512vnni", has_vnni, avx512vnni::kernels},
#endif
#if defined(CONVNN_WITH_AMX)
    {"amx", has_amx, amx::kernels},
#endif
#if defined(CONVNN_WITH_AVX512)
    {"avx512", has_avx512, avx512::kernels},
#endif
#if defined(CONVNN_WITH_AVX2)
    {"avx2", has_avx2, avx2::kernels},
#endif
    {"portable", [] { return true; }, portable::kernels},
};

// The instruction set of this name if it runs here, or null.
const InstructionSet* find(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(name, set.name) == 0) return set.runs_here() ? &set : nullptr;
  }
  return nullptr;
}

const char* requested_set() {
  const char* name = std::getenv("CONVNN_CPU_ISA");
  return name && *name ? name : nullptr;
}

std::string list(const std::vector<std::string>& words, const char* between) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : between) + word;
  return text;
}

struct Choice {
  const Kernels* kernels;
  std::string description;
};

Choice describe(const Kernels& kernels, const std::string& how) {
  return {&kernels, std::string("instruction_set ") + kernels.instruction_set + "\n" + how};
}

Choice choose_requested(const char* name) {
  if (const InstructionSet* set = find(name)) return describe(set->kernels(), "source requested\n");
  throw std::runtime_error("CONVNN_CPU_ISA must be one of the instruction sets that run here (" +
                           list(usable_instruction_sets(), ", ") + "), got " + name);
}

// The times of these sets: remembered, or else measured and remembered. Describes which.
Times times_of(const std::vector<const Kernels*>& sets, std::string& description) {
  Times times;
  for (const Kernels* set : sets) times.sets.push_back(set->instruction_set);
  const std::string key = processor_model() + "; " CONVNN_BUILD "; " + list(times.sets, " ");
  const std::string file = remembered_file(key);
  if (!file.empty() && from_text(read_file(file), key, times)) {
    description = "source remembered\nfile " + file + "\n";
  } else {
    const Measurement measured = measure(sets);
    times.picoseconds = measured.picoseconds;
    description = "source measured\nmicroseconds " + std::to_string(measured.microseconds) + "\n";
    if (!file.empty()) {
      description += (write_file(file, to_text(key, times)) ? "file " : "file! ") + file + "\n";
    }
  }
  description += "picoseconds " + times_text(times) + "\n";
  return times;
}

// Never `portable`, whose results differ, where another set runs.
Choice choose_by_speed() {
  std::vector<const Kernels*> sets;
  for (const std::string& name : usable_instruction_sets()) {
    if (sets.empty() || name != "portable") sets.push_back(&find(name.c_str())->kernels());
  }
  if (sets.size() == 1) return describe(*sets[0], "source only\n");
  try {
    std::string how;
    const Times times = times_of(sets, how);
    return describe(*sets[fastest(times.picoseconds)], how);
  } catch (const std::exception&) {
    return describe(*sets[0], "source default\n");
  }
}

// What choice() made, once it has. Other threads wait for it, and so does a fork: in the new
// process, nobody would release the mutex.
std::atomic<const Choice*> chosen{nullptr};
std::mutex choosing;
[[maybe_unused]] const int fork_waits =
    pthread_atfork([] { choosing.lock(); }, [] { choosing.unlock(); }, [] { choosing.unlock(); });

const Choice& choice() {
  if (const Choice* made = chosen.load()) return *made;
  const std::lock_guard<std::mutex> lock(choosing);
  if (!chosen.load()) {
    const char* const requested = requested_set();
    static const Choice made = requested ? choose_requested(requested) : choose_by_speed();
    chosen.store(&made);
  }
  return *chosen.load();
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
  return *choice().kernels;
}

bool can_choose() {
  const char* const requested = requested_set();
  return forced.load() || chosen.load() || !requested || find(requested);
}

const std::string& describe_choice() { return choice().description; }

const char* instruction_set() { return kernels().instruction_set; }

}  // namespace convnn::cpu
