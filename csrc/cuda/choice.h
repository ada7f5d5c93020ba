// SPDX-License-Identifier: MIT
// Which calls the kernels of this library run instead of Triton's, and the Hopper kernels instead
// of the portable ones, when nothing is forced. Nothing here launches a kernel or includes PyTorch.
#pragma once

#include "../params.h"

namespace convnn::cuda {

enum class Operator : int { forward, select };

// Calls that the same instance of the sweep and of the finish serves, but for splits, are of one
// kind: one check of results, before the first use on a device, stands for all of them.
constexpr int kHopperKinds = 32;
int hopper_kind(const SelectParams& params);

// What convnn_kernels/backends/hopper.py found out about a kind on a device.
enum class Verdict : int { unknown, right, wrong };
void set_verdict(int device, Operator op, int kind, Verdict verdict);
// Whether the kernels were checked there and are right. False for all devices but those of compute
// capability 9.0, which alone are checked.
bool is_right(int device, Operator op, int kind);
// Whether is_right() of any kind.
bool may_run_hopper(int device);

// Whether the Hopper kernels, which can run the call, are predicted to be faster than Triton's.
// `aggregate` is null for select.
bool hopper_is_faster(const SelectParams& select, const AggregateParams* aggregate);

// Whether the gradients of such a forward are predicted to be faster by the portable kernels than
// by Triton's, on a device of compute capability 9.0.
bool gradients_are_faster(const SelectParams& select, const AggregateParams& aggregate);

// Who runs a call. Without Python, a program that loaded only the libraries, there are no others
// than these kernels and the portable ones. Where a backend is forced, all calls are left to
// Python.
enum class Routing : int { without_python, choose, to_python };
void set_routing(Routing routing);
Routing routing();

}  // namespace convnn::cuda
