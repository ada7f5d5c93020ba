// SPDX-License-Identifier: MIT
// Argument checks of the operators. Each throws before anything runs and names the argument, what
// was expected and what was passed. convnn_kernels/checks.py has the same checks, in the same order
// and words, for calls that come through Python; a test compares them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"
#include "tensor.h"

namespace convnn::checks {

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "convnn::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A number for a message: the sign of a NaN is not printed, as in Python.
inline double without_sign_of_nan(double x) { return std::isnan(x) ? std::fabs(x) : x; }

// As Python names it, without "torch.".
inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      break;
  }
  // The names of all others differ in case only.
  std::string name = torch::headeronly::toString(dtype);
  for (char& letter : name) {
    if (letter >= 'A' && letter <= 'Z') letter = char(letter - 'A' + 'a');
  }
  return name;
}

inline std::string name_of(const Shape& shape, size_t dims) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < dims; ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}
inline std::string shape_of(const Tensor& tensor) {
  return name_of(tensor.sizes(), size_t(tensor.dim()));
}
// The leading dimensions: all but the last two.
inline std::string leading_of(const Tensor& tensor) {
  return name_of(tensor.sizes(), size_t(tensor.dim()) - 2);
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string index = std::to_string(tensor.device_index());
  if (tensor.is_cuda()) return "cuda:" + index;
  return "device " + index;
}
inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.device_type() == b.device_type() && a.device_index() == b.device_index();
}

inline int64_t rows_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 2); }
inline int64_t columns_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }
inline int64_t batch_of(const Tensor& tensor) {
  uint64_t batch = 1;
  for (int64_t i = 0; i < tensor.dim() - 2; ++i) batch *= uint64_t(tensor.size(i));
  return int64_t(batch);
}
inline bool same_leading(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim() - 2; ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline std::optional<DType> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      return std::nullopt;
  }
}

inline std::optional<Metric> metric_of(const std::string& name) {
  if (name == "cosine") return Metric::cosine;
  if (name == "dot") return Metric::dot;
  if (name == "euclidean") return Metric::euclidean;
  return std::nullopt;
}
inline std::optional<Order> order_of(const std::string& name) {
  if (name == "similarity") return Order::similarity;
  if (name == "index") return Order::index;
  return std::nullopt;
}
inline std::optional<Rho> rho_of(const std::string& name) {
  if (name == "softmax") return Rho::softmax;
  if (name == "ones") return Rho::ones;
  if (name == "similarity") return Rho::similarity;
  return std::nullopt;
}

// None for a required tensor arrives as an undefined tensor.
inline void check_given(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.defined()) fail(op, name, " must be a tensor, got None");
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor,
                           const char* shape) {
  if (tensor.dim() < 2) {
    fail(op, name, " must have at least 2 dimensions ", shape, ", got shape ", shape_of(tensor));
  }
  if (!dtype_of(tensor)) {
    fail(op, name, " must be float64, float32, float16 or bfloat16, got ",
         name_of(tensor.scalar_type()));
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    fail(op, name, " must be ", name_of(dtype), ", got ", name_of(tensor.scalar_type()));
  }
}

inline void check_dtype_as(const char* op, const char* name, const Tensor& tensor,
                           const char* other_name, const Tensor& other) {
  if (tensor.scalar_type() != other.scalar_type()) {
    fail(op, name, " must be ", name_of(other.scalar_type()), " as ", other_name, " is, got ",
         name_of(tensor.scalar_type()));
  }
}

inline void check_device_as(const char* op, const char* name, const Tensor& tensor,
                            const char* other_name, const Tensor& other) {
  if (!same_device(tensor, other)) {
    fail(op, name, " must be on ", device_of(other), " as ", other_name, " is, got ",
         device_of(tensor));
  }
}

inline void check_leading_as(const char* op, const char* name, const Tensor& tensor,
                             const char* other_name, const Tensor& other) {
  if (tensor.dim() != other.dim() || !same_leading(tensor, other)) {
    fail(op, name, " must have the leading dimensions ", leading_of(other), " of ", other_name,
         ", got shape ", shape_of(tensor));
  }
}

// What indexes elements, or bytes of what is made for each of them, stays within 64 bits. No
// machine stores or searches as many.
constexpr int64_t kMostElements = int64_t(1) << 56;

// Whether the product of the first sizes, 0 counted as 1, and of `factor` is at most kMostElements.
inline bool is_countable(const Tensor& tensor, int64_t dims, int64_t factor) {
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t size = std::max<int64_t>(tensor.size(i), 1);
    if (__builtin_mul_overflow(factor, size, &factor)) return false;
  }
  return factor <= kMostElements;
}

inline void check_size(const char* op, const char* name, const Tensor& tensor) {
  if (is_countable(tensor, tensor.dim(), 1)) return;
  fail(op, name, " must have at most ", kMostElements,
       " elements, a size of 0 counted as 1, got shape ", shape_of(tensor));
}

