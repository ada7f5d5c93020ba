# SPDX-License-Identifier: MIT
"""The arguments of `select` as its kernels take them, whatever the strategy."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import hardware
from .launch import Workspace
from .metrics import METRICS
from .norms import add_norms, compute_norms
from .tensors import Rows, alignment, is_same, rows_of


@dataclass
class Search:
    """One search for neighbors: S = Q K^T (Eq. 3), of which select keeps the k largest of a row.

    A column of S is a row of key, or a candidate.
    """

    Q: Rows  # [B, N, D]
    K: Rows  # [B, M, D]
    candidates: Tensor | None  # [R] int64
    self_indices: Tensor | None  # [N] int64
    key_mask: Tensor | None  # [..., M] bool
    k: int
    metric: str
    by_index: bool
    arch: int
    similarities: Tensor  # [..., N, k] float32: the results
    indices: Tensor  # [..., N, k] int64
    arguments: dict[str, Any]  # those that several kernels have in common, by parameter

    @property
    def columns(self) -> int:
        return self.K.N if self.candidates is None else self.candidates.shape[0]

    @property
    def bits(self) -> int:
        return 8 * self.Q.data.dtype.itemsize


def prepare(
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None,
    self_indices: Tensor | None,
    key_mask: Tensor | None,
    metric: str,
    order: str,
) -> Search:
    """The search that the arguments of `select` ask for, with norms computed and results empty."""
    candidates = None if candidates is None else candidates.contiguous()
    self_indices = None if self_indices is None else self_indices.contiguous()
    K = rows_of(key)
    search = Search(
        Q=K if is_same(query, key) else rows_of(query),
        K=K,
        candidates=candidates,
        self_indices=self_indices,
        key_mask=key_mask,
        k=k,
        metric=metric,
        by_index=order == "index",
        arch=hardware.architecture(query),
        similarities=query.new_empty((*query.shape[:-1], k), dtype=torch.float32),
        indices=query.new_empty((*query.shape[:-1], k), dtype=torch.int64),
        arguments={},
    )
    if search.indices.numel():
        search.arguments = _norms(search, query.device) | _common(search)
    return search


def _norms(search: Search, device: torch.device) -> dict[str, Any]:
    """Computes norms if the metric is the cosine; Q and K are scaled rows from then on."""
    if search.metric != "cosine":
        names = ("query_norm", "key_norm", "query_inverse", "key_inverse")
        return {f"p_{name}": None for name in names}
    Q, K, workspace = search.Q, search.K, Workspace()
    of_keys = add_norms(K, workspace)
    of_queries = of_keys if Q is K else add_norms(Q, workspace)
    workspace.allocate(device)
    compute_norms(K, of_keys, search.arch)
    if Q is not K:
        compute_norms(Q, of_queries, search.arch)
    search.Q, search.K = of_queries.rows, of_keys.rows
    return {
        "p_query_norm": of_queries.norm,
        "p_key_norm": of_keys.norm,
        "p_query_inverse": of_queries.inverse,
        "p_key_inverse": of_keys.inverse,
    }


def _common(search: Search) -> dict[str, Any]:
    Q, K = search.Q, search.K
    mask = None if search.key_mask is None else rows_of(search.key_mask.unsqueeze(-2))
    stride_mb1, stride_mb2, _ = (0, 0, 0) if mask is None else mask.strides
    return {
        "p_query": Q.data,
        "p_key": K.data,
        "p_columns": search.candidates,
        "p_mask": None if mask is None else mask.data,
        "p_self": search.self_indices,
        "p_similarities": search.similarities,
        "p_indices": search.indices,
        "N": Q.N,
        "M": K.N,
        "D": Q.D,
        "columns": search.columns,
        "k": search.k,
        "B2": Q.B2,
        **Q.stride_arguments("q"),
        **K.stride_arguments("k"),
        "stride_mb1": stride_mb1,
        "stride_mb2": stride_mb2,
        "ALIGN": alignment(Q, K),
        "METRIC": METRICS[search.metric],
        "BY_INDEX": search.by_index,
    }
