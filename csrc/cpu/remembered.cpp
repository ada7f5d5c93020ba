// SPDX-License-Identifier: MIT
#include "remembered.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace convnn::cpu {
namespace {

constexpr size_t kMostBytes = 1 << 16;  // of a file that is ours

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// The folder for files, or empty. Relative paths are ignored: they would name another folder in
// each working directory.
std::string folder() {
  const std::string own = environment("CONVNN_CACHE");
  if (!own.empty()) return own[0] == '/' ? own : "";
  const std::string cache = environment("XDG_CACHE_HOME"), home = environment("HOME");
  if (!cache.empty() && cache[0] == '/') return cache + "/convnn_kernels";
  return !home.empty() && home[0] == '/' ? home + "/.cache/convnn_kernels" : "";
}

// FNV-1a.
uint64_t hash(const std::string& text) {
  uint64_t value = 0xcbf29ce484222325;
  for (unsigned char c : text) value = (value ^ c) * 0x100000001b3;
  return value;
}

}  // namespace

std::string processor_model() {
#if defined(__x86_64__)
  unsigned words[13] = {};
  unsigned signature = 0, b, c, d;
  for (unsigned i = 0; i < 3; ++i) {
    unsigned* to = words + 4 * i;
    __get_cpuid(0x80000002 + i, to, to + 1, to + 2, to + 3);
  }
  __get_cpuid(1, &signature, &b, &c, &d);
  char name[sizeof words], number[16];
  std::memcpy(name, words, sizeof name);
  for (char* at = name; *at; ++at) {
    if (*at < ' ') *at = ' ';  // the name is part of a line
  }
  std::snprintf(number, sizeof number, "%08x", signature);
  return std::string(name) + " " + number;
#else
  return "unknown";
#endif
}

std::string remembered_file(const std::string& key) {
  const std::string in = folder();
  if (in.empty()) return "";
  char name[32];
  std::snprintf(name, sizeof name, "/cpu-%016llx.txt", static_cast<unsigned long long>(hash(key)));
  return in + name;
}

std::string read_file(const std::string& path) {
  std::string text;
  if (std::FILE* file = std::fopen(path.c_str(), "re")) {
    text.resize(kMostBytes);
    text.resize(std::fread(&text[0], 1, text.size(), file));
    std::fclose(file);
  }
  return text;
}

bool write_file(const std::string& path, const std::string& text) {
  for (size_t at = path.find('/', 1); at != std::string::npos; at = path.find('/', at + 1)) {
    mkdir(path.substr(0, at).c_str(), 0700);  // whether it exists then, opening a file tells
  }
  std::vector<char> temporary(path.begin(), path.end());
  for (const char* c = ".XXXXXX"; *c; ++c) temporary.push_back(*c);
  temporary.push_back('\0');
  const int file = mkstemp(temporary.data());
  if (file < 0) return false;
  // Others may use a folder that several users share.
  const bool readable = fchmod(file, 0644) == 0;
  const bool written = write(file, text.data(), text.size()) == ssize_t(text.size());
  const bool closed = close(file) == 0;
  if (readable && written && closed && std::rename(temporary.data(), path.c_str()) == 0)
    return true;
  unlink(temporary.data());
  return false;
}

}  // namespace convnn::cpu
