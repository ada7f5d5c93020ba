# SPDX-License-Identifier: MIT
"""The arguments of `select` as its kernels take them, whatever the strategy."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hardware
from .launch import Pointers
from .metrics import METRICS
from .norms import NO_NORMS, compute_norms, plan_norms, rescales
from .tensors import Layout, alignment, is_same, rows_of


class Search(NamedTuple):
    """A search for neighbors, but for the tensors: S = Q K^T (Eq. 3), of which select keeps the k
    largest of a row. A column of S is a row of key, or a candidate.
    """

    Q: Layout  # [B, N, D]
    K: Layout  # [B, M, D]
    columns: int
    k: int
    metric: str
    by_index: bool
    has_candidates: bool
    has_self: bool
    has_mask: bool
    mask_strides: tuple[int, int]
    bits: int
    tf32: bool
    arch: int

    def numbers(self) -> dict[str, Any]:
        """Numbers and constants that the kernels share, by parameter."""
        return {
            "N": self.Q.N,
            "M": self.K.N,
            "D": self.Q.D,
            "columns": self.columns,
            "k": self.k,
            "B2": self.Q.B2,
            **self.Q.strides("q"),
            **self.K.strides("k"),
            "stride_mb1": self.mask_strides[0],
            "stride_mb2": self.mask_strides[1],
            "ALIGN": alignment(self.Q, self.K),
            "METRIC": METRICS[self.metric],
            "BY_INDEX": self.by_index,
        }


def prepare(
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None,
    self_indices: Tensor | None,
    key_mask: Tensor | None,
    metric: str,
    order: str,
) -> tuple[Search, Pointers]:
    """The search that the arguments of `select` ask for, and its tensors by parameter.

    For the cosine, norms are computed and, except in float16, query and key are replaced by scaled
    rows.
    """
    arch, dtype = hardware.architecture(query), query.dtype
    K, K_layout = rows_of(key)
    one_tensor = is_same(query, key)
    Q, Q_layout = (K, K_layout) if one_tensor else rows_of(query)
    mask, mask_layout = (None, None) if key_mask is None else rows_of(key_mask.unsqueeze(-2))
    pointers = Pointers(
        query.device,
        p_query=Q,
        p_key=K,
        p_columns=None if candidates is None else candidates.contiguous(),
        p_mask=mask,
        p_self=None if self_indices is None else self_indices.contiguous(),
    )
    if metric == "cosine":
        scaled = rescales(dtype)
        plan = plan_norms(Q_layout, K_layout, dtype, one_tensor, scaled, arch)
        compute_norms(pointers, plan, one_tensor)
        if scaled:
            query_rows = "p_key_scaled" if one_tensor else "p_query_scaled"
            pointers.replace(p_query=query_rows, p_key="p_key_scaled")
            Q_layout, K_layout = Q_layout.contiguous(), K_layout.contiguous()
    else:
        pointers.add(**NO_NORMS)
    search = Search(
        Q=Q_layout,
        K=K_layout,
        columns=K_layout.N if candidates is None else candidates.shape[0],
        k=k,
        metric=metric,
        by_index=order == "index",
        has_candidates=candidates is not None,
        has_self=self_indices is not None,
        has_mask=key_mask is not None,
        mask_strides=(0, 0) if mask_layout is None else mask_layout[4:6],
        bits=8 * dtype.itemsize,
        tf32=dtype == torch.float32 and hardware.allows_tf32(),
        arch=arch,
    )
    return search, pointers
