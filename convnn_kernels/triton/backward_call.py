# SPDX-License-Identifier: MIT
"""The arguments of a depthwise backward as its kernels take them."""

from typing import NamedTuple

import torch

from .tensors import Layout, alignment


class Backward(NamedTuple):
    """The gradients of a call, but for the tensors."""

    Q: Layout  # [B, N, D]; without elements, as K, where there is only V
    K: Layout  # [B, M, D]
    V: Layout  # [B, M, C]; without elements where there is only Q and K
    batch: int  # batch elements in all
    B: int  # those of a plan
    B2: int
    N: int
    M: int
    k: int
    metric: str
    rho: str
    scale: float
    has_weight: bool
    has_direct: bool  # whether there is a gradient of the returned similarities
    needed: frozenset[str]
    query_dtype: torch.dtype
    value_dtype: torch.dtype
    query_precision: str  # of products with rows of query; so that of value
    value_precision: str
    arch: int
    R: int = 0  # rows of key among which all neighbors are, but for one of each query; or 0

    @property
    def align(self) -> int:
        return alignment(self.Q, self.K, self.V)

    @property
    def bits(self) -> int:
        return 8 * max(self.query_dtype.itemsize, self.value_dtype.itemsize)

    @property
    def through_rho(self) -> bool:
        """Whether ds depends on the gradient of the output."""
        search = self.has_search or "similarities" in self.needed
        return search and self.V.N > 0 and self.rho != "ones"

    @property
    def has_search(self) -> bool:
        return bool(self.needed & {"query", "key"})

    @property
    def sorts(self) -> bool:
        return bool(self.needed & {"value", "key"})
