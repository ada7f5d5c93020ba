# SPDX-License-Identifier: MIT
"""The Triton kernels in Triton's interpreter, on CPU tensors, through ``backend("triton")``.

They need a process of their own, started with ``TRITON_INTERPRET=1``: `make test` has one.
"""

import dataclasses
import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import count, islice, product
from typing import Any

import pytest
import torch
from cases import Case, assert_special, make_case, make_special_case, whole_numbers
from interpreter import in_interpreter
from test_backward_arguments import OPS, arguments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convnn_kernels
from convnn_kernels.backends import selection
from convnn_kernels.triton import backend, configs, hardware
from python_ref import assert_aggregate, assert_forward, assert_select, select

pytestmark = in_interpreter

ops = torch.ops.convnn
QUICK, ALL = 12, 320
QUICK_SPECIAL, ALL_SPECIAL = 10, 120
# The interpreter takes a millisecond for a program.
MOST_ROWS = 300
F32, F16 = torch.float32, torch.float16
# float64 is for other backends; the interpreter computes bfloat16 wrongly.
INSTEAD = {torch.float64: F32, torch.bfloat16: F16}


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with convnn_kernels.backend("triton"):
        yield


@pytest.fixture(autouse=True)
def _fresh_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plan that was made with configurations of another test."""
    forget_plans()
    yield
    monkeypatch.undo()
    forget_plans()


def forget_plans() -> None:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()


def cases(
    make: Callable[[int], Case] = make_case, most_rows: int = MOST_ROWS, most_columns: int = 130
) -> Iterator[Case]:
    for case in map(make, count()):
        batch = math.prod(case.lead)
        if batch * max(case.N, case.M) <= most_rows and max(case.D, case.C) <= most_columns:
            yield dataclasses.replace(
                case,
                query_dtype=INSTEAD.get(case.query_dtype, case.query_dtype),
                value_dtype=INSTEAD.get(case.value_dtype, case.value_dtype),
            )


def special_cases() -> Iterator[Case]:
    for case in cases(make_special_case, most_rows=50, most_columns=66):
        # A dense product is multiplied by rho: an infinite rho gives infinity where terms of both
        # signs are NaN.
        is_dense = case.weight == "dense" and case.rho == "similarity"
        if not (is_dense and case.content == "not_finite"):
            yield case


def random_cases(cases: Iterator[Case], quick: int, number: int) -> list[Any]:
    return [
        pytest.param(case, id=case.id, marks=[] if i < quick else [pytest.mark.slow])
        for i, case in enumerate(islice(cases, number))
    ]


@pytest.mark.parametrize("case", random_cases(cases(), QUICK, ALL))
def test_random_case(case: Case) -> None:
    assert_forward(ops.forward, **case.arguments(), exact=case.exact, seed=case.seed)


@pytest.mark.parametrize("case", random_cases(special_cases(), QUICK_SPECIAL, ALL_SPECIAL))
def test_random_special_case(case: Case) -> None:
    # The inverse of a huge norm is subnormal, which has fewer bits.
    backward = case.content != "huge"
    assert_special(case, ops.forward, ops.select, backward)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leave_out_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns are then selected as many columns are."""
    for name in ("allows_select_network", "allows_select_small"):
        monkeypatch.setattr(configs, name, lambda *_, **__: False)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize(
    ("N", "M", "D", "k"),
    [(3, 65, 3, 1), (33, 130, 17, 3), (5, 300, 70, 9), (2, 600, 2, 33), (2, 100, 129, 100)],
)
def test_exact(
    metric: str, N: int, M: int, D: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many ties, in every place of a group and a tile."""
    dtype = F16 if N % 2 else F32
    query, key = integers(2, N, D, dtype=dtype), integers(2, M, D, seed=1, dtype=dtype)
    assert_select(ops.select, query, key, k, metric=metric, exact=True, backward=False)
    if metric == "dot" and dtype == F16:
        leave_out_small(monkeypatch)
        assert_select(ops.select, query, key, k, metric=metric, exact=True, backward=False)


@pytest.mark.parametrize("bits", [2, 9, 11, 12, 17, 20])
def test_whole_numbers_of_many_bits(bits: int) -> None:
    """Neighbors are exact, with tensor cores or without."""
    query, key = whole_numbers(3, 200, 70, bits)
    s, I = ops.select(query, key, 4, metric="dot")
    assert torch.equal(s, torch.tensor([199.0, 198, 197, 196]).expand(3, 1, 4))
    assert torch.equal((query @ key.mT).gather(-1, I), s)


OPTIONS = {
    "mask": {"key_mask": torch.arange(300) % 7 == 3},
    "mask_of_groups": {"key_mask": (torch.arange(300) // 8) % 5 == 4},
    "few_left": {"key_mask": (torch.arange(300) == 3) | (torch.arange(300) == 299)},
    "last_keys": {"key_mask": torch.arange(300) >= 250},
    "none_left": {"key_mask": torch.zeros(300, dtype=torch.bool)},
    "candidates": {"candidates": torch.arange(299, 0, -2)},
    "candidates_and_mask": {
        "candidates": (torch.arange(200) * 7) % 300,
        "key_mask": torch.arange(300) % 3 == 0,
    },
    "self": {"self_indices": torch.tensor([0, 150, 299, 7, 8])},
    "self_and_mask": {
        "self_indices": torch.tensor([0, 150, 299, 7, 8]),
        "key_mask": torch.arange(300) % 2 == 0,
    },
    "self_outside_candidates": {
        "self_indices": torch.tensor([0, 151, 298, 6, 8]),
        "candidates": torch.arange(299, 0, -2),
    },
}


@pytest.mark.quick_one_in(7)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize(
    ("k", "dtype"), [(4, F32), (4, F16), pytest.param(70, F32, marks=pytest.mark.slow)], ids=str
)
def test_options(option: str, order: str, k: int, dtype: torch.dtype) -> None:
    """Through groups, in one launch, and, with k = 70, over all columns."""
    # `select_small_kernel` runs `dot` only from D = 16 on.
    query, key = integers(5, 18, dtype=dtype), integers(300, 18, seed=1, dtype=dtype)
    options = OPTIONS[option]
    options = {**options, "metric": "dot", "order": order}
    assert_select(ops.select, query, key, k, **options, exact=True, backward=False)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("M", [300, 50])
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_a_token_that_is_near_itself_is_counted_once(
    metric: str, M: int, dtype: torch.dtype
) -> None:
    """By groups, by all columns, and in one launch: the token is a neighbor without being asked."""
    key = integers(M, 18, seed=1, dtype=dtype)
    own = torch.tensor([0, 7, 8, M - 1])
    options = {"self_indices": own, "metric": metric}
    query = key[own] * (10 if metric == "dot" else 1)
    _, I = assert_select(ops.select, query, key, 4, **options, exact=True, backward=False)
    assert torch.equal(I[:, 0], own)
    assert not (I[:, 1:] == own[:, None]).any()


@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("option", ["self_and_mask", "few_left", "candidates"])
@pytest.mark.parametrize("k", [257, pytest.param(290, marks=pytest.mark.slow)])
def test_more_neighbors_than_a_list_holds(k: int, option: str, order: str) -> None:
    query, key = integers(5, 3), integers(600, 3, seed=1)
    options = {
        name: torch.cat([X, X + 300 if name == "candidates" else X])
        for name, X in OPTIONS[option].items()
        if name != "self_indices"
    }
    options |= {name: X for name, X in OPTIONS[option].items() if name == "self_indices"}
    options |= {"metric": "dot", "order": order}
    assert_select(ops.select, query, key, k, **options, exact=True, backward=False)


MISSING = {
    "keys": {},
    "mask": {"key_mask": torch.arange(20) % 3 == 0},
    "candidates": {"candidates": torch.tensor([15, 3, 8])},
    "self_in_candidates": {
        "candidates": torch.tensor([15, 3, 8]),
        "self_indices": torch.tensor([3, 8, 15, 3, 8]),
    },
    "self_outside_candidates": {
        "candidates": torch.tensor([15, 3, 8]),
        "self_indices": torch.tensor([0, 1, 2, 18, 19]),
        "key_mask": torch.arange(20) != 2,
    },
    "no_candidates": {"candidates": torch.arange(0)},
}


@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("option", MISSING)
@pytest.mark.parametrize(("k", "dtype"), [(21, F16), (21, F32), (40, F16), (300, F32)], ids=str)
def test_more_neighbors_than_keys(option: str, order: str, k: int, dtype: torch.dtype) -> None:
    """In one launch, over all columns, and in passes."""
    query, key = integers(5, 18, dtype=dtype), integers(20, 18, seed=1, dtype=dtype)
    options = MISSING[option] | {"metric": "dot", "order": order}
    assert_select(ops.select, query, key, k, **options, exact=True, backward=False)


@pytest.mark.parametrize("weight", ["none", "depthwise", "dense"])
@pytest.mark.parametrize(
    ("metric", "rho"), [("cosine", "softmax"), ("dot", "similarity"), ("euclidean", "ones")]
)
@pytest.mark.parametrize(
    ("M", "k", "dtype"),
    [
        (4, 5, F32),
        (0, 3, F32),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, 9, F16), (3, 40, F32))),
    ],
    ids=str,
)
def test_missing_places_and_gradients(
    weight: str, metric: str, rho: str, M: int, k: int, dtype: torch.dtype
) -> None:
    """The value that a missing place has an index of is NaN."""
    N, D, C, O = 3, 18, 5, 3
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (O, C, k)}[weight]
    mask = torch.arange(M) != 0
    value = normal(M, C, seed=2, dtype=dtype)
    value[:1] = math.nan
    assert_forward(
        ops.forward,
        normal(N, D, dtype=dtype),
        normal(M, D, seed=1, dtype=dtype),
        value,
        k,
        None if shape is None else normal(*shape, seed=3, dtype=dtype) / 8,
        normal(O if weight == "dense" else C, seed=4, dtype=dtype),
        key_mask=mask,
        metric=metric,
        rho=rho,
    )


@pytest.mark.slow
def test_passes_with_all_keys_and_values() -> None:
    query, key, value = normal(3, 5), normal(520, 5, seed=1), normal(520, 4, seed=2)
    assert_forward(ops.forward, query, key, value, 520, normal(4, 1, 520, seed=3))


SPECIAL = {
    "nan_rows": lambda X: X.index_fill_(-2, torch.tensor([5, 131, 290]), math.nan),
    "negative_nan": lambda X: X.index_fill_(-2, torch.tensor([131]), -math.nan),
    "infinite_rows": lambda X: X.index_fill_(-2, torch.tensor([7, 250]), math.inf),
    "one_infinite_column": lambda X: X[..., 100:120, 2:3].fill_(-math.inf),
    "zero_rows": lambda X: X.index_fill_(-2, torch.arange(0, 300, 2), 0.0),
    "negative_zero": lambda X: X.index_fill_(-2, torch.arange(40, 300), -0.0),
    "constant": lambda X: X.fill_(0.3),
    "nan_of_last_bits": lambda X: X.view(torch.int32)[40:200:91, 2].copy_(
        torch.tensor([0x7F800001, -0x7FFFFF])
    ),
    # The bfloat16 that is nearest to any of these is infinite.
    "largest_numbers": lambda X: (
        X[5:300:3]
        .zero_()[:, 2]
        .copy_(torch.finfo(F32).max * (1 - 2.0**-16 * (torch.arange(99) * 37 % 99)))
    ),
}


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(
    ("dtype", "small", "D"), [(F32, False, 5), (F32, False, 37), (F16, False, 5), (F16, True, 21)]
)
def test_special_values(
    special: str,
    metric: str,
    dtype: torch.dtype,
    small: bool,
    D: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small and metric == "euclidean":
        return
    if not small:
        leave_out_small(monkeypatch)
    query, key = normal(6, D), normal(300, D, seed=1)
    SPECIAL[special](key)
    query[1], query[2, 3], query[3] = 0.0, math.nan, -0.0
    query[4, 0] = math.inf
    assert_select(ops.select, query.to(dtype), key.to(dtype), 6, metric=metric, backward=False)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("option", ["mask", "last_keys", "candidates", "none"])
def test_what_is_left_out_ranks_below_everything(
    option: str, small: bool, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All similarities are negative, below those of rows of zeros, and for one query NaN."""
    if not small:
        leave_out_small(monkeypatch)
    query, key = -normal(4, 18).abs(), normal(300, 18, seed=1).abs()
    query[1] = math.nan
    options = OPTIONS.get(option, {})
    assert_select(ops.select, query.half(), key.half(), 5, **options, metric=metric, backward=False)


@pytest.mark.parametrize("size", [1e20, 1e-20, 1e-37, 3e38])
def test_norms_of_finite_rows_are_finite(size: float) -> None:
    query, key = normal(5, 7), normal(200, 7, seed=1)
    query = query / query.abs().amax() * size
    s, _ = assert_select(ops.select, query, key * (min(size, 1e37) if size > 1 else size), 5)
    assert bool(s.isfinite().all())


def combinations() -> list[Any]:
    """Metric, rho, weight and dtype: all, of which a few are quick."""
    every = product(
        ("cosine", "dot", "euclidean"),
        ("softmax", "ones", "similarity"),
        ("none", "depthwise", "dense"),
        (F32, F16),
    )
    return [
        pytest.param(*each, marks=[] if i % 5 == 0 else [pytest.mark.slow])
        for i, each in enumerate(every)
    ]


@pytest.mark.parametrize(("metric", "rho", "weight", "dtype"), combinations())
def test_gradients(metric: str, rho: str, weight: str, dtype: torch.dtype) -> None:
    """Missing neighbors, hubs that every query chooses, keys that none does, two batches."""
    N, M, D, C, O, k = 20, 90, 9, 20, 35, 3
    query, key = normal(2, N, D, dtype=dtype), normal(2, M, D, seed=1, dtype=dtype)
    query[0] = query[0, :1]
    mask = torch.arange(2 * M).view(2, M) % 3 > 0
    mask[1, 3:] = False
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (O, C, k)}[weight]
    assert_forward(
        ops.forward,
        query,
        key,
        normal(2, M, C, seed=2, dtype=dtype),
        k,
        None if shape is None else normal(*shape, seed=3, dtype=dtype) / 8,
        normal(O if weight == "dense" else C, seed=4, dtype=dtype),
        key_mask=mask,
        metric=metric,
        rho=rho,
        scale=0.7 if rho == "softmax" else 1.0,
    )


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_rows_that_count_as_zero_have_no_gradient(dtype: torch.dtype) -> None:
    """Each key is a neighbor of each query."""
    query, key = normal(4, 5, dtype=dtype), normal(6, 5, seed=1, dtype=dtype)
    query[1], key[3] = 0.0, 0.0
    if dtype == F32:
        query[2], key[4] = 3e-14, -3e-14
    assert_select(ops.select, query, key, 6)
    query.requires_grad_(), key.requires_grad_()
    s, _ = ops.select(query, key, 6)
    dq, dk = torch.autograd.grad(s, (query, key), normal(4, 6, seed=2))
    assert torch.equal(dq.any(1), (query.abs() > 1e-12).any(1))
    assert torch.equal(dk.any(1), (key.abs() > 1e-12).any(1))


