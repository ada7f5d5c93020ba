# SPDX-License-Identifier: MIT
"""Convolutional nearest neighbors, in the symbols of section 4.1 of the paper.

    S = Q K^T                        Eq. 3    similarity   [..., N, M]
    s_i = k-max S[i, :]              Eq. 4    select       [..., N, k]
    I_i = k-argmax S[i, :]           Eq. 5    select       [..., N, k]
    X_nn,i = diag(rho(s_i)) V[I_i]   Eq. 6    modulate     [..., N, k, C]
    Y = Conv1d(X_nn), stride k       step 4   aggregate    [..., N, O or C]

Every intermediate tensor is materialized, gradients come from plain autograd, and arguments have
the names and order of the operators'. float64 is computed in float64; all other dtypes are computed
in float32 and rounded once, at the end.

Algorithm 1 as printed differs from Eq. 3: with features stored as [c, n], its `k_norm.T @ q_norm`
is the transpose of S. The rows of that matrix are keys, so `topk` over the last dimension would
choose queries for every key. Eq. 3 is right, and this module follows it: rows are queries.

The operators, and this module with them, deliberately differ from eager PyTorch in four ways:

- A row with norm <= 1e-12 has cosine 0 and a gradient of exactly 0, where `F.normalize` divides the
  gradient by 1e-12. The norm of a finite row does not overflow.
- Neighbors are in a total order: similarity descending, then index ascending. NaN ranks above every
  number, as in `torch.topk`, which leaves the order of ties unspecified.
- Masked keys, and those out of a query's range, are never neighbors, and k may exceed the number of
  keys. Where fewer than k keys remain, missing neighbors come last, with similarity -inf and index
  0.
- A similarity of -inf marks a missing neighbor. It contributes nothing to output or gradient, for
  any rho and any value in V; eager softmax over missing neighbors only would give NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computations with tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(X: Tensor) -> Tensor:
    """The rows of X [..., D] divided by their norms. Rows with norm <= 1e-12 become 0."""
    if X.shape[-1] == 0:
        return X
    # Squares of 1e20 overflow float32, so rows are scaled to about 1 first. The scale is a power of
    # two and therefore exact; the result does not depend on it, so it needs no gradient.
    with torch.no_grad():
        largest = X.abs().amax(dim=-1, keepdim=True)
        exponent = torch.frexp(largest).exponent - 1
        scale = torch.ldexp(torch.ones_like(largest), exponent)
        scale = torch.where(largest.isfinite() & (scale > 0), scale, 1.0)
        is_zero = torch.linalg.vector_norm(X / scale, dim=-1, keepdim=True) * scale <= EPSILON
    # The inner `where` keeps 0/0 out of the gradient, the outer one sets value and gradient to 0.
    scaled = torch.where(is_zero, 1.0, X / scale)
    unit = scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(is_zero, 0.0, unit)


def similarity(query: Tensor, key: Tensor, metric: str = "cosine") -> Tensor:
    """S [..., N, M] of query [..., N, D] and key [..., M, D] (Eq. 3). Higher is nearer.

    `cosine` and `dot` are a matrix product, whose rounding may depend on the position of a row.
    `euclidean` is -||q - k||^2 from direct differences and materializes [..., N, M, D].
    """
    dtype = compute_dtype(query.dtype)
    Q, K = query.to(dtype), key.to(dtype)
    if metric == "euclidean":
        return -(Q.unsqueeze(-2) - K.unsqueeze(-3)).square().sum(dim=-1)
    if metric == "cosine":
        Q, K = normalize(Q), normalize(K)
    elif metric != "dot":
        raise ValueError(f"metric must be 'cosine', 'dot' or 'euclidean', got '{metric}'")
    return Q @ K.mT


def neighbor_rows(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    metric: str = "cosine",
    missing: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Q [..., N, 1 or k, D] and K[I] [..., N, k, D], normalized for the cosine.

    Key rows where `missing` [..., N, k] is True are 0 and get no gradient, so that nothing of them
    reaches a result, not even a NaN.
    """
    dtype = compute_dtype(query.dtype)
    Q, K_nn = query.to(dtype), gather_rows(key.to(dtype), indices)
    if missing is not None:
        K_nn = K_nn.masked_fill(missing.unsqueeze(-1), 0.0)
        Q = Q.masked_fill(missing.all(dim=-1, keepdim=True), 0.0)
    if metric == "cosine":
        # After the gather, so that a NaN row of K that is nobody's neighbor reaches no gradient.
        Q, K_nn = normalize(Q), normalize(K_nn)
    Q = Q.unsqueeze(-2)
    if missing is not None and metric == "euclidean":
        # The difference to a missing row is 0, too: that of an infinite query would be infinite.
        Q = Q.masked_fill(missing.unsqueeze(-1), 0.0)
    return Q, K_nn


