# SPDX-License-Identifier: MIT
"""The settings that the layers share, and the checks that reject invalid ones."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

METRICS = ("cosine", "dot", "euclidean")
RHOS = ("softmax", "ones", "similarity")
ORDERS = ("similarity", "index")
AGGREGATIONS = ("dense", "depthwise", "sum")
POSITIONAL_ENCODINGS = (None, "similarity", "aggregation", "both")
COORDINATES = ("unit", "pixel")


def require(condition: bool, owner: str, name: str, expected: str, got: Any) -> None:
    """Raises a ValueError that names the argument, what was expected and what was passed."""
    if not condition:
        raise ValueError(f"{owner}: {name} must be {expected}, got {got!r}")


def require_choice(owner: str, name: str, got: Any, choices: Sequence[Any]) -> None:
    *others, last = (repr(choice) for choice in choices)
    require(got in choices, owner, name, f"{', '.join(others)} or {last}", got)


def require_count(owner: str, name: str, got: Any, least: int = 1) -> None:
    whole = isinstance(got, int) and not isinstance(got, bool)
    require(whole and got >= least, owner, name, f"a whole number of at least {least}", got)


def require_between(owner: str, name: str, got: Any, least: float, most: float) -> None:
    fits = isinstance(got, int | float) and least <= got <= most
    require(fits, owner, name, f"between {least:g} and {most:g}", got)


def require_shape(owner: str, name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Checks the number of dimensions, and the sizes that `expected` gives as numbers."""
    shape = tensor.shape
    fits = len(shape) == len(expected) and all(
        isinstance(wanted, str) or size == wanted
        for size, wanted in zip(shape, expected, strict=False)
    )
    if not fits:
        form = ", ".join(str(size) for size in expected)
        raise ValueError(f"{owner}: {name} must have shape [{form}], got {list(shape)}")


def require_common(
    owner: str,
    *,
    k: int,
    projections: str,
    allowed_projections: Sequence[str],
    rho: str,
    metric: str,
    scale: Any,
    order: str,
    aggregation: str,
    positional_encoding: str | None,
    coordinates: str,
) -> None:
    """Checks the settings that ConvNN1d, ConvNN2d and ConvNNAttention share."""
    require_count(owner, "k", k)
    require_choice(owner, "projections", projections, allowed_projections)
    require_choice(owner, "rho", rho, RHOS)
    require_choice(owner, "metric", metric, METRICS)
    require_choice(owner, "order", order, ORDERS)
    require_choice(owner, "aggregation", aggregation, AGGREGATIONS)
    require_choice(owner, "positional_encoding", positional_encoding, POSITIONAL_ENCODINGS)
    require_choice(owner, "coordinates", coordinates, COORDINATES)
    is_finite = isinstance(scale, int | float) and math.isfinite(scale)
    require(is_finite, owner, "scale", "finite", scale)
    require(scale == 1.0 or rho == "softmax", owner, "scale", "1.0 unless rho is 'softmax'", scale)
    require(
        not (projections == "learned" and rho == "ones"),
        owner,
        "projections",
        "other than learned with rho='ones', which gives query and key projections no gradient "
        "('value' learns the value projection alone)",
        projections,
    )
