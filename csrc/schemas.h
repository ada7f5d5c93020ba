// SPDX-License-Identifier: MIT
// The schemas of the operators: the one list of their names, argument types, order and defaults.
// The CPU library defines them as the library convnn, the CUDA library once more as convnn_cuda.
#pragma once

namespace convnn {

// In the backward operators, which are internal, a gradient that is not needed is an empty tensor.
// The gradient of the similarities that forward returns is added to what comes from the output;
// None stands for zero. The candidates of forward_backward are those of forward, if the batch
// shares them: from them a backend knows that a query's neighbors are among so few rows of key, but
// for the token itself.
constexpr const char* kSchemas[] = {
    "forward(Tensor query, Tensor key, Tensor value, SymInt k, Tensor? weight=None, "
    "Tensor? bias=None, Tensor? candidates=None, Tensor? self_indices=None, "
    "Tensor? key_mask=None, str metric=\"cosine\", str rho=\"softmax\", float scale=1.0, "
    "str order=\"similarity\", Tensor? key_range=None, bool exclude_self=False) "
    "-> (Tensor output, Tensor similarities, Tensor indices)",

    "select(Tensor query, Tensor key, SymInt k, Tensor? candidates=None, "
    "Tensor? self_indices=None, Tensor? key_mask=None, str metric=\"cosine\", "
    "str order=\"similarity\", Tensor? key_range=None, bool exclude_self=False) "
    "-> (Tensor similarities, Tensor indices)",

    "aggregate(Tensor value, Tensor similarities, Tensor indices, Tensor? weight=None, "
    "Tensor? bias=None, str rho=\"softmax\", float scale=1.0) -> Tensor",

    "forward_backward(Tensor grad_output, Tensor? grad_similarities, Tensor query, Tensor key, "
    "Tensor value, Tensor? weight, Tensor similarities, Tensor indices, bool has_bias, "
    "str metric, str rho, float scale, bool need_query, bool need_key, bool need_value, "
    "bool need_weight, bool need_bias, Tensor? candidates=None) -> (Tensor grad_query, "
    "Tensor grad_key, Tensor grad_value, Tensor grad_weight, Tensor grad_bias)",

    "select_backward(Tensor grad_similarities, Tensor query, Tensor key, Tensor similarities, "
    "Tensor indices, str metric, bool need_query, bool need_key) "
    "-> (Tensor grad_query, Tensor grad_key)",

    "aggregate_backward(Tensor grad_output, Tensor value, Tensor similarities, Tensor indices, "
    "Tensor? weight, bool has_bias, str rho, float scale, bool need_value, "
    "bool need_similarities, bool need_weight, bool need_bias) "
    "-> (Tensor grad_value, Tensor grad_similarities, Tensor grad_weight, Tensor grad_bias)",
};

}  // namespace convnn
