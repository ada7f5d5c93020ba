// SPDX-License-Identifier: MIT
// The choice between instruction sets by how fast their kernels are on this processor: what
// decides, and the text in which times are remembered. Nothing here measures or reads a file.
//
// One kernel is timed, selection from float32. The sets differ only in their vectors, so that the
// order of their times is the same for every dtype, size and operator.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace convnn::cpu {

// What noise may add to a time: a set takes the place of a preferred one only by more than this.
constexpr double kMargin = 0.05;

struct Times {
  std::vector<std::string> sets;     // preferred first
  std::vector<int64_t> picoseconds;  // [sets] per similarity
};

// The position of the first time that is not more than kMargin above the least. Not of no times.
size_t fastest(const std::vector<int64_t>& picoseconds);

// "SET1 TIME1 SET2 TIME2 ..."
std::string times_text(const Times& times);

// The text of a file that remembers times. The key says of what: the processor, the build and the
// sets, on one line.
std::string to_text(const std::string& key, const Times& times);

// Reads the times of the sets in `times` from such a text. Returns false, and leaves no times, if
// it is not one, or has another key or other sets.
bool from_text(const std::string& text, const std::string& key, Times& times);

}  // namespace convnn::cpu
