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

}  // namespace

size_t fastest(const std::vector<int64_t>& picoseconds) {
  const int64_t least = *std::min_element(picoseconds.begin(), picoseconds.end());
  const auto is_close = [&](int64_t time) { return double(time) <= (1 + kMargin) * double(least); };
  return size_t(std::find_if(picoseconds.begin(), picoseconds.end(), is_close) -
                picoseconds.begin());
}

std::string times_text(const Times& times) {
  std::string text;
  for (size_t set = 0; set < times.sets.size(); ++set) {
    text += (set ? " " : "") + times.sets[set] + " " + std::to_string(times.picoseconds[set]);
  }
  return text;
}

std::string to_text(const std::string& key, const Times& times) {
  return std::string(kTitle) + "\n" + key + "\n" + times_text(times) + "\n";
}

// Whatever the numbers are taken from, it is such a text if they make the same one.
bool from_text(const std::string& text, const std::string& key, Times& times) {
  std::istringstream words(text);
  words.imbue(std::locale::classic());
  std::string word;
  std::getline(words, word);
  std::getline(words, word);
  times.picoseconds.clear();
  bool good = true;
  while (times.picoseconds.size() < times.sets.size()) {
    int64_t time = 0;
    words >> word >> time;
    good = good && time > 0;
    times.picoseconds.push_back(time);
  }
  good = good && text == to_text(key, times);
  if (!good) times.picoseconds.clear();
  return good;
}

}  // namespace convnn::cpu
