# SPDX-License-Identifier: MIT
"""The operators ``torch.ops.convnn.*``: their schemas and shapes, and what runs them.

Importing this module defines and registers everything but the C++ implementations, which
``convnn_kernels.native`` loads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from convnn_kernels import autograd, checks, flops, transforms
from convnn_kernels.backends import selection

_library = torch.library.Library("convnn", "DEF")

_library.define(
    "forward(Tensor query, Tensor key, Tensor value, SymInt k, Tensor? weight=None, "
    "Tensor? bias=None, Tensor? candidates=None, Tensor? self_indices=None, "
    'Tensor? key_mask=None, str metric="cosine", str rho="softmax", float scale=1.0, '
    'str order="similarity") -> (Tensor output, Tensor similarities, Tensor indices)'
)
_library.define(
    "select(Tensor query, Tensor key, SymInt k, Tensor? candidates=None, "
    'Tensor? self_indices=None, Tensor? key_mask=None, str metric="cosine", '
    'str order="similarity") -> (Tensor similarities, Tensor indices)'
)
_library.define(
    "aggregate(Tensor value, Tensor similarities, Tensor indices, Tensor? weight=None, "
    'Tensor? bias=None, str rho="softmax", float scale=1.0) -> Tensor'
)
# The backward operators are internal. A gradient that is not needed is an empty tensor.
_library.define(
    "select_backward(Tensor grad_similarities, Tensor query, Tensor key, Tensor similarities, "
    "Tensor indices, str metric, bool need_query, bool need_key) "
    "-> (Tensor grad_query, Tensor grad_key)"
)
_library.define(
    "aggregate_backward(Tensor grad_output, Tensor value, Tensor similarities, Tensor indices, "
    "Tensor? weight, bool has_bias, str rho, float scale, bool need_value, "
    "bool need_similarities, bool need_weight, bool need_bias) "
    "-> (Tensor grad_value, Tensor grad_similarities, Tensor grad_weight, Tensor grad_bias)"
)

forward = torch.ops.convnn.forward.default
select = torch.ops.convnn.select.default
aggregate = torch.ops.convnn.aggregate.default
select_backward = torch.ops.convnn.select_backward.default
aggregate_backward = torch.ops.convnn.aggregate_backward.default

_OPS = (forward, select, aggregate, select_backward, aggregate_backward)

# Where the CUDA C++ kernels register: the CUDA key of the library above belongs to `selection`.
_cuda_library = torch.library.Library("convnn_cuda", "DEF")
for _op in _OPS:
    _cuda_library.define(str(_op._schema).removeprefix("convnn::"))


# Fake kernels: the shapes and dtypes of the results, after the checks of the arguments.


@torch.library.register_fake("convnn::forward", lib=_library)
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    rho: str = "softmax",
    scale: float = 1.0,
    order: str = "similarity",
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_forward(
        "convnn::forward",
        query,
        key,
        value,
        k,
        weight,
        bias,
        candidates,
        self_indices,
        key_mask,
        metric,
        rho,
        scale,
        order,
    )
    return _output(value, query.shape[:-1], weight), *_neighbors(query, k)


@torch.library.register_fake("convnn::select", lib=_library)
def _(
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    order: str = "similarity",
) -> tuple[Tensor, Tensor]:
    checks.check_select(
        "convnn::select", query, key, k, candidates, self_indices, key_mask, metric, order
    )
    return _neighbors(query, k)


@torch.library.register_fake("convnn::aggregate", lib=_library)
def _(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rho: str = "softmax",
    scale: float = 1.0,
) -> Tensor:
    checks.check_aggregate(
        "convnn::aggregate", value, similarities, indices, weight, bias, rho, scale
    )
    return _output(value, similarities.shape[:-1], weight)


@torch.library.register_fake("convnn::select_backward", lib=_library)
def _(
    grad_similarities: Tensor,
    query: Tensor,
    key: Tensor,
    similarities: Tensor,
    indices: Tensor,
    metric: str,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    return _grad(query, need_query), _grad(key, need_key)


@torch.library.register_fake("convnn::aggregate_backward", lib=_library)
def _(
    grad_output: Tensor,
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    rho: str,
    scale: float,
    need_value: bool,
    need_similarities: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _grad(value, need_value),
        _grad(similarities, need_similarities),
        _grad(value if weight is None else weight, need_weight and weight is not None),
        value.new_empty(grad_output.shape[-1] if need_bias and has_bias else 0),
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


for _op in _OPS:
    _library.impl(_op, autograd.kernel(_op), "Autograd", with_keyset=True)
    _library.impl(_op, selection.cuda_kernel(_op), "CUDA")
    if (_ask := selection.forced_kernel(_op)) is not None:
        _library.impl(_op, _ask, "BackendSelect", with_keyset=True)
    torch.library.register_vmap(_op, transforms.VMAP[_op.name()], lib=_library)

# Backward runs in the dtypes of forward: autocast does not touch the backward operators.
for _op, _keep in ((forward, ()), (select, ()), (aggregate, (1,))):
    for _device in ("CPU", "CUDA"):
        _kernel = transforms.autocast(_op, _device.lower(), _keep)
        _library.impl(_op, _kernel, f"Autocast{_device}")

flops.register()
