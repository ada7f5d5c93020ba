# SPDX-License-Identifier: MIT
"""Checks a selection: exactly where similarities are exact, otherwise by a float64 certificate.

Error bounds of a similarity, with u the unit roundoff (2^-24, or 2^-53 for float64), D columns, and
gamma(n) = n u / (1 - n u), which bounds the relative error of n roundings (Higham 2002, section 3):

- dot: D products and D - 1 additions in any order: gamma(D) * sum |q_d k_d|.
- euclidean: a difference, its square and the additions: gamma(D + 2) * sum (q_d - k_d)^2.
- cosine: let c be the exact value and a = sum |q_d k_d| / (||q|| ||k||) <= 1. The product of the
  rows is as for dot, with at most 6 more roundings per term (scaling and division of both rows):
  gamma(D + 6) * a. Each norm: gamma(D + 2) / 2 for the square root of the sum of squares, 2 u for
  root and scaling; the two norms and their combination: gamma(D + 8) * |c|.

A term below the smallest normal number may be lost entirely, so D times that number is added. For
float64 inputs the bound is doubled, because the float64 reference has rounding errors, too.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .convnn import EPSILON, allowed_keys, compute_dtype, normalize, select

# Elements of the largest temporary tensor of a comparison.
WORKSPACE = 2**23


def query_chunks(N: int, elements_per_query: int) -> Iterator[slice]:
    step = max(1, WORKSPACE // max(1, elements_per_query))
    for start in range(0, N, step):
        yield slice(start, min(start + step, N))


def fail(name: str, wrong: Tensor, *details: tuple[str, Tensor]) -> None:
    """Raises for the first True in `wrong`, with the details at that position."""
    if not bool(wrong.any()):
        return
    position = tuple(wrong.nonzero()[0].tolist())
    shown = ", ".join(
        f"{label} {tensor.expand(wrong.shape)[position].item()!r}" for label, tensor in details
    )
    raise AssertionError(f"{name}: {int(wrong.sum())} wrong, the first at {position}: {shown}")


def _check_form(query: Tensor, key: Tensor, similarities: Tensor, indices: Tensor, k: int) -> None:
    shape = (*query.shape[:-1], k)
    for name, result, dtype in (
        ("similarities", similarities, compute_dtype(query.dtype)),
        ("indices", indices, torch.int64),
    ):
        if result.shape != shape or result.dtype != dtype:
            raise AssertionError(
                f"{name}: expected {dtype} {shape}, got {result.dtype} {tuple(result.shape)}"
            )
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= max(key.shape[-2], 1):
            raise AssertionError(f"indices: from {low} to {high}, key has {key.shape[-2]} rows")


def assert_exact_selection(
    query: Tensor,
    key: Tensor,
    similarities: Tensor,
    indices: Tensor,
    k: int,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "dot",
    order: str = "similarity",
    key_range: Tensor | None = None,
    exclude_self: bool = False,
) -> None:
    """Asserts that indices and similarities equal those of the float64 reference.

    For small integer inputs with `dot` or `euclidean`, where every partial sum is exact.
    """
    if metric == "cosine":
        raise ValueError("cosine is not exact, even for integers: use the certificate")
    _check_form(query, key, similarities, indices, k)
    Q, K = query.detach().double(), key.detach().double()
    for tensor in (Q, K):
        if not bool((tensor == tensor.round()).all()):
            raise ValueError("an exact selection needs inputs of integers")
    largest = (Q.abs().max() + K.abs().max()).square() if Q.numel() and K.numel() else 0.0
    if float(largest) * query.shape[-1] >= 1 / torch.finfo(similarities.dtype).eps:
        raise ValueError("the integers are too large: partial sums may be rounded")
    lead, M = query.shape[:-2], key.shape[-2]
    per_query = lead.numel() * M * (query.shape[-1] if metric == "euclidean" else 1)
    for rows in query_chunks(query.shape[-2], per_query):
        s, I = select(
            Q[..., rows, :],
            K,
            k,
            candidates,
            None if self_indices is None else self_indices[..., rows],
            key_mask,
            metric,
            order,
            None if key_range is None else key_range[..., rows, :],
            exclude_self,
        )
        got_I, got_s = indices[..., rows, :], similarities.detach()[..., rows, :].double()
        details = (
            ("expected index", I),
            ("got", got_I),
            ("expected similarity", s),
            ("got", got_s),
        )
        fail("indices", got_I != I, *details)
        fail("similarities", got_s != s, *details)


def _similarity_bounds(
    Q: Tensor, K: Tensor, metric: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact similarities S, and the least and the greatest value that a computation in `dtype` may
    return for each pair.

    Q [B, n, D] and K [B, M, D] are float64; so are the three results, [B, n, M]. A NaN in S means
    that the pair is NaN in any computation. Where the outcome of an overflow depends on the order
    of operations, the least is -inf and the greatest NaN.
    """
    D = Q.shape[-1]
    finfo = torch.finfo(dtype)
    u = finfo.eps / 2

    def gamma(n: int) -> float:
        return n * u / (1 - n * u)

    lost = D * finfo.tiny
    if metric == "cosine":
        Q_unit, K_unit = normalize(Q), normalize(K)
        S = Q_unit @ K_unit.mT
        bound = gamma(D + 6) * (Q_unit.abs() @ K_unit.abs().mT) + gamma(D + 8) * S.abs() + lost
        # A row whose norm equals epsilon up to rounding may or may not count as zero.
        for X, dim in ((Q, -1), (K, -2)):
            norm = torch.linalg.vector_norm(X, dim=-1)
            unsure = (norm / EPSILON - 1).abs() <= gamma(D + 8)
            bound = bound + unsure.unsqueeze(dim).double()
        magnitude = other_sign = torch.zeros_like(S)
    else:
        Q_finite, K_finite = (torch.where(X.isfinite(), X, 0.0) for X in (Q, K))
        if metric == "dot":
            S = Q @ K.mT
            magnitude = Q_finite.abs() @ K_finite.abs().mT
            other_sign = torch.zeros_like(S)
            if bool((magnitude > 0.98 * finfo.max).any()):
                other_sign = _terms_of_other_sign(Q_finite, K_finite, S)
            bound = gamma(D) * magnitude + lost
        else:
            S = -(Q.unsqueeze(-2) - K.unsqueeze(-3)).square().sum(dim=-1)
            magnitude = torch.where(S.isfinite(), -S, 0.0)
            other_sign = torch.zeros_like(S)
            bound = gamma(D + 2) * magnitude + lost
    if dtype == torch.float64:
        bound = 2 * bound

    # Overflow. If only the terms of one sign exceed the largest number, the result is that
    # infinity; if both may, the result can be anything.
    largest = finfo.max
    finite_rows = Q.isfinite().all(dim=-1, keepdim=True) & K.isfinite().all(dim=-1).unsqueeze(-2)
    over = finite_rows & (S.abs() > 1.01 * largest) & (other_sign < 0.49 * largest)
    S = torch.where(over & S.isfinite(), S.sign() * math.inf, S)
    unsure = (magnitude > 0.98 * largest) & ~over
    if metric == "euclidean":
        # All terms have one sign, so inf - inf cannot occur in any order.
        unsure = unsure & finite_rows
    S = torch.where(unsure, 0.0, S)
    settled = S.isfinite()
    least = torch.where(settled, S - bound, S)
    greatest = torch.where(settled, S + bound, S)
    least = torch.where(unsure, -math.inf, least)
    greatest = torch.where(unsure, 0.0 if metric == "euclidean" else math.nan, greatest)
    return S, least, greatest