@pytest.mark.parametrize("infinite", ["query", "key"])
def test_gradients_of_infinite_rows(infinite: str) -> None:
    """They are NaN."""
    leaves = {"query": normal(5, 6), "key": normal(9, 6, seed=1)}
    leaves[infinite][1, 0] = math.inf
    ops.select(*(X.requires_grad_() for X in leaves.values()), 8)[0].sum().backward()
    assert leaves[infinite].grad[1].isnan().all()


def test_the_gradient_of_an_infinite_row_that_is_nobodys_neighbor() -> None:
    query, key = normal(5, 6), normal(9, 6, seed=1)
    key[7, 0] = math.inf
    key.requires_grad_()
    ops.select(query, key, 8, key_mask=torch.arange(9) != 7)[0].sum().backward()
    assert not key.grad[7].any()


@pytest.mark.parametrize("near", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(2, 1, 2), (3, 2, 2)])
def test_a_softmax_that_is_nan_leaves_missing_neighbors_out(
    shape: tuple[int, ...], near: float
) -> None:
    """Their part of each gradient is 0."""
    value, weight = torch.ones(2, 2, requires_grad=True), torch.ones(shape, requires_grad=True)
    s = torch.tensor([[near, -math.inf]], requires_grad=True)
    ops.aggregate(value, s, torch.tensor([[1, 0]]), weight, rho="softmax").sum().backward()
    assert s.grad.isnan().tolist() == [[True, False]]
    assert s.grad[0, 1] == 0
    assert value.grad[1].isnan().all()
    assert not value.grad[0].any()
    assert weight.grad[..., 0].isnan().all()
    assert not weight.grad[..., 1].any()


