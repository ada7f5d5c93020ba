# SPDX-License-Identifier: MIT
"""The arguments of `select` as its kernels take them, whatever the strategy."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hardware
from .metrics import METRICS
from .norms import Norms, prepare_norms, rescales
from .tensors import MOST_ROWS, Layout, alignment, is_same, rows_of


class Search(NamedTuple):
    """A search for neighbors, but for the tensors: S = Q K^T (Eq. 3), of which select keeps the k
    largest of a row. A column of S is a row of key, or a candidate.
    """

    Q: Layout  # [B, N, D]
    K: Layout  # [B, M, D]
    one_tensor: bool  # whether query is key
    columns: int
    k: int
    metric: str
    by_index: bool
    has_candidates: bool
    has_self: bool
    has_mask: bool
    mask_strides: tuple[int, int]
    has_range: bool
    exclude_self: bool
    # Along the batch, in candidates and in queries; 0: shared.
    candidates_stride: int
    self_stride: int
    range_stride: int
    dtype: torch.dtype
    tf32: bool
    arch: int

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    @property
    def ranks(self) -> int:
        """How many of the best columns of a row surely have its neighbors."""
        return self.k + self.exclude_self

    @property
    def is_plain(self) -> bool:
        """Whether all queries may see the same keys, and the tokens themselves are included."""
        own = self.has_range or self.candidates_stride > 0 or self.self_stride > 0
        return not (own or self.exclude_self)

    @property
    def scales_rows(self) -> bool:
        """Whether kernels read scaled rows, contiguous, in the place of query and key."""
        return self.metric == "cosine" and rescales(self.dtype)

    def norms(self) -> Norms:
        return prepare_norms(
            self.Q, self.K, self.dtype, self.metric, self.one_tensor, self.scales_rows, self.arch
        )

    def numbers(self) -> dict[str, Any]:
        """Numbers and constants that the kernels share, by parameter."""
        Q, K = self.Q, self.K
        if self.scales_rows:
            Q, K = Q.contiguous(), K.contiguous()
        return {
            "N": Q.N,
            "M": K.N,
            "D": Q.D,
            "columns": self.columns,
            "k": self.k,
            "B2": Q.B2,
            **Q.strides("q"),
            **K.strides("k"),
            "stride_mb1": self.mask_strides[0],
            "stride_mb2": self.mask_strides[1],
            "stride_columns": self.candidates_stride,
            "stride_self": self.self_stride,
            "stride_range": self.range_stride,
            "ALIGN": alignment(Q, K),
            "METRIC": METRICS[self.metric],
            "BY_INDEX": self.by_index,
            "EXCLUDE_SELF": self.exclude_self,
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
    key_range: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Search, dict[str, Tensor | None]]:
    """The search that the arguments of `select` ask for, and its tensors by parameter."""
    K, K_layout = rows_of(key)
    if K_layout.N == 0:
        # There is nothing that a candidate could be.
        candidates = None
    one_tensor = is_same(query, key)
    Q, Q_layout = (K, K_layout) if one_tensor else rows_of(query)
    mask, mask_layout = (None, None) if key_mask is None else rows_of(key_mask.unsqueeze(-2))
    mask_strides = (0, 0) if mask_layout is None else mask_layout[4:6]
    candidates, candidates_stride = _of_batch(candidates, Q_layout.B)
    if not one_tensor and candidates_stride == 0:
        Q_layout, K_layout = _fold(Q_layout, K_layout, mask_strides)
    folded = Q_layout.N // query.shape[-2]
    self_indices, self_stride = _of_queries(self_indices, Q_layout, folded, 1)
    key_range, range_stride = _of_queries(key_range, Q_layout, folded, 2)
    search = Search(
        Q=Q_layout,
        K=K_layout,
        one_tensor=one_tensor,
        columns=K_layout.N if candidates is None else candidates.shape[-1],
        k=k,
        metric=metric,
        by_index=order == "index",
        has_candidates=candidates is not None,
        has_self=self_indices is not None,
        has_mask=key_mask is not None,
        mask_strides=mask_strides,
        has_range=key_range is not None,
        exclude_self=exclude_self,
        candidates_stride=candidates_stride,
        self_stride=self_stride,
        range_stride=range_stride,
        dtype=query.dtype,
        tf32=query.dtype == torch.float32 and hardware.allows_tf32(),
        arch=hardware.architecture(query),
    )
    tensors = {
        "p_query": Q,
        "p_key": K,
        "p_columns": candidates,
        "p_mask": mask,
        "p_self": self_indices,
        "p_range": key_range,
    }
    return search, tensors


def _of_batch(rows: Tensor | None, B: int) -> tuple[Tensor | None, int]:
    """Rows [R] or [..., R], contiguous, and their stride along B batch elements; 0: shared."""
    if rows is None:
        return None, 0
    return rows.contiguous(), rows.shape[-1] if rows.dim() > 1 and B > 1 else 0


def _of_queries(X: Tensor | None, Q: Layout, folded: int, dims: int) -> tuple[Tensor | None, int]:
    """What each query has, in `dims` dimensions or in those of the batch, too; contiguous, and its
    stride along batch elements of Q, in queries; 0: shared.

    `folded` batch elements have become one in Q: what they share is repeated.
    """
    if X is None:
        return None, 0
    if X.dim() > dims:
        return X.contiguous(), Q.N if Q.B > 1 else 0
    return X.repeat(folded, *[1] * (dims - 1)) if folded > 1 else X.contiguous(), 0


def _fold(Q: Layout, K: Layout, mask_strides: tuple[int, int]) -> tuple[Layout, Layout]:
    """Queries of batch elements that share their keys and mask, as those of one batch element.

    Norms of keys are then computed once, and a tile of S has queries of several batch elements.
    """
    if Q.B * Q.N > MOST_ROWS:
        return Q, K
    if Q.B2 > 1 and K.stride_b2 == mask_strides[1] == 0 and Q.stride_b2 == Q.N * Q.stride_n:
        Q, K = Q._replace(B2=1, N=Q.B2 * Q.N, stride_b2=0), K._replace(B2=1)
    if Q.B2 == 1 and K.stride_b1 == mask_strides[0] == 0 and Q.stride_b1 == Q.N * Q.stride_n:
        Q, K = Q._replace(B1=1, N=Q.B1 * Q.N, stride_b1=0), K._replace(B1=1)
    return Q, K
