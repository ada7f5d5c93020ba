# SPDX-License-Identifier: MIT
"""The settings that the layers share, and the checks that reject invalid ones."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from convnn_kernels.functional import Metric, Order, Rho

Aggregation: TypeAlias = Literal["dense", "depthwise", "sum"]
CoordinateOrder: TypeAlias = Literal["yx", "xy"]
Coordinates: TypeAlias = Literal["unit", "pixel"]
PositionalEncoding: TypeAlias = Literal["similarity", "aggregation", "both"] | None

METRICS = get_args(Metric)
RHOS = get_args(Rho)
ORDERS = get_args(Order)
AGGREGATIONS = get_args(Aggregation)
POSITIONAL_ENCODINGS = (None, "similarity", "aggregation", "both")
COORDINATES = get_args(Coordinates)
COORDINATE_ORDERS = get_args(CoordinateOrder)
# Of a value in a message.
_MOST_BITS, _MOST_LETTERS = 2048, 1000
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require(condition: bool, owner: str, name: str, expected: str, got: Any) -> None:
    """Raises a ValueError that names the argument, what was expected and what was passed."""
    if not condition:
        raise ValueError(f"{owner}: {name} must be {expected}, got {_shown(got)}")


def _shown(got: Any) -> str:
    """The value, or what kind of array or object it is, if it would fill the screen."""
    if isinstance(got, type):
        return f"the class {got.__qualname__}"
    if isinstance(got, torch.dtype):
        return _name(got)
    shape = getattr(got, "shape", ())
    if isinstance(got, Tensor) or len(shape) > 0:
        return f"{type(got).__name__} of shape {list(shape)}"
    if isinstance(got, int) and got.bit_length() > _MOST_BITS:
        return f"a number of {got.bit_length()} bits"
    text = repr(got)
    # Other objects show their address, and modules and numbers may have many lines.
    is_short = isinstance(got, str | int) or not ("\n" in text or " at 0x" in text)
    return text if is_short and len(text) <= _MOST_LETTERS else type(got).__qualname__


def require_choice(owner: str, name: str, got: Any, choices: Sequence[Any]) -> None:
    fits = (got is None or isinstance(got, str)) and got in choices
    require(fits, owner, name, _either([repr(choice) for choice in choices]), got)


def _either(choices: Sequence[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def require_count(owner: str, name: str, got: Any, least: int = 1) -> int:
    """Checks a whole number; returns it as an int, which it is not if it comes from NumPy."""
    whole = isinstance(got, numbers.Integral) and not isinstance(got, bool)
    require(whole and got >= least, owner, name, f"a whole number of at least {least}", got)
    return int(got)


def require_between(owner: str, name: str, got: Any, least: float, most: float) -> float:
    """Checks a number; returns it as a float."""
    fits = _is_number(got) and least <= got <= most
    require(fits, owner, name, f"between {least:g} and {most:g}", got)
    return float(got)


def require_flag(owner: str, name: str, got: Any) -> bool:
    """Checks a truth value, which may be one of NumPy; returns it as a bool."""
    # NumPy's type is called bool, and before NumPy 2 bool_.
    require(type(got).__name__ in ("bool", "bool_"), owner, name, "True or False", got)
    return bool(got)


def require_number(owner: str, name: str, got: Any) -> float:
    """Checks a number that float32 can hold; returns it as a float."""
    fits = _is_finite(got) and abs(got) <= torch.finfo(torch.float32).max
    require(fits, owner, name, "a number that is finite in float32", got)
    return float(got)


def _is_number(got: Any) -> bool:
    return isinstance(got, numbers.Real) and not isinstance(got, bool)


def _is_finite(got: Any) -> bool:
    try:
        return _is_number(got) and math.isfinite(got)
    except OverflowError:  # an int that is too large for a float
        return False


def _require_scale(owner: str, got: Any, rho: str) -> None:
    expected = "a finite number"
    if isinstance(got, Tensor):
        expected = (
            "a number, which gets no gradient (for a temperature that learns, multiply the "
            "similarities of functional.select_neighbors by it and call "
            "functional.aggregate_neighbors)"
        )
    require(_is_finite(got), owner, "scale", expected, got)
    require(got == 1.0 or rho == "softmax", owner, "scale", "1.0 unless rho is 'softmax'", got)


def require_options(owner: str, device: Any, dtype: Any) -> dict[str, Any]:
    """Checks device and dtype of parameters; returns them as the keyword arguments of a layer."""
    expected = _either([_name(each) for each in FLOATING])
    require(
        dtype is None or any(dtype is each for each in FLOATING), owner, "dtype", expected, dtype
    )
    is_device = device is None or isinstance(device, torch.device | int)
    if isinstance(device, str):
        try:
            is_device = bool(torch.device(device))
        except RuntimeError:
            is_device = False
    require(is_device and not isinstance(device, bool), owner, "device", "a device", device)
    return {"device": device, "dtype": dtype}


def require_input(owner: str, name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Checks the shape of an input, as ``require_shape`` does, and its dtype."""
    require_shape(owner, name, tensor, expected)
    require_dtype(owner, name, tensor, *FLOATING)


