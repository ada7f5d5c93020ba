// SPDX-License-Identifier: MIT
// The operators as PyTorch calls them, on LibTorch's stable ABI, for the backends written in C++:
// they check arguments, allocate results and turn tensors into the parameters of params.h. Schemas
// are in schemas.h, fake kernels in convnn_kernels/ops.py, derivatives in
// convnn_kernels/autograd.py.
//
// A Backend is constructed for each call from a tensor on its device. It has a function for each
// operator; forward(select, aggregate) writes the neighbors that it then reads. kReadsIndices says
// whether index values are in host memory and can be checked, kReadsStrides whether query, key and
// value may have strides.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.h"
#include "schemas.h"

namespace convnn::torch_operators {
namespace {

using namespace checks;

// Converts an argument of an operator and takes ownership of it. For std::string, the conversion of
// PyTorch 2.13 leaks memory.
template <class T>
T take(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}
template <>
Tensor take(StableIValue value) {
  return Tensor(take<AtenTensorHandle>(value));
}
template <>
OptionalTensor take(StableIValue value) {
  const auto handle = take<std::optional<AtenTensorHandle>>(value);
  return handle ? OptionalTensor(*handle) : std::nullopt;
}
template <>
std::string take(StableIValue value) {
  const auto handle = take<StringHandle>(value);
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// The reverse: gives ownership to the dispatcher.
template <class T>
StableIValue give(T& value) {
  return torch::stable::detail::from(value);
}
inline StableIValue give(Tensor& value) { return torch::stable::detail::from(value.release()); }
inline StableIValue give(OptionalTensor& value) {
  std::optional<AtenTensorHandle> handle;
  if (value) handle = value->release();
  return torch::stable::detail::from(handle);
}

// Moves a tuple from and to the stack of the dispatcher, which holds arguments, then results.
template <class Values>
struct Stack {
  using All = std::make_index_sequence<std::tuple_size_v<Values>>;
  static Values get(StableIValue* stack) { return get(stack, All()); }
  static void put(StableIValue* stack, Values& values) { put(stack, values, All()); }

 private:
  template <size_t... I>
  static Values get(StableIValue* stack, std::index_sequence<I...>) {
    return {take<std::tuple_element_t<I, Values>>(stack[I])...};
  }
  template <size_t... I>
  static void put(StableIValue* stack, Values& values, std::index_sequence<I...>) {
    ((stack[I] = give(std::get<I>(values))), ...);
  }
};

inline void check_schema(bool fits) {
  if (!fits) {
    throw std::runtime_error("convnn: the schema of an operator is not that of its kernel");
  }
}

// Calls the implementation of an operator, whose name its errors of memory then begin with.
template <class Function, class Arguments>
auto call_named(const char* op, Function function, const Arguments& arguments) {
  try {
    return std::apply(function, arguments);
  } catch (const OutOfMemory& error) {
    fail(op, error.what());
  } catch (const std::bad_alloc&) {
    fail(op, "cannot allocate host memory");
  }
}

inline constexpr char kForward[] = "forward", kForwardBackward[] = "forward_backward";
inline constexpr char kSelect[] = "select", kSelectBackward[] = "select_backward";
inline constexpr char kAggregate[] = "aggregate", kAggregateBackward[] = "aggregate_backward";

// The boxed form of a function, like TORCH_BOX, for these argument types and results.
template <const char* op, auto function>
struct Boxed;
template <const char* op, class... Results, class... Arguments,
          std::tuple<Results...> (*function)(Arguments...)>
struct Boxed<op, function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    check_schema(arguments == sizeof...(Arguments) && results == sizeof...(Results));
    const auto taken = Stack<std::tuple<std::decay_t<Arguments>...>>::get(stack);
    std::tuple<Results...> made = call_named(op, function, taken);
    Stack<std::tuple<Results...>>::put(stack, made);
  }
};

// A contiguous tensor on the device of `like`. torch::stable::new_empty looks the operator up by
// name and goes through the dispatcher, which takes longer than the kernels of a small call.
Tensor empty_as(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype,
                const char* name) {
  // Those of a tensor without elements do not matter, and may exceed 64 bits.
  std::vector<int64_t> strides(shape.size(), 1);
  bool is_exceeded = false;
  for (size_t i = shape.size(); i-- > 1;) {
    is_exceeded |=
        __builtin_mul_overflow(strides[i], std::max<int64_t>(shape[i], 1), &strides[i - 1]);
    if (is_exceeded) strides[i - 1] = 1;
  }
  size_t bytes = size_t(bytes_per_element(dtype));
  for (const int64_t size : shape) bytes = bytes_of(bytes, size);
  AtenTensorHandle empty = nullptr;
  if (bytes > size_t(std::numeric_limits<int64_t>::max()) ||
      aoti_torch_empty_strided(
          int64_t(shape.size()), shape.data(), strides.data(),
          torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
          like.device_type(), like.device_index(), &empty)) {
    throw OutOfMemory(bytes, std::string(name) + " of shape " +
                                 name_of(Shape(shape.data(), shape.size()), shape.size()));
  }
  return Tensor(empty);
}
// The same, of the shape of a tensor.
Tensor empty_like(const Tensor& tensor, const char* name) {
  const Shape sizes = tensor.sizes();
  return empty_as(tensor, {sizes.begin(), sizes.end()}, tensor.scalar_type(), name);
}

Tensor contiguous_copy(const Tensor& tensor, const char* name) {
  const std::string what_for = std::string("a copy of ") + name;
  Tensor copy = empty_like(tensor, what_for.c_str());
  copy.copy_from(tensor);
  return copy;
}

// The elements of a tensor in row-major order, copied if necessary; null only for no tensor.
class Contiguous {
 public:
  Contiguous(const char* op, const char* name, const Tensor& tensor) {
    check_storage(op, name, tensor);
    if (!tensor.is_contiguous()) copy_ = contiguous_copy(tensor, name);
    data_ = (copy_ ? *copy_ : tensor).const_data_ptr();
    static constexpr char kNoElements = 0;
    if (!data_) data_ = &kNoElements;  // an empty tensor has no memory
  }
  Contiguous(const char* op, const char* name, const OptionalTensor& tensor) {
    if (tensor) *this = Contiguous(op, name, *tensor);
  }
  const void* data() const { return data_; }
  template <class T>
  const T* data_as() const {
    return static_cast<const T*>(data_);
  }

