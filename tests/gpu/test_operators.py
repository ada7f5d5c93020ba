# SPDX-License-Identifier: MIT
"""Every operator and dtype on the GPU, against the reference in float64 and the CPU kernels."""

import dataclasses
import math
from itertools import islice
from typing import Any

import pytest
import torch
from cases import Case, make_case, whole_numbers
from on_device import ON_CPU, on_device
from torch import Tensor

from python_ref import assert_aggregate, assert_forward, assert_select

ops = torch.ops.convnn
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
# The interpreter computes bfloat16 wrongly.
if ON_CPU:
    DTYPES = [F32, F16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def weights(weight: str, O: int, C: int, k: int, dtype: torch.dtype) -> Tensor | None:
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (O, C, k)}[weight]
    return None if shape is None else normal(*shape, seed=3, dtype=dtype) / math.sqrt(C * k)


# Few columns, groups of columns, every kind of list, and several passes.
SIZES = {
    "few": (2, 197, 197, 64, 64, 9),
    "groups": (1, 200, 3000, 64, 48, 16),
    "odd": (3, 65, 300, 70, 17, 33),
    "passes": (1, 20, 600, 24, 8, 300),
}
EXACT = [(2, 197, 197, 64, 9), (1, 64, 4096, 16, 9), (1, 33, 1500, 7, 33), (1, 9, 700, 5, 300)]
if ON_CPU:
    SIZES = {"tiny": (1, 9, 80, 12, 8, 5)}
    EXACT = [(1, 9, 80, 5, 9)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.usefixtures("backend")
def test_forward(metric: str, size: str, dtype: torch.dtype) -> None:
    B, N, M, D, C, k = SIZES[size]
    weight = {"cosine": "dense", "dot": "depthwise", "euclidean": "none"}[metric]
    assert_forward(
        on_device(ops.forward),
        normal(B, N, D, dtype=dtype),
        normal(B, M, D, seed=1, dtype=dtype),
        normal(B, M, C, seed=2, dtype=dtype),
        k,
        weights(weight, 40, C, k, dtype),
        metric=metric,
        rho="softmax" if metric == "cosine" else "similarity",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["none", "depthwise", "dense"])
@pytest.mark.usefixtures("backend")
def test_aggregate(weight: str, dtype: torch.dtype) -> None:
    """Missing neighbors, a key that half of the queries selected, channels beyond one block."""
    N, M, C, O, k = (300, 90, 72, 130, 9) if not ON_CPU else (30, 9, 20, 8, 3)
    generator = torch.Generator().manual_seed(0)
    I = torch.randint(M, (2, N, k), generator=generator)
    I[:, ::2, 1] = 7
    s = normal(2, N, k)
    s[:, ::3, 2] = -math.inf
    assert_aggregate(
        on_device(ops.aggregate),
        normal(2, M, C, seed=1, dtype=dtype),
        s,
        I,
        weights(weight, O, C, k, dtype),
        normal(O if weight == "dense" else C, seed=4, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EXACT, ids=str)
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.usefixtures("backend")
def test_exact(metric: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With many ties, indices equal those of the CPU kernels and of the reference."""
    B, N, M, D, k = shape
    query, key = integers(B, N, D, dtype=dtype), integers(B, M, D, seed=1, dtype=dtype)
    run = on_device(ops.select)
    s, I = assert_select(run, query, key, k, metric=metric, exact=True, backward=False)
    if not ON_CPU:
        expected = ops.select(query, key, k, metric=metric)
        assert torch.equal(I, expected[1])
        assert torch.equal(s, expected[0])


def restrictions(kind: str, B: int, N: int, M: int) -> dict[str, Any]:
    """Where the queries are among the keys, the last at the last key."""
    at, generator = torch.arange(N) + M - N, torch.Generator().manual_seed(2)
    if kind == "causal":
        return {"key_range": torch.stack([0 * at, at + 1], -1).clamp(0, M)}
    if kind == "window":
        ranges = torch.stack([at - M // 8, at + M // 8], -1).clamp(0, M)
        return {"key_range": ranges, "self_indices": at % M, "exclude_self": True}
    if kind == "segments":
        return {"key_range": torch.stack([at // 50 * 50, at // 50 * 50 + 50], -1).clamp(0, M)}
    listed = torch.rand(B, M, generator=generator).argsort(-1)[:, : M - M // 5]
    own = torch.randint(M, (B, N), generator=generator)
    given = {"candidates": listed, "self_indices": own, "exclude_self": kind == "own, excluded"}
    ends = torch.randint(M + 1, (B, N, 2), generator=generator)
    return given if kind == "own" else {**given, "key_range": ends.sort(-1).values}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EXACT, ids=str)
@pytest.mark.parametrize("kind", ["causal", "window", "segments", "own", "own, excluded"])
@pytest.mark.usefixtures("backend")
def test_exact_restricted(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Ranges, the token itself excluded, candidates and tokens of each batch element."""
    B, N, M, D, k = shape
    query, key = integers(B, N, D, dtype=dtype), integers(B, M, D, seed=1, dtype=dtype)
    given = {"metric": "dot", **restrictions(kind, B, N, M)}
    run = on_device(ops.select)
    s, I = assert_select(run, query, key, k, **given, exact=True, backward=False)
    if not ON_CPU:
        expected = ops.select(query, key, k, **given)
        assert torch.equal(I, expected[1])
        assert torch.equal(s, expected[0])


@pytest.mark.parametrize("value", [-1, -(2**63), 2**63 - 1, 2**32])
@pytest.mark.parametrize("name", ["candidates", "self_indices", "key_range"])
@pytest.mark.usefixtures("backend")
@pytest.mark.cuda_only
def test_restrictions_out_of_range(name: str, value: int) -> None:
    """Those of one batch element: nothing is read outside of the keys, and no key is a neighbor."""
    query, key = integers(2, 40, 8), integers(2, 700, 8, seed=1)
    given = {"candidates": torch.arange(700).repeat(2, 1)}
    given |= {"self_indices": torch.full((2, 40), 3)}
    given |= {"key_range": torch.tensor([0, 700]).repeat(2, 40, 1)}
    is_left = {"candidates": torch.arange(700) == 3, "key_range": torch.zeros(700).bool()}
    without = {**given, "key_mask": is_left.get(name, torch.ones(700).bool()).repeat(2, 1)}
    if name == "self_indices":
        del without[name]
    select = on_device(ops.select)
    expected = [select(query, key, 9, metric="dot", **each) for each in (without, given)]
    given[name][0] = value
    result = select(query, key, 9, metric="dot", **given)
    for b in range(2):
        assert all(torch.equal(X[b], Y[b]) for X, Y in zip(result, expected[b], strict=True))


@pytest.mark.parametrize("bits", [9, 17] if ON_CPU else [2, 6, 9, 11, 12, 14, 17, 20])
@pytest.mark.usefixtures("backend")
def test_whole_numbers_of_many_bits(bits: int) -> None:
    """Products of split numbers, and their sums in tensor cores, are exact."""
    B, M = (2, 200) if ON_CPU else (3, 3000)
    query, key = whole_numbers(B, M, 70, bits)
    s, I = on_device(ops.select)(query, key, 4, None, None, None, "dot")
    expected = torch.arange(M - 1.0, M - 5, -1).expand(B, 1, 4)
    assert torch.equal(s, expected)
    assert torch.equal((query.double() @ key.double().mT).gather(-1, I), expected.double())


def random_cases(restricted: bool) -> list[Any]:
    def usable(case: Case) -> bool:
        batch = math.prod(case.lead)
        return 0 < batch * max(case.N, case.M) <= (40 if ON_CPU else 1000)

    def narrow(dtype: torch.dtype) -> torch.dtype:
        instead = {torch.float64: F32} | ({BF16: F16} if ON_CPU else {})
        return instead.get(dtype, dtype)

    cases = filter(usable, (make_case(seed, restricted) for seed in range(1000, 2000)))
    return [
        pytest.param(
            dataclasses.replace(
                case, query_dtype=narrow(case.query_dtype), value_dtype=narrow(case.value_dtype)
            ),
            id=case.id,
        )
        for case in islice(cases, 2 if ON_CPU else 32)
    ]


@pytest.mark.parametrize("case", [*random_cases(False), *random_cases(True)])
@pytest.mark.usefixtures("backend")
def test_random_case(case: Case) -> None:
    assert_forward(on_device(ops.forward), **case.arguments(), exact=case.exact, seed=case.seed)
