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

bool hopper_is_faster(const SelectParams& select, const AggregateParams* aggregate) {
  // By the predictions of python -m tools.predict, D = 64, k = 9: 157 us here and 154 there for
  // 64 x 2048 x 2048, 36 and 47 for 4 x 4096 x 4096, but 36 and 18 for 1 x 4096 x 4096, where too
  // few items of 256 rows are on their way.
  constexpr int64_t kFewestColumns = 2048, kFewestRows = 16384;
  const int64_t columns = select.candidates ? select.r : select.m;
  // Anything else is aggregated in launches of its own.
  const bool in_one = !aggregate || (aggregate->convolution != Convolution::dense &&
                                     aggregate->dtype == select.dtype);
  return in_one && columns > kFewestColumns && select.batch * select.n >= kFewestRows;
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