 private:
  OptionalTensor copy_;
  const void* data_ = nullptr;
};

// The rows of a tensor [..., rows, columns], of which `reads` are read in each batch element. A
// backend that reads strides gets them where they lie if the elements of a row are adjacent and so
// are the rows, or if only a few are read: reading rows that are far apart takes longer than
// copying them. All else is copied, but expanded dimensions are not repeated.
class Readable {
 public:
  static constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  static constexpr int64_t kFew = 0;

  Readable(const char* op, const char* name, const Tensor& tensor, bool reads_strides,
           int64_t reads = kAll) {
    check_storage(op, name, tensor);
    const int64_t rows = rows_of(tensor), columns = columns_of(tensor);
    const bool are_adjacent = rows <= 1 || tensor.stride(tensor.dim() - 2) <= columns;
    if (tensor.is_contiguous()) {
      rows_ = dense_rows(tensor.const_data_ptr(), rows, columns);
    } else if (!reads_strides) {
      copy_ = contiguous_copy(tensor, name);
      rows_ = dense_rows(copy_->const_data_ptr(), rows, columns);
    } else if ((tensor.stride(tensor.dim() - 1) == 1 || columns <= 1) &&
               (are_adjacent || reads < rows)) {
      read_strides(tensor, tensor.sizes());
    } else {
      copy_ = contiguous_copy(tensor.distinct(), name);
      read_strides(*copy_, tensor.sizes());
    }
  }
  const StridedRows& rows() const { return rows_; }

