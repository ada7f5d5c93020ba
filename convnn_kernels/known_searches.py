# SPDX-License-Identifier: MIT
"""Searches whose results are known, and whether a result is right.

For kernels that are checked on each device before their first use: their instructions may be wrong
there, or the product of a pair may have other bits in another tile.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A search, or one for each of B batch elements, of which some rows are compared."""

    name: str
    query: Tensor  # [N, D] or [B, N, D]
    key: Tensor  # [M, D] or [B, M, D]
    metric: str
    is_exact: bool  # whether every similarity is exact, so that neighbors are unique
    candidates: Tensor | None = None  # [R]
    key_mask: Tensor | None = None  # [M] or [B, M]
    order: str = "similarity"
    key_range: Tensor | None = None  # [N, 2], of a search without a batch

    @property
    def value(self) -> Tensor:
        """As key, without NaN."""
        return self.key.nan_to_num(1.0)


class Result(NamedTuple):
    similarities: Tensor  # [N, k] or [B, N, k]
    indices: Tensor  # the same
    output: Tensor | None = None  # [N, O] or [B, N, O]: softmax, aggregation, convolution
    weight: Tensor | None = None  # [D, 1, k] or [O, D, k]
    bias: Tensor | None = None  # [O]


class _Rows:
    """Makes rows of D numbers, always the same ones."""

    def __init__(self, device: torch.device, dtype: torch.dtype, D: int) -> None:
        self.device, self.dtype, self.D = device, dtype, D
        # Whatever the default device is.
        self.options: dict[str, Any] = {
            "generator": torch.Generator().manual_seed(0),
            "device": torch.device("cpu"),
        }

    def signs(self, n: int) -> Tensor:
        """Rows of 1, -1 and 0."""
        D, cpu = self.D, self.options["device"]
        # So many that a norm is a power of two.
        nonzero = 4 ** ((D.bit_length() - 1) // 2)
        first = torch.randint(0, D, (n, 1), **self.options)
        where = (first + torch.arange(nonzero, device=cpu)) % D
        which = torch.randint(0, 2, (n, nonzero), **self.options) * 2.0 - 1.0
        rows = torch.zeros(n, D, device=cpu).scatter(1, where, which)
        return rows.to(self.device, self.dtype)

    def random(self, n: int) -> Tensor:
        return torch.randn(n, self.D, **self.options).to(self.device, self.dtype)

    def ranges(self, n: int, M: int, fewest: int = 64) -> Tensor:
        """Of n queries, at least `fewest` of M keys; of every other one, the first keys."""
        count = torch.randint(fewest, M + 1, (n,), **self.options)
        begin = torch.randint(0, M, (n,), **self.options) % (M - count + 1)
        begin[::2] = 0
        return torch.stack([begin, begin + count], dim=1).to(self.device)


def cases(
    device: torch.device,
    metric: str,
    dtype: torch.dtype,
    D: int,
    M: int,
    *,
    distinct: int = 40,
    queries: int = 200,
    rows: int = 4096,
    with_ranges: bool = False,
) -> Iterator[Case]:
    """Searches of M keys, or of a range of them for each row; of `queries` rows, and in the last
    one, of `rows`.

    One has `distinct` different keys, of which each is at every `distinct`-th column.
    """
    make = _Rows(device, dtype, D)

    def case(name: str, query: Tensor, key: Tensor, is_exact: bool = True) -> Case:
        ranges = make.ranges(len(query), M) if with_ranges else None
        return Case(name, query, key, metric, is_exact, key_range=ranges)

    query, few, key = make.signs(queries), make.signs(distinct), make.signs(M)
    yield case(f"{distinct} distinct keys", query, few.repeat(-(-M // distinct), 1)[:M])
    # Two of three keys are copies of others, 43 and 86 columns before.
    apart = torch.arange(M, device=device)
    yield case("pairs of equal keys", query, key[apart - apart % 3 * 43])
    yield case("equal keys", query, key[:1].repeat(M, 1))
    key = key.clone()
    key[M // 2], key[M - 1], query[3], query[4] = float("nan"), float("nan"), 0, float("nan")
    yield case("NaN and a zero query", query, key)
    query, key = make.random(rows), make.random(M)
    query[5] = 0
    yield case("random rows", query, key, is_exact=False)


def batches(
    device: torch.device, metric: str, dtype: torch.dtype, D: int, M: int, N: int
) -> Iterator[Case]:
    """Searches of N queries in each of four batch elements: of all M keys, and of some."""
    B = 4
    make = _Rows(device, dtype, D)

    def tensors(rows: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        return rows(B * N).view(B, N, D), rows(B * M).view(B, M, D)

    random, signs = tensors(make.random), tensors(make.signs)
    yield Case("a batch of many queries", *random, metric, is_exact=False)
    candidates = torch.randperm(M, **make.options)[: M * 5 // 6].to(device)
    mask = (torch.rand(B, M, **make.options) < 0.8).to(device)
    yield Case("candidates and a mask", *signs, metric, True, candidates, mask)
    yield Case("order by index", *random, metric, False, candidates, mask, "index")


def is_right(case: Case, result: Result, in_tf32: bool = False) -> bool:
    """Whether a result is that of a case; `in_tf32` for products of float32 in TF32."""
    I = result.indices
    if bool(((I < 0) | (case.key.shape[-2] <= I)).any()):
        return False
    # Some rows at a time: all of S in float64 would take more memory than a search.
    return all(
        _rows_are_right(some, of_them, in_tf32)
        for element in _elements(case, result)
        for some, of_them in _blocks(*element)
    )


def _elements(case: Case, result: Result) -> Iterator[tuple[Case, Result]]:
    """Each batch element with every 37th row and the last ones, which may fill a block in part."""
    if case.query.ndim == 2:
        yield case, result
        return
    N, device = case.query.shape[1], case.query.device
    last = torch.arange(max(N - 40, 0), N, device=device)
    rows = torch.cat([torch.arange(0, N, 37, device=device), last]).unique()
    for b in range(len(case.query)):
        yield (
            case._replace(
                query=case.query[b, rows],
                key=case.key[b],
                key_mask=None if case.key_mask is None else case.key_mask[b],
            ),
            result._replace(
                similarities=result.similarities[b, rows],
                indices=result.indices[b, rows],
                output=None if result.output is None else result.output[b, rows],
            ),
        )


def _blocks(case: Case, result: Result) -> Iterator[tuple[Case, Result]]:
    blocks = [X.split(256) for X in (case.query, result.similarities, result.indices)]
    none = [None] * len(blocks[0])
    of_rows = (none if X is None else X.split(256) for X in (case.key_range, result.output))
    for query, s, I, key_range, output in zip(*blocks, *of_rows, strict=True):
        yield (
            case._replace(query=query, key_range=key_range),
            result._replace(similarities=s, indices=I, output=output),
        )


def _rows_are_right(case: Case, result: Result, in_tf32: bool) -> bool:
    s, I = result.similarities, result.indices
    k, D = I.shape[1], case.key.shape[1]
    S, size = _similarities(case.query, case.key, case.metric)
    S = S.masked_fill(~_allowed(case), -torch.inf)
    chosen = S.gather(1, I)
    bound = torch.zeros_like(chosen)
    if case.is_exact:
        # A stable sort of what has NaN above every number is the total order.
        S = S.masked_fill(S.isnan(), torch.inf)
        expected = S.sort(dim=1, descending=True, stable=True).indices[:, :k]
        if case.order == "index":
            expected = expected.sort(1).values
        neighbors_are_right = torch.equal(I, expected)
    else:
        size *= 2.0**-9 if in_tf32 else (D + 8) * 2.0**-22
        bound = size.gather(1, I)
        rest = (S - size).scatter(1, I, -torch.inf).amax(1)
        ascending = I if case.order == "index" else I.sort(1).values
        distinct = bool((ascending.diff(dim=1) > 0).all())
        neighbors_are_right = distinct and bool((rest <= (s + bound).amin(1)).all())
    error = (s - chosen).abs()
    both_nan = s.isnan() & chosen.isnan()
    similarities_are_right = bool(((error <= bound) | both_nan).all())
    return neighbors_are_right and similarities_are_right and _output_is_right(case.value, result)


def _allowed(case: Case) -> Tensor:
    """Which keys may be neighbors, [M] or [N, M]."""
    of_candidates = torch.ones(len(case.key), dtype=torch.bool, device=case.key.device)
    if case.candidates is not None:
        of_candidates.fill_(False)[case.candidates] = True
    allowed = of_candidates if case.key_mask is None else of_candidates & case.key_mask
    if case.key_range is None:
        return allowed
    rows = torch.arange(len(case.key), device=case.key.device)
    return allowed & (rows >= case.key_range[:, :1]) & (rows < case.key_range[:, 1:])


def _output_is_right(value: Tensor, result: Result) -> bool:
    if result.output is None:
        return True
    # Of the returned similarities, since an exponential magnifies their errors.
    rho = result.similarities.double().softmax(1)[:, :, None]
    gathered = rho * value.double()[result.indices]  # [N, k, D]
    if result.weight is None:
        expected = gathered.sum(1)
    elif result.weight.shape[1] == 1:
        expected = (gathered * result.weight.double()[:, 0].mT).sum(1)
    else:
        expected = torch.einsum("nkc,ock->no", gathered, result.weight.double())
    if result.bias is not None:
        expected = expected + result.bias.double()
    return bool(
        torch.isclose(
            result.output.double(), expected, rtol=2**-6, atol=2**-6, equal_nan=True
        ).all()
    )


def _similarities(query: Tensor, key: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """All of S in float64, and of each similarity the size to which its error is relative."""
    query, key = query.double(), key.double()
    if metric == "euclidean":
        S = -torch.stack([(row - key).square().sum(1) for row in query])
        return S, S.abs()
    if metric == "cosine":
        query, key = (torch.nn.functional.normalize(X, dim=1) for X in (query, key))
    return query @ key.mT, query.norm(dim=1)[:, None] * key.norm(dim=1)
