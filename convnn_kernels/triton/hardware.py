# SPDX-License-Identifier: MIT
"""What the device of a call can do. Nothing here imports Triton."""

import functools
import os

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, a choice that Triton makes when imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def architecture(X: Tensor) -> int:
    """The compute capability of X's device without its point, such as 90; 0 in the interpreter."""
    return _capability(X.device.index) if X.is_cuda else 0


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def allows_tf32() -> bool:
    """Whether PyTorch's switch allows TF32 in products of float32 matrices."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def product_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies blocks of float32; without effect for 16 bits."""
    return "tf32" if dtype.itemsize == 2 or allows_tf32() else "tf32x3"
