# SPDX-License-Identifier: MIT
"""Tensors as kernels read them: two batch dimensions of any strides, rows, adjacent channels."""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Kernels count rows in 32 bits, and some count those of query and key one behind the other.
MOST_ROWS = 10**9
# The letter of a tensor in kernels, and that of its rows.
_ROWS = {"q": "n", "k": "m", "v": "m", "x": "n"}


class Layout(NamedTuple):
    """The shape of rows, [B1, B2, N, D], and their strides in elements. The D channels of a row are
    adjacent."""

    B1: int
    B2: int
    N: int
    D: int
    stride_b1: int
    stride_b2: int
    stride_n: int

    @property
    def B(self) -> int:
        return self.B1 * self.B2

    def strides(self, letter: str) -> dict[str, int]:
        """The strides by the names that kernels give them: stride_qb1, stride_qb2, stride_qn."""
        names = (f"stride_{letter}{of}" for of in ("b1", "b2", _ROWS[letter]))
        return dict(zip(names, self[4:], strict=True))

    def distinct(self) -> "Layout":
        """Each row once, however many batch elements share it."""
        B1, B2 = (self.B1 if self.stride_b1 else 1), (self.B2 if self.stride_b2 else 1)
        return _layout(B1, B2, self.N, self.D, self.stride_b1, self.stride_b2, self.stride_n)

    def contiguous(self) -> "Layout":
        """The same shape in contiguous memory. What batch elements share, they still share."""
        once, rows = self.distinct(), self.N * self.D
        b1 = once.B2 * rows if self.stride_b1 else 0
        b2 = rows if self.stride_b2 else 0
        return _layout(self.B1, self.B2, self.N, self.D, b1, b2, self.D)


def rows_of(X: Tensor) -> tuple[Tensor, Layout]:
    """The rows of X [..., N, D].

    X is copied if its channels are not adjacent, because gathering such rows would read a sector of
    memory for each channel, or if more than two leading dimensions cannot be merged into two. An
    expanded dimension is not copied out, unless it stands among others that are not to be merged.
    """
    layout = _layout_in_place(X.shape, X.stride())
    if layout is None:
        X = _copy_of_distinct(X)
        if X.dim() > 4:
            X = X.reshape(X.shape[:-3].numel(), *X.shape[-3:])
        layout = _layout_in_place(X.shape, X.stride())
        assert layout is not None
    return X, layout


# A call asks for every tensor, and most have shapes and strides of the call before.
@functools.lru_cache(maxsize=4096)
def _layout_in_place(shape: torch.Size, strides: tuple[int, ...]) -> Layout | None:
    """The layout of a tensor that kernels can read where it lies; None if it must be copied."""
    if 0 in shape:  # there is nothing to read
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if (strides[-1] != 1 and shape[-1] > 1) or not _merge(shape[:-3], strides):
        return None
    *lead, N, D = shape
    if not lead:
        return _layout(1, 1, N, D, 0, 0, strides[-2])
    if len(lead) == 1:
        return _layout(lead[0], 1, N, D, strides[0], 0, strides[-2])
    outer = [stride for size, stride in zip(lead[:-1], strides, strict=False) if size > 1]
    B1 = math.prod(lead[:-1])
    return _layout(B1, lead[-1], N, D, outer[-1] if outer else 0, strides[-3], strides[-2])


def _layout(B1: int, B2: int, N: int, D: int, b1: int, b2: int, n: int) -> Layout:
    """A layout in which a dimension of one has the stride that it would have in contiguous memory,
    or 0: strides without effect do not make another variant."""
    return Layout(B1, B2, N, D, b1 if B1 > 1 else 0, b2 if B2 > 1 else 0, n if N > 1 else D)


def _merge(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether dimensions of this shape are one dimension in memory."""
    lead = [(size, stride) for size, stride in zip(shape, strides, strict=False) if size > 1]
    return all(outer == size * stride for (_, outer), (size, stride) in pairwise(lead))


def _copy_of_distinct(X: Tensor) -> Tensor:
    """A contiguous copy of X, in which an expanded dimension is expanded again."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in X.stride()[:-1])
    return X[once].contiguous().expand(X.shape)


def alignment(*layouts: Layout) -> int:
    """The constant ALIGN of a kernel: a number of which all strides are multiples."""
    return 16 if all(stride % 16 == 0 for each in layouts for stride in each[4:]) else 1


def is_same(X: Tensor, Y: Tensor) -> bool:
    """Whether two tensors of one dtype are the same elements in memory."""
    return X is Y or (
        X.data_ptr() == Y.data_ptr() != 0 and X.shape == Y.shape and X.stride() == Y.stride()
    )


def empty_gradient(X: Tensor, needed: bool) -> Tensor:
    """Memory for the gradient of X, contiguous; without elements if it is not needed."""
    return X.new_empty(X.shape if needed else 0)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
