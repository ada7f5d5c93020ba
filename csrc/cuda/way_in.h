// SPDX-License-Identifier: MIT
// The way of a call of convnn::forward or convnn::select to the Hopper kernels, without Python:
// what stands on the CUDA key of the library convnn. A call that these kernels do not run goes on
// to the operator of the same name in the library convnn_python, whose CUDA kernel is Python
// (convnn_kernels/backends/selection.py). There the first call of each kind has the kernels checked
// and is logged; choice.h remembers it.
//
// A Backend is one of torch_operators.h that also says which device a tensor is on, by device().
#pragma once

#include <cstdlib>

#include "../torch_operators.h"
#include "choice.h"
#include "hopper.h"

namespace convnn::torch_operators {
namespace {

using cuda::Operator;

// Memory for the kernels of one call. Small parts share an allocation, which takes the host about
// as long as a launch.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}

  // Aligned to 256 bytes.
  void* allocate(size_t bytes) {
    constexpr size_t kAlignment = 256, kShared = size_t(1) << 20;
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes >= kShared) return reserve(bytes);
    if (bytes > left_) {
      next_ = reserve(kShared);
      left_ = kShared;
    }
    char* const memory = next_;
    next_ += bytes;
    left_ -= bytes;
    return memory;
  }
  void clear() {
    all_.clear();
    left_ = 0;
  }

 private:
  char* reserve(size_t bytes) {
    all_.push_back(empty_as(like_, {int64_t(bytes)}, ScalarType::Byte, "workspace"));
    return static_cast<char*>(all_.back().mutable_data_ptr());
  }

  const Tensor& like_;
  std::vector<Tensor> all_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

constexpr const char* name_of(Operator op) {
  return op == Operator::forward ? "convnn_python::forward" : "convnn_python::select";
}

// The schema of forward or select with another name, and other results if any are given.
std::string schema_of(const std::string& operator_name, const std::string& name,
                      const std::string& results = "") {
  for (const std::string schema : kSchemas) {
    if (schema.rfind(operator_name + "(", 0) != 0) continue;
    const size_t begin = operator_name.size(), arrow = schema.find(" -> ");
    return name + schema.substr(begin, results.empty() ? schema.npos : arrow - begin) + results;
  }
  throw std::logic_error("convnn: no schema of " + operator_name);
}

// Hands a call over to Python. A C++ caller of an operator does not get the exception that its
// kernel raises, so the last result holds the characters of its message, or none. It is a tensor,
// because PyTorch 2.13 returns to such callers only results that are all of one type.
template <Operator op, class Results>
void ask_python(StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name_of(op), "", stack, TORCH_ABI_VERSION));
  Results results = Stack<Results>::get(stack);
  const Tensor error = take<Tensor>(stack[std::tuple_size_v<Results>]);
  if (const int64_t length = error.numel()) {
    throw std::runtime_error(
        std::string(static_cast<const char*>(error.const_data_ptr()), size_t(length)));
  }
  Stack<Results>::put(stack, results);
}

template <class Backend>
int device_of(StableIValue argument) {
  const auto tensor = torch::stable::detail::to<AtenTensorHandle>(argument);
  bool defined = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(tensor, &defined));
  if (!defined) return -1;
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  return Backend::device(type, index);
}

// The boxed form of a function that returns nothing if Python shall run the call. Without Python,
// `boxed` runs it.
template <class Backend, Operator op, auto function, auto boxed>
struct Chooser;
template <class Backend, Operator op, class Results, class... Arguments,
          std::optional<Results> (*function)(Arguments...), auto boxed>
struct Chooser<Backend, op, function, boxed> {
  using All = std::tuple<std::decay_t<Arguments>...>;

  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    check_schema(arguments == sizeof...(Arguments) && results == std::tuple_size_v<Results>);
    const cuda::Routing routing = cuda::routing();
    if (routing == cuda::Routing::without_python) return boxed(stack, arguments, results);
    if (routing == cuda::Routing::to_python ||
        !cuda::may_run_hopper(device_of<Backend>(stack[0]))) {
      return ask_python<op, Results>(stack);
    }
    All taken = Stack<All>::get(stack);
    const char* const name = op == Operator::forward ? kForward : kSelect;
    if (std::optional<Results> made = call_named(name, function, taken)) {
      Stack<Results>::put(stack, *made);
    } else {
      Stack<All>::put(stack, taken);
      ask_python<op, Results>(stack);
    }
  }
};

