# SPDX-License-Identifier: MIT
"""FLOP formulas for ``torch.utils.flop_counter``.

As everywhere in that counter, a multiplication and an addition are two FLOPs, and only matrix
products and the like count: not norms, softmax, or the search itself. Formulas see shapes in place
of tensors.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.flop_counter import flop_registry, register_flop_formula

from convnn_kernels import schemas

_Shape = Sequence[int]


def register() -> None:
    """Registers the formulas."""
    for name, formula in _FORMULAS.items():
        _register(name, formula)


def _register(name: str, formula: Callable[[Any], int]) -> None:
    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(schemas.arguments(name)(*args, **kwargs))

    operator = schemas.OPERATORS[name].overloadpacket
    flop_registry.pop(operator, None)  # of an earlier import: a second formula is refused
    register_flop_formula(operator)(flops)


def _forward(arguments: Any) -> int:
    slots = math.prod(arguments.query[:-1]) * arguments.k
    return _select(arguments) + slots * _per_slot(arguments.value, arguments.weight)


def _select(arguments: Any) -> int:
    candidates = arguments.candidates
    searched = arguments.key[-2] if candidates is None else candidates[-1]
    return 2 * math.prod(arguments.query) * searched


def _aggregate(arguments: Any) -> int:
    return math.prod(arguments.similarities) * _per_slot(arguments.value, arguments.weight)


def _forward_backward(arguments: Any) -> int:
    from_output = arguments.rho != "ones" and (arguments.need_query or arguments.need_key)
    selects = from_output or arguments.grad_similarities is not None
    aggregation = _aggregation_backward(arguments, from_output)
    return aggregation + (_select_backward(arguments) if selects else 0)


def _select_backward(arguments: Any) -> int:
    products = arguments.need_query + arguments.need_key
    return 2 * math.prod(arguments.similarities) * arguments.query[-1] * products


def _aggregate_backward(arguments: Any) -> int:
    return _aggregation_backward(arguments, arguments.need_similarities)


def _aggregation_backward(arguments: Any, need_similarities: bool) -> int:
    value, weight = arguments.value, arguments.weight
    convolution = _per_slot(value, weight)
    # The gradient of the modulated neighbors is the convolution transposed; scaled by rho it is
    # that of value, and its product with the neighbors is that of rho.
    per_slot = convolution * (arguments.need_value or need_similarities)
    per_slot += 2 * value[-1] * need_similarities
    per_slot += convolution * (arguments.need_weight and weight is not None)
    return math.prod(arguments.similarities) * per_slot


def _per_slot(value: _Shape, weight: _Shape | None) -> int:
    """FLOPs of the convolution for one neighbor of one query."""
    channels = value[-1]
    dense = weight is not None and weight[1] == channels
    return 2 * channels * (weight[0] if dense and weight is not None else 1)


_FORMULAS = {
    "convnn::forward": _forward,
    "convnn::select": _select,
    "convnn::aggregate": _aggregate,
    "convnn::forward_backward": _forward_backward,
    "convnn::select_backward": _select_backward,
    "convnn::aggregate_backward": _aggregate_backward,
}