 private:
  // Reads `tensor`, whose dimensions of size 1 are repeated where `sizes` has more.
  void read_strides(const Tensor& tensor, const Shape& sizes) {
    const auto stride = [&](int64_t i) {
      return tensor.size(i) == 1 && sizes[size_t(i)] > 1 ? 0 : tensor.stride(i);
    };
    rows_ = {tensor.const_data_ptr(), stride(tensor.dim() - 2), 0, nullptr};
    // The leading dimensions as one, if it has a stride.
    bool single = true, first = true;
    int64_t batch = 1, next = 0;
    for (int64_t i = tensor.dim() - 2; i-- > 0;) {
      const int64_t size = sizes[size_t(i)];
      batch *= size;
      if (size == 1) continue;
      if (first) {
        rows_.batch_stride = stride(i);
      } else if (stride(i) != next) {
        single = false;
      }
      next = stride(i) * size;
      first = false;
    }
    if (single) return;
    offsets_ = zeros<int64_t>(size_t(batch), "the places of batch elements");
    for (int64_t b = 0; b < batch; ++b) {
      int64_t rest = b;
      for (int64_t i = tensor.dim() - 2; i-- > 0; rest /= sizes[size_t(i)]) {
        offsets_[size_t(b)] += rest % sizes[size_t(i)] * stride(i);
      }
    }
    rows_.offsets = offsets_.data();
  }

  OptionalTensor copy_;
  std::vector<int64_t> offsets_;
  StridedRows rows_;
};

// The shape of `tensor` with its last two dimensions replaced.
std::vector<int64_t> shape_with(const Tensor& tensor, int64_t rows, int64_t columns) {
  const Shape sizes = tensor.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[shape.size() - 2] = rows;
  shape[shape.size() - 1] = columns;
  return shape;
}

// Pairs of a query and a neighbor in each batch element.
int64_t pairs_of(const Tensor& similarities) {
  return rows_of(similarities) * columns_of(similarities);
}

// A gradient like `tensor`, or an empty one.
Tensor new_grad(bool needed, const Tensor& tensor, const char* name) {
  return needed ? empty_like(tensor, name) : empty_as(tensor, {0}, tensor.scalar_type(), name);
}

// Without pairs, all gradients are zero.
template <class... Gradients>
bool fill_without_pairs(const Tensor& similarities, const Gradients&... gradients) {
  if (similarities.numel() > 0) return false;
  (gradients.fill_with_zeros(), ...);
  return true;
}

void check_distinct(const char* op, const int64_t* candidates, int64_t count) {
  std::vector<int64_t> sorted = zeros<int64_t>(size_t(count), "sorted candidates");
  std::copy(candidates, candidates + count, sorted.begin());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    fail(op, "candidates must be distinct, got ", *twice, " more than once");
  }
}

// Index values in host memory are rows. If there is none, all neighbors must be missing.
void check_indices(const char* op, const Contiguous& indices, const Contiguous& similarities,
                   const Tensor& shaped, int64_t rows) {
  const int64_t count = shaped.numel();
  if (rows > 0) return check_range(op, "indices", indices.data_as<int64_t>(), count, rows);
  const bool is_float64 = shaped.scalar_type() == ScalarType::Double;
  for (int64_t i = 0; i < count; ++i) {
    const double s =
        is_float64 ? similarities.data_as<double>()[i] : similarities.data_as<float>()[i];
    if (!(std::isinf(s) && s < 0)) {
      fail(op, "similarities must be -inf without rows of value, got ", without_sign_of_nan(s),
           " at position ", i);
    }
  }
}

// The parameters of select except its pointers.
SelectParams select_params(const Tensor& query, const Tensor& key, int64_t k,
                           const std::string& metric, const std::string& order) {
  SelectParams params = {};
  params.batch = batch_of(query);
  params.n = rows_of(query);
  params.m = rows_of(key);
  params.d = columns_of(query);
  params.k = k;
  params.dtype = *dtype_of(query);
  params.metric = *metric_of(metric);
  params.order = *order_of(order);
  return params;
}

// The elements of the last dimension.
int64_t last_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// The restrictions except their pointers.
void set_restrictions(SelectParams& params, const Restrictions& given) {
  // Those of a batch element, or 0 if the batch shares them: then there are no leading dimensions.
  const auto stride = [](const OptionalTensor& tensor, int64_t dims, int64_t elements) {
    return tensor && tensor->dim() > dims ? elements : 0;
  };
  params.r = given.candidates ? last_of(*given.candidates) : 0;
  params.candidates_stride = stride(given.candidates, 1, params.r);
  params.self_stride = stride(given.self_indices, 1, params.n);
  params.range_stride = stride(given.key_range, 2, 2 * params.n);
  params.exclude_self = given.exclude_self;
}