def _terms_of_other_sign(Q: Tensor, K: Tensor, S: Tensor) -> Tensor:
    """The sum of the terms q_d k_d whose sign is not that of S, without their sign.

    Not a difference of sums, in which 1e40 is lost beside 1e70.
    """
    positive = Q.relu() @ K.relu().mT + (-Q).relu() @ (-K).relu().mT
    negative = Q.relu() @ (-K).relu().mT + (-Q).relu() @ K.relu().mT
    return torch.where(S > 0, negative, positive)


def _at_most(a: Tensor, b: Tensor) -> Tensor:
    """a <= b, with NaN above every number."""
    return b.isnan() | (~a.isnan() & (a <= b))


def assert_certified_selection(
    query: Tensor,
    key: Tensor,
    similarities: Tensor,
    indices: Tensor,
    k: int,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    order: str = "similarity",
    key_range: Tensor | None = None,
    exclude_self: bool = False,
) -> None:
    """Asserts the certificate of a selection, computed in float64 from the inputs as given.

    - Indices are in range, allowed and unique. Self is included if it may be a neighbor, and comes
      first with order="similarity". Missing neighbors are exactly as many as necessary and come
      last, with similarity -inf and index 0.
    - Neighbors are in the total order of the returned similarities, or in that of the indices.
    - Each returned similarity is within the error bound of its pair.
    - The best key that was not returned <= the worst returned one + both bounds. Every key outside
      that band around the k-th similarity is therefore returned if above it, and not if below.
    - Pairs that are NaN or infinite in any computation are so here, and ties go by index.
    """
    _check_form(query, key, similarities, indices, k)
    lead, (N, D), M = query.shape[:-2], query.shape[-2:], key.shape[-2]
    B = lead.numel()
    if B * N == 0:
        return
    Q, K = query.detach().double().reshape(B, N, D), key.detach().double().reshape(B, M, D)
    all_s, all_I = similarities.detach().double().reshape(B, N, k), indices.reshape(B, N, k)
    mask = None if key_mask is None else key_mask.reshape(B, M)
    candidates, self_indices, key_range = (
        None if X is None else X.expand(*lead, *X.shape[-dims:]).reshape(B, *X.shape[-dims:])
        for X, dims in ((candidates, 1), (self_indices, 1), (key_range, 2))
    )
    if M == 0:
        # Missing neighbors have index 0, so there must be a row 0. It may not be a neighbor.
        M, K, mask = 1, K.new_zeros(B, 1, D), torch.zeros(B, 1, dtype=torch.bool, device=K.device)
    per_query = B * M * (D if metric == "euclidean" else 4)
    for rows in query_chunks(N, per_query):
        self_rows = None if self_indices is None else self_indices[:, rows]
        range_rows = None if key_range is None else key_range[:, rows]
        allowed, is_self = allowed_keys(
            Q[:, rows], K, candidates, self_rows, mask, range_rows, exclude_self
        )
        S, least, greatest = _similarity_bounds(Q[:, rows], K, metric, similarities.dtype)
        _certify(S, least, greatest, all_s[:, rows], all_I[:, rows], allowed, is_self, order)


