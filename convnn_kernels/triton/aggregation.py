# SPDX-License-Identifier: MIT
"""The arguments of `aggregate` and its backward as their kernels take them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import hardware
from .tensors import Rows, alignment, rows_of

RHOS = {"softmax": 0, "ones": 1, "similarity": 2}


@dataclass
class Aggregation:
    """A convolution over modulated neighbors (Eq. 6): its inputs, and what kernels share."""

    V: Rows  # [B, M, C]
    similarities: Tensor  # [..., N, k] float32, contiguous
    indices: Tensor  # [..., N, k] int64, contiguous
    weight: Tensor | None  # [O, C, k] dense or [C, 1, k] depthwise
    O: int
    rho: str
    arch: int
    arguments: dict[str, Any]  # those that several kernels have in common, by parameter

    @property
    def N(self) -> int:
        return self.indices.shape[-2]

    @property
    def k(self) -> int:
        return self.indices.shape[-1]

    @property
    def rows(self) -> int:
        """The queries of all batch elements, B * N."""
        return self.V.B * self.N

    @property
    def bits(self) -> int:
        return 8 * self.V.data.dtype.itemsize

    @property
    def dense(self) -> bool:
        """Whether weight is [O, C, k]; a weight [1, 1, k] is both, and dense."""
        return self.weight is not None and self.weight.shape[1] == self.V.D

    def kernel_weight(self) -> Tensor | None:
        """The weight as kernels read it: [k, C, O] if dense, else [C, 1, k], contiguous."""
        if self.weight is None:
            return None
        return (self.weight.permute(2, 1, 0) if self.dense else self.weight).contiguous()


def prepare(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    rho: str,
    scale: float,
) -> Aggregation:
    V = rows_of(value)
    s, I = similarities.contiguous(), indices.contiguous()
    O = V.D if weight is None else weight.shape[0]
    arguments = {
        "p_value": V.data,
        "p_similarities": s,
        "p_indices": I,
        "N": I.shape[-2],
        "M": V.N,
        "C": V.D,
        "O": O,
        "k": I.shape[-1],
        "scale": scale,
        "B2": V.B2,
        **V.stride_arguments("v"),
        "ALIGN": alignment(V),
        "RHO": RHOS[rho],
    }
    return Aggregation(V, s, I, weight, O, rho, hardware.architecture(value), arguments)
