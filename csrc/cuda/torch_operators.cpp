// SPDX-License-Identifier: MIT
// Defines the operators of the library convnn_cuda, which convnn_kernels/backends/cuda.py calls,
// and registers them for the CUDA dispatch key. On the CUDA key of the library convnn it registers
// forward and select, as way_in.h says; the other operators are registered there by
// convnn_kernels/backends/selection.py.
#include "way_in.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "operators.h"

namespace convnn::torch_operators {
namespace {

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Runs on the device of a tensor, in its current stream: the Hopper kernels where they were checked
// and can run a call, the portable ones elsewhere. Workspace comes from PyTorch's allocator,
// which reuses it only for work later in that stream.
class Cuda : protected cuda::Context {
 public:
  static constexpr bool kReadsIndices = false;
  static constexpr bool kReadsStrides = false;

  explicit Cuda(const Tensor& like)
      : Context(current_stream(like.device_index())),
        guard_(like.device_index()),
        like_(like),
        workspace_(like) {}

  // The index of a device that is one of these; otherwise -1.
  static int device(int32_t type, int32_t index) {
    return type == aoti_torch_device_type_cuda() ? index : -1;
  }

  void select(const SelectParams& params) {
    if (runs_on_hopper(Operator::select, params, nullptr)) {
      cuda::hopper_forward(params, nullptr, *this);
    } else {
      cuda::select(params, *this);
    }
  }
  void forward(const SelectParams& selecting, const AggregateParams& aggregating) {
    if (runs_on_hopper(Operator::forward, selecting, &aggregating)) {
      cuda::hopper_forward(selecting, &aggregating, *this);
    } else {
      cuda::forward(selecting, aggregating, *this);
    }
  }
  void select_backward(const SelectBackwardParams& params) { cuda::select_backward(params, *this); }
  void aggregate(const AggregateParams& params) { cuda::aggregate(params, *this); }
  void aggregate_backward(const AggregateBackwardParams& params) {
    cuda::aggregate_backward(params, *this);
  }
  void forward_backward(const ForwardBackwardParams& params) {
    cuda::forward_backward(params, *this);
  }

 private:
  bool runs_on_hopper(Operator op, const SelectParams& select, const AggregateParams* aggregate) {
    return cuda::is_right(like_.device_index(), op, cuda::hopper_kind(select)) &&
           !cuda::hopper_refuses(select, aggregate);
  }

  void* allocate(size_t bytes) override { return workspace_.allocate(bytes); }

  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& like_;
  Workspace workspace_;
};

// Runs the Hopper kernels, whether they were checked or not.
class Hopper : public Cuda {
 public:
  using Cuda::Cuda;
  void select(const SelectParams& params) { run("select", params, nullptr); }
  void forward(const SelectParams& selecting, const AggregateParams& aggregating) {
    run("forward", selecting, &aggregating);
  }

 private:
  void run(const char* op, const SelectParams& select, const AggregateParams* aggregate) {
    const char* refusal = cuda::hopper_refuses(select, aggregate);
    if (refusal) fail(op, "the Hopper kernels cannot run this call: ", refusal);
    cuda::hopper_forward(select, aggregate, *this);
  }
};

}  // namespace
}  // namespace convnn::torch_operators

STABLE_TORCH_LIBRARY(convnn_cuda, library) {
  convnn::torch_operators::define(library);
  convnn::torch_operators::define_questions(library);
}
STABLE_TORCH_LIBRARY(convnn_python, library) { convnn::torch_operators::define_python(library); }

STABLE_TORCH_LIBRARY_IMPL(convnn_cuda, CUDA, library) {
  convnn::torch_operators::implement<convnn::torch_operators::Cuda>(library);
  convnn::torch_operators::implement_hopper<convnn::torch_operators::Hopper>(library);
}
// On any device, because only shapes and dtypes count.
STABLE_TORCH_LIBRARY_IMPL(convnn_cuda, CompositeExplicitAutograd, library) {
  convnn::torch_operators::implement_choices(library);
}
STABLE_TORCH_LIBRARY_IMPL(convnn, CUDA, library) {
  convnn::torch_operators::implement_way_in<convnn::torch_operators::Cuda>(library);
}