// Memory that shape and strides describe may have been freed, by resizing its storage.
inline void check_storage(const char* op, const char* name, const Tensor& tensor) {
  const int64_t needed = tensor.bytes_reached(), stored = needed ? tensor.bytes_stored() : 0;
  if (stored < needed) {
    fail(op, name, " must have a storage of at least ", needed, " bytes for its shape ",
         shape_of(tensor), ", got one of ", stored, " bytes");
  }
}

inline const OptionalTensor kNotGiven = std::nullopt;

// The arguments of select and forward that restrict which keys may be neighbors.
struct Restrictions {
  const OptionalTensor& candidates = kNotGiven;
  const OptionalTensor& self_indices = kNotGiven;
  const OptionalTensor& key_mask = kNotGiven;
  const OptionalTensor& key_range = kNotGiven;
  bool exclude_self = false;
};

// Whether a tensor has these last dimensions, and before them none or those of query.
inline bool has_shape_of_queries(const Tensor& tensor, const Tensor& query,
                                 std::initializer_list<int64_t> last) {
  const int64_t lead = tensor.dim() - int64_t(last.size());
  if (lead != 0 && lead != query.dim() - 2) return false;
  for (int64_t i = 0; i < lead; ++i) {
    if (tensor.size(i) != query.size(i)) return false;
  }
  return std::equal(last.begin(), last.end(), tensor.sizes().begin() + lead);
}
// The shapes that it may have, "[5, 2]" or "[5, 2] or [3, 5, 2]".
inline std::string shapes_of_queries(const Tensor& query, const std::string& last) {
  const std::string lead = leading_of(query);
  if (query.dim() == 2) return "[" + last + "]";
  return "[" + last + "] or " + lead.substr(0, lead.size() - 1) + ", " + last + "]";
}

inline void check_restrictions(const char* op, const Tensor& query, const Tensor& key,
                               const Restrictions& given) {
  const std::string n = std::to_string(rows_of(query));
  if (given.candidates) {
    const Tensor& candidates = *given.candidates;
    check_dtype(op, "candidates", candidates, ScalarType::Long);
    check_device_as(op, "candidates", candidates, "query", query);
    if (candidates.dim() == 0 ||
        !has_shape_of_queries(candidates, query, {candidates.size(candidates.dim() - 1)})) {
      fail(op, "candidates must have shape ", shapes_of_queries(query, "R"), ", got shape ",
           shape_of(candidates));
    }
  }
  if (given.self_indices) {
    const Tensor& self_indices = *given.self_indices;
    check_dtype(op, "self_indices", self_indices, ScalarType::Long);
    check_device_as(op, "self_indices", self_indices, "query", query);
    if (!has_shape_of_queries(self_indices, query, {rows_of(query)})) {
      fail(op, "self_indices must have shape ", shapes_of_queries(query, n),
           ", one row of key for each query, got shape ", shape_of(self_indices));
    }
  } else if (given.exclude_self) {
    fail(op, "exclude_self must be False without self_indices, got True");
  }
  if (given.key_mask) {
    const Tensor& key_mask = *given.key_mask;
    check_dtype(op, "key_mask", key_mask, ScalarType::Bool);
    check_device_as(op, "key_mask", key_mask, "query", query);
    bool same = key_mask.dim() == key.dim() - 1;
    for (int64_t i = 0; same && i < key_mask.dim(); ++i) same = key_mask.size(i) == key.size(i);
    if (!same) {
      fail(op, "key_mask must have shape ", name_of(key.sizes(), size_t(key.dim()) - 1),
           ", got shape ", shape_of(key_mask));
    }
  }
  if (given.key_range) {
    const Tensor& key_range = *given.key_range;
    check_dtype(op, "key_range", key_range, ScalarType::Long);
    check_device_as(op, "key_range", key_range, "query", query);
    if (!has_shape_of_queries(key_range, query, {rows_of(query), 2})) {
      fail(op, "key_range must have shape ", shapes_of_queries(query, n + ", 2"),
           ", begin and end for each query, got shape ", shape_of(key_range));
    }
  }
}

// The arguments that select and forward share.
inline void check_select(const char* op, const Tensor& query, const Tensor& key, int64_t k,
                         const Restrictions& restrictions, const std::string& metric,
                         const std::string& order) {
  check_given(op, "query", query);
  check_given(op, "key", key);
  check_floating(op, "query", query, "[..., N, D]");
  if (key.dim() != query.dim()) {
    fail(op, "key must have as many dimensions as query (", query.dim(), "), got shape ",
         shape_of(key));
  }
  check_dtype_as(op, "key", key, "query", query);
  check_device_as(op, "key", key, "query", query);
  check_leading_as(op, "key", key, "query", query);
  if (columns_of(key) != columns_of(query)) {
    fail(op, "key must have the ", columns_of(query), " columns of query, got shape ",
         shape_of(key));
  }
  check_size(op, "query", query);
  check_size(op, "key", key);
  if (!metric_of(metric)) {
    fail(op, "metric must be 'cosine', 'dot' or 'euclidean', got '", metric, "'");
  }
  if (!order_of(order)) fail(op, "order must be 'similarity' or 'index', got '", order, "'");
  check_restrictions(op, query, key, restrictions);
  if (k < 1) fail(op, "k must be at least 1, got ", k);
  if (!is_countable(query, query.dim() - 1, k)) {
    fail(op, "k must give at most ", kMostElements, " neighbors for query of shape ",
         shape_of(query), ", a size of 0 counted as 1, got ", k);
  }
}

