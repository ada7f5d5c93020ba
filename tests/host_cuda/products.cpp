// SPDX-License-Identifier: MIT
// The asynchronous products of warpgroups.
//
// A product is only recorded when a thread issues it. Once all threads of a warpgroup have
// committed a group, an event computes it. Its results reach the registers at hold().
#include <algorithm>
#include <array>
#include <list>
#include <vector>

#include <sanitizer/asan_interface.h>

#include "fibers.h"
#include "hopper.h"

namespace execution {
namespace {

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr int kRows = 64, kDepth = 16, kMostColumns = 256;
// A signaling NaN: arithmetic turns it into another, so that a value computed from it differs.
constexpr uint32_t kPoison = 0x7FA0DEADu;

// Registers that products write to.
struct Accumulators {
  float* d;
  std::vector<float> values;
  int64_t group;  // the last one with a product for them

  bool untouched() const {
    return std::all_of(d, d + values.size(),
                       [](float x) { return same_bits<uint32_t>(x) == kPoison; });
  }
  void poison() const { std::fill_n(d, values.size(), same_bits<float>(kPoison)); }
};

struct Issued {
  Product product;
  std::array<uint32_t, 4> a;  // the registers of A
  Accumulators* d;
};
using Group = std::vector<Issued>;

struct Thread {
  bool fenced = false;
  Group open;
  std::vector<Group> groups;  // committed, not yet computed
  int64_t committed = 0, waited = 0;
  std::list<Accumulators> accumulators;

  std::list<Accumulators>::iterator find(const float* d) {
    return std::find_if(accumulators.begin(), accumulators.end(),
                        [&](const Accumulators& each) { return each.d == d; });
  }
};
std::vector<Thread> threads;

// What a group reads of shared memory, until a thread has waited for the group.
struct Reading {
  int64_t group;
  uint32_t begin;
  size_t bytes;
};
struct Warpgroup {
  int64_t computed = 0, waited = 0;
  std::vector<int> commits;  // threads, for each group
  std::vector<Reading> reading;
};
std::vector<Warpgroup> warpgroups;

// Made when a block first uses them, since most kernels do not.
Thread& own() {
  if (threads.empty()) threads.resize(size_t(thread_count()));
  return threads[size_t(current_thread())];
}
Warpgroup& own_warpgroup(Site site) {
  if (warpgroups.empty()) warpgroups.resize(size_t(thread_count() / kWarpgroup));
  const size_t warpgroup = size_t(current_thread() / kWarpgroup);
  if (warpgroup >= warpgroups.size()) fail("a product of a part of a warpgroup", site);
  return warpgroups[warpgroup];
}

// Matrices in shared memory, [rows, 16], in rows of 128 bytes with the 128-byte swizzle.

struct Address {
  uint32_t begin;
  size_t bytes;  // of all rows, from the multiple of 1024 at or before `begin` on
};

Address address_of(uint64_t descriptor, int rows, Site site) {
  if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3FFF) != 1024 / 16) {
    fail("a descriptor without the 128-byte swizzle of 8 rows in 1024 bytes", site);
  }
  const uint32_t begin = uint32_t(descriptor & 0x3FFF) * 16;
  if (begin % 1024 >= 128 || begin % 32 != 0 || (descriptor >> 49 & 7) != 0) {
    fail("a descriptor that does not begin in the first of 8 rows, at a multiple of 32 bytes",
         site);
  }
  const size_t bytes = size_t(rows) * 128;
  if (begin / 1024 * 1024 + bytes > shared_bytes()) {
    fail("a descriptor beyond shared memory", site);
  }
  return {begin, bytes};
}

float element(bool is_half, uint16_t bits) {
  static const std::vector<float> halves = [] {
    std::vector<float> values(1 << 16);
    for (size_t i = 0; i < values.size(); ++i) values[i] = float_from_half(uint16_t(i));
    return values;
  }();
  return is_half ? halves[bits] : same_bits<float>(uint32_t(bits) << 16);
}

// Calls store(row, column, value) for the elements of the matrix.
template <class Store>
void read_matrix(const Product& product, uint64_t descriptor, int rows, int thread,
                 const Store& store) {
  const Address address = address_of(descriptor, rows, product.site);
  check_visible(address.begin / 1024 * 1024, address.bytes, product.site, thread);
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < kDepth; ++column) {
      const uint32_t at = address.begin + uint32_t(row * 128 + column * 2);
      uint16_t bits;
      std::memcpy(&bits, shared_memory() + (at ^ (at >> 7 & 7) << 4), 2);
      store(row, column, element(product.is_half, bits));
    }
  }
}

