# SPDX-License-Identifier: MIT
"""Slips of the argument checks in C++ and of the operators as PyTorch calls them."""

_CHECKED_INDICES = """  const int64_t* rows = all_indices.data_as<int64_t>();
  if (Backend::kReadsIndices) {
    check_indices(op, all_indices, all_similarities, similarities, rows_of(value));
  }
"""

SLIPS = {
    "csrc/checks.h": [
        (
            "return std::isnan(x) ? std::fabs(x) : x;",
            "return x;",
            "the message names -nan",
        ),
        (
            "if (!std::isfinite(scale))",
            "if (std::isnan(scale))",
            "an infinite scale is accepted",
        ),
        (
            "if (values[i] < 0 || values[i] >= m) {",
            "if (values[i] >= m) {",
            "negative indices are accepted",
        ),
        (
            "if (values[i] < 0 || values[i] >= m) {",
            "if (values[i] < 0 || values[i] > m) {",
            "an index one beyond the last row is accepted",
        ),
        (
            "if (begin < 0 || begin > end || end > m) {",
            "if (begin < 0 || begin > end) {",
            "ranges may end beyond the last key",
        ),
        (
            "if (begin < 0 || begin > end || end > m) {",
            "if (begin < 0 || end > m) {",
            "ranges may begin after their end",
        ),
        (
            "return a.device_type() == b.device_type() && a.device_index() == b.device_index();",
            "return a.device_type() == b.device_type();",
            "tensors may be on another device of the same kind",
        ),
        (
            "if (lead != 0 && lead != query.dim() - 2) return false;",
            "if (lead < 0) return false;",
            "restrictions may have some of the leading dimensions",
        ),
        (
            'check_dtype_as(op, "bias", *bias, "value", value);',
            "",
            "a bias of another dtype is read as that of value",
        ),
        (
            "if (bias->dim() != 1 || bias->size(0) != outputs) {",
            "if (bias->size(0) != outputs) {",
            "a bias with several dimensions is accepted",
        ),
        (
            "const bool fits = weight->dim() == 3 && weight->size(2) == k;",
            "const bool fits = weight->dim() == 3;",
            "a weight for another number of neighbors is accepted",
        ),
        (
            'check_device_as(op, "value", value, "query", query);',
            "",
            "a value on another device is read",
        ),
        (
            "if (columns_of(similarities) < 1) {",
            "if (columns_of(similarities) < 0) {",
            "similarities without columns are accepted",
        ),
        (
            'check_dtype(op, "key_mask", key_mask, ScalarType::Bool);',
            "",
            "a mask of another dtype is read as bool",
        ),
        (
            "same = indices.size(i) == similarities.size(i);",
            "same = indices.size(i) >= similarities.size(i);",
            "indices larger than similarities are accepted",
        ),
        (
            "if (tensor.dim() != other.dim() || !same_leading(tensor, other)) {",
            "if (!same_leading(tensor, other)) {",
            "value may have other leading dimensions",
        ),
    ],
    "csrc/torch_operators.h": [
        (
            "  check_dtype(op, name, tensor, dtype);\n}\n\n// k of a backward operator",
            "}\n\n// k of a backward operator",
            "gradients of another dtype are read as if they had the right one",
        ),
        (
            _CHECKED_INDICES + "\n  need_weight",
            "  const int64_t* rows = all_indices.data_as<int64_t>();\n  need_weight",
            "indices out of range are read in the backward of aggregate",
        ),
        (
            "  if (Backend::kReadsIndices) {\n"
            "    check_indices(op, all_indices, all_similarities, similarities, rows_of(key));\n"
            "  }\n\n  Tensor grad_query",
            "  Tensor grad_query",
            "indices out of range are read in the backward of select",
        ),
        (
            "if (!(std::isinf(s) && s < 0)) {",
            "if (!std::isinf(s)) {",
            "without rows of value, infinite similarities pass for missing",
        ),
        (
            "params.r = given.candidates ? last_of(*given.candidates) : 0;\n"
            "  params.candidates_stride = stride(given.candidates, 1, params.r);",
            "params.r = given.candidates ? last_of(*given.candidates) : 0;\n"
            "  params.candidates_stride = 0;",
            "all batch elements have the candidates of the first",
        ),
        (
            "params.self_stride = stride(given.self_indices, 1, params.n);",
            "params.self_stride = 0;",
            "all batch elements have the tokens of the first",
        ),
        (
            "params.range_stride = stride(given.key_range, 2, 2 * params.n);",
            "params.range_stride = stride(given.key_range, 2, params.n);",
            "ranges of later batch elements are wrong",
        ),
        (
            "check_distinct(op, candidates_.data_as<int64_t>() + i, r);",
            "check_distinct(op, candidates_.data_as<int64_t>(), r);",
            "candidates that are not distinct are accepted in later batch elements",
        ),
        (
            "return tensor.size(i) == 1 && sizes[size_t(i)] > 1 ? 0 : tensor.stride(i);",
            "return tensor.stride(i);",
            "an expanded dimension of a copy is read beyond its end",
        ),
        (
            "} else if (stride(i) != next) {",
            "} else if (false) {",
            "leading dimensions that do not follow one another are read as one",
        ),
        (
            "if (!data_) data_ = &kNoElements;",
            "",
            "an empty tensor counts as none",
        ),
        (
            "if (!grad_similarities && *rho_of(rho) == Rho::ones) {",
            "if (*rho_of(rho) == Rho::ones) {",
            "gradients of similarities are dropped if rho is ones",
        ),
        (
            "    grad_query.fill_with_zeros();\n    grad_key.fill_with_zeros();\n",
            "    grad_query.fill_with_zeros();\n",
            "the gradient of key is not set if nothing depends on it",
        ),
        (
            "(gradients.fill_with_zeros(), ...);",
            "",
            "gradients without pairs are not set",
        ),
        (
            "__builtin_mul_overflow(strides[i], std::max<int64_t>(shape[i], 1), &strides[i - 1]);",
            "__builtin_mul_overflow(strides[i], shape[i], &strides[i - 1]);",
            "strides of empty results are zero",
        ),
        (
            "if (grad_similarities) {\n    check_same(",
            "if (false) {\n    check_same(",
            "a gradient of similarities of another shape is read",
        ),
        (
            "&Boxed<kAggregate, &aggregate<Backend>>::call",
            "&Boxed<kAggregate, &select<Backend>>::call",
            "an operator has the kernel of another",
        ),
        (
            "TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));\n",
            "",
            "every call leaks a string",
        ),
    ],
    "csrc/tensor.h": [
        (
            "if (strides_[i] == 0) sizes[i] = 1;",
            "",
            "expanded dimensions are copied in full",
        ),
        (
            "for (size_t i = 0; i + 1 < sizes.size(); ++i) {",
            "for (size_t i = 0; i < sizes.size(); ++i) {",
            "an expanded last dimension is read as one element",
        ),
        (
            "void operator()(AtenTensorHandle handle) const { "
            "aoti_torch_delete_tensor_object(handle); }",
            "void operator()(AtenTensorHandle) const {}",
            "tensors are never freed",
        ),
    ],
    "csrc/cpu/torch_operators.cpp": [
        (
            "const cpu::FloatingPointModeGuard guard(mode);",
            "",
            "worker threads keep their own mode of denormals",
        ),
    ],
}