def similarities_at(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    metric: str = "cosine",
    missing: Tensor | None = None,
) -> Tensor:
    """The similarities [..., N, k] of every query with the key rows `indices` [..., N, k].

    Differentiable; S is not formed. Entries where `missing` [..., N, k] is True are -inf.
    """
    Q, K_nn = neighbor_rows(query, key, indices, metric, missing)
    s = -(Q - K_nn).square().sum(dim=-1) if metric == "euclidean" else (Q * K_nn).sum(dim=-1)
    return s if missing is None else s.masked_fill(missing, -math.inf)


def allowed_keys(
    query: Tensor,
    key: Tensor,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_range: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Which keys may be neighbors, and which key is the query itself: two bool [..., N, M].

    The token itself need not be among the candidates, but if it is masked or out of range it is not
    a neighbor. With exclude_self it is neither allowed nor marked.
    """
    N, M = query.shape[-2], key.shape[-2]
    shape = (*query.shape[:-2], N, M)
    allowed = torch.ones(1, M, dtype=torch.bool, device=key.device)
    if candidates is not None:
        none = torch.zeros(*candidates.shape[:-1], M, dtype=torch.bool, device=key.device)
        allowed = none.scatter(-1, candidates, True).unsqueeze(-2)
    is_self = torch.zeros(N, M, dtype=torch.bool, device=key.device)
    if self_indices is not None:
        none = is_self.expand(*self_indices.shape[:-1], N, M)
        is_self = none.scatter(-1, self_indices.unsqueeze(-1), True)
    if exclude_self:
        allowed, is_self = allowed & ~is_self, torch.zeros_like(is_self)
    allowed, is_self = (allowed | is_self).expand(shape), is_self.expand(shape)
    if key_mask is not None:
        allowed, is_self = allowed & key_mask.unsqueeze(-2), is_self & key_mask.unsqueeze(-2)
    if key_range is not None:
        rows = torch.arange(M, device=key.device)
        begin, end = key_range.unsqueeze(-2).unbind(-1)  # [..., N, 1]
        in_range = (begin <= rows) & (rows < end)
        allowed, is_self = allowed & in_range, is_self & in_range
    return allowed, is_self


def select(
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    order: str = "similarity",
    key_range: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """s [..., N, k] and I [..., N, k]: the k nearest keys of every query (Eq. 4 and 5).

    query [..., N, D], key [..., M, D], candidates [R] or [..., R], self_indices [N] or [..., N],
    key_mask [..., M], key_range [N, 2] or [..., N, 2].
    k may exceed the number of keys that may be neighbors, and even M.
    The gradient goes through all of S, so non-finite keys put 0 * inf into it even if they are not
    neighbors. `similarities_at` with the returned indices avoids that.
    """
    S = similarity(query, key, metric)
    allowed, is_self = allowed_keys(
        query, key, candidates, self_indices, key_mask, key_range, exclude_self
    )
    with torch.no_grad():
        # Stable sorts, the last one decisive: by index, by similarity, then self before allowed
        # keys before all others.
        I = S.sort(dim=-1, descending=True, stable=True).indices
        group = torch.where(is_self, 0, torch.where(allowed, 1, 2))
        I = I.gather(-1, group.gather(-1, I).sort(dim=-1, stable=True).indices)[..., :k]
        missing = ~allowed.gather(-1, I)
        if order == "index":
            I, by_index = I.masked_fill(missing, key.shape[-2]).sort(dim=-1, stable=True)
            missing = missing.gather(-1, by_index)
        elif order != "similarity":
            raise ValueError(f"order must be 'similarity' or 'index', got '{order}'")
        I = I.masked_fill(missing, 0)
    s = S.gather(-1, I).masked_fill(missing, -math.inf)
    beyond = (0, k - I.shape[-1])
    return F.pad(s, beyond, value=-math.inf), F.pad(I, beyond)


def modulate(similarities: Tensor, rho: str = "softmax", scale: float = 1.0) -> Tensor:
    """rho(s_i) [..., N, k], section 4.1. Missing neighbors (similarity -inf) get 0."""
    s = similarities
    missing = s == -math.inf
    if rho == "ones":
        weights = torch.ones_like(s)
    elif rho == "similarity":
        weights = s
    elif rho == "softmax":
        # Filled before the product, so that a negative scale does not turn -inf into +inf.
        logits = scale * s.masked_fill(missing, 0.0)
        none_left = missing.all(dim=-1, keepdim=True)
        logits = logits.masked_fill(missing & ~none_left, -math.inf)
        weights = torch.softmax(logits, dim=-1)
    else:
        raise ValueError(f"rho must be 'softmax', 'ones' or 'similarity', got '{rho}'")
    return weights.masked_fill(missing, 0.0)


def gather_rows(X: Tensor, I: Tensor) -> Tensor:
    """X[I] per batch element: X [..., M, C], I [..., N, k] -> [..., N, k, C].

    If M = 0, a row of zeros stands for the row 0 of missing neighbors.
    """
    X = X if X.shape[-2] else F.pad(X, (0, 0, 0, 1))
    lead, (M, C) = X.shape[:-2], X.shape[-2:]
    first_row = M * torch.arange(lead.numel(), device=I.device).reshape(*lead, 1, 1)
    rows = (I + first_row).reshape(-1)
    return X.reshape(lead.numel() * M, C).index_select(0, rows).reshape(*I.shape, C)


def aggregate(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rho: str = "softmax",
    scale: float = 1.0,
) -> Tensor:
    """Y [..., N, O or C]: a Conv1d with kernel and stride k over the modulated neighbors (Eq. 6).

    value [..., M, C], similarities and indices [..., N, k], weight [O, C, k] (dense), [C, 1, k]
    (depthwise) or None (a sum), bias [O] or [C]. The result has the dtype of value.
    """
    dtype = compute_dtype(value.dtype)
    C, k = value.shape[-1], indices.shape[-1]
    # Missing neighbors are masked, not multiplied by zero, because V may contain NaN there.
    missing = (similarities == -math.inf).unsqueeze(-1)
    V_nn = gather_rows(value.to(dtype), indices).masked_fill(missing, 0.0)
    X_nn = modulate(similarities, rho, scale).to(dtype).unsqueeze(-1) * V_nn
    if weight is None:
        Y = X_nn.sum(dim=-2)
    elif weight.shape == (C, 1, k) and C != 1:
        Y = (X_nn * weight.to(dtype).squeeze(1).mT).sum(dim=-2)
    else:
        W = weight.to(dtype).permute(2, 1, 0).reshape(k * C, weight.shape[0])
        Y = X_nn.flatten(-2) @ W
    if bias is not None:
        Y = Y + bias.to(dtype)
    return Y.to(value.dtype)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    rho: str = "softmax",
    scale: float = 1.0,
    order: str = "similarity",
    key_range: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, s and I from `select`, then `aggregate`, with their shapes."""
    restrictions = (candidates, self_indices, key_mask, metric, order, key_range, exclude_self)
    s, I = select(query, key, k, *restrictions)
    return aggregate(value, s, I, weight, bias, rho, scale), s, I