// The row and column of register i of a thread of the warpgroup, in D, and of pair i in A.
int row_of(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
int row_of_a(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + i % 2 * 8; }
int column_of_a(int thread, int i) { return i / 2 * 8 + thread % 4 * 2; }

struct Matrices {
  float a[kRows][kDepth], b[kDepth * kMostColumns], d[kRows][kMostColumns];
};

void read_a(Matrices& m, const Group* const* groups, size_t index, int first) {
  const Product& product = (*groups[0])[index].product;
  if (!product.a_registers) {
    read_matrix(product, product.a, kRows, first,
                [&](int row, int column, float x) { m.a[row][column] = x; });
    return;
  }
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const Issued& issued = (*groups[thread])[index];
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = issued.a[size_t(i)];
      float* a = m.a[row_of_a(thread, i)] + column_of_a(thread, i);
      a[0] = element(product.is_half, uint16_t(pair));
      a[1] = element(product.is_half, uint16_t(pair >> 16));
    }
  }
}

void compute(Matrices& m, const Group* const* groups, size_t index, int first) {
  const Product& product = (*groups[0])[index].product;
  const int columns = product.columns;
  read_a(m, groups, index, first);
  read_matrix(product, product.b, columns, first,
              [&](int row, int column, float x) { m.b[column * columns + row] = x; });
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const float* values = (*groups[thread])[index].d->values.data();
    for (int i = 0; i < columns / 2; ++i) {
      m.d[row_of(thread, i)][column_of(thread, i)] = product.add ? values[i] : 0;
    }
  }
  for (int row = 0; row < kRows; ++row) multiply_row(m.d[row], m.a[row], m.b, columns);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    float* values = (*groups[thread])[index].d->values.data();
    for (int i = 0; i < columns / 2; ++i) {
      values[i] = m.d[row_of(thread, i)][column_of(thread, i)];
    }
  }
}

bool differ(const Product& x, const Product& y) {
  return x.is_half != y.is_half || x.columns != y.columns || x.add != y.add || x.b != y.b ||
         x.a != y.a || !x.a_registers != !y.a_registers;
}

// All threads must have issued the same products, those of a warp at the same points, and the
// registers of A must not have changed.
void check_group(const Group& group, const Group& of_warpgroup, const Group& of_warp, int thread) {
  if (group.size() != of_warpgroup.size()) {
    const Site site = (group.empty() ? of_warpgroup : group)[0].product.site;
    fail("products differ within a warpgroup", site, thread);
  }
  for (size_t i = 0; i < group.size(); ++i) {
    const Product& x = group[i].product;
    if (differ(x, of_warpgroup[i].product)) {
      fail("products differ within a warpgroup", x.site, thread);
    }
    if (!same(x.site, of_warp[i].product.site)) {
      fail("lanes of a warp issue a product at different points", x.site, thread);
    }
    if (!x.a_registers || __asan_address_is_poisoned(x.a_registers)) continue;
    if (!std::equal(group[i].a.begin(), group[i].a.end(), x.a_registers)) {
      fail("registers of A were written while a product reads them", x.site, thread);
    }
  }
}

void compute_group(size_t index) {
  static Matrices matrices;
  const int first = int(index) * kWarpgroup;
  const Group* groups[kWarpgroup];
  for (int i = 0; i < kWarpgroup; ++i) {
    groups[i] = &threads[size_t(first + i)].groups.front();
    check_group(*groups[i], *groups[0], *groups[i / kWarp * kWarp], first + i);
  }
  for (size_t i = 0; i < groups[0]->size(); ++i) compute(matrices, groups, i, first);
  for (int i = 0; i < kWarpgroup; ++i) {
    auto& left = threads[size_t(first + i)].groups;
    left.erase(left.begin());
  }
  ++warpgroups[index].computed;
  changed();
}

class GroupsComputed : public Condition {
 public:
  GroupsComputed(const Warpgroup& warpgroup, int64_t groups)
      : warpgroup_(warpgroup), groups_(groups) {}
  bool holds() const override { return warpgroup_.computed >= groups_; }
  std::string text() const override {
    return "products, of which " + std::to_string(warpgroup_.commits[size_t(groups_ - 1)]) +
           " of the 128 threads of the warpgroup have committed their part";
  }

