# SPDX-License-Identifier: MIT
"""The schemas of the operators ``torch.ops.convnn.*``, and their arguments by name.

This is the one list of names, types, order and defaults on the Python side. Importing the module
defines the operators, without an implementation, in the library ``convnn`` and once more in
``convnn_cuda``, where the CUDA C++ kernels register: the CUDA dispatch key of ``convnn`` itself
belongs to ``convnn_kernels.backends.selection``.
"""

import collections
from typing import Any

import torch

# In the backward operators, which are internal, a gradient that is not needed is an empty tensor.
_SCHEMAS = (
    "forward(Tensor query, Tensor key, Tensor value, SymInt k, Tensor? weight=None, "
    "Tensor? bias=None, Tensor? candidates=None, Tensor? self_indices=None, "
    'Tensor? key_mask=None, str metric="cosine", str rho="softmax", float scale=1.0, '
    'str order="similarity") -> (Tensor output, Tensor similarities, Tensor indices)',
    "select(Tensor query, Tensor key, SymInt k, Tensor? candidates=None, "
    'Tensor? self_indices=None, Tensor? key_mask=None, str metric="cosine", '
    'str order="similarity") -> (Tensor similarities, Tensor indices)',
    "aggregate(Tensor value, Tensor similarities, Tensor indices, Tensor? weight=None, "
    'Tensor? bias=None, str rho="softmax", float scale=1.0) -> Tensor',
    # The gradient of the similarities that forward returns is added to what comes from the output;
    # None stands for zero.
    "forward_backward(Tensor grad_output, Tensor? grad_similarities, Tensor query, Tensor key, "
    "Tensor value, Tensor? weight, Tensor similarities, Tensor indices, bool has_bias, "
    "str metric, str rho, float scale, bool need_query, bool need_key, bool need_value, "
    "bool need_weight, bool need_bias) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_weight, Tensor grad_bias)",
    "select_backward(Tensor grad_similarities, Tensor query, Tensor key, Tensor similarities, "
    "Tensor indices, str metric, bool need_query, bool need_key) "
    "-> (Tensor grad_query, Tensor grad_key)",
    "aggregate_backward(Tensor grad_output, Tensor value, Tensor similarities, Tensor indices, "
    "Tensor? weight, bool has_bias, str rho, float scale, bool need_value, "
    "bool need_similarities, bool need_weight, bool need_bias) "
    "-> (Tensor grad_value, Tensor grad_similarities, Tensor grad_weight, Tensor grad_bias)",
)

LIBRARY = torch.library.Library("convnn", "DEF")
CUDA_LIBRARY = torch.library.Library("convnn_cuda", "DEF")

# The operators by name, "convnn::forward" and so on, in the order of their definition.
OPERATORS: dict[str, torch._ops.OpOverload] = {}
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)
    CUDA_LIBRARY.define(_schema)
    _op = getattr(torch.ops.convnn, _schema.partition("(")[0]).default
    OPERATORS[_op.name()] = _op


def _arguments_class(op: torch._ops.OpOverload) -> Any:
    arguments = op._schema.arguments  # private; PyTorch has no public way to read a schema
    # Arguments without a default come first, as `define` requires.
    defaults = [each.default_value for each in arguments if each.has_default_value()]
    name = op._schema.name.removeprefix("convnn::").title().replace("_", "")
    return collections.namedtuple(
        f"{name}Arguments", [each.name for each in arguments], defaults=defaults
    )


_ARGUMENTS = {name: _arguments_class(op) for name, op in OPERATORS.items()}


def arguments(op: torch._ops.OpOverload | str) -> Any:
    """The namedtuple class of the arguments of ``op``, an operator or its name.

    Its fields are the names in the schema and its defaults are those of the schema, so
    ``arguments(op)(*args)`` adds the trailing arguments that the dispatcher leaves out because
    they have their default value.
    """
    return _ARGUMENTS[op if isinstance(op, str) else op.name()]