// The parameters of a checked call as far as a choice depends on them; of the pointers, only
// whether they are null counts.
SelectParams outline(const Tensor& query, const Tensor& key, int64_t k, const Restrictions& given,
                     const std::string& metric, const std::string& order) {
  static constexpr int64_t kGiven = 0;
  static constexpr uint8_t kGivenMask = 0;
  SelectParams params = select_params(query, key, k, metric, order);
  params.query = dense_rows(query.const_data_ptr(), params.n, params.d);
  params.key = dense_rows(key.const_data_ptr(), params.m, params.d);
  set_restrictions(params, given);
  params.candidates = given.candidates ? &kGiven : nullptr;
  params.self_indices = given.self_indices ? &kGiven : nullptr;
  params.key_mask = given.key_mask ? &kGivenMask : nullptr;
  params.key_range = given.key_range ? &kGiven : nullptr;
  return params;
}
AggregateParams outline(const Tensor& query, const Tensor& value, int64_t k,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        Convolution convolution, int64_t outputs, const std::string& rho,
                        double scale) {
  AggregateParams params = aggregate_params(value, query, convolution, outputs, rho, scale);
  params.k = k;
  params.similarity_dtype =
      query.scalar_type() == ScalarType::Double ? DType::float64 : DType::float32;
  params.value = dense_rows(value.const_data_ptr(), params.m, params.c);
  params.weight = weight ? weight->const_data_ptr() : nullptr;
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  return params;
}

struct Choice {
  int kind;
  bool is_faster;
  const char* refusal;  // or null
};
Choice choice_of(const SelectParams& select, const AggregateParams* aggregate) {
  return {cuda::hopper_kind(select), cuda::hopper_is_faster(select, aggregate),
          cuda::hopper_refuses(select, aggregate)};
}
bool is_chosen(int device, Operator op, const Choice& choice) {
  return !choice.refusal && choice.is_faster && cuda::is_right(device, op, choice.kind);
}

// Index values are checked in Python, for those who ask for it.
bool has_values_to_check(const Restrictions& given) {
  if (!given.candidates && !given.self_indices && !given.key_range) return false;
  const char* wanted = std::getenv("CONVNN_CHECK_INDICES");
  return wanted && std::string(wanted) == "1";
}

template <class Backend>
std::optional<std::tuple<Tensor, Tensor>> try_select(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& candidates,
    const OptionalTensor& self_indices, const OptionalTensor& key_mask, const std::string& metric,
    const std::string& order, const OptionalTensor& key_range, bool exclude_self) {
  const Restrictions restrictions = {candidates, self_indices, key_mask, key_range, exclude_self};
  check_select(kSelect, query, key, k, restrictions, metric, order);
  if (has_values_to_check(restrictions)) return std::nullopt;
  const SelectParams params = outline(query, key, k, restrictions, metric, order);
  const int device = Backend::device(query.device_type(), query.device_index());
  if (!is_chosen(device, Operator::select, choice_of(params, nullptr))) return std::nullopt;
  return checked_select<Backend>(query, key, k, restrictions, metric, order);
}

template <class Backend>
std::optional<std::tuple<Tensor, Tensor, Tensor>> try_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t k,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& candidates,
    const OptionalTensor& self_indices, const OptionalTensor& key_mask, const std::string& metric,
    const std::string& rho, double scale, const std::string& order, const OptionalTensor& key_range,
    bool exclude_self) {
  const Restrictions restrictions = {candidates, self_indices, key_mask, key_range, exclude_self};
  int64_t outputs = 0;
  const Convolution convolution = check_forward(query, key, value, k, weight, bias, restrictions,
                                                metric, rho, scale, order, outputs);
  if (has_values_to_check(restrictions)) return std::nullopt;
  const SelectParams params = outline(query, key, k, restrictions, metric, order);
  const AggregateParams more =
      outline(query, value, k, weight, bias, convolution, outputs, rho, scale);
  const int device = Backend::device(query.device_type(), query.device_index());
  if (!is_chosen(device, Operator::forward, choice_of(params, &more))) return std::nullopt;
  return checked_forward<Backend>(query, key, value, k, weight, bias, restrictions, metric, rho,
                                  scale, order, convolution, outputs);
}

