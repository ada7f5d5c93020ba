// SPDX-License-Identifier: MIT
// The scheduler of execution.cpp, for the other parts of the layer.
//
// Besides threads there are events: what the bulk engine and the tensor cores do on their own. The
// scheduler runs them at random times, late ones often only once no thread can continue.
#pragma once

#include <functional>
#include <string>

#include "execution.h"

namespace execution {

// What a thread waits for.
class Condition {
 public:
  virtual bool holds() const = 0;
  virtual std::string text() const = 0;

 protected:
  ~Condition() = default;
};

int current_thread();
int thread_count();
size_t shared_bytes();
uint64_t random_number();
bool same(Site a, Site b);
std::string place(Site site);
// Reports the thread `thread` of the block, and aborts.
[[noreturn]] void fail(const std::string& what, Site site, int thread);
[[noreturn]] void fail(const std::string& what, Site site);

// The current thread waits, unless the condition holds. The condition is asked again after
// changed().
void wait(Site site, const Condition& condition);
void changed();
// Now and then lets other threads continue first.
void perhaps_switch(Site site);
// An event, run once at some time from now on; `what` and `site` are for errors.
void later(std::string what, Site site, std::function<void()> event);

// What the other parts keep for a block and check at its end.
void begin_barriers();
void end_barriers();
void begin_copies();
void begin_products();
void end_products_of_thread();
void begin_registers();
// A barrier of all threads, or a named one with this thread, was passed.
void publish_barriers(int thread);
// Lets threads in wait_for_previous() continue; false if that was done before.
void begin_dependence();
bool release_dependence();
bool is_before_previous();
void end_dependence();
// Errors if the part of shared memory differs from what the bulk engine and products see of it.
void check_visible(uint32_t begin, size_t bytes, Site site, int thread);
// Whether a product in flight reads the part, and a copy in flight writes it.
bool product_reads(uint32_t begin, size_t bytes);
bool copy_writes(uint32_t begin, size_t bytes);

// d [columns] += a [16] b [16, columns] as a device may compute it: each term is truncated after
// the 24th bit of the largest, and so is the sum.
void multiply_row(float* d, const float* a, const float* b, int columns);

}  // namespace execution
