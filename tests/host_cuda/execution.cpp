// SPDX-License-Identifier: MIT
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include <sanitizer/common_interface_defs.h>

#include "fibers.h"

execution::Dimension threadIdx, blockIdx, gridDim;

#if defined(__x86_64__)
// swapcontext() of the C library makes a system call for the signal mask each time, which would
// take most of the time of a test. This saves the callee-saved registers on the stack and its
// address in *current, and continues on the stack at `other`.
extern "C" void execution_switch_stack(void** current, void* other);
__asm__(R"(
.text
.type execution_switch_stack, @function
execution_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size execution_switch_stack, .-execution_switch_stack
)");
#endif

namespace execution {
namespace {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kMostShared = 227 << 10;
constexpr size_t kStack = 256 << 10;

#if defined(__x86_64__)
using StackPosition = void*;

void switch_stack(StackPosition& current, StackPosition& other) {
  execution_switch_stack(&current, other);
}
void start_at(StackPosition& position, void* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStack);
  *--top = nullptr;  // the return address of entry(), which never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  position = top;
}
#else
using StackPosition = ucontext_t;

void switch_stack(StackPosition& current, StackPosition& other) { swapcontext(&current, &other); }
void start_at(StackPosition& position, void* stack, void (*entry)()) {
  getcontext(&position);
  position.uc_stack.ss_sp = stack;
  position.uc_stack.ss_size = kStack;
  position.uc_link = nullptr;
  makecontext(&position, entry, 0);
}
#endif

enum class State { ready, in_barrier, in_collective, waiting, ended };

struct Fiber {
  StackPosition position;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  State state = State::ready;
  Site site = {};
  void* operand = nullptr;
  const Condition* condition = nullptr;
};

struct Event {
  std::string what;
  Site site;
  std::function<void()> run;
};

struct Machine {
  std::mt19937_64 random{0};
  Launched launched;
  int64_t collectives = 0;  // of the kernel that runs
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int threads = 0, current = 0, in_barrier = 0;
  std::vector<int> ready, waiting;
  bool changed = false;
  std::vector<Event> events;
  uint64_t event_odds = 0;  // an event before about every so many steps of threads
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  StackPosition scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};
Machine machine;

Fiber& fiber_of(int thread) { return *machine.fibers[size_t(thread)]; }

// Switches from a fiber to the scheduler, and back unless the fiber has ended.
void leave(Fiber& fiber, bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_size);
  switch_stack(fiber.position, machine.scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.scheduler_stack,
                                  &machine.scheduler_stack_size);
}

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
  Fiber& fiber = fiber_of(machine.current);
  (*machine.body)();
  end_products_of_thread();
  fiber.state = State::ended;
  leave(fiber, true);
}

void resume(int thread) {
  Fiber& fiber = fiber_of(thread);
  machine.current = thread;
  threadIdx.x = unsigned(thread);
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStack);
  switch_stack(machine.scheduler, fiber.position);
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
}

void make_ready(int thread) {
  fiber_of(thread).state = State::ready;
  machine.ready.push_back(thread);
}

std::string state_text(const Fiber& fiber) {
  switch (fiber.state) {
    case State::ready:
      return "can continue";
    case State::in_barrier:
      return "waits in __syncthreads() at " + place(fiber.site);
    case State::in_collective:
      return "waits for its warp at " + place(fiber.site);
    case State::waiting:
      return "waits for " + fiber.condition->text() + " at " + place(fiber.site);
    case State::ended:
      return "has ended";
  }
  return "";
}

// What each warp waits for; several lines where its lanes differ.
void print_states() {
  for (int warp = 0; warp < machine.threads / kWarp; ++warp) {
    std::map<std::string, int> lanes;
    for (int i = 0; i < kWarp; ++i) ++lanes[state_text(fiber_of(warp * kWarp + i))];
    for (const auto& [text, count] : lanes) {
      std::fprintf(stderr, "  warp %d, %d lanes: %s\n", warp, count, text.c_str());
    }
  }
}