// For Python: the kind of a call that passed its checks, whether the Hopper kernels are predicted
// to be faster than Triton's, and why they cannot run it, or an empty string.
using Answer = std::tuple<int64_t, bool, std::string>;
Answer answer(const Choice& choice) {
  return {choice.kind, choice.is_faster, choice.refusal ? choice.refusal : ""};
}
Answer select_choice(const Tensor& query, const Tensor& key, int64_t k,
                     const OptionalTensor& candidates, const OptionalTensor& self_indices,
                     const OptionalTensor& key_mask, const std::string& metric,
                     const std::string& order, const OptionalTensor& key_range, bool exclude_self) {
  const Restrictions restrictions = {candidates, self_indices, key_mask, key_range, exclude_self};
  check_select(kSelect, query, key, k, restrictions, metric, order);
  return answer(choice_of(outline(query, key, k, restrictions, metric, order), nullptr));
}
Answer forward_choice(const Tensor& query, const Tensor& key, const Tensor& value, int64_t k,
                      const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& candidates, const OptionalTensor& self_indices,
                      const OptionalTensor& key_mask, const std::string& metric,
                      const std::string& rho, double scale, const std::string& order,
                      const OptionalTensor& key_range, bool exclude_self) {
  const Restrictions restrictions = {candidates, self_indices, key_mask, key_range, exclude_self};
  int64_t outputs = 0;
  const Convolution convolution = check_forward(query, key, value, k, weight, bias, restrictions,
                                                metric, rho, scale, order, outputs);
  const AggregateParams more =
      outline(query, value, k, weight, bias, convolution, outputs, rho, scale);
  return answer(choice_of(outline(query, key, k, restrictions, metric, order), &more));
}

// Of a backward, only whether the portable kernels are predicted to be faster.
std::tuple<bool> forward_backward_choice(const Tensor& grad_output,
                                         const OptionalTensor& grad_similarities,
                                         const Tensor& query, const Tensor& key,
                                         const Tensor& value, const OptionalTensor& weight,
                                         const Tensor& similarities, const Tensor& indices, bool,
                                         const std::string& metric, const std::string& rho,
                                         double scale, bool, bool, bool, bool, bool,
                                         const OptionalTensor& candidates) {
  int64_t outputs = 0;
  const Convolution convolution = check_forward_backward(
      kForwardBackward, grad_output, grad_similarities, query, key, value, weight, similarities,
      indices, candidates, metric, rho, scale, outputs);
  const int64_t k = columns_of(similarities);
  const AggregateParams aggregate =
      outline(query, value, k, weight, std::nullopt, convolution, outputs, rho, scale);
  const SelectParams select =
      outline(query, key, k, Restrictions{candidates}, metric, "similarity");
  return {cuda::gradients_are_faster(select, aggregate)};
}

// The library convnn_python.
template <class Library>
void define_python(Library& library) {
  library.def(schema_of("forward", "forward",
                        " -> (Tensor output, Tensor similarities, Tensor indices, Tensor error)")
                  .c_str());
  library.def(
      schema_of("select", "select", " -> (Tensor similarities, Tensor indices, Tensor error)")
          .c_str());
}

// What Python asks: the choice, and results of the Hopper kernels whether they were checked or not.
template <class Library>
void define_questions(Library& library) {
  for (const char* name : {"forward", "select"}) {
    library.def(schema_of(name, std::string("hopper_") + name).c_str());
    library.def(schema_of(name, std::string(name) + "_choice",
                          " -> (int kind, bool is_faster, str refusal)")
                    .c_str());
  }
  library.def(schema_of("forward_backward", "forward_backward_choice", " -> bool").c_str());
}

template <class Library>
void implement_choices(Library& library) {
  library.impl("forward_choice", &Boxed<kForward, &forward_choice>::call);
  library.impl("select_choice", &Boxed<kSelect, &select_choice>::call);
  library.impl("forward_backward_choice", &Boxed<kForwardBackward, &forward_backward_choice>::call);
}
// `Hopper` is a backend of these kernels only.
template <class Hopper, class Library>
void implement_hopper(Library& library) {
  library.impl("hopper_forward", &Boxed<kForward, &forward<Hopper>>::call);
  library.impl("hopper_select", &Boxed<kSelect, &select<Hopper>>::call);
}
template <class Backend, class Library>
void implement_way_in(Library& library) {
  library.impl("forward", &Chooser<Backend, Operator::forward, &try_forward<Backend>,
                                   &Boxed<kForward, &forward<Backend>>::call>::call);
  library.impl("select", &Chooser<Backend, Operator::select, &try_select<Backend>,
                                  &Boxed<kSelect, &select<Backend>>::call>::call);
}

}  // namespace
}  // namespace convnn::torch_operators
