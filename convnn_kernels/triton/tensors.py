# SPDX-License-Identifier: MIT
"""Tensors as kernels read them: two batch dimensions of any strides, rows, adjacent channels."""

from typing import NamedTuple

from torch import Tensor

from .launch import Buffer

# The letter of a tensor in kernels, and that of its rows.
_ROWS = {"q": "n", "k": "m", "v": "m", "x": "n"}
_STRIDES = {X: tuple(f"stride_{X}{of}" for of in ("b1", "b2", row)) for X, row in _ROWS.items()}


class Rows(NamedTuple):
    """The rows of a tensor [..., N, D], whose leading dimensions are two, [B1, B2, N, D]."""

    data: Tensor | Buffer
    B1: int
    B2: int
    N: int
    D: int
    # In elements, of B1, B2 and N. The D channels of a row are adjacent.
    strides: tuple[int, int, int]

    @property
    def B(self) -> int:
        return self.B1 * self.B2

    def stride_arguments(self, letter: str) -> dict[str, int]:
        """The strides by the names that kernels give them: stride_qb1, stride_qb2, stride_qn."""
        return dict(zip(_STRIDES[letter], self.strides, strict=True))

    def contiguous(self, data: Tensor | Buffer) -> "Rows":
        """Rows of the same shape in other, contiguous memory."""
        rows = self.N * self.D
        return self._replace(data=data, strides=_without_unused(self, self.B2 * rows, rows, self.D))


def rows_of(X: Tensor) -> Rows:
    """The rows of X [..., N, D].

    X is copied if its channels are not adjacent, because gathering such rows would read a sector of
    memory for each channel, or if more than two leading dimensions cannot be merged into two.
    """
    X = _with_adjacent_channels(X)
    if X.dim() > 4:
        X = X.reshape(X.shape[:-3].numel(), *X.shape[-3:])
    shape, strides = X.shape, X.stride()
    B1, B2 = (1, 1, *shape[:-2])[-2:]
    stride_b1, stride_b2 = (0, 0, *strides[:-2])[-2:]
    if len(shape) == 3:
        B1, B2, stride_b1, stride_b2 = B2, 1, stride_b2, 0
    rows = Rows(X, B1, B2, shape[-2], shape[-1], (0, 0, 0))
    return rows._replace(strides=_without_unused(rows, stride_b1, stride_b2, strides[-2]))


def _without_unused(rows: Rows, b1: int, b2: int, n: int) -> tuple[int, int, int]:
    """Strides, in which that of a dimension of one, which has no effect, suits any alignment of the
    channels."""
    return b1 if rows.B1 > 1 else 0, b2 if rows.B2 > 1 else 0, n if rows.N > 1 else rows.D


def _with_adjacent_channels(X: Tensor) -> Tensor:
    """X, copied if its channels are not adjacent. An expanded dimension is not copied out."""
    if X.shape[-1] <= 1 or X.stride(-1) == 1:
        return X
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in X.stride()[:-1])
    return X[once].contiguous().expand(X.shape)


def alignment(*tensors: Rows) -> int:
    """The constant ALIGN of a kernel: a number of which all strides are multiples."""
    return 16 if all(stride % 16 == 0 for X in tensors for stride in X.strides) else 1


def is_same(X: Tensor, Y: Tensor) -> bool:
    """Whether two tensors of one dtype are the same elements in memory."""
    return X is Y or (
        X.data_ptr() == Y.data_ptr() and X.shape == Y.shape and X.stride() == Y.stride()
    )


def empty_gradient(X: Tensor, needed: bool) -> Tensor:
    """Memory for the gradient of X, contiguous; without elements if it is not needed."""
    return X.new_empty(X.shape if needed else 0)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
