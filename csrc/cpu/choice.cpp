// SPDX-License-Identifier: MIT
#include "choice.h"

#include <algorithm>
#include <locale>
#include <sstream>

namespace convnn::cpu {
namespace {

constexpr const char* kTitle =
    "Time of the CPU kernels of convnn_kernels in ps per similarity. Delete this file to measure "
    "it again.";

// Reads "name set time set time ...", with all sets in order.
bool read_times(const std::string& line, const char* name, const std::vector<std::string>& sets,
                std::vector<int64_t>& times) {
  std::istringstream words(line);
  words.imbue(std::locale::classic());
  std::string word;
  if (!(words >> word) || word != name) return false;
  for (const std::string& set : sets) {
    int64_t time = 0;
    if (!(words >> word >> time) || word != set || time <= 0) return false;
    times.push_back(time);
  }
  return !(words >> word);
}

}  // namespace

size_t fastest(const std::vector<int64_t>& picoseconds) {
  const int64_t least = *std::min_element(picoseconds.begin(), picoseconds.end());
  const auto is_close = [&](int64_t time) { return double(time) <= (1 + kMargin) * double(least); };
  return size_t(std::find_if(picoseconds.begin(), picoseconds.end(), is_close) -
                picoseconds.begin());
}

std::string times_text(const Times& times, int timed) {
  std::string text;
  for (size_t set = 0; set < times.sets.size(); ++set) {
    text += " " + times.sets[set] + " " + std::to_string(times.picoseconds[timed][set]);
  }
  return text;
}

std::string to_text(const std::string& key, const Times& times) {
  std::string text = std::string(kTitle) + "\n" + key + "\n";
  for (int i = 0; i < kTimed; ++i) {
    text += kTimedNames[i] + times_text(times, i) + "\n";
  }
  return text + "end\n";
}

bool from_text(const std::string& text, const std::string& key, Times& times) {
  for (auto& of_one : times.picoseconds) of_one.clear();
  std::istringstream lines(text);
  std::string line;
  bool good =
      std::getline(lines, line) && line == kTitle && std::getline(lines, line) && line == key;
  for (int i = 0; i < kTimed; ++i) {
    good = good && std::getline(lines, line) &&
           read_times(line, kTimedNames[i], times.sets, times.picoseconds[i]);
  }
  good = good && std::getline(lines, line) && line == "end";
  if (!good) {
    for (auto& of_one : times.picoseconds) of_one.clear();
  }
  return good;
}

}  // namespace convnn::cpu
