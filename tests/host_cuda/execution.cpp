// SPDX-License-Identifier: MIT
#include "execution.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <sanitizer/common_interface_defs.h>

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

constexpr int kWarp = 32;
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

enum class State { ready, in_barrier, in_collective, ended };

struct Fiber {
  StackPosition position;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  State state = State::ready;
  Site site = {};
  void* operand = nullptr;
};

struct Machine {
  std::mt19937_64 random{0};
  Launched launched;
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int threads = 0, current = 0;
  std::vector<int> ready;
  unsigned char* shared = nullptr;
  StackPosition scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};
Machine machine;

[[noreturn]] void fail(const char* what, const Fiber& fiber) {
  std::fprintf(stderr, "%s: block %u: %s, at %s:%d\n", machine.kernel, blockIdx.x, what,
               fiber.site.file ? fiber.site.file : "?", fiber.site.line);
  std::abort();
}

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
  Fiber& fiber = *machine.fibers[size_t(machine.current)];
  (*machine.body)();
  fiber.state = State::ended;
  leave(fiber, true);
}

void resume(int thread) {
  Fiber& fiber = *machine.fibers[size_t(thread)];
  machine.current = thread;
  threadIdx.x = unsigned(thread);
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStack);
  switch_stack(machine.scheduler, fiber.position);
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
}

void make_ready(int thread) {
  machine.fibers[size_t(thread)]->state = State::ready;
  machine.ready.push_back(thread);
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// No thread can continue: all must be at the same barrier.
void release_barrier() {
  const Fiber* first = nullptr;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[size_t(i)];
    if (fiber.state == State::in_collective)
      fail("a warp waits for a lane that is elsewhere", fiber);
    if (fiber.state == State::in_barrier && !first) first = &fiber;
  }
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[size_t(i)];
    if (fiber.state == State::ended) fail("a barrier waits for a thread that has ended", *first);
    if (!same(fiber.site, first->site)) fail("threads wait at different barriers", fiber);
  }
  for (int i = 0; i < machine.threads; ++i) make_ready(i);
}

void run_block() {
  machine.ready.resize(size_t(machine.threads));
  std::iota(machine.ready.begin(), machine.ready.end(), 0);
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[size_t(i)];
    fiber.state = State::ready;
    fiber.fake_stack = nullptr;
    start_at(fiber.position, fiber.stack, enter);
  }
  int alive = machine.threads;
  while (alive) {
    if (machine.ready.empty()) release_barrier();
    const size_t chosen = size_t(machine.random() % machine.ready.size());
    const int thread = machine.ready[chosen];
    machine.ready[chosen] = machine.ready.back();
    machine.ready.pop_back();
    resume(thread);
    if (machine.fibers[size_t(thread)]->state == State::ended) --alive;
  }
}

// A float from the 16 bits of a float16 or bfloat16 element.
float element(bool is_half, uint32_t pair, int which) {
  const uint16_t bits = uint16_t(which ? pair >> 16 : pair);
  return is_half ? float_from_half(bits) : same_bits<float>(uint32_t(bits) << 16);
}

struct Matrices {
  float a[16][16], b[16][8], d[16][8];
};

// The sum of d and the 16 products as a device may compute it: each term is truncated after the
// 24th bit of the largest, and so is the sum.
float sum_of(float d, const double (&products)[16]) {
  double sum = double(d), largest = std::fabs(sum);
  for (const double product : products) {
    sum += product;
    largest = std::max(largest, std::fabs(product));
  }
  if (!std::isfinite(sum) || largest == 0) return float(sum);
  const int last = std::max(std::ilogb(largest) - 23, -149);
  const double scale = std::ldexp(1.0, -last);
  auto units = int32_t(double(d) * scale);
  for (const double product : products) units += int32_t(product * scale);
  sum = std::ldexp(double(units), last);
  const float nearest = float(sum);
  const bool away = std::fabs(double(nearest)) > std::fabs(sum);
  return std::isfinite(nearest) && away ? std::nextafterf(nearest, 0) : nearest;
}

void multiply(Matrices& m) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double products[16];
      for (int i = 0; i < 16; ++i) products[i] = double(m.a[row][i]) * double(m.b[i][column]);
      m.d[row][column] = sum_of(m.d[row][column], products);
    }
  }
}

struct MatrixOperand {
  bool is_half;
  float* d;
  const uint32_t *a, *b;
};

