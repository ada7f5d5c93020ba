// SPDX-License-Identifier: MIT
// The operators on LibTorch's stable ABI, for the backends written in C++: tensors become the plain
// parameters of params.h. Schemas and fake tensors are in convnn_kernels/ops.py, derivatives in
// convnn_kernels/autograd.py.
//
// A Backend is made for each call from a tensor of its device. It runs select(), aggregate() and
// their backward passes, and says in kReadsIndices whether index values are in host memory and can
// be checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace convnn::entry {
namespace {

using namespace checks;

// The text of a string argument, whose handle it deletes. PyTorch 2.13's conversion to std::string
// never frees a copy that it makes.
std::string take_text(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Keeps the contiguous form of an optional argument alive, and its pointer.
template <class T>
class ContiguousArgument {
 public:
  explicit ContiguousArgument(const OptionalTensor& tensor) {
    if (tensor) tensor_ = as_contiguous(*tensor);
  }
  const T* data() const {
    return tensor_ ? static_cast<const T*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  OptionalTensor tensor_;
};

// A contiguous tensor on the device of `like`. torch::stable::new_empty would look the operator up
// by its name and go through the dispatcher, which takes longer than the kernels of a small call.
Tensor empty_as(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size() - 1; i > 0; --i) {
    strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  }
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle empty = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &empty));
  return Tensor(empty);
}

// The shape of `tensor` with its last two dimensions replaced.
std::vector<int64_t> shape_with(const Tensor& tensor, int64_t rows, int64_t columns) {
  const Shape sizes = tensor.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[shape.size() - 2] = rows;
  shape[shape.size() - 1] = columns;
  return shape;
}

Tensor empty_like_if(bool needed, const Tensor& tensor) {
  if (!needed) return empty_as(tensor, {0}, tensor.scalar_type());
  const Shape sizes = tensor.sizes();
  return empty_as(tensor, std::vector<int64_t>(sizes.begin(), sizes.end()), tensor.scalar_type());
}

void check_distinct(const char* op, const int64_t* candidates, int64_t count) {
  std::vector<int64_t> sorted(candidates, candidates + count);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    fail(op, "candidates must be distinct, got ", *twice, " more than once");
  }
}

template <class Backend>
std::tuple<Tensor, Tensor> checked_select(const char* op, const Tensor& query, const Tensor& key,
                                          int64_t k, const OptionalTensor& candidates,
                                          const OptionalTensor& self_indices,
                                          const OptionalTensor& key_mask, const std::string& metric,
                                          const std::string& order) {
  const int64_t n = rows_of(query), m = rows_of(key);
  const bool wide = query.scalar_type() == ScalarType::Double;
  const int64_t columns = candidates ? candidates->size(0) : m;
  if (!wide && columns > std::numeric_limits<uint32_t>::max()) {
    fail(op, "key must have at most ", std::numeric_limits<uint32_t>::max(),
         " rows that may be neighbors, got ", columns);
  }
  const ContiguousArgument<int64_t> contiguous_candidates(candidates),
      contiguous_self(self_indices);
  const ContiguousArgument<bool> contiguous_mask(key_mask);
  if (Backend::kReadsIndices && candidates) {
    check_range(op, "candidates", contiguous_candidates.data(), candidates->size(0), m);
    check_distinct(op, contiguous_candidates.data(), candidates->size(0));
  }
  if (Backend::kReadsIndices && self_indices)
    check_range(op, "self_indices", contiguous_self.data(), n, m);

  const Tensor contiguous_query = as_contiguous(query), contiguous_key = as_contiguous(key);
  const std::vector<int64_t> shape = shape_with(query, n, k);
  Tensor similarities = empty_as(query, shape, wide ? ScalarType::Double : ScalarType::Float);
  Tensor indices = empty_as(query, shape, ScalarType::Long);
  const SelectParams params = {
      batch_of(query),
      n,
      m,
      columns_of(query),
      k,
      *dtype_of(query),
      *metric_of(metric),
      *order_of(order),
      contiguous_query.const_data_ptr(),
      contiguous_key.const_data_ptr(),
      contiguous_candidates.data(),
      candidates ? candidates->size(0) : 0,
      contiguous_self.data(),
      contiguous_mask.data(),
      similarities.mutable_data_ptr(),
      static_cast<int64_t*>(indices.mutable_data_ptr()),
  };
  Backend(query).select(params);
  return {similarities, indices};
}

