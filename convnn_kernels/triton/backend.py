# SPDX-License-Identifier: MIT
"""When the Triton kernels can run a call, and running it.

Triton is imported when a call first runs. With ``TRITON_INTERPRET=1`` set before that, kernels run
in Triton's interpreter, on CPU tensors.
"""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .hardware import interpreted
from .tensors import MOST_ROWS

OLDEST = (3, 6)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CannotCompile(RuntimeError):
    """Triton cannot compile on this machine, whatever the kernel."""


@functools.cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = ".".join(map(str, OLDEST))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    compilers = filter(None, (os.environ.get("CC"), "clang", "gcc"))
    if not any(map(shutil.which, compilers)):
        return "Triton needs a C compiler at run time, and none was found"
    return None


def refuses(
    device: torch.device, dtypes: tuple[torch.dtype, ...], is_huge: bool = False
) -> str | None:
    """Why a call with tensors of these dtypes on `device` cannot run; None if it can."""
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in _DTYPES:
            return f"it does not take {str(dtype).removeprefix('torch.')}"
        if interpreted() and dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    if device.type != ("cpu" if interpreted() else "cuda"):
        return f"it cannot run tensors on {device}"
    if is_huge:
        return f"it takes up to {MOST_ROWS:,} rows"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, {device} is older"
    return None


def is_huge(tensors: list[Tensor]) -> bool:
    """Whether a dimension of a tensor is more than kernels can count."""
    return any(
        not 0 < X.numel() <= MOST_ROWS and max(X.shape, default=0) > MOST_ROWS for X in tensors
    )


def run(name: str, device: torch.device, args: tuple[Any, ...]) -> Any:
    """The results of operator `name` for all of its arguments, which have been checked.

    Raises:
        CannotCompile: if Triton finds no working C compiler.
    """
    try:
        operator = operators()[name]
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return operator(*args)
        with torch.cuda.device(device):
            return operator(*args)
    except subprocess.CalledProcessError as error:
        raise CannotCompile(str(error)) from error
    except RuntimeError as error:
        if "Failed to find C compiler" in str(error):
            raise CannotCompile(str(error)) from error
        raise


@functools.cache
def operators() -> dict[str, Callable[..., Any]]:
    """The implementation of each operator. Imports Triton."""
    from .aggregate import aggregate
    from .aggregate_backward import aggregate_backward
    from .forward import forward, forward_backward
    from .launch import settle_cache_keys
    from .select import select
    from .select_backward import select_backward

    settle_cache_keys()
    return {
        "convnn::forward": forward,
        "convnn::select": select,
        "convnn::aggregate": aggregate,
        "convnn::forward_backward": forward_backward,
        "convnn::select_backward": select_backward,
        "convnn::aggregate_backward": aggregate_backward,
    }