// What select reads: its checked arguments, and the copies that its parameters point to.
template <class Backend>
class SelectInputs {
 public:
  SelectInputs(const char* op, const Tensor& query, const Tensor& key, int64_t k,
               const Restrictions& given, const std::string& metric, const std::string& order)
      : candidates_(op, "candidates", given.candidates),
        self_(op, "self_indices", given.self_indices),
        mask_(op, "key_mask", given.key_mask),
        range_(op, "key_range", given.key_range),
        queries_(op, "query", query, Backend::kReadsStrides, reads_of(query)),
        keys_(op, "key", key, Backend::kReadsStrides, reads_of(query)) {
    check_columns(op, key, given);
    if (Backend::kReadsIndices) check_values(op, given, rows_of(key));
    params_ = select_params(query, key, k, metric, order);
    params_.query = queries_.rows();
    params_.key = keys_.rows();
    set_restrictions(params_, given);
    params_.candidates = candidates_.data_as<int64_t>();
    params_.self_indices = self_.data_as<int64_t>();
    params_.key_mask = mask_.data_as<uint8_t>();
    params_.key_range = range_.data_as<int64_t>();
  }

  // The parameters, with results that are these tensors.
  SelectParams with(const Tensor& similarities, const Tensor& indices) const {
    SelectParams params = params_;
    params.similarities = similarities.mutable_data_ptr();
    params.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
    return params;
  }

 private:
  // The rows of key that may be neighbors are counted in 32 bits, except in float64. Without
  // columns they need no memory, and there may be more than can be searched.
  static void check_columns(const char* op, const Tensor& key, const Restrictions& given) {
    constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
    const int64_t columns = given.candidates ? last_of(*given.candidates) : rows_of(key);
    const bool is_limited = key.scalar_type() != ScalarType::Double || columns_of(key) == 0;
    if (is_limited && columns > kMost) {
      fail(op, "key must have at most ", kMost, " rows that may be neighbors, got ", columns);
    }
  }

  void check_values(const char* op, const Restrictions& given, int64_t m) const {
    if (given.candidates) {
      const int64_t count = given.candidates->numel(), r = last_of(*given.candidates);
      check_range(op, "candidates", candidates_.data_as<int64_t>(), count, m);
      for (int64_t i = 0; i < count; i += r) {
        check_distinct(op, candidates_.data_as<int64_t>() + i, r);
      }
    }
    if (given.self_indices) {
      check_range(op, "self_indices", self_.data_as<int64_t>(), given.self_indices->numel(), m);
    }
    if (given.key_range) {
      check_key_range(op, range_.data_as<int64_t>(), given.key_range->numel() / 2, m);
    }
  }

  // Up to this many queries, reading the keys costs more than the products, and copying them costs
  // as much again; with more, rows that are adjacent are worth it. Measured on the CPU.
  static constexpr int64_t kMostInPlace = 64;
  static int64_t reads_of(const Tensor& query) {
    return rows_of(query) <= kMostInPlace ? Readable::kFew : Readable::kAll;
  }

  Contiguous candidates_, self_, mask_, range_;
  Readable queries_, keys_;
  SelectParams params_;
};

// New similarities and indices [..., n, k].
std::tuple<Tensor, Tensor> new_neighbors(const Tensor& query, int64_t k) {
  const bool is_float64 = query.scalar_type() == ScalarType::Double;
  const std::vector<int64_t> shape = shape_with(query, rows_of(query), k);
  const ScalarType dtype = is_float64 ? ScalarType::Double : ScalarType::Float;
  return {empty_as(query, shape, dtype, "similarities"),
          empty_as(query, shape, ScalarType::Long, "indices")};
}

// The parameters of aggregate except its pointers.
AggregateParams aggregate_params(const Tensor& value, const Tensor& similarities,
                                 Convolution convolution, int64_t outputs, const std::string& rho,
                                 double scale) {
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
  return params;
}

// What aggregate reads besides the neighbors: the copies that its parameters point to.
template <class Backend>
class AggregateInputs {
 public:
  AggregateInputs(const char* op, const Tensor& value, const Tensor& similarities,
                  const OptionalTensor& weight, const OptionalTensor& bias)
      : values_(op, "value", value, Backend::kReadsStrides, pairs_of(similarities)),
        weights_(op, "weight", weight),
        biases_(op, "bias", bias) {}

