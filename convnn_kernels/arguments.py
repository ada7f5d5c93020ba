# SPDX-License-Identifier: MIT
"""Types of the arguments of ``convnn_kernels.functional``.

The dispatcher checks types as well, but it takes a tensor of one element for a number, which drops
its gradient, and True for 1; and its message about a wrong type prints the whole value. Numbers and
truth values are therefore checked before a call (``whole`` and ``real``, which the fast path, a
plain int or float, does without, and ``flag``), everything else after a call that failed
(``require_types``).

``function`` is the name that messages begin with.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convnn_kernels import checks, torch_internals

_CHOICES = {"metric": checks.METRICS, "order": checks.ORDERS, "rho": checks.RHOS}
# Of a number in a message; Python prints about 14,000.
_MOST_BITS = 2048
_MODULE_OF_BUILTINS = int.__module__
_LEARN = (
    ", which would get no gradient. To learn a temperature, multiply the similarities of "
    "select_neighbors by it and pass them to aggregate_neighbors"
)


def whole(function: str, name: str, value: Any) -> Any:
    """The argument as an int, or as it is where PyTorch traces sizes as other types.

    Raises:
        TypeError: naming the argument, what was expected and what it got.
    """
    if isinstance(value, torch.SymInt) or _is_traced(value):
        return value
    # Last: torch.compile sees a scalar of numpy as an array, up to here, where it gives up tracing.
    if not isinstance(value, bool) and isinstance(value, numbers.Integral):
        return int(value)
    hint = f" ({name}.item() reads its number)" if isinstance(value, Tensor) else ""
    raise TypeError(f"{function}: {name} must be a whole number, got {described(value)}{hint}")


def real(function: str, name: str, value: Any) -> Any:
    """The argument as a float; otherwise like ``whole``."""
    if isinstance(value, torch.SymInt | torch.SymFloat) or _is_traced(value):
        return value
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # the operator says that it must be finite
            return math.inf
    hint = _LEARN if isinstance(value, Tensor) else ""
    raise TypeError(f"{function}: {name} must be a number, got {described(value)}{hint}")


def flag(function: str, name: str, value: Any) -> Any:
    """The argument as a bool, which it is not if it comes from NumPy; otherwise like ``whole``."""
    if value is True or value is False or _is_traced(value):
        return value
    # NumPy's type is called bool, and before NumPy 2 bool_.
    if type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{function}: {name} must be True or False, got {described(value)}")


def radius(function: str, value: Any, metric: Any) -> Any:
    """The argument `within` as a float; otherwise like ``whole``.

    Raises:
        TypeError: if it is not a number.
        RuntimeError: if the number is not a radius, or the metric has none.
    """
    if isinstance(value, Tensor) and not _is_traced(value):
        raise TypeError(
            f"{function}: within must be a number, got a tensor (within.item() reads its number)"
        )
    value = real(function, "within", value)
    if not 0 <= value < math.inf:
        raise RuntimeError(f"{function}: within must be finite and at least 0, got {value:g}")
    if metric != "euclidean":
        raise RuntimeError(
            f"{function}: within must be None unless metric is 'euclidean', got {value:g} with "
            f"metric {metric!r}"
        )
    return value


def require_types(function: str, op: torch._ops.OpOverload, args: Sequence[Any]) -> None:
    """Explain a call of ``op`` that the dispatcher refused, if a type is the reason.

    Raises:
        TypeError: naming the argument, what was expected and what it got.
        RuntimeError: if k does not fit into the 64 bits of the dispatcher.
    """
    for argument, value in zip(op._schema.arguments, args, strict=True):
        name, kind = argument.name, str(argument.type)
        # None for a tensor that is not optional has a message of the operators' own.
        if _is_foreign(value) or (value is None and kind.endswith("Tensor")):
            continue
        if kind in ("Tensor", "Optional[Tensor]"):
            require_tensor(function, name, value, kind == "Optional[Tensor]")
        elif kind == "str" and not isinstance(value, str):
            expected = checks.listed(_CHOICES[name])
            raise TypeError(f"{function}: {name} must be {expected}, got {described(value)}")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            expected = "below 2**63" if value > 0 else "at least 1"
            raise RuntimeError(f"{function}: {name} must be {expected}, got {described(value)}")


def require_tensor(function: str, name: str, value: Any, is_optional: bool = False) -> None:
    """Check that an argument is a tensor, and a dense one: there are no kernels for others.

    Raises:
        TypeError: naming the argument, what was expected and what it got.
    """
    if isinstance(value, Tensor):
        return _require_dense(function, name, value)
    if _is_foreign(value) or (is_optional and value is None):
        return
    hint = ""
    if type(value).__module__ == "numpy":
        hint = " (torch.from_numpy converts it)"
    elif isinstance(value, list | tuple | range):
        hint = " (torch.tensor converts it)"
    elif isinstance(value, nn.Module) and isinstance(getattr(value, name, None), Tensor):
        hint = f" (pass its {name})"
    expected = "a tensor or None" if is_optional else "a tensor"
    raise TypeError(f"{function}: {name} must be {expected}, got {described(value)}{hint}")


def _require_dense(function: str, name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        got = "a nested one (pad it, and pass key_mask)"
    elif tensor.is_quantized:
        got = "a quantized one (dequantize() converts it)"
    elif tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        got = f"one of layout {layout} (to_dense() converts it)"
    else:
        return
    raise TypeError(f"{function}: {name} must be a dense tensor, got {got}")


def require_storage(function: str, name: str, tensor: Tensor) -> None:
    """Check what the operators of PyTorch read without a check: the storage that it has here.

    Raises:
        RuntimeError: if it was freed or made too small.
    """
    if torch.compiler.is_compiling():
        return
    tensor = torch_internals.unwrapped(tensor)
    # What handles the operators itself, as fake tensors do, may have its memory elsewhere.
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        checks.check_storage_of(function, name, tensor)


def check_edge_index(indices: Any, similarities: Any, num_keys: Any) -> Any:
    """Check the arguments of ``edge_index``, but not their values, and return num_keys.

    Raises:
        TypeError, RuntimeError: naming the argument, what was expected and what it got.
    """
    require_tensor("edge_index", "indices", indices)
    require_tensor("edge_index", "similarities", similarities)
    if indices.is_floating_point() and similarities.dtype is torch.int64:
        raise RuntimeError(
            "edge_index: indices must be int64, got the similarities: select_neighbors returns "
            "them first, edge_index takes them second"
        )
    checks.check_neighbors("edge_index", indices, similarities)
    require_storage("edge_index", "indices", indices)
    require_storage("edge_index", "similarities", similarities)
    if num_keys is None:
        return None
    num_keys = whole("edge_index", "num_keys", num_keys)
    if num_keys < 0:
        got = described(num_keys)
        raise RuntimeError(f"edge_index: num_keys must be at least 0, got {got}")
    graphs = max(indices.shape[:-2].numel(), 1)
    if num_keys * graphs >= 2**63:  # the number of the last key, whatever the batch
        got = described(num_keys)
        raise RuntimeError(f"edge_index: num_keys must be below 2**63 / {graphs}, got {got}")
    return num_keys


def _is_traced(value: Any) -> bool:
    """Whether the value stands for a number: torch.jit.trace sees sizes as tensors."""
    if isinstance(value, Tensor):
        return torch.jit.is_tracing()  # type: ignore[attr-defined]
    return _is_foreign(value)


def _is_foreign(value: Any) -> bool:
    """Whether the value is no tensor but handles PyTorch's calls, as the proxies of torch.fx do."""
    return not isinstance(value, Tensor) and hasattr(type(value), "__torch_function__")


def described(value: Any) -> str:
    """The value if it is short, else its type."""
    if isinstance(value, Tensor):
        return "a tensor"
    if torch.compiler.is_compiling():  # which cannot trace repr
        return type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if type(value) is int and value.bit_length() > _MOST_BITS:
        return f"a number of {value.bit_length()} bits"
    short = value is None or type(value) in (bool, int, float, complex)
    if short or (type(value) is str and len(value) <= 20):
        return repr(value)
    module, name = type(value).__module__, type(value).__qualname__
    return name if module == _MODULE_OF_BUILTINS else f"{module}.{name}"
