// SPDX-License-Identifier: MIT
// A lightweight handle for tensors of LibTorch's stable ABI that keeps small calls cheap: it is the
// only owner of the tensor and reads shape, dtype and device once. torch::stable::Tensor shares its
// tensor and calls into PyTorch for every query.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "memory.h"

namespace convnn {

using torch::headeronly::ScalarType;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// Of the dtypes that operators take; 1 for others.
inline int64_t bytes_per_element(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

class Tensor {
 public:
  // Takes ownership of the handle.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined_));
    if (!defined_) return;
    int64_t *sizes = nullptr, *strides = nullptr;
    int64_t dims = 0;
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
    sizes_ = Shape(sizes, size_t(dims));
    strides_ = Shape(strides, size_t(dims));
    try {
      dtype_ = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype));
    } catch (const std::exception&) {
      // Not one of the stable ABI. The argument checks refuse it once all handles have owners; for
      // its name, the number is that of PyTorch.
      dtype_ = static_cast<ScalarType>(dtype);
    }
  }

  // Gives ownership of the handle to the caller.
  AtenTensorHandle release() { return handle_.release(); }

  // None for a required tensor arrives as one that is not defined; call nothing else on that.
  bool defined() const { return defined_; }

  int64_t dim() const { return int64_t(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[size_t(i)]; }
  const Shape& sizes() const { return sizes_; }
  int64_t stride(int64_t i) const { return strides_[size_t(i)]; }
  const Shape& strides() const { return strides_; }
  ScalarType scalar_type() const { return dtype_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }
  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }

  // PyTorch makes no tensor of more than 2^63 elements.
  int64_t numel() const {
    uint64_t count = 1;
    for (const int64_t size : sizes_) count *= uint64_t(size);
    return int64_t(count);
  }

  // The bytes of its storage up to its last element, and those that the storage has: fewer if that
  // was resized.
  int64_t bytes_reached() const {
    if (numel() == 0) return 0;
    int64_t last = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle_.get(), &last));
    for (size_t i = 0; i < sizes_.size(); ++i) last += (sizes_[i] - 1) * strides_[i];
    return (last + 1) * bytes_per_element(dtype_);
  }
  int64_t bytes_stored() const {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle_.get(), &bytes));
    return bytes;
  }

  bool is_contiguous() const {
    bool contiguous = false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_.get(), &contiguous));
    return contiguous;
  }
  // Without the repetitions of expanded dimensions, whose size becomes 1, except the last: a view.
  Tensor distinct() const {
    std::vector<int64_t> sizes(sizes_.begin(), sizes_.end());
    for (size_t i = 0; i + 1 < sizes.size(); ++i) {
      if (strides_[i] == 0) sizes[i] = 1;
    }
    AtenTensorHandle view = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(handle_.get(), dim(), sizes.data(),
                                                          strides_.data(), 0, &view));
    return Tensor(view);
  }
  void copy_from(const Tensor& other) const {
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(handle_.get(), other.handle_.get(), 0));
  }
  void fill_with_zeros() const { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(handle_.get())); }

  const void* const_data_ptr() const {
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_.get(), &data));
    return data;
  }
  void* mutable_data_ptr() const {
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_.get(), &data));
    return data;
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
  bool defined_ = false;
  Shape sizes_, strides_;  // point into the tensor
  ScalarType dtype_ = ScalarType::Undefined;
  int32_t device_type_ = 0, device_index_ = 0;
};

using OptionalTensor = std::optional<Tensor>;

}  // namespace convnn