  // `params`, which has no pointers yet, with these neighbors and this result.
  AggregateParams with(AggregateParams params, const void* similarities, const int64_t* indices,
                       const Tensor& output) const {
    params.value = values_.rows();
    params.similarities = similarities;
    params.indices = indices;
    params.weight = weights_.data();
    params.bias = biases_.data();
    params.output = output.mutable_data_ptr();
    return params;
  }

 private:
  Readable values_;
  Contiguous weights_, biases_;
};

Tensor new_output(const Tensor& value, int64_t rows, int64_t outputs) {
  return empty_as(value, shape_with(value, rows, outputs), value.scalar_type(), "output");
}

template <class Backend>
std::tuple<Tensor, Tensor> checked_select(const Tensor& query, const Tensor& key, int64_t k,
                                          const Restrictions& restrictions,
                                          const std::string& metric, const std::string& order) {
  const SelectInputs<Backend> inputs(kSelect, query, key, k, restrictions, metric, order);
  auto [similarities, indices] = new_neighbors(query, k);
  Backend(query).select(inputs.with(similarities, indices));
  return {std::move(similarities), std::move(indices)};
}

template <class Backend>
std::tuple<Tensor, Tensor> select(const Tensor& query, const Tensor& key, int64_t k,
                                  const OptionalTensor& candidates,
                                  const OptionalTensor& self_indices,
                                  const OptionalTensor& key_mask, const std::string& metric,
                                  const std::string& order, const OptionalTensor& key_range,
                                  bool exclude_self) {
  const Restrictions restrictions = {candidates, self_indices, key_mask, key_range, exclude_self};
  check_select(kSelect, query, key, k, restrictions, metric, order);
  return checked_select<Backend>(query, key, k, restrictions, metric, order);
}

template <class Backend>
std::tuple<Tensor> aggregate(const Tensor& value, const Tensor& similarities, const Tensor& indices,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const std::string& rho, double scale) {
  constexpr const char* op = kAggregate;
  check_aggregate(op, value, similarities, indices);
  int64_t outputs = 0;
  const Convolution convolution =
      check_convolution(op, value, columns_of(similarities), weight, bias, rho, scale, outputs);
  const Contiguous all_similarities(op, "similarities", similarities);
  const Contiguous all_indices(op, "indices", indices);
  if (Backend::kReadsIndices) {
    check_indices(op, all_indices, all_similarities, similarities, rows_of(value));
  }
  const AggregateInputs<Backend> inputs(op, value, similarities, weight, bias);
  Tensor output = new_output(value, rows_of(similarities), outputs);
  Backend(value).aggregate(
      inputs.with(aggregate_params(value, similarities, convolution, outputs, rho, scale),
                  all_similarities.data(), all_indices.data_as<int64_t>(), output));
  return {std::move(output)};
}

// Returns the kind of convolution and, in `outputs`, its output channels.
Convolution check_forward(const Tensor& query, const Tensor& key, const Tensor& value, int64_t k,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const Restrictions& restrictions, const std::string& metric,
                          const std::string& rho, double scale, const std::string& order,
                          int64_t& outputs) {
  constexpr const char* op = kForward;
  check_select(op, query, key, k, restrictions, metric, order);
  check_value_as(op, value, query, key);
  return check_convolution(op, value, k, weight, bias, rho, scale, outputs);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> checked_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t k,
    const OptionalTensor& weight, const OptionalTensor& bias, const Restrictions& restrictions,
    const std::string& metric, const std::string& rho, double scale, const std::string& order,
    Convolution convolution, int64_t outputs) {
  const SelectInputs<Backend> to_select(kForward, query, key, k, restrictions, metric, order);
  auto [similarities, indices] = new_neighbors(query, k);
  const AggregateInputs<Backend> to_aggregate(kForward, value, similarities, weight, bias);
  Tensor output = new_output(value, rows_of(query), outputs);
  const SelectParams found = to_select.with(similarities, indices);
  const AggregateParams params =
      aggregate_params(value, similarities, convolution, outputs, rho, scale);
  Backend(query).forward(found,
                         to_aggregate.with(params, found.similarities, found.indices, output));
  return {std::move(output), std::move(similarities), std::move(indices)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t k,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& candidates,
    const OptionalTensor& self_indices, const OptionalTensor& key_mask, const std::string& metric,
    const std::string& rho, double scale, const std::string& order, const OptionalTensor& key_range,
    bool exclude_self) {
  const Restrictions restrictions = {candidates, self_indices, key_mask, key_range, exclude_self};
  int64_t outputs = 0;
  const Convolution convolution = check_forward(query, key, value, k, weight, bias, restrictions,
                                                metric, rho, scale, order, outputs);
  return checked_forward<Backend>(query, key, value, k, weight, bias, restrictions, metric, rho,
                                  scale, order, convolution, outputs);
}

// A backward operator gets the arguments and results of its forward operator, so these checks are
// terse: they only keep a wrong call from reading out of bounds.
void check_same(const char* op, const char* name, const Tensor& tensor,
                const std::vector<int64_t>& shape, ScalarType dtype, const char* other_name,
                const Tensor& other) {
  check_given(op, name, tensor);
  check_device_as(op, name, tensor, other_name, other);
  const Shape sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(op, name, " must have shape ", name_of(Shape(shape.data(), shape.size()), shape.size()),
         ", got shape ", shape_of(tensor));
  }
  check_dtype(op, name, tensor, dtype);
}

