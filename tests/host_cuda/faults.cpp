// SPDX-License-Identifier: MIT
// Kernels with one fault each, named after it, to test that the execution layer detects it. Two
// kernels are correct.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cuda/order.cuh"

namespace {

using namespace convnn::cuda;

class NoMemory : public Context {
 public:
  NoMemory() : Context(nullptr) {}
  void* allocate(size_t) override { std::abort(); }
};

// Every thread reads what its neighbor wrote to shared memory.
void exchange(int* result, bool waits) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = int(threadIdx.x);
  if (waits) __syncthreads();
  result[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}
void no_barrier(int* result) { exchange(result, false); }
void sound(int* result) { exchange(result, true); }
// Every lane must see the list as it was when it read, although other lanes then change it.
void list_changed_after_reading(int* result) {
  NearestList<float> list(shared_memory() + warp() * NearestList<float>::bytes(kWarp), kWarp);
  list.clear();
  list.push(key_of<float>(order_of(0.0f), threadIdx.x));
  list.finish();
  const int64_t lowest = index_of<float>(list[0]);
  // Instead of the lowest index the highest comes first, as it is.
  list.reorder(kWarp, [](NarrowKey key) { return pack(high_of(key), ~low_of(key)); });
  const int64_t highest = low_of(list[0]);
  list.clear();
  const bool right = lowest == warp() * kWarp && highest == lowest + kWarp - 1;
  result[threadIdx.x] = right ? int(threadIdx.x + 1) % kThreads : -1;
}

void thread_ends_before_barrier(int*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
void different_barriers(int*) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void lane_ends_before_vote(int*) {
  if (threadIdx.x == 5) return;
  __ballot_sync(kAllLanes, true);
}
void lane_elsewhere(int*) {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __ballot_sync(kAllLanes, true);
  }
}
void shared_memory_ends(int*) { shared_memory()[kThreads * sizeof(int)] = 1; }
void not_aligned(int* result) { copy16(result, shared_memory() + 4); }

}  // namespace

int main(int count, char** arguments) {
  struct {
    const char* name;
    void (*kernel)(int*);
    size_t shared_bytes = kThreads * sizeof(int);
  } const kernels[] = {
      {"sound", sound},
      {"list_changed_after_reading", list_changed_after_reading,
       kWarps * NearestList<float>::bytes(kWarp)},
      {"no_barrier", no_barrier},
      {"thread_ends_before_barrier", thread_ends_before_barrier},
      {"different_barriers", different_barriers},
      {"lane_ends_before_vote", lane_ends_before_vote},
      {"lane_elsewhere", lane_elsewhere},
      {"shared_memory_ends", shared_memory_ends},
      {"not_aligned", not_aligned},
  };
  for (const auto& each : kernels) {
    if (count != 2 || std::strcmp(each.name, arguments[1]) != 0) continue;
    NoMemory context;
    int result[kThreads];
    launch(each.name, each.kernel, 3, each.shared_bytes, context, static_cast<int*>(result));
    for (int i = 0; i < kThreads; ++i) {
      if (result[i] != (i + 1) % kThreads) {
        std::fprintf(stderr, "wrong result\n");
        return 1;
      }
    }
    return 0;
  }
  return 2;
}
