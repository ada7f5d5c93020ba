# SPDX-License-Identifier: MIT
"""FLOP formulas for ``torch.utils.flop_counter``.

As everywhere in that counter, a multiplication and its addition are two, and only products of
matrices and their like count: not norms, softmax, or the search itself. Formulas receive shapes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_convnn = torch.ops.convnn
_Shape = Sequence[int]


def register() -> None:
    """Registers the formulas; the operators must be defined."""
    register_flop_formula(_convnn.forward)(_forward)
    register_flop_formula(_convnn.select)(_select)
    register_flop_formula(_convnn.aggregate)(_aggregate)
    register_flop_formula(_convnn.select_backward)(_select_backward)
    register_flop_formula(_convnn.aggregate_backward)(_aggregate_backward)


def _forward(
    query: _Shape,
    key: _Shape,
    value: _Shape,
    k: int,
    weight: _Shape | None = None,
    bias: _Shape | None = None,
    candidates: _Shape | None = None,
    *_: Any,
    **__: Any,
) -> int:
    slots = math.prod(query[:-1]) * k
    return _select(query, key, k, candidates) + slots * _per_slot(value, weight)


def _select(
    query: _Shape, key: _Shape, k: int, candidates: _Shape | None = None, *_: Any, **__: Any
) -> int:
    searched = key[-2] if candidates is None else candidates[0]
    return 2 * math.prod(query) * searched


def _aggregate(
    value: _Shape,
    similarities: _Shape,
    indices: _Shape,
    weight: _Shape | None = None,
    *_: Any,
    **__: Any,
) -> int:
    return math.prod(similarities) * _per_slot(value, weight)


def _select_backward(
    grad_similarities: _Shape,
    query: _Shape,
    key: _Shape,
    similarities: _Shape,
    indices: _Shape,
    metric: str,
    need_query: bool,
    need_key: bool,
    **_: Any,
) -> int:
    return 2 * math.prod(similarities) * query[-1] * (need_query + need_key)


def _aggregate_backward(
    grad_output: _Shape,
    value: _Shape,
    similarities: _Shape,
    indices: _Shape,
    weight: _Shape | None,
    has_bias: bool,
    rho: str,
    scale: float,
    need_value: bool,
    need_similarities: bool,
    need_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    convolution = _per_slot(value, weight)
    # The gradient of the modulated neighbors is the convolution transposed; scaled by rho it is
    # that of value, and its product with the neighbors is that of rho.
    per_slot = convolution * (need_value or need_similarities)
    per_slot += 2 * value[-1] * need_similarities
    per_slot += convolution * (need_weight and weight is not None)
    return math.prod(similarities) * per_slot


def _per_slot(value: _Shape, weight: _Shape | None) -> int:
    """FLOPs of the convolution for one neighbor of one query."""
    channels = value[-1]
    dense = weight is not None and weight[1] == channels
    return 2 * channels * (weight[0] if dense and weight is not None else 1)