 private:
  const Warpgroup& warpgroup_;
  const int64_t groups_;
};

// The registers d for a product about to be issued.
Accumulators* begin_accumulators(Thread& thread, const Product& product) {
  const size_t count = size_t(product.columns) / 2;
  auto d = thread.find(product.d);
  if (d == thread.accumulators.end()) {
    d = thread.accumulators.insert(d, {product.d, {product.d, product.d + count}, 0});
    d->poison();
  } else if (!d->untouched()) {
    // Results that were never held, and since then another variable at this address.
    if (d->group >= thread.waited) {
      fail("accumulators of a product in flight were written", product.site);
    }
    d->values.assign(product.d, product.d + count);
    d->poison();
  }
  if (d->values.size() != count) fail("products of other columns in flight", product.site);
  d->group = thread.committed;
  return &*d;
}

}  // namespace

void begin_products() {
  threads.clear();
  warpgroups.clear();
}

void end_products_of_thread() {
  if (threads.empty()) return;
  const Thread& thread = own();
  if (!thread.open.empty()) {
    fail("a thread ends after a product without wgmma_commit()", thread.open[0].product.site);
  }
  if (thread.waited == thread.committed) return;
  fail("a thread ends with products in flight", thread.groups.empty() || thread.groups[0].empty()
                                                    ? Site{}
                                                    : thread.groups[0][0].product.site);
}

bool product_reads(uint32_t begin, size_t bytes) {
  for (const Warpgroup& warpgroup : warpgroups) {
    for (const Reading& reading : warpgroup.reading) {
      if (begin < reading.begin + reading.bytes && reading.begin < begin + bytes) return true;
    }
  }
  return false;
}

void wgmma_fence(Site site) {
  own_warpgroup(site);
  own().fenced = true;
}

void wgmma(const Product& product) {
  Thread& thread = own();
  Warpgroup& warpgroup = own_warpgroup(product.site);
  if (!thread.fenced) fail("a product without wgmma_fence() in its group", product.site);
  const auto reads = [&](uint64_t descriptor, int rows) {
    const Address address = address_of(descriptor, rows, product.site);
    const uint32_t begin = address.begin / 1024 * 1024;
    if (copy_writes(begin, address.bytes)) {
      fail("a product reads what a copy in flight writes", product.site);
    }
    if (current_thread() % kWarpgroup != 0) return;
    warpgroup.reading.push_back({thread.committed, begin, address.bytes});
  };
  reads(product.b, product.columns);
  if (!product.a_registers) reads(product.a, kRows);
  Issued issued = {product, {}, begin_accumulators(thread, product)};
  if (product.a_registers) std::copy_n(product.a_registers, 4, issued.a.begin());
  thread.open.push_back(issued);
}

void wgmma_commit(Site site) {
  Thread& thread = own();
  Warpgroup& warpgroup = own_warpgroup(site);
  thread.fenced = false;
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
  const size_t group = size_t(thread.committed++);
  if (warpgroup.commits.size() <= group) warpgroup.commits.resize(group + 1);
  if (++warpgroup.commits[group] < kWarpgroup) return;
  later("a product", site,
        [index = size_t(current_thread() / kWarpgroup)] { compute_group(index); });
}

void wgmma_wait(int left, Site site) {
  Thread& thread = own();
  Warpgroup& warpgroup = own_warpgroup(site);
  if (!thread.open.empty()) fail("products without wgmma_commit() before a wait", site);
  const int64_t groups = thread.committed - left;
  if (groups <= thread.waited) return;
  wait(site, GroupsComputed(warpgroup, groups));
  thread.waited = groups;
  if (groups <= warpgroup.waited) return;
  warpgroup.waited = groups;
  auto& reading = warpgroup.reading;
  reading.erase(std::remove_if(reading.begin(), reading.end(),
                               [&](const Reading& each) { return each.group < groups; }),
                reading.end());
}

void hold(float* d, int count, Site site) {
  Thread& thread = own();
  const auto found = thread.find(d);
  if (found == thread.accumulators.end()) return;
  if (found->group >= thread.waited) fail("hold() of a product in flight", site);
  if (found->values.size() != size_t(count)) fail("hold() of part of a product", site);
  if (!found->untouched()) fail("accumulators were written before hold()", site);
  std::copy(found->values.begin(), found->values.end(), d);
  thread.accumulators.erase(found);
}

}  // namespace execution