// No thread can continue, and nothing is in flight.
[[noreturn]] void deadlock() {
  print_states();
  int ended = -1, in_barrier = -1, any = -1;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = fiber_of(i);
    if (fiber.state == State::in_collective) {
      fail("a warp waits for a lane that is elsewhere", fiber.site, i);
    }
    if (fiber.state == State::ended) {
      ended = i;
    } else {
      any = i;
    }
    if (fiber.state == State::in_barrier) in_barrier = i;
  }
  if (in_barrier >= 0 && ended >= 0) {
    fail("a barrier waits for a thread that has ended", fiber_of(in_barrier).site, in_barrier);
  }
  fail("no thread can continue: this one waits for " +
           (in_barrier >= 0 ? "__syncthreads()" : fiber_of(any).condition->text()),
       fiber_of(any).site, any);
}

// All threads have arrived.
void release_barrier() {
  const Site site = fiber_of(0).site;
  for (int i = 0; i < machine.threads; ++i) {
    if (!same(fiber_of(i).site, site)) {
      fail("threads wait at different barriers", fiber_of(i).site, i);
    }
  }
  machine.in_barrier = 0;
  for (int i = 0; i < machine.threads; ++i) {
    publish_barriers(i);
    make_ready(i);
  }
}

void ask_waiting() {
  machine.changed = false;
  size_t left = 0;
  for (const int thread : machine.waiting) {
    if (fiber_of(thread).condition->holds()) {
      make_ready(thread);
    } else {
      machine.waiting[left++] = thread;
    }
  }
  machine.waiting.resize(left);
}

template <class T>
T take_any(std::vector<T>& values) {
  const size_t chosen = size_t(machine.random() % values.size());
  T value = std::move(values[chosen]);
  values[chosen] = std::move(values.back());
  values.pop_back();
  return value;
}

void begin_block() {
  machine.ready.resize(size_t(machine.threads));
  std::iota(machine.ready.begin(), machine.ready.end(), 0);
  machine.waiting.clear();
  machine.in_barrier = 0;
  // Events as early as 2 steps after the one that causes them, or only when nothing else is left.
  machine.event_odds = uint64_t(2) << machine.random() % 16;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = fiber_of(i);
    fiber.state = State::ready;
    fiber.fake_stack = nullptr;
    start_at(fiber.position, fiber.stack, enter);
  }
  begin_barriers();
  begin_copies();
  begin_products();
  begin_registers();
  begin_dependence();
}

void end_block() {
  for (const Event& event : machine.events) {
    fail(event.what + " is in flight at the end of the block", event.site);
  }
  end_barriers();
  end_dependence();
}

void run_block() {
  begin_block();
  int alive = machine.threads;
  while (alive) {
    if (machine.changed) ask_waiting();
    const bool idle = machine.ready.empty();
    if (!machine.events.empty() && (idle || machine.random() % machine.event_odds == 0)) {
      take_any(machine.events).run();
    } else if (!idle) {
      const int thread = take_any(machine.ready);
      resume(thread);
      if (fiber_of(thread).state == State::ended) --alive;
    } else if (!release_dependence()) {
      deadlock();
    }
  }
  end_block();
}

// AddressSanitizer reports an error.
void print_place() {
  std::fprintf(stderr, "%s: block %u, warp %d, lane %d%s\n", machine.kernel, blockIdx.x,
               machine.current / kWarp, machine.current % kWarp,
               is_before_previous() ? ", before it may touch results of the previous kernel" : "");
}

}  // namespace

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string place(Site site) {
  return std::string(site.file ? site.file : "?") + ":" + std::to_string(site.line);
}

