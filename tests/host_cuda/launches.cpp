// SPDX-License-Identifier: MIT
// What belongs to a launch: the registers of its warpgroups, and its dependence on the kernel
// before.
#include <algorithm>
#include <utility>
#include <vector>

#include <sanitizer/asan_interface.h>

#include "fibers.h"
#include "hopper.h"

namespace execution {
namespace {

constexpr int kWarpgroup = 128;

// Registers

struct Warpgroup {
  int registers = 0, wanted = 0, arrived = 0;
  bool claims = false, asking = false;
  int64_t granted = 0;
  Site site = {};
};
std::vector<Warpgroup> warpgroups;
int free_registers;  // per thread of a warpgroup

void grant() {
  for (Warpgroup& warpgroup : warpgroups) {
    const int more = warpgroup.wanted - warpgroup.registers;
    if (!warpgroup.asking || more > free_registers) continue;
    free_registers -= more;
    warpgroup.registers = warpgroup.wanted;
    warpgroup.asking = false;
    ++warpgroup.granted;
    changed();
    grant();
    return;
  }
}

class RegistersGranted : public Condition {
 public:
  RegistersGranted(const Warpgroup& warpgroup)
      : warpgroup_(warpgroup), before_(warpgroup.granted) {}
  bool holds() const override { return warpgroup_.granted > before_; }
  std::string text() const override {
    if (!warpgroup_.asking) {
      return "the rest of its warpgroup to set registers, which " +
             std::to_string(warpgroup_.arrived) + " threads do";
    }
    return std::to_string(warpgroup_.wanted) + " registers instead of " +
           std::to_string(warpgroup_.registers) + ", of which " + std::to_string(free_registers) +
           " are free";
  }

 private:
  const Warpgroup& warpgroup_;
  const int64_t before_;
};

// Dependent launches

std::vector<std::pair<void*, size_t>> written;
bool dependent = false, released = true, waited_for_previous = false;

class PreviousEnded : public Condition {
 public:
  bool holds() const override { return released; }
  std::string text() const override { return "the previous kernel"; }
};

}  // namespace

void begin_registers() {
  // What __launch_bounds__ with one block on a multiprocessor leaves a thread.
  const int registers = std::min(65536 / thread_count() / 8 * 8, 255);
  warpgroups.assign(size_t(thread_count() / kWarpgroup), {});
  for (Warpgroup& warpgroup : warpgroups) warpgroup.registers = registers;
  free_registers = 0;
}

void set_registers(int registers, bool claim, Site site) {
  if (registers % 8 != 0 || registers < 24 || registers > 256) {
    fail("a number of registers that is not a multiple of 8 from 24 to 256", site);
  }
  const size_t own = size_t(current_thread() / kWarpgroup);
  if (own >= warpgroups.size()) fail("registers of a part of a warpgroup", site);
  Warpgroup& warpgroup = warpgroups[own];
  if (warpgroup.arrived == 0) {
    warpgroup.wanted = registers, warpgroup.claims = claim, warpgroup.site = site;
  } else if (warpgroup.wanted != registers || warpgroup.claims != claim) {
    fail("threads of a warpgroup set different numbers of registers", site);
  }
  if (claim ? registers < warpgroup.registers : registers > warpgroup.registers) {
    fail(std::string(claim ? "claim_registers() of fewer" : "release_registers() of more") +
             " registers than the " + std::to_string(warpgroup.registers) + " of the warpgroup",
         site);
  }
  const RegistersGranted condition(warpgroup);
  if (++warpgroup.arrived == kWarpgroup) {
    warpgroup.arrived = 0;
    warpgroup.asking = true;
    grant();
  }
  wait(site, condition);
}

void launch_dependents() {}

void written_by_kernels(void* memory, size_t bytes) { written.emplace_back(memory, bytes); }
void forget_memory() { written.clear(); }

void begin_dependence() {
  released = !dependent;
  waited_for_previous = false;
  if (!dependent) return;
  for (const auto& [memory, bytes] : written) __asan_poison_memory_region(memory, bytes);
}

bool is_before_previous() { return !released; }

bool release_dependence() {
  if (released) return false;
  released = true;
  for (const auto& [memory, bytes] : written) __asan_unpoison_memory_region(memory, bytes);
  changed();
  return true;
}

void end_dependence() {
  release_dependence();
  if (dependent && !waited_for_previous) {
    fail("no thread of a dependent launch called wait_for_previous()", {});
  }
}

void wait_for_previous(Site site) {
  waited_for_previous = true;
  wait(site, PreviousEnded());
}

void launch_kernel(intptr_t address, const char* name, int64_t blocks, int threads, size_t shared,
                   bool depends, const std::function<void()>& body) {
  dependent = depends;
  run(address, name, blocks, threads, shared, body);
  dependent = false;
}

}  // namespace execution
