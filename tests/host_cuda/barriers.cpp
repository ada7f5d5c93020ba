// SPDX-License-Identifier: MIT
// Barriers in shared memory, and named barriers.
#include "barriers.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "fibers.h"
#include "hopper.h"

namespace execution {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kMostBytes = (1 << 20) - 1;

// A barrier in shared memory. Its 8 bytes there hold a tag, to find out when they are overwritten.
struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0, phase = 0;
  // The last phase that copies completed in, and that a thread waited for.
  int64_t copied = -1, waited = -1;
  uint32_t address = 0;
  int initializer = 0;
  bool fenced = false, published = false;
  Site site = {};
};
std::map<uint32_t, Barrier> barriers;  // by address

uint64_t tag(uint32_t address) { return 0xBA221E2000000000u | address; }

std::string name_of(const Barrier& barrier) {
  return "the barrier at byte " + std::to_string(barrier.address) + ", initialized at " +
         place(barrier.site) + ",";
}

std::string outstanding(const Barrier& barrier) {
  return std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) +
         " arrivals and " + std::to_string(barrier.bytes) + " bytes outstanding";
}

Barrier& find(uint64_t* bar, Site site) {
  const uint32_t address = shared_address(bar, site);
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("a barrier that was not initialized", site);
  Barrier& barrier = found->second;
  if (*bar != tag(address)) fail(name_of(barrier) + " was overwritten", site);
  if (!barrier.published && barrier.initializer != current_thread()) {
    fail(name_of(barrier) + " is used by another thread without fence_barrier_init() and " +
             "__syncthreads() since",
         site);
  }
  return barrier;
}

// Completes the phase if nothing is outstanding.
void settle(Barrier& barrier, Site site) {
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0) {
    fail("more bytes were copied than " + name_of(barrier) + " expected", site);
  }
  ++barrier.phase;
  barrier.pending = barrier.count;
  changed();
}

void arrive(Barrier& barrier, Site site) {
  if (barrier.pending == 0) fail("too many arrivals at " + name_of(barrier), site);
  --barrier.pending;
  settle(barrier, site);
}

class PhaseComplete : public Condition {
 public:
  PhaseComplete(const Barrier& barrier, int parity) : barrier_(barrier), parity_(parity) {}
  bool holds() const override { return (barrier_.phase & 1) != parity_; }
  std::string text() const override {
    return name_of(barrier_) + " parity " + std::to_string(parity_) + ", in phase " +
           std::to_string(barrier_.phase) + " with " + outstanding(barrier_);
  }

 private:
  const Barrier& barrier_;
  const int parity_;
};

// Named barriers

struct NamedBarrier {
  int threads = 0;
  std::vector<int> arrived;
  std::set<int> warps;  // that completed it before
  int64_t completed = 0;
  Site site = {};
};
std::vector<NamedBarrier> named;  // 16, or none before the first use in a block

class NamedComplete : public Condition {
 public:
  NamedComplete(int id) : id_(id), before_(named[size_t(id)].completed) {}
  bool holds() const override { return named[size_t(id_)].completed > before_; }
  std::string text() const override {
    const NamedBarrier& barrier = named[size_t(id_)];
    return "named barrier " + std::to_string(id_) + ", where " +
           std::to_string(barrier.arrived.size()) + " of " + std::to_string(barrier.threads) +
           " threads have come";
  }

 private:
  const int id_;
  const int64_t before_;
};

void complete(NamedBarrier& barrier, int id, Site site) {
  std::set<int> warps;
  for (const int thread : barrier.arrived) {
    warps.insert(thread / kWarp);
    publish_barriers(thread);
  }
  if (int(warps.size()) * kWarp != barrier.threads) {
    fail("named barrier " + std::to_string(id) + " was completed by parts of warps", site);
  }
  if (barrier.completed > 0 && warps != barrier.warps) {
    fail("named barrier " + std::to_string(id) + " was completed by other warps than before", site);
  }
  barrier.warps = warps;
  barrier.arrived.clear();
  ++barrier.completed;
  changed();
}

}  // namespace

uint32_t shared_address(const void* p, Site site) {
  const auto* address = static_cast<const unsigned char*>(p);
  if (address < shared_memory() || address > shared_memory() + shared_bytes()) {
    fail("an address outside shared memory", site);
  }
  return uint32_t(address - shared_memory());
}

