# SPDX-License-Identifier: MIT
"""The device of these tests, and copies of tensors to it and back."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ON_CPU = os.environ.get("CONVNN_GPU_TESTS") == "cpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")


def on_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator for CPU tensors, computed on the device."""

    def run(*args: Any, **options: Any) -> Any:
        options = {name: _moved(X) for name, X in options.items()}
        results = operator(*map(_moved, args), **options)
        return tuple(X.cpu() for X in results) if isinstance(results, tuple) else results.cpu()

    return run


def _moved(X: Any) -> Any:
    """A tensor on the device; like X, it may not be contiguous."""
    if not isinstance(X, Tensor):
        return X
    Y = X.to(DEVICE)
    if X.is_contiguous() or X.ndim < 2:
        return Y
    return Y.mT.contiguous().mT


def there(X: Any) -> Any:
    """A tensor on the device with the same strides, offset and memory between its elements."""
    if not isinstance(X, Tensor):
        return X
    memory = torch.empty(0, dtype=X.dtype).set_(X.untyped_storage())
    return memory.to(DEVICE).as_strided(X.shape, X.stride(), X.storage_offset())
