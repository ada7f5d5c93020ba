# SPDX-License-Identifier: MIT
"""The arguments of `aggregate` and its backward as their kernels take them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hardware
from .tensors import Layout, alignment, rows_of

RHOS = {"softmax": 0, "ones": 1, "similarity": 2}


class Aggregation(NamedTuple):
    """A convolution over modulated neighbors (Eq. 6), but for the tensors."""

    V: Layout  # [B, M, C]
    N: int
    k: int
    O: int
    is_dense: bool  # whether the weight is [O, C, k]
    has_weight: bool
    rho: str
    scale: float
    dtype: torch.dtype
    precision: str
    arch: int

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """The queries of all batch elements."""
        return self.V.B * self.N

    @property
    def has_rho(self) -> bool:
        """Whether rho is a number of each neighbor, not 1 of all."""
        return self.rho != "ones"

    def numbers(self) -> dict[str, Any]:
        """Numbers and constants that the kernels share, by parameter."""
        return {
            "rows": self.rows,
            "N": self.N,
            "M": self.V.N,
            "C": self.V.D,
            "O": self.O,
            "k": self.k,
            "scale": self.scale,
            "B2": self.V.B2,
            **self.V.strides("v"),
            "ALIGN": alignment(self.V),
            "RHO": RHOS[self.rho],
            "PRECISION": self.precision,
        }


def is_dense(weight: Tensor | None, channels: int) -> bool:
    """Whether a weight is [O, C, k] rather than [C, 1, k]; [1, 1, k] is both, and dense."""
    return weight is not None and weight.shape[1] == channels


def prepare(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    rho: str,
    scale: float,
) -> tuple[Aggregation, dict[str, Tensor | None]]:
    """The aggregation that the arguments of `aggregate` ask for, and its tensors by parameter.

    A dense weight is given to dense_inputs.py.
    """
    V, layout = rows_of(value)
    N, k = indices.shape[-2:]
    dense = is_dense(weight, layout.D)
    aggregation = Aggregation(
        V=layout,
        N=N,
        k=k,
        O=layout.D if weight is None else weight.shape[0],
        is_dense=dense,
        has_weight=weight is not None,
        rho=rho,
        scale=scale,
        dtype=value.dtype,
        precision=hardware.product_precision(value.dtype),
        arch=hardware.architecture(value),
    )
    tensors = {
        "p_value": V,
        "p_similarities": similarities.contiguous(),
        "p_indices": indices.contiguous(),
        "p_given_weight" if dense else "p_weight": None if weight is None else weight.contiguous(),
    }
    return aggregation, tensors
