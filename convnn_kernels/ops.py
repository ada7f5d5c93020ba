# SPDX-License-Identifier: MIT
"""The operators ``torch.ops.convnn.*``: fake kernels, and what is registered for each of them.

Importing this module registers everything but the schemas and the C++ implementations, which
``convnn_kernels.schemas`` has loaded.
"""

import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import autograd, checks, flops, schemas, transforms
from convnn_kernels.backends import selection

forward = torch.ops.convnn.forward.default
select = torch.ops.convnn.select.default
aggregate = torch.ops.convnn.aggregate.default

_register_fake = functools.partial(torch.library.register_fake, lib=schemas.LIBRARY)


# Fake kernels check the arguments and return the shapes and dtypes of the results.


@_register_fake("convnn::forward")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = schemas.arguments("convnn::forward")(*args)
    checks.check_forward("convnn::forward", arguments)
    query, value = arguments.query, arguments.value
    output = _output(value, query.shape[:-1], arguments.weight)
    return output, *_neighbors(query, arguments.k)


@_register_fake("convnn::select")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = schemas.arguments("convnn::select")(*args)
    checks.check_select("convnn::select", arguments)
    return _neighbors(arguments.query, arguments.k)


@_register_fake("convnn::aggregate")
def _(*args: Any) -> Tensor:
    arguments = schemas.arguments("convnn::aggregate")(*args)
    checks.check_aggregate("convnn::aggregate", arguments)
    return _output(arguments.value, arguments.similarities.shape[:-1], arguments.weight)


@_register_fake("convnn::forward_backward")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = schemas.arguments("convnn::forward_backward")(*args)
    checks.check_forward_backward("convnn::forward_backward", arguments)
    return (
        _grad(arguments.query, arguments.need_query),
        _grad(arguments.key, arguments.need_key),
        _grad(arguments.value, arguments.need_value),
        *_convolution_grads(arguments),
    )


@_register_fake("convnn::select_backward")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = schemas.arguments("convnn::select_backward")(*args)
    checks.check_select_backward("convnn::select_backward", arguments)
    return _grad(arguments.query, arguments.need_query), _grad(arguments.key, arguments.need_key)


@_register_fake("convnn::aggregate_backward")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = schemas.arguments("convnn::aggregate_backward")(*args)
    checks.check_aggregate_backward("convnn::aggregate_backward", arguments)
    return (
        _grad(arguments.value, arguments.need_value),
        _grad(arguments.similarities, arguments.need_similarities),
        *_convolution_grads(arguments),
    )


def _output(value: Tensor, rows: Sequence[int], weight: Tensor | None) -> Tensor:
    channels = value.shape[-1] if weight is None else weight.shape[0]
    return value.new_empty((*rows, channels))


def _neighbors(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices."""
    shape = (*query.shape[:-1], k)
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


def _grad(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else 0)


def _convolution_grads(arguments: Any) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias."""
    value, weight, grad_output = arguments.value, arguments.weight, arguments.grad_output
    needs_bias = arguments.need_bias and arguments.has_bias
    return (
        value.new_empty(0) if weight is None else _grad(weight, arguments.need_weight),
        value.new_empty(grad_output.shape[-1] if needs_bias else 0),
    )


for _op in schemas.OPERATORS.values():
    schemas.LIBRARY.impl(_op, autograd.kernel(_op), "Autograd", with_keyset=True)
    selection.register(_op)
    if (_ask := selection.forced_kernel(_op)) is not None:
        schemas.LIBRARY.impl(_op, _ask, "BackendSelect", with_keyset=True)
    torch.library.register_vmap(_op, transforms.vmap(_op), lib=schemas.LIBRARY)

# Backward runs in the dtypes of forward, so autocast does not apply to the backward operators.
for _op in (forward, select, aggregate):
    for _device in ("CPU", "CUDA"):
        _kernel = transforms.autocast(_op, _device.lower())
        schemas.LIBRARY.impl(_op, _kernel, f"Autocast{_device}")

flops.register()


_DESCRIPTIONS = {
    forward: "Convolves the k nearest neighbors of every query; the arguments are those of "
    "convnn_kernels.functional.convnn. Returns output [..., N, O], or [..., N, C] with a depthwise "
    "weight or none, and similarities and indices, [..., N, k] each, as select does.",
    select: "Finds the k nearest neighbors of every query; the arguments are those of "
    "convnn_kernels.functional.select_neighbors. Returns similarities and indices, [..., N, k] "
    "each. Missing neighbors come last, with similarity -inf and index 0.",
    aggregate: "Weights and convolves given neighbors; the arguments are those of "
    "convnn_kernels.functional.aggregate_neighbors. Returns [..., N, O], or [..., N, C] with a "
    "depthwise weight or none.",
}
_OF_NUMBERS = (
    "PyTorch's dispatcher converts a tensor of one element to a number, without a gradient, and "
    "True to 1, before it calls an operator. The functions refuse both."
)
for _op, _text in _DESCRIPTIONS.items():
    _paragraphs = (_text, _OF_NUMBERS)
    _lines = [str(_op._schema), *(textwrap.fill(each, 100) for each in _paragraphs)]
    _op.__doc__ = _op.overloadpacket.__doc__ = "\n\n".join(_lines)