void begin_barriers() {
  barriers.clear();
  named.clear();
}

void end_barriers() {
  for (const auto& [address, barrier] : barriers) {
    if (barrier.pending != barrier.count || barrier.bytes != 0) {
      fail("the block ends within a phase of " + name_of(barrier) + " with " + outstanding(barrier),
           barrier.site);
    }
    if (barrier.copied > barrier.waited) {
      fail("no thread has waited for the last copies to " + name_of(barrier), barrier.site);
    }
  }
  for (size_t id = 0; id < named.size(); ++id) {
    if (named[id].arrived.empty()) continue;
    fail("the block ends while threads wait at named barrier " + std::to_string(id),
         named[id].site);
  }
}

void publish_barriers(int thread) {
  for (auto& [address, barrier] : barriers) {
    if (barrier.initializer == thread && barrier.fenced) barrier.published = true;
  }
}

void barrier_init(uint64_t* bar, int count, Site site) {
  const uint32_t address = shared_address(bar, site);
  if (address % 8 != 0 || address + 8 > shared_bytes()) {
    fail("a barrier outside shared memory or not aligned", site);
  }
  if (count < 1 || count > kMostBytes) fail("a barrier of no or too many arrivals", site);
  if (barriers.count(address)) fail("a barrier is initialized again", site);
  Barrier barrier;
  barrier.count = barrier.pending = count;
  barrier.address = address;
  barrier.initializer = current_thread();
  barrier.site = site;
  barriers[address] = barrier;
  *bar = tag(address);
}

void fence_barrier_init() {
  for (auto& [address, barrier] : barriers) {
    if (barrier.initializer == current_thread()) barrier.fenced = true;
  }
}

void barrier_arrive(uint64_t* bar, Site site) {
  arrive(find(bar, site), site);
  perhaps_switch(site);
}

void barrier_expect(uint64_t* bar, int bytes, Site site) {
  Barrier& barrier = find(bar, site);
  barrier.bytes += bytes;
  if (bytes < 0 || barrier.bytes > kMostBytes) fail("too many bytes expected", site);
  arrive(barrier, site);
  perhaps_switch(site);
}

void barrier_wait(uint64_t* bar, int parity, Site site) {
  Barrier& barrier = find(bar, site);
  if (parity != 0 && parity != 1) fail("a parity other than 0 and 1", site);
  perhaps_switch(site);
  wait(site, PhaseComplete(barrier, parity));
  barrier.waited = std::max(barrier.waited, barrier.phase - 1);
}

int64_t begin_copy(uint64_t* bar, Site site) {
  const Barrier& barrier = find(bar, site);
  if (!barrier.fenced) fail(name_of(barrier) + " takes a copy without fence_barrier_init()", site);
  return barrier.phase;
}

void complete_copy(uint64_t* bar, int bytes, int64_t phase, Site site) {
  Barrier& barrier = barriers.at(shared_address(bar, site));
  if (barrier.phase != phase) {
    fail("a copy of " + std::to_string(bytes) + " bytes ends after its phase of " +
             name_of(barrier) + " which expected fewer bytes",
         site);
  }
  barrier.copied = phase;
  barrier.bytes -= bytes;
  settle(barrier, site);
}

void named_barrier(int id, int threads, Site site) {
  if (id < 1 || id > 15) fail("a named barrier other than 1 to 15", site);
  if (threads < kWarp || threads % kWarp != 0 || threads > thread_count()) {
    fail("a named barrier of " + std::to_string(threads) + " threads", site);
  }
  if (named.empty()) named.resize(16);
  NamedBarrier& barrier = named[size_t(id)];
  if (!barrier.arrived.empty() && barrier.threads != threads) {
    fail("threads come to named barrier " + std::to_string(id) + " with different numbers", site);
  }
  barrier.threads = threads;
  barrier.site = site;
  const NamedComplete condition(id);
  barrier.arrived.push_back(current_thread());
  if (int(barrier.arrived.size()) == threads) complete(barrier, id, site);
  perhaps_switch(site);
  wait(site, condition);
}

}  // namespace execution
