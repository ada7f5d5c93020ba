# SPDX-License-Identifier: MIT
"""Searches whose results are known, and whether a result is right.

For kernels that are checked on each device before their first use: their instructions may be wrong
there, or the product of a pair may have other bits in another tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    name: str
    query: Tensor  # [N, D]
    key: Tensor  # [M, D]
    metric: str
    is_exact: bool  # whether every similarity is exact, so that neighbors are unique

    @property
    def value(self) -> Tensor:
        """[M, D], without NaN."""
        return self.key.nan_to_num(1.0)


class Result(NamedTuple):
    similarities: Tensor  # [N, k]
    indices: Tensor  # [N, k]
    output: Tensor | None = None  # [N, O]: softmax, aggregation, convolution
    weight: Tensor | None = None  # [D, 1, k] or [O, D, k]
    bias: Tensor | None = None  # [O]


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
) -> Iterator[Case]:
    """Searches of M keys; of `queries` rows, and in the last one, of `rows`.

    One has `distinct` different keys, of which each is at every `distinct`-th column.
    """
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")  # whatever the default device is
    # So many channels that a norm is a power of two.
    nonzero = 4 ** ((D.bit_length() - 1) // 2)

    def signs(n: int) -> Tensor:
        """Rows of 1, -1 and 0."""
        first = torch.randint(0, D, (n, 1), generator=generator, device=cpu)
        where = (first + torch.arange(nonzero, device=cpu)) % D
        which = torch.randint(0, 2, (n, nonzero), generator=generator, device=cpu) * 2.0 - 1.0
        return torch.zeros(n, D, device=cpu).scatter(1, where, which).to(device, dtype)

    def random(n: int) -> Tensor:
        return torch.randn(n, D, generator=generator, device=cpu).to(device, dtype)

    def case(name: str, query: Tensor, key: Tensor, is_exact: bool = True) -> Case:
        return Case(name, query, key, metric, is_exact)

    query, few, key = signs(queries), signs(distinct), signs(M)
    yield case(f"{distinct} distinct keys", query, few.repeat(-(-M // distinct), 1)[:M])
    # Two of three keys are copies of others, 43 and 86 columns before.
    apart = torch.arange(M, device=device)
    yield case("pairs of equal keys", query, key[apart - apart % 3 * 43])
    yield case("equal keys", query, key[:1].repeat(M, 1))
    key = key.clone()
    key[M // 2], key[M - 1], query[3], query[4] = float("nan"), float("nan"), 0, float("nan")
    yield case("NaN and a zero query", query, key)
    query, key = random(rows), random(M)
    query[5] = 0
    yield case("random rows", query, key, is_exact=False)


def is_right(case: Case, result: Result, in_tf32: bool = False) -> bool:
    """Whether a result is that of a case; `in_tf32` for products of float32 in TF32."""
    s, I = result.similarities, result.indices
    if bool(((I < 0) | (len(case.key) <= I)).any()):
        return False
    # Some rows at a time: all of S in float64 would take more memory than a search.
    blocks = [X.split(256) for X in (case.query, s, I)]
    outputs = [None] * len(blocks[0]) if result.output is None else result.output.split(256)
    return all(
        _rows_are_right(
            case._replace(query=query),
            result._replace(similarities=s_rows, indices=I_rows, output=output),
            in_tf32,
        )
        for query, s_rows, I_rows, output in zip(*blocks, outputs, strict=True)
    )


def _rows_are_right(case: Case, result: Result, in_tf32: bool) -> bool:
    s, I = result.similarities, result.indices
    k, D = I.shape[1], case.key.shape[1]
    S, size = _similarities(case.query, case.key, case.metric)
    chosen = S.gather(1, I)
    bound = torch.zeros_like(chosen)
    if case.is_exact:
        # A stable sort of what has NaN above every number is the total order.
        order = S.nan_to_num(nan=torch.inf).sort(dim=1, descending=True, stable=True).indices
        neighbors_are_right = torch.equal(I, order[:, :k])
    else:
        size *= 2.0**-9 if in_tf32 else (D + 8) * 2.0**-22
        bound = size.gather(1, I)
        rest = (S - size).scatter(1, I, -torch.inf).amax(1)
        distinct = bool((I.sort(1).values.diff(dim=1) > 0).all())
        neighbors_are_right = distinct and bool((rest <= s[:, -1] + bound[:, -1]).all())
    error = (s - chosen).abs()
    both_nan = s.isnan() & chosen.isnan()
    similarities_are_right = bool(((error <= bound) | both_nan).all())
    return neighbors_are_right and similarities_are_right and _output_is_right(case.value, result)


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