def _certify(
    S: Tensor,
    least: Tensor,
    greatest: Tensor,
    s: Tensor,
    I: Tensor,
    allowed: Tensor,
    is_self: Tensor,
    order: str,
) -> None:
    B, n, M = S.shape
    k = I.shape[-1]
    slot = torch.arange(k, device=I.device)
    real = slot < allowed.sum(dim=-1, keepdim=True)
    fail("missing neighbor with a similarity", ~real & (s != -math.inf), ("similarity", s))
    fail("missing neighbor with an index other than 0", ~real & (I != 0), ("index", I))
    fail("neighbor that is not allowed", real & ~allowed.gather(-1, I), ("index", I))

    # Missing neighbors are counted in an extra column.
    columns = I.masked_fill(~real, M)
    counts = torch.zeros(B, n, M + 1, dtype=torch.int64, device=I.device)
    counts = counts.scatter_add(-1, columns, torch.ones_like(columns))[..., :M]
    fail("neighbor that is returned more than once", counts > 1, ("times", counts))
    fail("self is not among the neighbors", is_self & (counts == 0), ("times", counts))

    at_self = is_self.gather(-1, I) & real
    if order == "index":
        disordered = real[..., 1:] & (I[..., :-1] > I[..., 1:])
        fail("indices do not ascend", disordered, ("index", I[..., :-1]), ("next", I[..., 1:]))
    else:
        has_self = is_self.any(dim=-1, keepdim=True)
        fail("self is not first", has_self & (slot == 0) & ~at_self, ("index", I))
        a, b = s[..., :-1], s[..., 1:]
        tie = (a == b) | (a.isnan() & b.isnan())
        descending = _at_most(b, a) & ~tie
        in_order = descending | (tie & (I[..., :-1] < I[..., 1:])) | at_self[..., :-1]
        details = (
            ("similarity", a),
            ("next", b),
            ("index", I[..., :-1]),
            ("next", I[..., 1:]),
        )
        fail("neighbors are not in the total order", real[..., 1:] & ~in_order, *details)

    S_I, least_I, greatest_I = S.gather(-1, I), least.gather(-1, I), greatest.gather(-1, I)
    anything = greatest_I.isnan() & ~S_I.isnan()
    within = torch.where(S_I.isnan(), s.isnan(), (least_I <= s) & (s <= greatest_I)) | anything
    details = (("got", s), ("least", least_I), ("greatest", greatest_I), ("index", I))
    fail("similarity outside its error bound", real & ~within, *details)

    # The worst returned neighbor, by its greatest possible value. Self is returned regardless.
    chosen = real & ~at_self
    neutral = torch.where(chosen, greatest_I, math.nan)
    order_value = torch.where(neutral.isnan(), math.inf, neutral)
    worst = order_value.amin(dim=-1, keepdim=True)
    all_may_be_nan = neutral.isnan().all(dim=-1, keepdim=True)
    unreturned = allowed & (counts == 0)
    beaten = torch.where(least.isnan(), all_may_be_nan, least <= worst)
    fail(
        "key that is nearer than a returned neighbor",
        unreturned & ~beaten,
        ("its similarity", S),
        ("the worst returned, with its bound", worst),
    )

    # Values that are certain to be non-finite tie exactly, so the lowest indices are the neighbors.
    for name, of_kind in (
        ("NaN", torch.isnan),
        ("inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        certain = of_kind(least) & of_kind(greatest)
        last = torch.where(chosen & certain.gather(-1, I), I, -1).amax(dim=-1, keepdim=True)
        j = torch.arange(M, device=I.device).expand_as(S)
        skipped = unreturned & certain & (j < last)
        fail(f"tie of {name} not broken by index", skipped, ("index", j), ("returned", last))
