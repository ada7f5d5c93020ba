# SPDX-License-Identifier: MIT
"""Some batch elements of a call at a time, where the temporaries of all of them are too many.

A part has all of the inner batch dimension or is within it, so that its tensors are views. Sums
over the batch, the gradients of weight and bias, are kept for each part in float32 and added at the
end, in one order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import Layout, cdiv


class BatchPart(NamedTuple):
    """Batch elements [first, first + elements), which are B1 x B2."""

    b1: int
    b2: int
    B1: int
    B2: int
    first: int

    @property
    def elements(self) -> int:
        return self.B1 * self.B2

    def layout(self, X: Layout) -> Layout:
        """That of a part; absent rows keep their empty layout."""
        if X.N == 0:
            return X
        stride_b1 = X.stride_b1 if self.B1 > 1 else 0
        stride_b2 = X.stride_b2 if self.B2 > 1 else 0
        return X._replace(B1=self.B1, B2=self.B2, stride_b1=stride_b1, stride_b2=stride_b2)

    def rows(self, X: Tensor | None, of: Layout) -> Tensor | None:
        """The part of X, whose layout is `of`."""
        if X is None:
            return None
        offset = X.storage_offset() + self.b1 * of.stride_b1 + self.b2 * of.stride_b2
        strides = (of.stride_b1, of.stride_b2, of.stride_n, 1)
        return X.as_strided((self.B1, self.B2, of.N, of.D), strides, offset)

    def slice(self, X: Tensor | None) -> Tensor | None:
        """The part of X [..., N, k], contiguous; all of it if it is empty."""
        if X is None or X.numel() == 0:
            return X
        return X.flatten(0, -3)[self.first : self.first + self.elements]


def batch_parts(batch: int, B2: int, each: int) -> list[BatchPart]:
    """Parts of `each` batch elements: a multiple of B2, or at most B2."""
    if each >= B2:
        return [
            BatchPart(b1, 0, min(each, batch - b1 * B2) // B2, B2, b1 * B2)
            for b1 in range(0, batch // B2, each // B2)
        ]
    return [
        BatchPart(b1, b2, 1, min(each, B2 - b2), b1 * B2 + b2)
        for b1 in range(batch // B2)
        for b2 in range(0, B2, each)
    ]


def new_sums(parts: int, grad: Tensor | None) -> Tensor | None:
    """Memory for the sums of each part, [parts, numbers], whose total is `grad`; each aligned."""
    if grad is None or grad.numel() == 0:
        return None
    numbers = grad.numel()
    return grad.new_empty((parts, 4 * cdiv(numbers, 4)), dtype=torch.float32)[:, :numbers]