def test_values_of_missing_neighbors_do_not_matter() -> None:
    # Nor does what lies before the first row, where a row of -1 would be.
    value = torch.full((8, 20), math.nan)[2:].copy_(normal(6, 20))
    value[0] = math.nan
    s = normal(4, 3)
    s[1], s[2, 1] = -math.inf, -math.inf
    I = torch.tensor([[1, 2, 3], [0, 0, 0], [4, 0, 5], [2, 2, 2]])
    for weight in (None, normal(20, 1, 3), normal(7, 20, 3)):
        Y = assert_aggregate(ops.aggregate, value, s, I, weight)
        assert bool(Y.isfinite().all())


@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
def test_softmax_of_a_large_spread(kind: str) -> None:
    """exp would overflow, or be 0 everywhere, without the largest of scale times the similarity."""
    s, I = 400 * normal(6, 5), torch.arange(30).view(6, 5) % 9
    s[1], s[2, :3] = s[1] / 100, -math.inf
    shape = {"none": None, "depthwise": (7, 1, 5), "dense": (3, 7, 5)}[kind]
    weight = None if shape is None else normal(*shape, seed=1)
    for scale in (-1.0, 1.0):
        Y = assert_aggregate(ops.aggregate, normal(9, 7, seed=2), s, I, weight, scale=scale)
        assert bool(Y.isfinite().all())


