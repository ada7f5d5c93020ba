// SPDX-License-Identifier: MIT
// Runs random calls with each instruction set and prints a line for each call and set: seed, set,
// and a digest of every result. All sets but `portable` must give the same results.
//
//   calls FIRST COUNT one-range | reversed | threads
//   calls sets
//
// The second prints the instruction sets, a line each.
//
// The passes of a call run in one range of tasks, or in several whose last comes first, or in
// threads. With threads, several callers run calls at once, first with the instruction set that the
// library chooses, at last while the set in use changes.
#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>

#include "../../csrc/cpu/instruction_sets.h"
#include "random_call.h"

namespace sanitized {
namespace {

using convnn::cpu::Body;
using convnn::cpu::ParallelFor;

constexpr int kThreads = 3;
constexpr int kCallers = 2;

// Divides [0, tasks), at least two, into at most kThreads ranges of unequal length, the last one
// first. They may be shorter than an operator asks for, so that small calls have some, too.
std::vector<std::pair<int64_t, int64_t>> ranges_of(int64_t tasks) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  int64_t end = tasks;
  for (int64_t part = kThreads; part > 1 && end > 1; --part) {
    const int64_t begin = end - std::max<int64_t>(1, end / part - 1);
    ranges.push_back({begin, end});
    end = begin;
  }
  ranges.push_back({0, end});
  return ranges;
}

void one_range(int64_t tasks, int64_t, const Body& body) { body(0, tasks); }

void reversed(int64_t tasks, int64_t, const Body& body) {
  for (const auto& [begin, end] : ranges_of(tasks)) body(begin, end);
}

void threads(int64_t tasks, int64_t, const Body& body) {
  std::vector<std::thread> others;
  const auto ranges = ranges_of(tasks);
  for (size_t i = 1; i < ranges.size(); ++i) {
    others.emplace_back([&body, range = ranges[i]] { body(range.first, range.second); });
  }
  body(ranges[0].first, ranges[0].second);
  for (std::thread& other : others) other.join();
}

// What a report of AddressSanitizer or UBSan is about. They must be told to abort (abort_on_error).
thread_local std::string current;
void tell_current(int) { std::fprintf(stderr, "sanitized: in call %s\n", current.c_str()); }

using Digests = std::vector<RandomCall::Digest>;

// The digests of some calls. With several callers at once, each takes every kCallers-th call.
std::vector<Digests> run_calls(uint64_t first, size_t count, ParallelFor parallel_for) {
  std::vector<Digests> digests(count);
  const size_t callers = parallel_for == threads ? kCallers : 1;
  const auto run = [&](size_t caller) {
    for (size_t i = caller; i < count; i += callers) {
      const RandomCall call(first + i);
      current = std::to_string(first + i) + ": " + call.description();
      digests[i] = call.run(parallel_for);
    }
  };
  std::vector<std::thread> others;
  for (size_t caller = 1; caller < callers; ++caller) others.emplace_back(run, caller);
  run(0);
  for (std::thread& other : others) other.join();
  return digests;
}

// Compares results that must be equal. Returns whether they are.
bool compare(uint64_t first, const std::vector<Digests>& expected, const std::vector<Digests>& got,
             const std::string& what) {
  for (size_t i = 0; i < got.size(); ++i) {
    for (size_t j = 0; j < got[i].size(); ++j) {
      if (got[i][j].hash == expected[i][j].hash) continue;
      std::fprintf(stderr, "sanitized: %s gives other %s in call %s: %s\n", what.c_str(),
                   got[i][j].name, std::to_string(first + i).c_str(),
                   RandomCall(first + i).description().c_str());
      return false;
    }
  }
  return true;
}

void print(uint64_t first, const std::string& set, const std::vector<Digests>& digests) {
  for (size_t i = 0; i < digests.size(); ++i) {
    std::printf("%s %s", std::to_string(first + i).c_str(), set.c_str());
    for (const RandomCall::Digest& digest : digests[i]) {
      std::printf(" %s %016lx", digest.name, static_cast<unsigned long>(digest.hash));
    }
    std::printf("\n");
  }
}

void use(const std::string& set) {
  const char* before;
  convnn::cpu::use_instruction_set(set.c_str(), &before);
}

int run(uint64_t first, size_t count, ParallelFor parallel_for) {
  const bool several = parallel_for == threads;
  std::vector<Digests> chosen, fused;
  if (several) chosen = run_calls(first, std::min<size_t>(count, 2 * kCallers), parallel_for);
  const std::string choice = convnn::cpu::instruction_set();
  std::vector<std::string> others;  // than portable
  for (const std::string& set : convnn::cpu::usable_instruction_sets()) {
    use(set);
    const std::vector<Digests> digests = run_calls(first, count, parallel_for);
    print(first, set, digests);
    if (set == choice && !compare(first, digests, chosen, "the choice of a set")) return 1;
    if (set == "portable") continue;
    others.push_back(set);
    if (fused.empty()) fused = digests;
    if (!compare(first, fused, digests, set)) return 1;
  }
  if (!several || others.size() < 2) return 0;
  std::atomic<bool> done{false};
  std::thread switching([&] {
    for (size_t i = 0; !done; ++i) use(others[i % others.size()]);
  });
  const std::vector<Digests> switched = run_calls(first, std::min<size_t>(count, 50), parallel_for);
  done = true;
  switching.join();
  return compare(first, fused, switched, "a change of the set") ? 0 : 1;
}

}  // namespace
}  // namespace sanitized

int main(int arguments, char** argument) {
  std::signal(SIGABRT, sanitized::tell_current);
  if (arguments == 2 && argument[1] == std::string("sets")) {
    for (const std::string& set : convnn::cpu::usable_instruction_sets()) std::puts(set.c_str());
    return 0;
  }
  const std::string mode = arguments == 4 ? argument[3] : "";
  const convnn::cpu::ParallelFor parallel_for = mode == "one-range"  ? sanitized::one_range
                                                : mode == "reversed" ? sanitized::reversed
                                                : mode == "threads"  ? sanitized::threads
                                                                     : nullptr;
  if (!parallel_for) {
    std::fprintf(stderr, "usage: %s FIRST COUNT one-range | reversed | threads, or: sets\n",
                 argument[0]);
    return 2;
  }
  return sanitized::run(std::stoull(argument[1]), std::stoull(argument[2]), parallel_for);
}
