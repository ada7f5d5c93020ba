// SPDX-License-Identifier: MIT
#include "choice.h"

#include <atomic>

namespace convnn::cuda {
namespace {

// More devices than a machine has; the others are left to Python.
constexpr int kMostDevices = 64;
constexpr int kOperators = 2;

std::atomic<Routing> current_routing{Routing::without_python};
std::atomic<bool> any_right[kMostDevices];
std::atomic<Verdict> verdicts[kMostDevices][kOperators][kHopperKinds];

bool exists(int device) { return device >= 0 && device < kMostDevices; }

}  // namespace

int hopper_kind(const SelectParams& params) {
  int kind = params.k <= 10 ? 0 : params.k <= 16 ? 1 : params.k <= 32 ? 2 : 3;
  kind = 2 * kind + (params.d > 64);
  kind = 2 * kind + (params.metric == Metric::dot);
  return 2 * kind + (params.dtype == DType::bfloat16);
}

void set_verdict(int device, Operator op, int kind, Verdict verdict) {
  if (!exists(device) || kind < 0 || kind >= kHopperKinds) return;
  verdicts[device][int(op)][kind] = verdict;
  if (verdict == Verdict::right) any_right[device] = true;
}

bool is_right(int device, Operator op, int kind) {
  return exists(device) &&
         verdicts[device][int(op)][kind].load(std::memory_order_relaxed) == Verdict::right;
}

bool may_run_hopper(int device) {
  return exists(device) && any_right[device].load(std::memory_order_relaxed);
}

// All thresholds of the choice. They come from the predictions of python -m tools.predict, in us at
// 65% of the limit, these kernels against Triton's; nothing was measured.
namespace {

// Forward, k = 9 and 16, D = 64 and 128: a ratio of 0.59 to 0.94 for 1,024 to 16,384 columns; for
// 65,536 and 100,000, 1.01 to 1.05 with k = 9. Triton has a kernel of its own for up to 1,280
// columns of few channels, and few rows do not give each multiprocessor its 256.
constexpr int64_t kFewestColumns = 1024, kMostColumns = 32768, kFewestRows = 16384;
constexpr int64_t kFewChannels = 16, kMostOfFewChannels = 1280;
// Forward, 16,384 x 100,000, D = 128: 2,346 against 1,257 for k = 32 and 5,248 against 1,733 for
// k = 64. Gradients were predicted for k = 9 only, and 4,096 columns or more; Triton's backward of
// few tokens ends at 2,048.
constexpr int64_t kMostNeighbors = 16, kFewestOfGradients = 2049;
// Gradients, 64 x 4096, bfloat16, k = 9: 464 against 484 for D = C = 64, but 962 against 902 for
// 128.
constexpr int64_t kWidestGradients = 64;

// Whether the call is large enough, and depthwise or without weight in the dtype of query: anything
// else takes launches of its own.
bool is_suited(const SelectParams& select, const AggregateParams* aggregate) {
  const int64_t columns = select.candidates ? select.r : select.m;
  const bool in_one = !aggregate || (aggregate->convolution != Convolution::dense &&
                                     aggregate->dtype == select.dtype);
  return in_one && columns >= kFewestColumns && columns <= kMostColumns &&
         select.batch * select.n >= kFewestRows && select.k <= kMostNeighbors;
}

}  // namespace

bool hopper_is_faster(const SelectParams& select, const AggregateParams* aggregate) {
  const int64_t columns = select.candidates ? select.r : select.m;
  return is_suited(select, aggregate) && (select.d > kFewChannels || columns > kMostOfFewChannels);
}

bool gradients_are_faster(const SelectParams& select, const AggregateParams& aggregate) {
  const bool is_short = select.dtype == DType::float16 || select.dtype == DType::bfloat16;
  const int64_t columns = select.candidates ? select.r : select.m;
  return is_short && is_suited(select, &aggregate) && columns >= kFewestOfGradients &&
         select.d <= kWidestGradients && aggregate.c <= kWidestGradients;
}

void set_routing(Routing routing) { current_routing = routing; }
Routing routing() { return current_routing.load(std::memory_order_relaxed); }

}  // namespace convnn::cuda

// What convnn_kernels/backends/hopper.py calls.
extern "C" __attribute__((visibility("default"))) int convnn_cuda_hopper_is_built() {
#ifdef CONVNN_HOPPER
  return 1;
#else
  return 0;
#endif
}
extern "C" __attribute__((visibility("default"))) void convnn_cuda_set_verdict(int device, int op,
                                                                               int kind,
                                                                               int verdict) {
  using namespace convnn::cuda;
  set_verdict(device, Operator(op), kind, Verdict(verdict));
}
extern "C" __attribute__((visibility("default"))) void convnn_cuda_set_routing(int routing) {
  convnn::cuda::set_routing(convnn::cuda::Routing(routing));
}