def test_softmax_of_more_neighbors_than_a_block_holds() -> None:
    I = torch.randint(9, (5, 70))
    assert_aggregate(ops.aggregate, torch.randn(9, 4), torch.randn(5, 70), I, rho="softmax")


def test_infinite_similarity_is_nan_as_in_eager_softmax() -> None:
    s = normal(3, 4)
    s[0, 1], s[1, 2] = math.inf, math.nan
    I = torch.arange(12).view(3, 4)
    Y = assert_aggregate(ops.aggregate, normal(12, 5), s, I, backward=False)
    assert bool(Y[:2].isnan().all())
    assert bool(Y[2].isfinite().all())


@pytest.mark.parametrize("weight", ["none", "depthwise", "dense"])
def test_a_weight_gradient_of_several_parts(weight: str) -> None:
    N, C, k = 600, 3, 2
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (4, C, k)}[weight]
    W = None if shape is None else normal(*shape)
    s, I = normal(N, k), torch.randint(7, (N, k))
    assert_aggregate(ops.aggregate, normal(7, C, seed=1), s, I, W)


@pytest.mark.parametrize("M", [200, 30])
def test_a_bias_with_strides(M: int) -> None:
    """Where the convolution is part of the finish, and where it is a launch of its own."""
    query, key, value = normal(3, 18), normal(M, 18, seed=1), normal(M, 20, seed=2)
    bias = normal(40, seed=3)[::2]
    assert_forward(ops.forward, query, key, value, 4, normal(20, 1, 4, seed=4), bias)


def test_gradient_of_a_sum_has_no_strides() -> None:
    tensors = [normal(2, 30, 8, seed=i).requires_grad_() for i in range(3)]
    W = normal(6, 8, 4, seed=4).requires_grad_()
    ops.forward(*tensors, 4, W)[0].sum().backward()
    got = [X.grad.clone() for X in (*tensors, W)]
    Y = ops.forward(*tensors, 4, W)[0]
    expected = torch.autograd.grad(Y, (*tensors, W), torch.ones(Y.shape))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("weight", [None, (6, 1, 4), (5, 6, 4)], ids=str)
@pytest.mark.parametrize(
    ("lead", "N"), [((), 0), ((0,), 3), ((2, 0), 3), ((2,), 0)], ids=["N0", "B0", "B2x0", "B2N0"]
)
def test_empty(lead: tuple[int, ...], N: int, weight: tuple[int, ...] | None) -> None:
    tensors = [torch.randn(*lead, n, 6).requires_grad_() for n in (N, 9, 9)]
    W = None if weight is None else torch.randn(weight).requires_grad_()
    Y, s, _ = ops.forward(*tensors, 4, W)
    assert Y.shape == (*lead, N, 6 if W is None else W.shape[0])
    assert s.shape == (*lead, N, 4)
    (Y.sum() + s.sum()).backward()
    assert all(not X.grad.any() for X in (*tensors, W) if X is not None)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_no_channels(metric: str, dtype: torch.dtype) -> None:
    query, key = torch.zeros(2, 3, 0, dtype=dtype), torch.zeros(2, 4, 0, dtype=dtype)
    assert_forward(ops.forward, query, key, normal(2, 4, 5), 2, metric=metric)
    assert_forward(ops.forward, query, query, normal(2, 3, 5), 2, metric=metric)


@pytest.mark.parametrize("layout", ["heads", "transposed", "four_leading"])
def test_strides(layout: str) -> None:
    make = {
        "heads": lambda seed: normal(2, 40, 3, 8, seed=seed).transpose(1, 2),
        "transposed": lambda seed: normal(2, 3, 8, 40, seed=seed).mT,
        "four_leading": lambda seed: normal(2, 1, 2, 40, 8, seed=seed)[:, :, :, ::2],
    }[layout]
    assert_forward(ops.forward, make(0), make(1), make(2), 3, normal(8, 1, 3, seed=3))


