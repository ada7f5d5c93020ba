# SPDX-License-Identifier: MIT
"""What the gradients of the functions over ranks have in common."""

from typing import Any

import torch
from torch import Tensor


class Gradient(torch.autograd.Function):
    """A gradient that is computed in its own node, which has no derivative."""

    function = ""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{ctx._forward_cls.function}: second derivatives are not implemented")


def to_sum(X: Tensor) -> Tensor:
    """X in a dtype in which gradients are computed and summed: of 16 bits, as float32.

    A gradient is a sum over blocks and ranks, and must be rounded once, not for each of them.
    """
    return X if X.dtype is torch.float64 else X.float()