// The arguments that aggregate and forward share. Returns the kind of convolution and, in
// `outputs`, its output channels.
inline Convolution check_convolution(const char* op, const Tensor& value, int64_t k,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const std::string& rho, double scale, int64_t& outputs) {
  const int64_t c = columns_of(value);
  Convolution convolution = Convolution::none;
  outputs = c;
  if (weight) {
    check_dtype_as(op, "weight", *weight, "value", value);
    check_device_as(op, "weight", *weight, "value", value);
    const bool fits = weight->dim() == 3 && weight->size(2) == k;
    if (fits && weight->size(1) == c) {
      convolution = Convolution::dense;
      outputs = weight->size(0);
    } else if (fits && weight->size(1) == 1 && weight->size(0) == c) {
      convolution = Convolution::depthwise;
    } else {
      fail(op, "weight must have shape [O, ", c, ", ", k, "] or [", c, ", 1, ", k, "], got shape ",
           shape_of(*weight));
    }
    check_size(op, "weight", *weight);
  }
  if (bias) {
    check_dtype_as(op, "bias", *bias, "value", value);
    check_device_as(op, "bias", *bias, "value", value);
    if (bias->dim() != 1 || bias->size(0) != outputs) {
      fail(op, "bias must have shape [", outputs, "], got shape ", shape_of(*bias));
    }
  }
  if (!rho_of(rho)) fail(op, "rho must be 'softmax', 'ones' or 'similarity', got '", rho, "'");
  if (!std::isfinite(scale)) fail(op, "scale must be finite, got ", without_sign_of_nan(scale));
  if (scale != 1.0 && rho != "softmax") {
    fail(op, "scale must be 1.0 unless rho is 'softmax', got ", scale, " with rho '", rho, "'");
  }
  return convolution;
}

inline void check_value_as(const char* op, const Tensor& value, const Tensor& query,
                           const Tensor& key) {
  check_given(op, "value", value);
  check_floating(op, "value", value, "[..., M, C]");
  check_device_as(op, "value", value, "query", query);
  check_leading_as(op, "value", value, "query", query);
  if (rows_of(value) != rows_of(key)) {
    fail(op, "value must have the ", rows_of(key), " rows of key, got shape ", shape_of(value));
  }
  check_size(op, "value", value);
}

inline void check_has_neighbors(const char* op, const Tensor& similarities) {
  if (columns_of(similarities) < 1) {
    fail(op, "similarities must have at least one column (k >= 1), got shape ",
         shape_of(similarities));
  }
}

inline void check_aggregate(const char* op, const Tensor& value, const Tensor& similarities,
                            const Tensor& indices) {
  check_given(op, "value", value);
  check_floating(op, "value", value, "[..., M, C]");
  check_given(op, "similarities", similarities);
  check_given(op, "indices", indices);
  if (similarities.scalar_type() != ScalarType::Float &&
      similarities.scalar_type() != ScalarType::Double) {
    fail(op, "similarities must be float32 or float64, got ", name_of(similarities.scalar_type()));
  }
  check_device_as(op, "similarities", similarities, "value", value);
  if (similarities.dim() != value.dim()) {
    fail(op, "similarities must have as many dimensions as value (", value.dim(), "), got shape ",
         shape_of(similarities));
  }
  check_leading_as(op, "similarities", similarities, "value", value);
  check_has_neighbors(op, similarities);
  check_size(op, "value", value);
  check_size(op, "similarities", similarities);
  check_dtype(op, "indices", indices, ScalarType::Long);
  check_device_as(op, "indices", indices, "value", value);
  bool same = indices.dim() == similarities.dim();
  for (int64_t i = 0; same && i < indices.dim(); ++i) {
    same = indices.size(i) == similarities.size(i);
  }
  if (!same) {
    fail(op, "indices must have the shape ", shape_of(similarities), " of similarities, got shape ",
         shape_of(indices));
  }
}

// values [count] in host memory.
inline void check_range(const char* op, const char* name, const int64_t* values, int64_t count,
                        int64_t m) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= m) {
      fail(op, name, " must be in [0, ", m, "), got ", values[i], " at position ", i);
    }
  }
}

// ranges [count, 2] in host memory.
inline void check_key_range(const char* op, const int64_t* ranges, int64_t count, int64_t m) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = ranges[2 * i], end = ranges[2 * i + 1];
    if (begin < 0 || begin > end || end > m) {
      fail(op, "key_range must be 0 <= begin <= end <= ", m, ", got ", begin, " and ", end,
           " at position ", i);
    }
  }
}

}  // namespace convnn::checks