def require_shape(owner: str, name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Checks the number of dimensions, and the sizes that `expected` gives as numbers."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{owner}: {name} must be a tensor, got {_shown(tensor)}")
    shape = tensor.shape
    fits = len(shape) == len(expected) and all(
        isinstance(wanted, str) or size == wanted
        for size, wanted in zip(shape, expected, strict=False)
    )
    if not fits:
        form = ", ".join(str(size) for size in expected)
        raise ValueError(f"{owner}: {name} must have shape [{form}], got shape {list(shape)}")


def require_dtype(owner: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        expected = _either([_name(dtype) for dtype in dtypes])
        raise ValueError(f"{owner}: {name} must be {expected}, got {_name(tensor.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_as_parameters(layer: nn.Module, **inputs: Tensor | None) -> None:
    """Explains a forward that failed, if the device or the dtype of an input is the reason.

    Raises:
        RuntimeError: naming the layer, the input, what was expected and what was passed.
    """
    owner = type(layer).__name__
    # Of integers are those of quantized layers, which take other inputs.
    parameter = next((X for X in layer.parameters() if X.is_floating_point()), None)
    for name, tensor in inputs.items():
        if parameter is None or tensor is None:
            continue
        if tensor.device != parameter.device:
            raise RuntimeError(
                f"{owner}: {name} must be on {parameter.device} as the parameters are, "
                f"got {tensor.device}"
            )
        kind = tensor.device.type
        is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if tensor.is_floating_point() and tensor.dtype != parameter.dtype and not is_cast:
            raise RuntimeError(
                f"{owner}: {name} must be {_name(parameter.dtype)} as the parameters are, "
                f"got {_name(tensor.dtype)}"
            )


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
    aggregation: Aggregation,
    positional_encoding: PositionalEncoding,
    coordinates: Coordinates,
) -> int:
    """Checks the settings that ConvNN1d, ConvNN2d and ConvNNAttention share; returns k."""
    require_choice(owner, "projections", projections, allowed_projections)
    require_choice(owner, "rho", rho, RHOS)
    require_choice(owner, "metric", metric, METRICS)
    require_choice(owner, "order", order, ORDERS)
    require_choice(owner, "aggregation", aggregation, AGGREGATIONS)
    require_choice(owner, "positional_encoding", positional_encoding, POSITIONAL_ENCODINGS)
    require_choice(owner, "coordinates", coordinates, COORDINATES)
    _require_scale(owner, scale, rho)
    require(
        not (projections == "learned" and rho == "ones"),
        owner,
        "projections",
        "other than learned with rho='ones', which gives query and key projections no gradient "
        "('value' learns the value projection alone)",
        projections,
    )
    return require_count(owner, "k", k)