@pytest.mark.quick_one_in(7)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(("dtype", "D"), [(F16, 16), (F32, 8), (F32, 40)])
@pytest.mark.parametrize("what", ["keys", "itself", "candidates", "shared"])
def test_several_launches_and_splits(
    what: str, dtype: torch.dtype, D: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace for one block of rows at a time, and two ranges of columns."""
    query, key = normal(2, 20, D, dtype=dtype), normal(2, 300, D, seed=1, dtype=dtype)
    key[:, 7], query[:, 3] = 0, 0
    if what == "itself":
        query = key = key[:, :160]
    if what == "shared":
        query = query[:1].expand(2, 20, D)
    options = {"metric": metric}
    if what == "candidates":
        options["candidates"] = torch.arange(299, 40, -1)
    whole = ops.select(query, key, 4, **options)
    monkeypatch.setattr(configs, "WORKSPACE", 1)
    monkeypatch.setattr(configs, "allowed_memory", lambda *_: 0)
    monkeypatch.setattr(configs, "column_splits", lambda *_: 2)
    forget_plans()
    parts = ops.select(query, key, 4, **options)
    assert all(map(torch.equal, whole, parts))


def test_candidates_of_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values are not looked at on a GPU."""
    from convnn_kernels.triton.select import select

    candidates = torch.arange(200)
    s, I = select(normal(3, 8), normal(0, 8), 2, candidates, None, None, "dot", "similarity")
    assert torch.equal(s, torch.full((3, 2), -math.inf))
    assert not I.any()


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("M", [40, 300])
def test_nothing_beyond_the_tensors_is_read(M: int, metric: str) -> None:
    """A page behind query and key that must not be touched: a process of its own, as it would be
    ended."""
    code = f"""
import ctypes, mmap, torch
from convnn_kernels.triton.select import select
keep = []
def guarded(X):
    page, size = mmap.PAGESIZE, X.numel() * X.element_size()
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), page, 0) == 0
    Y = torch.frombuffer(memory, dtype=X.dtype, count=X.numel(), offset=pages - size)
    return Y.view(X.shape).copy_(X)
query, key = guarded(torch.randn(5, 32)), guarded(torch.randn({M}, 32))
for dtype in (torch.float32, torch.float16):
    tensors = (guarded(query.to(dtype)), guarded(key.to(dtype)))
    s, I = select(*tensors, 2, None, torch.arange(5), None, "{metric}", "similarity")
    assert s.isfinite().all()
print("nothing was touched")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "nothing was touched" in done.stdout, done.stderr


def test_the_same_from_run_to_run() -> None:
    tensors = [normal(2, 50, 8, seed=i).requires_grad_() for i in range(3)]
    W = normal(5, 8, 4, seed=4).requires_grad_()

    def run() -> list[Tensor]:
        Y, s, I = ops.forward(*tensors, 4, W)
        return [Y, s, I, *torch.autograd.grad([Y, s], [*tensors, W], [Y.detach(), s.detach()])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("M", [40, 300])
def test_queries_that_count_as_zero_tie_with_all_keys(M: int) -> None:
    query, key = normal(6, 8), normal(M, 8, seed=1)
    for X in (query, key):
        X[3] *= 1e-14
    for tensors in ((query, key), (key, key)):
        s, I = ops.select(*tensors, 4)
        assert torch.equal(I[3], torch.arange(4))
        assert not s[3].any()
        assert s[[0, 1, 2, 4, 5]].all()


def test_equal_rows_tie_wherever_they_lie() -> None:
    # Products of the interpreter are NumPy's, in which a sum may depend on the column: here all
    # sums are exact.
    query = (4 * normal(4, 37)).round() / 4
    key = (4 * normal(1, 37, seed=1)).round().expand(333, 37) / 4
    for metric, dtype in product(("cosine", "dot", "euclidean"), (F32, F16)):
        s, I = ops.select(query.to(dtype), key.to(dtype), 7, metric=metric)
        assert torch.equal(I, torch.arange(7).expand(4, 7))
        assert torch.equal(s, s[:, :1].expand(4, 7))


class _Allocations(TorchDispatchMode):
    """The sizes of all tensors with memory of their own that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for X in result if isinstance(result, (tuple, list)) else [result]:
            # Bytes are a workspace, whose buffers are counted one by one.
            is_new = isinstance(X, Tensor) and X.untyped_storage().data_ptr() not in self.seen
            if is_new and X.dtype != torch.uint8:
                self.seen.add(X.untyped_storage().data_ptr())
                self.sizes.append(X.numel())
        return result


@dataclasses.dataclass(frozen=True)
class Shape:
    N: int
    k: int
    M: int = 0
    C: int = 64
    O: int = 64
    B: int = 1
    weight: str = "dense"

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in dataclasses.asdict(self).items())


