// SPDX-License-Identifier: MIT
// The choice of an instruction set, its timing and the files of the cache, as functions for tests.
#include <time.h>

#include <cstring>
#include <thread>

#include "../csrc/cpu/choice.h"
#include "../csrc/cpu/remembered.h"
#include "../csrc/cpu/timing.h"

using namespace convnn;
using namespace convnn::cpu;

namespace {

const std::vector<std::string> kSets = {"first", "second", "third"};

int64_t nanoseconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Uses this much CPU time of the calling thread.
void compute(int64_t milliseconds) {
  const int64_t end = nanoseconds() + milliseconds * 1000000;
  while (nanoseconds() < end) {
  }
}

using Rows = void (*)(const SelectParams&, const SelectWork&, int64_t, int64_t, void*);

// Waits for another thread.
void alone_for_1(const SelectParams&, const SelectWork&, int64_t, int64_t, void*) {
  std::thread other(compute, 5);
  compute(1);
  other.join();
}

// Is as fast as it can be in one round of three, which calls it for two sizes, twice for each.
void undisturbed_for_1(const SelectParams&, const SelectWork&, int64_t, int64_t, void*) {
  static int64_t calls = 0;
  compute(calls++ / 4 % 3 == 2 ? 1 : 5);
}

void always_2(const SelectParams&, const SelectWork&, int64_t, int64_t, void*) { compute(2); }

// A set of which only selection from float32 can be called.
Kernels made_up(Rows rows) {
  Kernels set{};
  SelectKernel& kernel = set.select[int(DType::float32)];
  kernel.rows_per_task = kernel.columns_per_panel = 32;
  kernel.screen_pays = [](const SelectParams&, int64_t) { return false; };
  kernel.packed_bytes = [](const SelectParams&, int64_t, bool) -> size_t { return 0; };
  kernel.scratch_bytes = [](const SelectParams&) -> size_t { return 0; };
  kernel.pack = [](const SelectParams&, const SelectWork&, int64_t, int64_t, void*) {};
  kernel.rows = rows;
  return set;
}

}  // namespace

extern "C" {

int64_t chosen(const int64_t* picoseconds, int64_t count) {
  return int64_t(fastest({picoseconds, picoseconds + count}));
}

// Measures the three made-up sets. Returns the CPU time that it took, in microseconds.
int64_t measure_made_up(int64_t* picoseconds) {
  const Kernels sets[] = {made_up(alone_for_1), made_up(undisturbed_for_1), made_up(always_2)};
  const Measurement measured = measure({sets, sets + 1, sets + 2});
  for (int64_t time : measured.picoseconds) *picoseconds++ = time;
  return measured.microseconds;
}

// Writes the text of times [3] of the sets first, second and third.
void write_text(const char* key, const int64_t* picoseconds, char* text) {
  std::strcpy(text, to_text(key, {kSets, {picoseconds, picoseconds + 3}}).c_str());
}

// Reads the times back. Returns how many there are then, or -1 if that is not what it says.
int64_t read_text(const char* text, const char* key, int64_t* picoseconds) {
  Times times{kSets, {}};
  const bool good = from_text(text, key, times);
  for (int64_t time : times.picoseconds) *picoseconds++ = time;
  const size_t count = times.picoseconds.size();
  return count == (good ? 3 : 0) ? int64_t(count) : -1;
}

bool replace_file(const char* path, const char* text) { return write_file(path, text); }
}
