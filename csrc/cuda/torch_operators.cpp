// SPDX-License-Identifier: MIT
// Defines the operators of the library convnn_cuda, which convnn_kernels/backends/cuda.py calls,
// and registers them for the CUDA dispatch key. The CUDA key of the library convnn belongs to
// convnn_kernels/backends/selection.py.
#include "../torch_operators.h"

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

// Runs on the device of a tensor, in its current stream. Workspace comes from PyTorch's allocator,
// which reuses it only for work later in that stream.
class Cuda : private cuda::Context {
 public:
  static constexpr bool kReadsIndices = false;
  static constexpr bool kReadsStrides = false;

  explicit Cuda(const Tensor& like)
      : Context(current_stream(like.device_index())), guard_(like.device_index()), like_(like) {}

  void select(const SelectParams& params) { cuda::select(params, *this); }
  void select_backward(const SelectBackwardParams& params) { cuda::select_backward(params, *this); }
  void aggregate(const AggregateParams& params) { cuda::aggregate(params, *this); }
  void aggregate_backward(const AggregateBackwardParams& params) {
    cuda::aggregate_backward(params, *this);
  }
  void forward_backward(const ForwardBackwardParams& params) {
    cuda::forward_backward(params, *this);
  }

 private:
  void* allocate(size_t bytes) override {
    workspace_.push_back(empty_as(like_, {int64_t(bytes)}, ScalarType::Byte));
    return workspace_.back().mutable_data_ptr();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& like_;
  std::vector<Tensor> workspace_;
};

}  // namespace
}  // namespace convnn::torch_operators

STABLE_TORCH_LIBRARY(convnn_cuda, library) { convnn::torch_operators::define(library); }

STABLE_TORCH_LIBRARY_IMPL(convnn_cuda, CUDA, library) {
  convnn::torch_operators::implement<convnn::torch_operators::Cuda>(library);
}