void fail(const std::string& what, Site site, int thread) {
  std::fprintf(stderr, "%s: block %u, warp %d, lane %d: %s, at %s\n", machine.kernel, blockIdx.x,
               thread / kWarp, thread % kWarp, what.c_str(), place(site).c_str());
  std::abort();
}
void fail(const std::string& what, Site site) { fail(what, site, machine.current); }

int current_thread() { return machine.current; }
int thread_count() { return machine.threads; }
size_t shared_bytes() { return machine.shared_bytes; }
uint64_t random_number() { return machine.random(); }

void wait(Site site, const Condition& condition) {
  if (condition.holds()) return;
  Fiber& fiber = fiber_of(machine.current);
  fiber.site = site;
  fiber.condition = &condition;
  fiber.state = State::waiting;
  machine.waiting.push_back(machine.current);
  leave(fiber, false);
}
void changed() { machine.changed = true; }

void perhaps_switch(Site site) {
  if (machine.random() % 4 != 0) return;
  Fiber& fiber = fiber_of(machine.current);
  fiber.site = site;
  make_ready(machine.current);
  leave(fiber, false);
}

void later(std::string what, Site site, std::function<void()> event) {
  machine.events.push_back({std::move(what), site, std::move(event)});
}

void seed(uint64_t value) { machine.random.seed(value); }

const Launched& launched() { return machine.launched; }

unsigned char* shared_memory() { return machine.shared; }

void barrier(Site site) {
  Fiber& fiber = fiber_of(machine.current);
  fiber.site = site;
  fiber.state = State::in_barrier;
  if (++machine.in_barrier == machine.threads) release_barrier();
  leave(fiber, false);
}

void collective(Site site, void* operand, void (*combine)(void* const* lanes)) {
  const int current = machine.current;
  Fiber& fiber = fiber_of(current);
  fiber.site = site;
  fiber.operand = operand;
  fiber.state = State::in_collective;
  const int first = current / kWarp * kWarp;
  void* lanes[kWarp];
  bool complete = true;
  for (int i = 0; i < kWarp; ++i) {
    const Fiber& other = fiber_of(first + i);
    complete = complete && other.state == State::in_collective;
    lanes[i] = other.operand;
  }
  if (complete) {
    for (int i = 0; i < kWarp; ++i) {
      if (!same(fiber_of(first + i).site, site)) {
        fail("lanes of a warp wait at different points", site);
      }
    }
    ++machine.collectives;
    combine(lanes);
    for (int i = 0; i < kWarp; ++i) make_ready(first + i);
  }
  // The last lane to arrive is rescheduled, too: any of them may continue first.
  leave(fiber, false);
}

void run(intptr_t address, const char* name, int64_t blocks, int threads, size_t shared_bytes,
         const std::function<void()>& body) {
  machine.kernel = name;
  if (threads % kWarp != 0 || threads > kMostThreads || shared_bytes > kMostShared) {
    fail("more than a block can have, or a part of a warp", {});
  }
  Launches& launches = machine.launched[{address, name}];
  ++launches.count;
  size_t& most_shared_bytes = launches.most_shared_bytes;
  most_shared_bytes = std::max(most_shared_bytes, shared_bytes);
  machine.collectives = 0;
  machine.body = &body;
  machine.threads = threads;
  while (int(machine.fibers.size()) < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber->stack == MAP_FAILED) std::abort();
    machine.fibers.push_back(std::move(fiber));
  }
  gridDim.x = unsigned(blocks);
  std::vector<unsigned> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), machine.random);
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, shared_bytes) != 0) std::abort();
  const std::unique_ptr<unsigned char, void (*)(void*)> shared(static_cast<unsigned char*>(memory),
                                                               std::free);
  machine.shared = shared.get();
  machine.shared_bytes = shared_bytes;
  __sanitizer_set_death_callback(print_place);
  for (const unsigned block : order) {
    blockIdx.x = block;
    std::memset(shared.get(), 0xFF, shared_bytes);
    run_block();
  }
  launches.collectives += machine.collectives;
}

}  // namespace execution