// Fragments as the PTX manual defines them for mma.m16n8k16: register i of lane 4 group + member.
int row_of_d(int group, int i) { return i < 2 ? group : group + 8; }
int column_of_d(int member, int i) { return 2 * member + (i & 1); }

void read_d(Matrices& m, void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      m.d[row_of_d(lane / 4, i)][column_of_d(lane % 4, i)] =
          static_cast<MatrixOperand*>(lanes[lane])->d[i];
    }
  }
}
void write_d(const Matrices& m, void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      static_cast<MatrixOperand*>(lanes[lane])->d[i] =
          m.d[row_of_d(lane / 4, i)][column_of_d(lane % 4, i)];
    }
  }
}

void combine_16(void* const* lanes) {
  Matrices m;
  read_d(m, lanes);
  for (int lane = 0; lane < kWarp; ++lane) {
    const MatrixOperand& own = *static_cast<MatrixOperand*>(lanes[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = 2 * member + (i & 1) + (i >= 4 ? 8 : 0);
      m.a[row][column] = element(own.is_half, own.a[i / 2], i & 1);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * member + (i & 1) + (i >= 2 ? 8 : 0);
      m.b[row][group] = element(own.is_half, own.b[i / 2], i & 1);
    }
  }
  multiply(m);
  write_d(m, lanes);
}

}  // namespace

void seed(uint64_t value) { machine.random.seed(value); }

const Launched& launched() { return machine.launched; }

unsigned char* shared_memory() { return machine.shared; }

void barrier(Site site) {
  Fiber& fiber = *machine.fibers[size_t(machine.current)];
  fiber.site = site;
  fiber.state = State::in_barrier;
  leave(fiber, false);
}

void collective(Site site, void* operand, void (*combine)(void* const* lanes)) {
  const int current = machine.current;
  Fiber& fiber = *machine.fibers[size_t(current)];
  fiber.site = site;
  fiber.operand = operand;
  fiber.state = State::in_collective;
  const int first = current / kWarp * kWarp;
  void* lanes[kWarp];
  bool complete = true;
  for (int i = 0; i < kWarp; ++i) {
    const Fiber& other = *machine.fibers[size_t(first + i)];
    complete = complete && other.state == State::in_collective;
    lanes[i] = other.operand;
  }
  if (complete) {
    for (int i = 0; i < kWarp; ++i) {
      if (!same(machine.fibers[size_t(first + i)]->site, site)) {
        fail("lanes of a warp wait at different points", fiber);
      }
    }
    combine(lanes);
    for (int i = 0; i < kWarp; ++i) make_ready(first + i);
  }
  // The last lane to arrive is rescheduled, too: any of them may continue first.
  leave(fiber, false);
}

void run(intptr_t address, const char* name, int64_t blocks, int threads, size_t shared_bytes,
         const std::function<void()>& body) {
  if (threads % kWarp != 0) std::abort();
  machine.kernel = name;
  Launches& launches = machine.launched[{address, name}];
  ++launches.count;
  size_t& most_shared_bytes = launches.most_shared_bytes;
  most_shared_bytes = std::max(most_shared_bytes, shared_bytes);
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
  std::unique_ptr<unsigned char, void (*)(void*)> shared(
      static_cast<unsigned char*>(std::malloc(shared_bytes)), std::free);
  machine.shared = shared.get();
  for (const unsigned block : order) {
    blockIdx.x = block;
    std::memset(shared.get(), 0xFF, shared_bytes);
    run_block();
  }
}

float float_from_half(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return same_bits<float>(sign | 0x7F800000u | uint32_t(fraction) << 13);
  const float size = exponent ? std::ldexp(float(fraction + 1024), exponent - 25)
                              : std::ldexp(float(fraction), -24);
  return sign ? -size : size;
}

uint16_t half_from_float(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return uint16_t(sign | 0x7E00);
  // 65520 is halfway between the largest number and the next one.
  if (size >= 65520.0f) return uint16_t(sign | 0x7C00);
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  // In units of the last bit, rounded to even. A carry correctly increments the exponent.
  const auto units = uint16_t(std::nearbyint(std::ldexp(double(size), 10 - exponent)));
  return uint16_t(sign | (units + ((exponent + 14) << 10)));
}

uint16_t bfloat16_from_float(float x) {
  const uint32_t bits = same_bits<uint32_t>(x);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

void multiply_accumulate_16(bool is_half, float (&d)[4], const uint32_t (&a)[4],
                            const uint32_t (&b)[2], Site site) {
  MatrixOperand operand = {is_half, d, a, b};
  collective(site, &operand, combine_16);
}

}  // namespace execution
