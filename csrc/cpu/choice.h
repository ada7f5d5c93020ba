// SPDX-License-Identifier: MIT
// The choice between instruction sets by how fast their kernels are on this processor: what
// decides, and the text in which times are remembered. Nothing here measures or reads a file.
//
// Two kernels are timed: selection from float32 and from bfloat16. The others follow float32: those
// of the sets with 512-bit vectors take the same time, and they are as much faster than AVX2 in one
// as in another. So do all sizes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"

namespace convnn::cpu {

constexpr int kTimed = 2;
constexpr DType kTimedDTypes[kTimed] = {DType::float32, DType::bfloat16};
constexpr const char* kTimedNames[kTimed] = {"float32", "bfloat16"};

// What noise may add to a time: a set takes the place of a preferred one only by more than this.
constexpr double kMargin = 0.05;

struct Times {
  std::vector<std::string> sets;             // preferred first
  std::vector<int64_t> picoseconds[kTimed];  // [sets] per similarity
};

// The position of the first time that is not more than kMargin above the least. Not of no times.
size_t fastest(const std::vector<int64_t>& picoseconds);

// " SET1 TIME1 SET2 TIME2 ..." of one timed kernel.
std::string times_text(const Times& times, int timed);

// The text of a file that remembers times. The key says of what: the processor, the build and the
// sets, on one line.
std::string to_text(const std::string& key, const Times& times);

// Reads the times of the sets in `times` from such a text. Returns false, and leaves no times, if
// it is not one, or has another key or other sets.
bool from_text(const std::string& text, const std::string& key, Times& times);

}  // namespace convnn::cpu
