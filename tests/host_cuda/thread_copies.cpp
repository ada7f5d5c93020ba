// SPDX-License-Identifier: MIT
// Copies of 16 bytes that threads issue and wait for. Like those of the bulk engine, they complete
// late, and until then the target is 0xFF bytes.
#include "thread_copies.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>

#include <sanitizer/asan_interface.h>

#include "fibers.h"

namespace execution {
namespace {

constexpr size_t kBytes = 16;
constexpr unsigned char kPoison = 0xFF;

// The copies in flight of each group of a thread; the last group is not yet committed.
using Group = std::shared_ptr<int>;
std::map<int, std::deque<Group>> groups;

std::deque<Group>& groups_of_thread() {
  std::deque<Group>& mine = groups[current_thread()];
  if (mine.empty()) mine.push_back(std::make_shared<int>(0));
  return mine;
}

class GroupsComplete : public Condition {
 public:
  GroupsComplete(const std::deque<Group>& groups, size_t left) : groups_(groups), left_(left) {}
  bool holds() const override {
    for (size_t i = 0; i + 1 + left_ < groups_.size(); ++i) {
      if (*groups_[i] > 0) return false;
    }
    return true;
  }
  std::string text() const override { return "copies of its own"; }

 private:
  const std::deque<Group>& groups_;
  const size_t left_;
};

}  // namespace

void copy_async16(uint32_t target, const void* source, bool valid, Site site) {
  if (target % kBytes != 0 || reinterpret_cast<uintptr_t>(source) % kBytes != 0) {
    fail("a copy from or to an address not aligned to 16 bytes", site);
  }
  if (target + kBytes > shared_bytes()) fail("a copy beyond shared memory", site);
  if (product_reads(target, kBytes)) fail("a copy overwrites what a product in flight reads", site);
  unsigned char* const to = shared_memory() + target;
  std::memset(to, kPoison, kBytes);
  const Group group = groups_of_thread().back();
  ++*group;
  later("a copy", site, [=, thread = current_thread()] {
    if (std::any_of(to, to + kBytes, [](unsigned char x) { return x != kPoison; })) {
      fail("the target of a copy in flight was written", site, thread);
    }
    if (valid && __asan_region_is_poisoned(const_cast<void*>(source), kBytes)) {
      fail("a copy from memory that may not be read", site, thread);
    }
    if (valid) {
      std::memcpy(to, source, kBytes);
    } else {
      std::memset(to, 0, kBytes);
    }
    --*group;
    changed();
  });
  perhaps_switch(site);
}

void copy_commit() { groups_of_thread().push_back(std::make_shared<int>(0)); }

void copy_wait(int left, Site site) {
  std::deque<Group>& mine = groups_of_thread();
  wait(site, GroupsComplete(mine, size_t(left)));
  while (mine.size() > size_t(left) + 1) mine.pop_front();
}

}  // namespace execution