def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every temporary buffer of the launches that follow, which do not run."""
    from convnn_kernels.triton import launch

    made: list[int] = []
    allocate = launch.Pointers.allocate

    def count(pointers: launch.Pointers, workspace: launch.Workspace) -> None:
        made.extend(count for count, _ in workspace.sizes.values())
        allocate(pointers, workspace)

    monkeypatch.setattr(launch.Pointers, "allocate", count)
    monkeypatch.setattr(launch.Plan, "launch", lambda plan, pointers: None)
    return made


def allocations(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> tuple[list[int], int]:
    """Elements of every tensor that the host side makes, forward and backward, and the most that
    any input or output has.

    Kernels do not run: what they read and write has been allocated before.
    """

    made = planned(monkeypatch)
    monkeypatch.setattr(hardware, "architecture", lambda X: 90)
    B, N, M, C, O, k = shape.B, shape.N, shape.M or shape.N, shape.C, shape.O, shape.k
    query, key, value = (torch.zeros(B, n, C) for n in (N, M, M))
    weights = {"none": None, "depthwise": (C, 1, k), "dense": (O, C, k)}[shape.weight]
    W = None if weights is None else torch.zeros(weights)
    forward, backward = (
        backend.operators()[f"convnn::{name}"] for name in ("forward", "forward_backward")
    )
    mask = torch.ones(B, M) > 0
    options = ("cosine", "softmax", 1.0)
    with _Allocations() as mode:
        Y, s, I = forward(query, key, value, k, W, None, None, None, mask, *options, "similarity")
        s.zero_()
        I.zero_()
        # A gradient with strides of its own, which is copied.
        G = Y.mT.contiguous().mT
        backward(G, None, query, key, value, W, s, I, False, *options, *[True] * 4, False)
    given = max(X.numel() for X in (query, key, value, Y, s) if X is not None)
    given = max(given, 0 if W is None else W.numel())
    return [*mode.sizes, *made], given


MEMORY = [
    *(Shape(N, k, weight=w) for N, k in ((8192, 9), (4096, 300)) for w in ("none", "depthwise")),
    Shape(8192, 9),
    Shape(4096, 300),
    Shape(1024, 256),
    Shape(1024, 256, C=48),
    Shape(1024, 9, B=4),
    Shape(2048, 16, M=512, C=256, O=512),
    Shape(512, 16, M=4096, C=32, O=1024),
    Shape(3000, 32, C=20, B=2, weight="depthwise"),
    Shape(1024, 9, C=768, weight="none"),
]


SMALL_WORKSPACE = 2**21


@pytest.mark.parametrize("shape", MEMORY, ids=str)
def test_memory(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> None:
    """No tensor is N x M or N x k x C, unless three of an input are as large: float32 in pieces.

    The workspace is so small that all else follows from the sizes.
    """
    if shape.k <= 64:
        monkeypatch.setattr(configs, "WORKSPACE", SMALL_WORKSPACE)
    sizes, given = allocations(monkeypatch, shape)
    given *= 3
    assert len(sizes) > 10
    all_pairs = shape.B * shape.N * (shape.M or shape.N)
    all_neighbors = shape.B * shape.N * shape.k * shape.C
    assert max((size for size in sizes if size > given), default=0) < min(all_pairs, all_neighbors)
    assert max(sizes) <= max(given, SMALL_WORKSPACE // 4, configs.WORKSPACE // 4)


# M rows of D channels that G batch elements share; some with more batch elements of either kind.
SHARED = {
    "batch": lambda G, M, D: normal(M, D).expand(G, M, D),
    "batch_and_heads": lambda G, M, D: normal(M, D).expand(G, 2, M, D),
    "batch_of_heads": lambda G, M, D: normal(2, M, D).expand(G, 2, M, D),
    "grouped_heads": lambda G, M, D: normal(2, 1, M, D).expand(2, G, M, D),
    "batch_of_grouped_heads": lambda G, M, D: normal(2, 2, 1, M, D).expand(2, 2, G, M, D),
    "sliced_cache": lambda G, M, D: normal(2, 2 * M, G, D)[:, :M].transpose(1, 2),
    "sliced_cache_of_grouped_heads": lambda G, M, D: (
        normal(2, 2 * M, 2, 1, D)[:, :M].permute(0, 2, 3, 1, 4).expand(2, 2, G, M, D)
    ),
    "channels_apart": lambda G, M, D: normal(D, M).mT.expand(2, G, M, D),
}


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("layout", SHARED)
def test_rows_that_batch_elements_share_are_copied_once_at_most(
    monkeypatch: pytest.MonkeyPatch, layout: str, metric: str
) -> None:
    made = planned(monkeypatch)
    M, D = 512, 256
    key, value = SHARED[layout](16, M, D), SHARED[layout](16, M, D)
    distinct = key.numel() // math.prod(
        size for size, stride in zip(key.shape, key.stride(), strict=True) if stride == 0
    )
    query, weight = torch.zeros(*key.shape[:-2], 1, D), torch.zeros(D, 1, 4)
    mask = torch.ones(M, dtype=torch.bool).expand(key.shape[:-1])
    forward = backend.operators()["convnn::forward"]
    options = (None, None, mask, metric, "softmax", 1.0, "similarity")
    with _Allocations() as mode:
        mode.seen |= {X.untyped_storage().data_ptr() for X in (query, key, value, weight, mask)}
        forward(query, key, value, 4, weight, None, *options)
    # Keys in three pieces of 16 bits, and the same again in the interpreter.
    assert max(mode.sizes + made) <= 3 * distinct + 15


@pytest.mark.parametrize("option", ["none", "self", "mask", "own_masks"])
@pytest.mark.parametrize("layout", SHARED)
def test_rows_that_batch_elements_share(layout: str, option: str) -> None:
    M, D, N = 9, 5, 2
    key = SHARED[layout](2, M, D)
    lead = key.shape[:-2]
    generator = torch.Generator().manual_seed(0)
    options = {
        "none": {},
        "self": {"self_indices": torch.tensor([7, 3])},
        "mask": {"key_mask": (torch.arange(M) % 3 > 0).expand(*lead, M)},
        "own_masks": {"key_mask": torch.rand(*lead, M, generator=generator) > 0.5},
    }[option]
    query = normal(*lead, N, D, seed=1)
    assert_select(ops.select, query, key, 4, **options, backward=False)


QUERIES = {
    "rows_before_heads": lambda key: normal(2, 4, 3, 5).transpose(1, 2),
    "one_of_several": lambda key: normal(2, 3, 4, 5)[:, :, 2:3],
    "shared": lambda key: normal(2, 1, 4, 5).expand(2, 3, 4, 5),
    "one_row": lambda key: normal(5).expand(2, 3, 1, 5),
    "keys": lambda key: key,
    "first_key": lambda key: key[:, :, :1],
}


@pytest.mark.parametrize("layout", QUERIES)
def test_queries_of_shared_keys(layout: str) -> None:
    """Queries that do not follow one another, and such as are shared themselves."""
    key = normal(8, 5).expand(2, 3, 8, 5)
    assert_select(ops.select, QUERIES[layout](key), key, 4, backward=False)


def test_parts_of_a_weight_gradient_are_freed_before_the_inverse_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both may be large."""
    from convnn_kernels.triton import aggregate_backward, launch

    monkeypatch.setattr(launch.Plan, "launch", lambda plan, pointers: None)
    N, C, O, k = 2048, 16, 24, 3
    allocate, invert = launch.Pointers.allocate, aggregate_backward.invert
    parts, alive = [], []

    def note(pointers: launch.Pointers, workspace: launch.Workspace) -> None:
        allocate(pointers, workspace)
        if "p_part" in workspace.sizes:
            memory = pointers._owners["p_part"][0]
            parts.append((workspace.sizes["p_part"][0], weakref.ref(memory)))

    def inverse(*arguments: Any) -> launch.Pointers:
        alive.extend(memory() is not None for _, memory in parts)
        return invert(*arguments)

    monkeypatch.setattr(launch.Pointers, "allocate", note)
    monkeypatch.setattr(aggregate_backward, "invert", inverse)
    value, grad, W = (torch.zeros(shape) for shape in ((1, N, C), (1, N, O), (O, C, k)))
    s, I = torch.zeros(1, N, k), torch.zeros(1, N, k, dtype=torch.int64)
    options = (False, "softmax", 1.0, True, True, True, False)
    aggregate_backward.aggregate_backward(grad, value, s, I, W, *options)
    assert parts[0][0] > k * C * O
    assert alive == [False]


