# SPDX-License-Identifier: MIT
"""Calls as JSON, and the arguments that they stand for.

A call is ``{"call": "select", "arguments": {"query": ..., ...}}``, with ``"valid": true`` if it
must not be refused. An argument is

- null, true, a number or a text, which stand for themselves;
- ``{"float": "-nan"}``, a number that JSON does not have;
- ``{"object": "list"}``, an object of a wrong type, of ``OBJECTS``;
- ``{"tensor": {"shape": [5, 4], "dtype": "float32", "fill": "normal", "layout": "sliced", "kind":
  "plain", "seed": 1}}``. What is left out is as in ``DEFAULTS``. ``fill`` says which values (of
  ``FILLS``), ``layout`` how they are stored (of ``LAYOUTS``), ``kind`` what tensor it is (of
  ``KINDS``), and ``rows`` is the bound of the integers of some fills.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = dict[str, Any]

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "fill": "normal",
    "layout": "plain",
    "kind": "plain",
    "seed": 0,
}

# Larger tensors repeat one element.
MOST_ELEMENTS = 2**16


class Subclass(Tensor):
    """A subclass that does nothing of its own."""


def build(call: Call) -> dict[str, Any]:
    """The arguments of a call by name, newly made."""
    return {name: argument(value) for name, value in call["arguments"].items()}


def is_tensor(value: Any) -> bool:
    """Whether an argument stands for a tensor."""
    return isinstance(value, dict) and "tensor" in value


def argument(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return FLOATS[content]
    if kind == "object":
        return OBJECTS[content]()
    return tensor(**content)


def tensor(shape: list[int], rows: int = 1, **given: Any) -> Tensor:
    options = DEFAULTS | given
    dtype = getattr(torch, options["dtype"])
    count = 1
    for size in shape:
        count *= size
    if count > MOST_ELEMENTS:
        values = _filled([1] * len(shape), rows, options).to(dtype).expand(shape)
    else:
        values = LAYOUTS[options["layout"]](_filled(shape, rows, options).to(dtype))
    made = KINDS[options["kind"]](values)
    if options.get("requires_grad") and (made.is_floating_point() or made.is_complex()):
        made.requires_grad_()
    return made


def _filled(shape: list[int], rows: int, options: dict[str, Any]) -> Tensor:
    """The values, float64 or int64."""
    generator = torch.Generator().manual_seed(options["seed"])
    return FILLS[options["fill"]](shape, rows, generator)


def _normal(shape: list[int], rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _integers(shape: list[int], rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(7, shape, generator=generator).double() - 3


def _rows(shape: list[int], rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(max(rows, 1), shape, generator=generator)


def _distinct(shape: list[int], rows: int, generator: torch.Generator) -> Tensor:
    """In the last dimension, distinct rows, as far as there are so many."""
    *lead, count = shape or [1]
    order = torch.rand([*lead, max(rows, count, 1)], generator=generator).argsort(dim=-1)
    return order[..., :count].reshape(shape)


def _ranges(shape: list[int], rows: int, generator: torch.Generator) -> Tensor:
    ends = torch.randint(max(rows, 0) + 1, shape, generator=generator)
    return ends.sort(dim=-1).values if shape else ends


def _one_of_them(value: float) -> Callable[[list[int], int, torch.Generator], Tensor]:
    """Mostly normal values, some of them this one."""

    def fill(shape: list[int], rows: int, generator: torch.Generator) -> Tensor:
        values = _normal(shape, rows, generator)
        return values.masked_fill(torch.rand(shape, generator=generator) < 0.2, value)

    return fill


def _one_index(value: int) -> Callable[[list[int], int, torch.Generator], Tensor]:
    """Rows, of which the last is this number."""

    def fill(shape: list[int], rows: int, generator: torch.Generator) -> Tensor:
        values = _rows(shape, rows, generator)
        if values.numel():
            values.view(-1)[-1] = rows if value == 0 else value
        return values

    return fill


FILLS: dict[str, Callable[[list[int], int, torch.Generator], Tensor]] = {
    "normal": _normal,
    "integers": _integers,
    "zeros": lambda shape, rows, generator: torch.zeros(shape, dtype=torch.float64),
    "large": lambda shape, rows, generator: _normal(shape, rows, generator) * 1e30,
    "small": lambda shape, rows, generator: _normal(shape, rows, generator) * 1e-40,
    "nan": _one_of_them(float("nan")),
    "inf": _one_of_them(float("inf")),
    "-inf": _one_of_them(float("-inf")),
    "missing": lambda shape, rows, generator: torch.full(shape, -math.inf, dtype=torch.float64),
    "rows": _rows,
    "distinct": _distinct,
    "ranges": _ranges,
    "bits": lambda shape, rows, generator: torch.randint(2, shape, generator=generator),
    "row too many": _one_index(0),
    "row -1": _one_index(-1),
    "row 2**40": _one_index(2**40),
    "row -2**63": _one_index(-(2**63)),
}


def _sliced(values: Tensor) -> Tensor:
    """Every other element of a larger tensor, which begins before it."""
    if values.dim() == 0:
        return values
    larger = values.new_ones([size + 2 for size in values.shape[:-1]] + [2 * values.shape[-1] + 2])
    parts = [slice(1, 1 + size) for size in values.shape[:-1]]
    parts.append(slice(1, 1 + 2 * values.shape[-1], 2))
    return larger[tuple(parts)].copy_(values)


def _offset(values: Tensor) -> Tensor:
    larger = torch.cat([values.new_ones(1), values.reshape(-1)])
    return larger[1:].view(values.shape)


def _expanded(values: Tensor) -> Tensor:
    if values.dim() == 0 or values.shape[0] < 2:
        return values
    return values[:1].expand(values.shape)


def _repeated(values: Tensor) -> Tensor:
    """One element for all, with strides of 0."""
    return values.reshape(-1)[:1].view([1] * values.dim()).expand(values.shape)


def _overlapping(values: Tensor) -> Tensor:
    """Rows that begin one element after another."""
    if not values.numel():
        return values
    needed = 1 + sum(size - 1 for size in values.shape)
    return values.reshape(-1)[:needed].contiguous().as_strided(values.shape, [1] * values.dim())


def _reversed(values: Tensor) -> Tensor:
    order = list(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda values: values,
    "sliced": _sliced,
    "offset": _offset,
    "transposed": lambda values: values.mT.contiguous().mT if values.dim() > 1 else values,
    "reversed": _reversed,
    "expanded": _expanded,
    "repeated": lambda values: _repeated(values) if values.numel() else values,
    "overlapping": _overlapping,
}


def _freed(values: Tensor) -> Tensor:
    values = values.clone()
    values.untyped_storage().resize_(0)
    return values


def _other_bytes(values: Tensor) -> Tensor:
    """True as a byte other than 1."""
    return (values.to(torch.uint8) * 2).view(torch.bool) if values.dtype is torch.bool else values


def _negated(values: Tensor) -> Tensor:
    """The same values as a lazily negated view."""
    if not values.is_floating_point() or values.dtype.itemsize < 4:
        return values
    view = torch.complex(torch.zeros_like(values), -values).conj().imag
    return view if view.is_neg() else values


def _conjugate(values: Tensor) -> Tensor:
    return values.conj() if values.is_complex() else values


def _inference(values: Tensor) -> Tensor:
    with torch.inference_mode():
        return values.clone()


def _sparse(values: Tensor) -> Tensor:
    """Of a large tensor none of the elements: each would get an index."""
    if values.numel() <= MOST_ELEMENTS:
        return values.to_sparse()
    none = torch.empty(values.dim(), 0, dtype=torch.int64), values.new_empty(0)
    return torch.sparse_coo_tensor(*none, values.shape)


def _nested(values: Tensor) -> Tensor:
    rows = list(values.contiguous().unbind()) if values.dim() > 1 else [values]
    return torch.nested.as_nested_tensor(rows, layout=torch.strided)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda values: values,
    "subclass": lambda values: values.as_subclass(Subclass),
    "parameter": lambda values: torch.nn.Parameter(values, requires_grad=False),
    "negated": _negated,
    "inference": _inference,
    "zero": lambda values: torch._efficientzerotensor(values.shape, dtype=values.dtype),
    "other bytes": _other_bytes,
    "freed": _freed,
    "meta": lambda values: values.to("meta"),
    "conjugate": _conjugate,
    "sparse": _sparse,
    "csr": lambda values: values.to_sparse_csr(),
    "mkldnn": lambda values: values.to_mkldnn(),
    "quantized": lambda values: torch.quantize_per_tensor(values.float(), 0.1, 0, torch.qint8),
    "nested": _nested,
}
# Those that are no dense tensors of the CPU.
FOREIGN = {"meta", "sparse", "csr", "mkldnn", "quantized", "nested"}

FLOATS: dict[str, float] = {
    "nan": float("nan"),
    "-nan": struct.unpack("<d", struct.pack("<Q", 0xFFF8000000000000))[0],
    "inf": float("inf"),
    "-inf": float("-inf"),
}

OBJECTS: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1],
    "nested list": lambda: [[0.0, 1.0], [2.0, 3.0]],
    "empty tuple": tuple,
    "dict": dict,
    "bytes": lambda: b"cosine",
    "complex": lambda: 1j,
    "object": object,
    "type": lambda: int,
    "dtype": lambda: torch.float32,
    "size": lambda: torch.Size([2]),
    "surrogate": lambda: "\ud800",
    "module": lambda: torch.nn.Linear(2, 2),
    "number in a tensor": lambda: torch.tensor(2),
}