// The parameters of aggregate, but for bias and output. All tensors are contiguous and checked.
AggregateParams aggregate_params(const Tensor& value, const Tensor& similarities,
                                 const Tensor& indices, const void* weight, Convolution convolution,
                                 int64_t outputs, const std::string& rho, double scale) {
  AggregateParams params = {};
  params.batch = batch_of(value);
  params.n = rows_of(similarities);
  params.m = rows_of(value);
  params.c = columns_of(value);
  params.o = outputs;
  params.k = columns_of(similarities);
  params.dtype = *dtype_of(value);
  params.similarity_dtype = *dtype_of(similarities);
  params.convolution = convolution;
  params.rho = *rho_of(rho);
  params.scale = scale;
  params.value = value.const_data_ptr();
  params.similarities = similarities.const_data_ptr();
  params.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  params.weight = weight;
  return params;
}

template <class Backend>
Tensor checked_aggregate(const Tensor& value, const Tensor& similarities, const Tensor& indices,
                         const OptionalTensor& weight, const OptionalTensor& bias,
                         Convolution convolution, int64_t outputs, const std::string& rho,
                         double scale) {
  const Tensor contiguous_value = as_contiguous(value),
               contiguous_similarities = as_contiguous(similarities);
  const Tensor contiguous_indices = as_contiguous(indices);
  const ContiguousArgument<void> contiguous_weight(weight), contiguous_bias(bias);
  Tensor output =
      empty_as(value, shape_with(value, rows_of(similarities), outputs), value.scalar_type());
  AggregateParams params =
      aggregate_params(contiguous_value, contiguous_similarities, contiguous_indices,
                       contiguous_weight.data(), convolution, outputs, rho, scale);
  params.bias = contiguous_bias.data();
  params.output = output.mutable_data_ptr();
  Backend(value).aggregate(params);
  return output;
}

template <class Backend>
std::tuple<Tensor, Tensor> select(const Tensor& query, const Tensor& key, int64_t k,
                                  const OptionalTensor& candidates,
                                  const OptionalTensor& self_indices,
                                  const OptionalTensor& key_mask, StringHandle metric_handle,
                                  StringHandle order_handle) {
  const std::string metric = take_text(metric_handle), order = take_text(order_handle);
  check_select("select", query, key, k, candidates, self_indices, key_mask, metric, order);
  return checked_select<Backend>("select", query, key, k, candidates, self_indices, key_mask,
                                 metric, order);
}

template <class Backend>
Tensor aggregate(const Tensor& value, const Tensor& similarities, const Tensor& indices,
                 const OptionalTensor& weight, const OptionalTensor& bias, StringHandle rho_handle,
                 double scale) {
  const std::string rho = take_text(rho_handle);
  check_aggregate("aggregate", value, similarities, indices);
  int64_t outputs = 0;
  const Convolution convolution = check_convolution("aggregate", value, columns_of(similarities),
                                                    weight, bias, rho, scale, outputs);
  const Tensor contiguous_indices = as_contiguous(indices);
  if (Backend::kReadsIndices) {
    check_range("aggregate", "indices",
                static_cast<const int64_t*>(contiguous_indices.const_data_ptr()), indices.numel(),
                rows_of(value));
  }
  return checked_aggregate<Backend>(value, similarities, contiguous_indices, weight, bias,
                                    convolution, outputs, rho, scale);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t k,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& candidates,
    const OptionalTensor& self_indices, const OptionalTensor& key_mask, StringHandle metric_handle,
    StringHandle rho_handle, double scale, StringHandle order_handle) {
  const std::string metric = take_text(metric_handle), rho = take_text(rho_handle),
                    order = take_text(order_handle);
  check_select("forward", query, key, k, candidates, self_indices, key_mask, metric, order);
  check_value_as("forward", value, query, key);
  int64_t outputs = 0;
  const Convolution convolution =
      check_convolution("forward", value, k, weight, bias, rho, scale, outputs);
  const auto [similarities, indices] = checked_select<Backend>(
      "forward", query, key, k, candidates, self_indices, key_mask, metric, order);
  Tensor output = checked_aggregate<Backend>(value, similarities, indices, weight, bias,
                                             convolution, outputs, rho, scale);
  return {output, similarities, indices};
}

// A backward operator is called with what the forward one took and gave, so these checks are terse:
// they only keep a wrong call from reading out of bounds.
void check_same(const char* op, const char* name, const Tensor& tensor,
                const std::vector<int64_t>& shape, ScalarType dtype) {
  check_given(op, name, tensor);
  const Shape sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(op, name, " must have shape ", name_of(Shape(shape.data(), shape.size()), shape.size()),
         ", got shape ", shape_of(tensor));
  }
  check_dtype(op, name, tensor, dtype);
}

