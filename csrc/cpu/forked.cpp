// SPDX-License-Identifier: MIT
#include "forked.h"

#include <dirent.h>
#include <pthread.h>

namespace convnn::cpu {
namespace {

bool had_threads = false;  // when this process, or the one that it was forked from, last forked
bool is_forked = false;

// False where the system does not say.
bool has_threads() {
  DIR* const tasks = opendir("/proc/self/task");
  if (!tasks) return false;
  int threads = 0;
  while (const dirent* entry = readdir(tasks)) threads += entry->d_name[0] != '.';
  closedir(tasks);
  return threads > 1;
}

const int registered = pthread_atfork([] { had_threads = is_forked || has_threads(); }, nullptr,
                                      [] { is_forked = had_threads; });

}  // namespace

bool is_forked_from_threads() {
  (void)registered;
  return is_forked;
}

}  // namespace convnn::cpu