def test_parts_of_a_weight_gradient_are_bounded() -> None:
    for rows, size, bound, programs in (
        (1024, 2**23, 2**23, 100),
        (2**14, 2**16, 2**28, 9),
        (10**6, 10**5, 10**6, 3),
    ):
        count, each = configs.parts(rows, size, bound, programs)
        assert (count - 1) * each < rows <= count * each
        assert count == 1 or count * size < max(bound, configs.WORKSPACE // 8 + 1)


@pytest.mark.parametrize("rho", ["ones", "softmax", "similarity"])
@pytest.mark.parametrize("C", [3, 16, 40])
def test_dense_products_of_16_bits(C: int, rho: str) -> None:
    """Blocks of queries of several batch elements, and of neighbors of few channels."""
    q, v, W, G = (
        normal(*shape, seed=seed, dtype=torch.float16)
        for seed, shape in enumerate(((3, 5, 8), (3, 5, C), (24, C, 4), (3, 5, 24)))
    )
    tensors = [X.requires_grad_() for X in (v, W)]
    scale = 2.0 if rho == "softmax" else 1.0
    options = (None, None, None, None, "cosine", rho, scale, "similarity")
    Y, s, I = ops.forward(q, q, v, 4, W, *options)
    gradients = torch.autograd.grad(Y, tensors, G)

    def eager(dtype: torch.dtype) -> tuple[Tensor, ...]:
        V, weight = (X.detach().to(dtype).requires_grad_() for X in tensors)
        of_s = {"ones": torch.ones_like(s), "softmax": (scale * s).softmax(-1), "similarity": s}
        X_nn = of_s[rho].to(dtype)[..., None] * V[torch.arange(3)[:, None, None], I]
        Y = torch.einsum("bnjc,ocj->bno", X_nn, weight)
        return Y, *torch.autograd.grad(Y, (V, weight), G.to(dtype))

    for found, right, same in zip(
        (Y, *gradients), eager(torch.float64), eager(torch.float16), strict=True
    ):
        error, of_eager = ((X.double() - right).abs().max() for X in (found, same))
        assert error <= 2 * of_eager + 2**-10 * right.abs().max()


def test_an_infinite_gradient_of_a_missing_neighbor() -> None:
    value, G = normal(1, 2, 16), torch.ones(1, 2, 3)
    G[0, 0] = math.inf
    s, I = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    s[0, 0, 1] = -math.inf
    weight = torch.ones(3, 16, 2)
    backward = torch.ops.convnn.aggregate_backward
    needs = (False, False, True, False)
    grad = backward(G, value, s, I, weight, False, "ones", 1.0, *needs)[2]
    assert torch.equal(grad[:, :, 1], value[0, 0].expand(3, 16))
    assert grad[:, :, 0].isinf().all()


@pytest.mark.parametrize("parts", [1, 64])
def test_a_buffer_of_all_pairs_is_seen(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """As many parts of a weight's gradient as there were once; and a buffer in any tensor made."""
    shape = Shape(1024, 256) if parts > 1 else Shape(1024, 9, C=16, weight="none")
    if parts > 1:
        monkeypatch.setattr(configs, "parts", lambda rows, *_: (parts, -(-rows // parts)))
    else:
        empty = Tensor.new_empty
        monkeypatch.setattr(
            Tensor,
            "new_empty",
            lambda X, *args, **named: empty(empty(X, 1024, 1024)[:1], *args, **named),
        )
    sizes, given = allocations(monkeypatch, shape)
    assert max(size for size in sizes if size > given) >= 1024**2


class _Asked:
    """Notes for each launch what it would be compiled for, and runs it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from convnn_kernels.triton.launch import Launch

        self.variants: set[Any] = set()
        run = Launch.by_triton

        def note(launch: Launch, pointers: Any) -> None:
            tensors = map(pointers.tensor, launch.pointers)
            found = [X is not None and (X.dtype, X.data_ptr() % 16 == 0) for X in tensors]
            kinds = map(self._kind, launch.values)
            self.variants.add((launch.kernel.name, *found, *kinds, *launch.options.items()))
            run(launch, pointers)

        monkeypatch.setattr(Launch, "by_triton", note)

    @staticmethod
    def _kind(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return value == 1, value % 16 == 0, abs(value) < 2**31
        return type(value)


LOSSES = {
    "contiguous": lambda Y: Y * normal(*Y.shape, seed=9),
    "sum": lambda Y: Y.sum(),
    "transposed": lambda Y: Y.mT.contiguous() * normal(*Y.mT.shape, seed=9),
}


@pytest.mark.parametrize(
    ("weight", "loss"), [("dense", "contiguous"), ("depthwise", "sum"), ("dense", "transposed")]
)
def test_nothing_is_compiled_after_warmup(
    monkeypatch: pytest.MonkeyPatch, weight: str, loss: str
) -> None:
    asked = _Asked(monkeypatch)
    N, C, k = 40, 16, 4
    X = [normal(2, N, C, seed=i).requires_grad_() for i in range(3)]
    W = normal(*((C, 1, k) if weight == "depthwise" else (24, C, k)), seed=3).requires_grad_()
    convnn_kernels.warmup(*X, k, W)
    before = set(asked.variants)
    of_output = {"dense": ["weight_grad_dense_kernel", "value_grad_dense_kernel"]}
    assert {variant[0] for variant in before} >= {
        *("norms_kernel", "query_side_kernel", "sort_pairs_kernel", "key_side_kernel"),
        *of_output.get(weight, []),
    }
    LOSSES[loss](convnn_kernels.functional.convnn(*X, k, W)).sum().backward()
    assert asked.variants == before


def test_without_gradients_warmup_compiles_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _Asked(monkeypatch)
    X = [normal(2, 40, 16, seed=i) for i in range(3)]
    convnn_kernels.warmup(*X, 4)
    before = set(asked.variants)
    convnn_kernels.functional.convnn(*(x.requires_grad_() for x in X), 4).sum().backward()
    new = {variant[0] for variant in asked.variants - before}
    assert new == {"query_side_kernel", "sort_pairs_kernel", "key_side_kernel"}


LISTS = {
    "one_key": [100],
    "on_chunks": [16, 32, 0, 48, 4],
    "off_chunks": [1, 15, 16, 17, 40, 0, 11],
}


@pytest.mark.parametrize("lists", LISTS)
@pytest.mark.parametrize("weight", ["none", "depthwise", "dense"])
def test_keys_that_many_queries_chose(lists: str, weight: str) -> None:
    """Runs of pairs that begin, end and lie in every way to the chunks of the inverse list."""
    in_order = torch.arange(len(LISTS[lists])).repeat_interleave(torch.tensor(LISTS[lists]))
    M, C, k = len(LISTS[lists]) + 2, 20, 2
    N = len(in_order) // k
    generator = torch.Generator().manual_seed(0)
    # Slots by key: with a dense weight the list is sorted by key and slot.
    I = torch.stack([in_order.view(k, N).T, in_order.flip(0).view(k, N).T])
    I = I[:, torch.randperm(N, generator=generator)]
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (7, C, k)}[weight]
    W = None if shape is None else normal(*shape, seed=3) / 8
    assert_aggregate(ops.aggregate, normal(2, M, C, seed=1), normal(2, N, k), I, W)


@pytest.mark.parametrize("pairs_each", [64, 128, 4096])
@pytest.mark.parametrize(("B", "N", "M", "k"), [(1, 1, 1, 1), (2, 37, 11, 3), (3, 70, 300, 9)])
def test_inverse_list(
    B: int,
    N: int,
    M: int,
    k: int,
    pairs_each: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stable sort: pairs of a key by (j, i), however many tiles, missing ones last."""
    monkeypatch.setattr(
        configs, "inverse_list_parts", lambda *_: (-(-N * k // pairs_each), pairs_each)
    )
    generator = torch.Generator().manual_seed(0)
    I = torch.randint(-1, M + 1, (B, N, k), generator=generator)
    I[:, : N // 3] = 0
    s = normal(B, N, k)
    s[s > 1] = -math.inf
    present = (s != -math.inf) & (I >= 0) & (I < M)
    expected = torch.where(present, I + M * torch.arange(B).view(B, 1, 1), B * M)
    expected, bounds = expected * k + torch.arange(k), torch.arange(B * M + 1) * k
    in_order, places = expected.flatten().sort(stable=True)
    from convnn_kernels.triton.inverse_list import invert

    inverse = invert(s, I, M)
    pairs, keys, offsets = (inverse.tensor(f"p_{name}") for name in ("pairs", "keys", "offsets"))
    offsets = offsets[:: -(-N * k // pairs_each)][: B * M + 1]
    assert {X.dtype for X in (pairs, keys, offsets)} == {torch.int32}
    found = int(present.sum())
    assert torch.equal(pairs[:found].long(), places[:found])
    assert torch.equal(keys[:found].long(), in_order[:found])
    assert torch.equal(offsets.long(), torch.searchsorted(in_order, bounds))
    assert torch.equal(pairs[found:].long().sort().values, places[found:].sort().values)
    assert bool((keys[found:] >= bounds[-1]).all())


def test_tiles_of_an_inverse_list_are_bounded() -> None:
    for batch, pairs, keys in (
        (1, 9 * 2**16, 2**16),
        (4, 300 * 4096, 4096),
        (2**16, 5, 1),
        (1, 2**34, 2**30),
    ):
        count, each = configs.inverse_list_parts(batch, pairs, keys)
        assert (count - 1) * each < pairs <= count * each
        assert count == 1 or 4 * (batch * count * (keys + 1) + 1) <= configs.WORKSPACE // 2


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_a_key_gradient_of_many_queries(metric: str) -> None:
    query = normal(3, 1, 70, seed=5).repeat_interleave(30, dim=1)
    key = normal(3, 40, 70, seed=1)
    assert_select(ops.select, query, key, 5, metric=metric)


def test_what_it_does_not_take() -> None:
    x = torch.randn(5, 3)
    for dtype, why in ((torch.float64, "float64"), (torch.bfloat16, "bfloat16")):
        with pytest.raises(RuntimeError, match=f"forced backend 'triton' cannot run .*{why}"):
            ops.select(x.to(dtype), x.to(dtype), 2)
    with pytest.raises(RuntimeError, match="k must be at least 1, got 0"):
        ops.select(x, x, 0)


@pytest.mark.parametrize(
    ("argument", "values", "message"),
    [
        ("candidates", [0, 5], r"candidates must be in \[0, 5\), got 5 at position 1"),
        ("candidates", [3, 1, 3], "candidates must be distinct, got 3 more than once"),
        ("self_indices", [0, 1, -1, 2, 3], r"must be in \[0, 5\), got -1 at position 2"),
    ],
)
def test_index_values(argument: str, values: list[int], message: str) -> None:
    x = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match=message):
        ops.select(x, x, 2, **{argument: torch.tensor(values)})


def test_index_values_of_aggregate() -> None:
    with pytest.raises(RuntimeError, match=r"indices must be in \[0, 5\), got 9 at position 3"):
        ops.aggregate(torch.randn(5, 3), torch.randn(2, 2), torch.tensor([[0, 1], [2, 9]]))


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("similarities", lambda s: s.to(torch.int8), r"must be float32( or float64)?, got int8"),
        ("indices", lambda I: I[:, :2], r"must have (the )?shape \[2, 4, 2\].*, got shape \[2, 2,"),
        ("indices", lambda I: I.to(torch.int32), "must be int64, got int32"),
        ("indices", lambda I: I - 7, r"must be in \[0, 7\), got -\d at position 0"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_wrong_calls_of_backward_operators(
    op: str, argument: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    args = arguments(op)
    args[argument] = change(args[argument])
    with pytest.raises(RuntimeError, match=f"^convnn::{op}: {argument} {message}"):
        getattr(ops, op)(**args)


def test_no_access_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not checked, wrong ones are left out."""
    monkeypatch.setattr(selection, "_check_values", lambda *_: None)
    query, key = integers(3, 4), integers(200, 4, seed=1)
    wrong = torch.tensor([-5, 10**9, 200])
    candidates = torch.cat([wrong, torch.arange(0, 200, 2)])
    s, I = ops.select(query, key, 4, candidates, torch.tensor([10**12, -1, 3]), metric="dot")
    allowed = torch.arange(0, 200, 2)
    expected = select(query[:2], key, 4, allowed, metric="dot")
    assert torch.equal(I[:2], expected[1])
    assert torch.equal(s[:2], expected[0])
    value = torch.randn(5, 3, requires_grad=True)
    I = torch.tensor([[0, 1], [-7, 10**12]])
    for W in (None, torch.randn(3, 1, 2), torch.randn(4, 3, 2)):
        Y = ops.aggregate(value, torch.randn(2, 2), I, W)
        assert not Y[1].any()
        assert not torch.autograd.grad(Y.sum(), value)[0][2:].any()
