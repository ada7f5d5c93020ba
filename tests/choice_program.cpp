// SPDX-License-Identifier: MIT
// The choice of an instruction set and the files of the cache, as functions for tests.
#include <cstring>

#include "../csrc/cpu/choice.h"
#include "../csrc/cpu/remembered.h"

using namespace convnn::cpu;

namespace {

const std::vector<std::string> kSets = {"first", "second", "third"};

}  // namespace

extern "C" {

int64_t chosen(const int64_t* picoseconds, int64_t count) {
  return int64_t(fastest({picoseconds, picoseconds + count}));
}

// Writes the text of times [kTimed, 3] of the sets first, second and third.
void write_text(const char* key, const int64_t* picoseconds, char* text) {
  Times times;
  times.sets = kSets;
  for (auto& of_one : times.picoseconds) {
    of_one.assign(picoseconds, picoseconds + 3);
    picoseconds += 3;
  }
  std::strcpy(text, to_text(key, times).c_str());
}

// Reads the times back. Returns how many there are then.
int64_t read_text(const char* text, const char* key, int64_t* picoseconds) {
  Times times;
  times.sets = kSets;
  const bool good = from_text(text, key, times);
  int64_t count = 0;
  for (const auto& of_one : times.picoseconds) {
    for (int64_t time : of_one) picoseconds[count++] = time;
  }
  return good == (count == 3 * kTimed) ? count : -1;
}

bool replace_file(const char* path, const char* text) { return write_file(path, text); }
}