// k of a backward operator. Where similarities has too few dimensions, `check_same` says so.
int64_t neighbors_of(const char* op, const Tensor& similarities) {
  check_given(op, "similarities", similarities);
  if (similarities.dim() < 2) return 1;
  check_has_neighbors(op, similarities);
  return columns_of(similarities);
}

// The parameters of select_backward except its pointers.
SelectBackwardParams select_backward_params(const Tensor& query, const Tensor& key, int64_t k,
                                            const std::string& metric) {
  SelectBackwardParams params = {};
  params.batch = batch_of(query);
  params.n = rows_of(query);
  params.m = rows_of(key);
  params.d = columns_of(query);
  params.k = k;
  params.dtype = *dtype_of(query);
  params.metric = *metric_of(metric);
  return params;
}

template <class Backend>
std::tuple<Tensor, Tensor> select_backward(const Tensor& grad_similarities, const Tensor& query,
                                           const Tensor& key, const Tensor& similarities,
                                           const Tensor& indices, const std::string& metric,
                                           bool need_query, bool need_key) {
  constexpr const char* op = kSelectBackward;
  const int64_t k = neighbors_of(op, similarities);
  check_select(op, query, key, k, Restrictions{}, metric, "similarity");
  const bool is_float64 = query.scalar_type() == ScalarType::Double;
  const ScalarType dtype = is_float64 ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> shape = shape_with(query, rows_of(query), k);
  check_same(op, "similarities", similarities, shape, dtype, "query", query);
  check_same(op, "grad_similarities", grad_similarities, shape, dtype, "query", query);
  check_same(op, "indices", indices, shape, ScalarType::Long, "query", query);
  const int64_t reads = pairs_of(similarities);
  const Readable queries(op, "query", query, Backend::kReadsStrides, reads);
  const Readable keys(op, "key", key, Backend::kReadsStrides, reads);
  const Contiguous grads(op, "grad_similarities", grad_similarities);
  const Contiguous all_similarities(op, "similarities", similarities);
  const Contiguous all_indices(op, "indices", indices);
  const int64_t* rows = all_indices.data_as<int64_t>();
  if (Backend::kReadsIndices) {
    check_indices(op, all_indices, all_similarities, similarities, rows_of(key));
  }

  Tensor grad_query = new_grad(need_query, query, "grad_query");
  Tensor grad_key = new_grad(need_key, key, "grad_key");
  if (fill_without_pairs(similarities, grad_query, grad_key)) {
    return {std::move(grad_query), std::move(grad_key)};
  }
  SelectBackwardParams params = select_backward_params(query, key, k, metric);
  params.grad_similarities = grads.data();
  params.query = queries.rows();
  params.key = keys.rows();
  params.similarities = all_similarities.data();
  params.indices = rows;
  params.grad_query = need_query ? grad_query.mutable_data_ptr() : nullptr;
  params.grad_key = need_key ? grad_key.mutable_data_ptr() : nullptr;
  Backend(query).select_backward(params);
  return {std::move(grad_query), std::move(grad_key)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> aggregate_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& similarities,
    const Tensor& indices, const OptionalTensor& weight, bool has_bias, const std::string& rho,
    double scale, bool need_value, bool need_similarities, bool need_weight, bool need_bias) {
  constexpr const char* op = kAggregateBackward;
  check_aggregate(op, value, similarities, indices);
  int64_t outputs = 0;
  const Convolution convolution = check_convolution(op, value, columns_of(similarities), weight,
                                                    std::nullopt, rho, scale, outputs);
  check_same(op, "grad_output", grad_output, shape_with(value, rows_of(similarities), outputs),
             value.scalar_type(), "value", value);
  const Readable values(op, "value", value, Backend::kReadsStrides, pairs_of(similarities));
  const Contiguous grads(op, "grad_output", grad_output), weights(op, "weight", weight);
  const Contiguous all_similarities(op, "similarities", similarities);
  const Contiguous all_indices(op, "indices", indices);
  const int64_t* rows = all_indices.data_as<int64_t>();
  if (Backend::kReadsIndices) {
    check_indices(op, all_indices, all_similarities, similarities, rows_of(value));
  }

  need_weight = need_weight && weight;
  need_bias = need_bias && has_bias;
  Tensor grad_value = new_grad(need_value, value, "grad_value");
  Tensor grad_similarities = new_grad(need_similarities, similarities, "grad_similarities");
  Tensor grad_weight = new_grad(need_weight, weight ? *weight : value, "grad_weight");
  Tensor grad_bias = empty_as(value, {need_bias ? outputs : 0}, value.scalar_type(), "grad_bias");
  if (fill_without_pairs(similarities, grad_value, grad_similarities, grad_weight, grad_bias)) {
    return {std::move(grad_value), std::move(grad_similarities), std::move(grad_weight),
            std::move(grad_bias)};
  }
  AggregateBackwardParams params = {};
  params.forward = aggregate_params(value, similarities, convolution, outputs, rho, scale);
  params.forward.value = values.rows();
  params.forward.similarities = all_similarities.data();
  params.forward.indices = rows;
  params.forward.weight = weights.data();
  params.grad_output = grads.data();
  params.grad_value = need_value ? grad_value.mutable_data_ptr() : nullptr;
  params.grad_similarities = need_similarities ? grad_similarities.mutable_data_ptr() : nullptr;
  params.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  params.grad_bias = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  Backend(value).aggregate_backward(params);
  return {std::move(grad_value), std::move(grad_similarities), std::move(grad_weight),
          std::move(grad_bias)};
}

// Checks the arguments of forward_backward. Returns the kind of convolution and, in
// `outputs`, its output channels.
Convolution check_forward_backward(const char* op, const Tensor& grad_output,
                                   const OptionalTensor& grad_similarities, const Tensor& query,
                                   const Tensor& key, const Tensor& value,
                                   const OptionalTensor& weight, const Tensor& similarities,
                                   const Tensor& indices, const OptionalTensor& candidates,
                                   const std::string& metric, const std::string& rho, double scale,
                                   int64_t& outputs) {
  const int64_t k = neighbors_of(op, similarities);
  check_select(op, query, key, k, Restrictions{candidates}, metric, "similarity");
  check_value_as(op, value, query, key);
  const bool is_float64 = query.scalar_type() == ScalarType::Double;
  const ScalarType dtype = is_float64 ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> shape = shape_with(query, rows_of(query), k);
  check_same(op, "similarities", similarities, shape, dtype, "query", query);
  check_aggregate(op, value, similarities, indices);
  const Convolution convolution =
      check_convolution(op, value, k, weight, std::nullopt, rho, scale, outputs);
  if (grad_similarities) {
    check_same(op, "grad_similarities", *grad_similarities, shape, dtype, "query", query);
  }
  check_same(op, "grad_output", grad_output, shape_with(value, rows_of(query), outputs),
             value.scalar_type(), "value", value);
  return convolution;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward(
    const Tensor& grad_output, const OptionalTensor& grad_similarities, const Tensor& query,
    const Tensor& key, const Tensor& value, const OptionalTensor& weight,
    const Tensor& similarities, const Tensor& indices, bool has_bias, const std::string& metric,
    const std::string& rho, double scale, bool need_query, bool need_key, bool need_value,
    bool need_weight, bool need_bias, const OptionalTensor& candidates) {
  constexpr const char* op = kForwardBackward;
  int64_t outputs = 0;
  const Convolution convolution =
      check_forward_backward(op, grad_output, grad_similarities, query, key, value, weight,
                             similarities, indices, candidates, metric, rho, scale, outputs);
  const Contiguous output_grads(op, "grad_output", grad_output);
  const Contiguous similarity_grads(op, "grad_similarities", grad_similarities);
  const int64_t reads = pairs_of(similarities);
  const Readable queries(op, "query", query, Backend::kReadsStrides, reads);
  const Readable keys(op, "key", key, Backend::kReadsStrides, reads);
  const Readable values(op, "value", value, Backend::kReadsStrides, reads);
  const Contiguous weights(op, "weight", weight);
  if (candidates) check_storage(op, "candidates", *candidates);
  const Contiguous all_similarities(op, "similarities", similarities);
  const Contiguous all_indices(op, "indices", indices);
  const int64_t* rows = all_indices.data_as<int64_t>();
  if (Backend::kReadsIndices) {
    check_indices(op, all_indices, all_similarities, similarities, rows_of(key));
  }

  need_weight = need_weight && weight;
  need_bias = need_bias && has_bias;
  Tensor grad_query = new_grad(need_query, query, "grad_query");
  Tensor grad_key = new_grad(need_key, key, "grad_key");
  Tensor grad_value = new_grad(need_value, value, "grad_value");
  Tensor grad_weight = new_grad(need_weight, weight ? *weight : value, "grad_weight");
  Tensor grad_bias = empty_as(value, {need_bias ? outputs : 0}, value.scalar_type(), "grad_bias");
  if (fill_without_pairs(similarities, grad_query, grad_key, grad_value, grad_weight, grad_bias)) {
    return {std::move(grad_query), std::move(grad_key), std::move(grad_value),
            std::move(grad_weight), std::move(grad_bias)};
  }
  if (!grad_similarities && *rho_of(rho) == Rho::ones) {  // nothing depends on the similarities
    grad_query.fill_with_zeros();
    grad_key.fill_with_zeros();
    need_query = need_key = false;
  }
  ForwardBackwardParams params = {};
  AggregateBackwardParams& aggregate = params.aggregate;
  aggregate.forward = aggregate_params(value, similarities, convolution, outputs, rho, scale);
  aggregate.forward.value = values.rows();
  aggregate.forward.similarities = all_similarities.data();
  aggregate.forward.indices = rows;
  aggregate.forward.weight = weights.data();
  aggregate.grad_output = output_grads.data();
  aggregate.grad_value = need_value ? grad_value.mutable_data_ptr() : nullptr;
  aggregate.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  aggregate.grad_bias = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  SelectBackwardParams& select = params.select;
  select = select_backward_params(query, key, columns_of(similarities), metric);
  select.grad_similarities = similarity_grads.data();
  select.query = queries.rows();
  select.key = keys.rows();
  select.similarities = all_similarities.data();
  select.indices = rows;
  select.grad_query = need_query ? grad_query.mutable_data_ptr() : nullptr;
  select.grad_key = need_key ? grad_key.mutable_data_ptr() : nullptr;
  Backend(query).forward_backward(params);
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_weight),
          std::move(grad_bias)};
}

// Defines the operators of one library.
template <class Library>
void define(Library& library) {
  for (const char* schema : kSchemas) library.def(schema);
}

// Registers all operators of one library and dispatch key.
template <class Backend, class Library>
void implement(Library& library) {
  library.impl(kSelect, &Boxed<kSelect, &select<Backend>>::call);
  library.impl(kSelectBackward, &Boxed<kSelectBackward, &select_backward<Backend>>::call);
  library.impl(kAggregate, &Boxed<kAggregate, &aggregate<Backend>>::call);
  library.impl(kAggregateBackward, &Boxed<kAggregateBackward, &aggregate_backward<Backend>>::call);
  library.impl(kForward, &Boxed<kForward, &forward<Backend>>::call);
  library.impl(kForwardBackward, &Boxed<kForwardBackward, &forward_backward<Backend>>::call);
}

}  // namespace
}  // namespace convnn::torch_operators
