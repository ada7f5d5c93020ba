# SPDX-License-Identifier: MIT
"""Argument checks of the operators, on metadata only: sizes may be symbolic.

``csrc/checks.h``, and ``csrc/torch_operators.h`` for the backward operators, make the same checks
for the C++ kernels, in the same order and with the same messages, and add those that read values;
tests/test_errors.py and tests/test_wrong_calls.py compare both.

``op`` is the name that messages begin with, ``arguments`` a namedtuple of ``schemas.arguments``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

METRICS = ("cosine", "dot", "euclidean")
ORDERS = ("similarity", "index")
RHOS = ("softmax", "ones", "similarity")

# What indexes elements, or bytes of what is made for each of them, stays within 64 bits. No machine
# stores or searches as many.
MOST_ELEMENTS = 2**56

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_forward(op: str, arguments: Any) -> None:
    """Check the arguments of ``forward``: those of ``select``, then value and the convolution.

    Raises:
        RuntimeError: naming the operator, the argument, what was expected and what it got.
    """
    check_select(op, arguments)
    _check_value_as(op, arguments.value, arguments.query, arguments.key)
    _check_convolution(op, arguments, arguments.k)


def _check_value_as(op: str, value: Tensor, query: Tensor, key: Tensor) -> None:
    _check_value(op, value)
    _check_device(op, "value", value, "query", query)
    lead = list(query.shape[:-2])
    if list(value.shape[:-2]) != lead:
        raise RuntimeError(
            f"{op}: value must have the leading dimensions {lead} of query, "
            f"got shape {list(value.shape)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(
            f"{op}: value must have the {key.shape[-2]} rows of key, got shape {list(value.shape)}"
        )
    _check_size(op, "value", value)


def check_select(op: str, arguments: Any) -> None:
    """Check the arguments of ``select``. Raises as ``check_forward`` does."""
    _check_query_and_key(op, arguments.query, arguments.key)
    _check_choice(op, "metric", arguments.metric, METRICS)
    _check_choice(op, "order", arguments.order, ORDERS)
    _check_restrictions(op, arguments)
    _check_k(op, arguments.k, arguments.query)


def _check_query_and_key(op: str, query: Tensor, key: Tensor) -> None:
    _check_given(op, "query", query)
    _check_given(op, "key", key)
    if query.dim() < 2:
        raise RuntimeError(
            f"{op}: query must have at least 2 dimensions [..., N, D], "
            f"got shape {list(query.shape)}"
        )
    _check_floating(op, "query", query)
    if key.dim() != query.dim():
        raise RuntimeError(
            f"{op}: key must have as many dimensions as query ({query.dim()}), "
            f"got shape {list(key.shape)}"
        )
    _check_dtype(op, "key", key, query.dtype, " as query is")
    _check_device(op, "key", key, "query", query)
    lead, columns = list(query.shape[:-2]), query.shape[-1]
    if list(key.shape[:-2]) != lead:
        raise RuntimeError(
            f"{op}: key must have the leading dimensions {lead} of query, "
            f"got shape {list(key.shape)}"
        )
    if key.shape[-1] != columns:
        raise RuntimeError(
            f"{op}: key must have the {columns} columns of query, got shape {list(key.shape)}"
        )
    _check_size(op, "query", query)
    _check_size(op, "key", key)


def _check_restrictions(op: str, arguments: Any) -> None:
    """Check what restricts which keys may be neighbors."""
    query, key, rows = arguments.query, arguments.key, arguments.query.shape[-2]
    _check_candidates(op, arguments.candidates, query)
    self_indices = arguments.self_indices
    if self_indices is not None:
        _check_dtype(op, "self_indices", self_indices, torch.int64)
        _check_device(op, "self_indices", self_indices, "query", query)
        if not (_ends_in(self_indices, rows) and _has_lead(self_indices.shape[:-1], query)):
            raise RuntimeError(
                f"{op}: self_indices must have shape {_shapes_of_queries(query, rows)}, one row of "
                f"key for each query, got shape {list(self_indices.shape)}"
            )
    elif arguments.exclude_self:
        raise RuntimeError(f"{op}: exclude_self must be False without self_indices, got True")
    _check_key_mask(op, arguments.key_mask, query, key)
    key_range = arguments.key_range
    if key_range is not None:
        _check_dtype(op, "key_range", key_range, torch.int64)
        _check_device(op, "key_range", key_range, "query", query)
        if not (_ends_in(key_range, rows, 2) and _has_lead(key_range.shape[:-2], query)):
            raise RuntimeError(
                f"{op}: key_range must have shape {_shapes_of_queries(query, rows, 2)}, begin and "
                f"end for each query, got shape {list(key_range.shape)}"
            )


def _check_candidates(op: str, candidates: Tensor | None, query: Tensor) -> None:
    if candidates is None:
        return
    _check_dtype(op, "candidates", candidates, torch.int64)
    _check_device(op, "candidates", candidates, "query", query)
    if candidates.dim() == 0 or not _has_lead(candidates.shape[:-1], query):
        raise RuntimeError(
            f"{op}: candidates must have shape {_shapes_of_queries(query, 'R')}, "
            f"got shape {list(candidates.shape)}"
        )


def _check_key_mask(op: str, key_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    if key_mask is None:
        return
    _check_dtype(op, "key_mask", key_mask, torch.bool)
    _check_device(op, "key_mask", key_mask, "query", query)
    if list(key_mask.shape) != list(key.shape[:-1]):
        raise RuntimeError(
            f"{op}: key_mask must have shape {list(key.shape[:-1])}, "
            f"got shape {list(key_mask.shape)}"
        )


def _ends_in(tensor: Tensor, *last: int) -> bool:
    return tensor.dim() >= len(last) and list(tensor.shape[-len(last) :]) == list(last)


def _has_lead(lead: Sequence[int], query: Tensor) -> bool:
    """Whether these leading dimensions are none, which the batch shares, or those of query."""
    return len(lead) == 0 or list(lead) == list(query.shape[:-2])


def _shapes_of_queries(query: Tensor, *last: Any) -> str:
    """The shapes that such a tensor may have: "[5, 2]" or "[5, 2] or [3, 5, 2]"."""
    shapes = [last] if query.dim() == 2 else [last, (*query.shape[:-2], *last)]
    return " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)


def _check_k(op: str, k: int, query: Tensor) -> None:
    # torch._check, because under torch.compile k may be unknown until run time.
    torch._check(k >= 1, lambda: f"{op}: k must be at least 1, got {k}")
    # A symbolic k is compared at run time: here, it would get a guard.
    if type(k) is int and k * _product(query.shape[:-1]) > MOST_ELEMENTS:
        raise RuntimeError(
            f"{op}: k must give at most {MOST_ELEMENTS} neighbors for query of shape "
            f"{list(query.shape)}, a size of 0 counted as 1, got {k}"
        )


def check_aggregate(op: str, arguments: Any) -> None:
    """Check the arguments of ``aggregate``. Raises as ``check_forward`` does."""
    _check_given_neighbors(op, arguments.value, arguments.similarities, arguments.indices)
    _check_convolution(op, arguments, arguments.similarities.shape[-1])


def _check_given_neighbors(op: str, value: Tensor, similarities: Tensor, indices: Tensor) -> None:
    _check_value(op, value)
    _check_given(op, "similarities", similarities)
    _check_given(op, "indices", indices)
    shape = list(similarities.shape)
    lead = list(value.shape[:-2])
    if similarities.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(
            f"{op}: similarities must be float32 or float64, got {_name(similarities.dtype)}"
        )
    _check_device(op, "similarities", similarities, "value", value)
    if similarities.dim() != value.dim():
        raise RuntimeError(
            f"{op}: similarities must have as many dimensions as value ({value.dim()}), "
            f"got shape {shape}"
        )
    if shape[:-2] != lead:
        raise RuntimeError(
            f"{op}: similarities must have the leading dimensions {lead} of value, "
            f"got shape {shape}"
        )
    _check_has_columns(op, similarities)
    _check_size(op, "value", value)
    _check_size(op, "similarities", similarities)
    _check_dtype(op, "indices", indices, torch.int64)
    _check_device(op, "indices", indices, "value", value)
    if list(indices.shape) != shape:
        raise RuntimeError(
            f"{op}: indices must have the shape {shape} of similarities, "
            f"got shape {list(indices.shape)}"
        )


def _check_has_columns(op: str, similarities: Tensor) -> None:
    shape = list(similarities.shape)
    torch._check(
        shape[-1] >= 1,
        lambda: f"{op}: similarities must have at least one column (k >= 1), got shape {shape}",
    )


def _check_convolution(op: str, arguments: Any, k: int) -> None:
    """Check what modulates and convolves the k neighbors: weight, bias, rho and scale."""
    value, weight = arguments.value, arguments.weight
    # Backward operators are told only whether there was a bias.
    bias = getattr(arguments, "bias", None)
    channels = value.shape[-1]
    if weight is not None:
        _check_dtype(op, "weight", weight, value.dtype, " as value is")
        _check_device(op, "weight", weight, "value", value)
        if not (_is_dense(weight, channels, k) or _is_depthwise(weight, channels, k)):
            raise RuntimeError(
                f"{op}: weight must have shape [O, {channels}, {k}] or [{channels}, 1, {k}], "
                f"got shape {list(weight.shape)}"
            )
        _check_size(op, "weight", weight)
    if bias is not None:
        _check_dtype(op, "bias", bias, value.dtype, " as value is")
        _check_device(op, "bias", bias, "value", value)
        outputs = channels if weight is None else weight.shape[0]
        if bias.dim() != 1 or bias.shape[0] != outputs:
            raise RuntimeError(
                f"{op}: bias must have shape [{outputs}], got shape {list(bias.shape)}"
            )
    rho, scale = arguments.rho, arguments.scale
    _check_choice(op, "rho", rho, RHOS)
    if not math.isfinite(scale):
        raise RuntimeError(f"{op}: scale must be finite, got {scale:g}")
    if scale != 1.0 and rho != "softmax":
        raise RuntimeError(
            f"{op}: scale must be 1.0 unless rho is 'softmax', got {scale:g} with rho '{rho}'"
        )


def check_forward_backward(op: str, arguments: Any) -> None:
    """Check the arguments of ``forward_backward``. Raises as ``check_forward`` does."""
    query, similarities = arguments.query, arguments.similarities
    k = _columns_of(op, similarities)
    _check_query_and_key(op, query, arguments.key)
    _check_choice(op, "metric", arguments.metric, METRICS)
    _check_candidates(op, arguments.candidates, query)
    _check_value_as(op, arguments.value, query, arguments.key)
    _check_as_found(op, "similarities", similarities, query, k)
    _check_given_neighbors(op, arguments.value, similarities, arguments.indices)
    _check_convolution(op, arguments, k)
    if arguments.grad_similarities is not None:
        _check_as_found(op, "grad_similarities", arguments.grad_similarities, query, k)
    _check_grad_output(op, arguments)


def check_select_backward(op: str, arguments: Any) -> None:
    """Check the arguments of ``select_backward``. Raises as ``check_forward`` does."""
    query, similarities = arguments.query, arguments.similarities
    k = _columns_of(op, similarities)
    _check_query_and_key(op, query, arguments.key)
    _check_choice(op, "metric", arguments.metric, METRICS)
    _check_as_found(op, "similarities", similarities, query, k)
    _check_as_found(op, "grad_similarities", arguments.grad_similarities, query, k)
    shape = [*query.shape[:-1], k]
    _check_same(op, "indices", arguments.indices, shape, torch.int64, "query", query)


def check_aggregate_backward(op: str, arguments: Any) -> None:
    """Check the arguments of ``aggregate_backward``. Raises as ``check_forward`` does."""
    _check_given_neighbors(op, arguments.value, arguments.similarities, arguments.indices)
    _check_convolution(op, arguments, arguments.similarities.shape[-1])
    _check_grad_output(op, arguments)


def _columns_of(op: str, similarities: Tensor) -> int:
    """k of a backward operator. `_check_as_found` reports too few dimensions."""
    _check_given(op, "similarities", similarities)
    if similarities.dim() < 2:
        return 1
    _check_has_columns(op, similarities)
    return similarities.shape[-1]


def _check_as_found(op: str, name: str, tensor: Tensor, query: Tensor, k: int) -> None:
    """Check similarities, or their gradient, against those that ``select`` returns."""
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    _check_same(op, name, tensor, [*query.shape[:-1], k], dtype, "query", query)


def _check_grad_output(op: str, arguments: Any) -> None:
    value, weight = arguments.value, arguments.weight
    # A depthwise weight has as many rows as value has channels.
    outputs = value.shape[-1] if weight is None else weight.shape[0]
    shape = [*arguments.similarities.shape[:-1], outputs]
    _check_same(op, "grad_output", arguments.grad_output, shape, value.dtype, "value", value)


def _check_same(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    other: str,
    reference: Tensor,
) -> None:
    _check_given(op, name, tensor)
    _check_device(op, name, tensor, other, reference)
    if list(tensor.shape) != list(shape):
        raise RuntimeError(
            f"{op}: {name} must have shape {list(shape)}, got shape {list(tensor.shape)}"
        )
    _check_dtype(op, name, tensor, dtype)


def check_neighbors(op: str, indices: Tensor, similarities: Tensor) -> None:
    """Check the results of ``select`` that become edges. Raises as ``check_forward`` does."""
    shape = list(indices.shape)
    _check_dtype(op, "indices", indices, torch.int64)
    if len(shape) < 2:
        raise RuntimeError(
            f"{op}: indices must have at least 2 dimensions [..., N, k], got shape {shape}"
        )
    _check_floating(op, "similarities", similarities)
    _check_device(op, "similarities", similarities, "indices", indices)
    if list(similarities.shape) != shape:
        raise RuntimeError(
            f"{op}: similarities must have the shape {shape} of indices, "
            f"got shape {list(similarities.shape)}"
        )


def check_storage(op: str, arguments: Any) -> None:
    """Check that the storage of no tensor was freed or made too small."""
    for name, X in zip(arguments._fields, arguments, strict=True):
        if isinstance(X, Tensor):
            check_storage_of(op, name, X)


def check_storage_of(op: str, name: str, X: Tensor) -> None:
    """Check that the storage of a tensor was not freed or made too small."""
    if X.numel() == 0:
        return
    last = sum((n - 1) * stride for n, stride in zip(X.shape, X.stride(), strict=True))
    needed = (X.storage_offset() + last + 1) * X.element_size()
    stored = X.untyped_storage().nbytes()
    if stored < needed:
        raise RuntimeError(
            f"{op}: {name} must have a storage of at least {needed} bytes for its shape "
            f"{list(X.shape)}, got one of {stored} bytes"
        )


def check_candidates(op: str, candidates: Tensor | None, rows: int) -> None:
    """Check, by reading them, that the values of ``candidates`` are distinct rows of key."""
    if candidates is None:
        return
    _check_range(op, "candidates", candidates, rows)
    in_order = candidates.sort().values
    again = in_order[..., 1:][in_order[..., 1:] == in_order[..., :-1]]
    if again.numel():
        raise RuntimeError(f"{op}: candidates must be distinct, got {int(again[0])} more than once")


def check_key_range(op: str, key_range: Tensor | None, rows: int) -> None:
    """Check, by reading them, that the values of ``key_range`` are ranges of rows of key."""
    if key_range is None:
        return
    begin, end = key_range.unbind(-1)
    wrong = ((begin < 0) | (begin > end) | (end > rows)).flatten().nonzero()
    if wrong.numel():
        position = int(wrong[0])
        got = [int(each.flatten()[position]) for each in (begin, end)]
        raise RuntimeError(
            f"{op}: key_range must be 0 <= begin <= end <= {rows}, got {got[0]} and {got[1]} "
            f"at position {position}"
        )


def check_self_indices(op: str, self_indices: Tensor | None, rows: int) -> None:
    """Check, by reading them, that the values of ``self_indices`` are rows of key."""
    if self_indices is not None:
        _check_range(op, "self_indices", self_indices, rows)


def check_indices(op: str, indices: Tensor, similarities: Tensor, rows: int) -> None:
    """Check, by reading them, that ``indices`` are among as many rows of key or value.

    If there are none, all neighbors must be missing.
    """
    if rows > 0:
        _check_range(op, "indices", indices, rows)
        return
    present = (~similarities.isneginf()).flatten().nonzero()
    if present.numel():
        position = int(present[0])
        raise RuntimeError(
            f"{op}: similarities must be -inf without rows of value, "
            f"got {float(similarities.flatten()[position]):g} at position {position}"
        )


def _check_range(op: str, name: str, tensor: Tensor, rows: int) -> None:
    wrong = ((tensor < 0) | (tensor >= rows)).flatten().nonzero()
    if wrong.numel():
        position = int(wrong[0])
        got = int(tensor.flatten()[position])
        raise RuntimeError(f"{op}: {name} must be in [0, {rows}), got {got} at position {position}")


def _is_dense(weight: Tensor, channels: int, k: int) -> bool:
    return weight.dim() == 3 and weight.shape[1] == channels and weight.shape[2] == k


def _is_depthwise(weight: Tensor, channels: int, k: int) -> bool:
    return (
        weight.dim() == 3
        and weight.shape[0] == channels
        and weight.shape[1] == 1
        and weight.shape[2] == k
    )


def _check_given(op: str, name: str, tensor: Tensor) -> None:
    # The dispatcher accepts None for a tensor that is not optional.
    if not isinstance(tensor, Tensor):
        raise RuntimeError(f"{op}: {name} must be a tensor, got None")


def _check_value(op: str, value: Tensor) -> None:
    _check_given(op, "value", value)
    if value.dim() < 2:
        raise RuntimeError(
            f"{op}: value must have at least 2 dimensions [..., M, C], "
            f"got shape {list(value.shape)}"
        )
    _check_floating(op, "value", value)


def _check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        raise RuntimeError(
            f"{op}: {name} must be float64, float32, float16 or bfloat16, got {_name(tensor.dtype)}"
        )


def _product(shape: Sequence[int]) -> int:
    """The product of the sizes that are known, 0 counted as 1."""
    # Symbolic sizes are checked at run time: here, they would get a guard.
    return math.prod(max(size, 1) for size in shape if type(size) is int)


def _check_size(op: str, name: str, tensor: Tensor) -> None:
    if _product(tensor.shape) > MOST_ELEMENTS:
        raise RuntimeError(
            f"{op}: {name} must have at most {MOST_ELEMENTS} elements, a size of 0 counted as 1, "
            f"got shape {list(tensor.shape)}"
        )


def _check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype, why: str = "") -> None:
    if tensor.dtype != dtype:
        raise RuntimeError(f"{op}: {name} must be {_name(dtype)}{why}, got {_name(tensor.dtype)}")


def _check_device(op: str, name: str, tensor: Tensor, other: str, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise RuntimeError(
            f"{op}: {name} must be on {reference.device} as {other} is, got {tensor.device}"
        )


def _check_choice(op: str, name: str, choice: str, choices: Sequence[str]) -> None:
    if choice not in choices:
        raise RuntimeError(f"{op}: {name} must be {listed(choices)}, got '{choice}'")


def listed(choices: Sequence[str]) -> str:
    """Choices as messages list them: 'a', 'b' or 'c'."""
    quoted = [f"'{each}'" for each in choices]
    return ", ".join(quoted[:-1]) + f" or {quoted[-1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
