# SPDX-License-Identifier: MIT
"""The arguments of `select` as its kernels take them, whatever the strategy."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hardware
from .metrics import METRICS
from .norms import compute_norms
from .tensors import Layout, alignment, is_same, rows_of

Pointers = dict[str, Any]


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

    Norms are computed if the metric is the cosine; query and key are scaled rows from then on.
    """
    arch = hardware.architecture(query)
    K, K_layout = rows_of(key)
    Q, Q_layout = (K, K_layout) if is_same(query, key) else rows_of(query)
    pointers: Pointers = {
        "p_query": Q,
        "p_key": K,
        "p_query_norm": None,
        "p_key_norm": None,
        "p_query_inverse": None,
        "p_key_inverse": None,
        "p_columns": None if candidates is None else candidates.contiguous(),
        "p_mask": None,
        "p_self": None if self_indices is None else self_indices.contiguous(),
    }
    mask_strides = (0, 0)
    if key_mask is not None:
        pointers["p_mask"], mask_layout = rows_of(key_mask.unsqueeze(-2))
        mask_strides = mask_layout.stride_b1, mask_layout.stride_b2
    if metric == "cosine":
        of_keys = compute_norms(K, K_layout, arch)
        of_queries = of_keys if Q is K else compute_norms(Q, Q_layout, arch)
        Q_layout, K_layout = of_queries.layout, of_keys.layout
        pointers |= {
            "p_query": of_queries.rows,
            "p_key": of_keys.rows,
            "p_query_norm": of_queries.norm,
            "p_key_norm": of_keys.norm,
            "p_query_inverse": of_queries.inverse,
            "p_key_inverse": of_keys.inverse,
        }
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
        mask_strides=mask_strides,
        bits=8 * query.dtype.itemsize,
        tf32=query.dtype == torch.float32 and hardware.allows_tf32(),
        arch=arch,
    )
    return search, pointers