template <class Backend>
std::tuple<Tensor, Tensor> select_backward(const Tensor& grad_similarities, const Tensor& query,
                                           const Tensor& key, const Tensor& similarities,
                                           const Tensor& indices, StringHandle metric_handle,
                                           bool need_query, bool need_key) {
  const std::string metric = take_text(metric_handle);
  constexpr const char* op = "select_backward";
  check_given(op, "similarities", similarities);
  const int64_t k = similarities.dim() >= 2 ? columns_of(similarities) : 1;
  check_select(op, query, key, k, std::nullopt, std::nullopt, std::nullopt, metric, "similarity");
  const bool wide = query.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> shape = shape_with(query, rows_of(query), k);
  check_same(op, "similarities", similarities, shape, dtype);
  check_same(op, "grad_similarities", grad_similarities, shape, dtype);
  check_same(op, "indices", indices, shape, ScalarType::Long);
  const Tensor contiguous_grads = as_contiguous(grad_similarities),
               contiguous_query = as_contiguous(query);
  const Tensor contiguous_key = as_contiguous(key),
               contiguous_similarities = as_contiguous(similarities);
  const Tensor contiguous_indices = as_contiguous(indices);
  const int64_t* rows = static_cast<const int64_t*>(contiguous_indices.const_data_ptr());
  if (Backend::kReadsIndices) check_range(op, "indices", rows, indices.numel(), rows_of(key));

  Tensor grad_query = empty_like_if(need_query, query);
  Tensor grad_key = empty_like_if(need_key, key);
  const SelectBackwardParams params = {
      batch_of(query),
      rows_of(query),
      rows_of(key),
      columns_of(query),
      k,
      *dtype_of(query),
      *metric_of(metric),
      contiguous_grads.const_data_ptr(),
      contiguous_query.const_data_ptr(),
      contiguous_key.const_data_ptr(),
      contiguous_similarities.const_data_ptr(),
      rows,
      need_query ? grad_query.mutable_data_ptr() : nullptr,
      need_key ? grad_key.mutable_data_ptr() : nullptr,
  };
  Backend(query).select_backward(params);
  return {grad_query, grad_key};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> aggregate_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& similarities,
    const Tensor& indices, const OptionalTensor& weight, bool has_bias, StringHandle rho_handle,
    double scale, bool need_value, bool need_similarities, bool need_weight, bool need_bias) {
  const std::string rho = take_text(rho_handle);
  constexpr const char* op = "aggregate_backward";
  check_aggregate(op, value, similarities, indices);
  int64_t outputs = 0;
  const Convolution convolution = check_convolution(op, value, columns_of(similarities), weight,
                                                    std::nullopt, rho, scale, outputs);
  check_same(op, "grad_output", grad_output, shape_with(value, rows_of(similarities), outputs),
             value.scalar_type());
  const Tensor contiguous_grads = as_contiguous(grad_output),
               contiguous_value = as_contiguous(value);
  const Tensor contiguous_similarities = as_contiguous(similarities),
               contiguous_indices = as_contiguous(indices);
  const ContiguousArgument<void> contiguous_weight(weight);
  if (Backend::kReadsIndices) {
    check_range(op, "indices", static_cast<const int64_t*>(contiguous_indices.const_data_ptr()),
                indices.numel(), rows_of(value));
  }

  need_weight = need_weight && weight;
  need_bias = need_bias && has_bias;
  Tensor grad_value = empty_like_if(need_value, value);
  Tensor grad_similarities = empty_like_if(need_similarities, similarities);
  Tensor grad_weight = empty_like_if(need_weight, weight ? *weight : value);
  Tensor grad_bias = empty_as(value, {need_bias ? outputs : 0}, value.scalar_type());
  AggregateBackwardParams params = {};
  params.forward = aggregate_params(contiguous_value, contiguous_similarities, contiguous_indices,
                                    contiguous_weight.data(), convolution, outputs, rho, scale);
  params.grad_output = contiguous_grads.const_data_ptr();
  params.grad_value = need_value ? grad_value.mutable_data_ptr() : nullptr;
  params.grad_similarities = need_similarities ? grad_similarities.mutable_data_ptr() : nullptr;
  params.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  params.grad_bias = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  Backend(value).aggregate_backward(params);
  return {grad_value, grad_similarities, grad_weight, grad_bias};
}

// Registers all operators of one library and dispatch key.
template <class Backend, class Library>
void implement(Library& library) {
  library.impl("select", TORCH_BOX(&select<Backend>));
  library.impl("select_backward", TORCH_BOX(&select_backward<Backend>));
  library.impl("aggregate", TORCH_BOX(&aggregate<Backend>));
  library.impl("aggregate_backward", TORCH_BOX(&aggregate_backward<Backend>));
  library.impl("forward", TORCH_BOX(&forward<Backend>));
}

}  // namespace
}  // namespace convnn::entry
