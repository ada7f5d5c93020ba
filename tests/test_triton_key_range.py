# SPDX-License-Identifier: MIT
"""Which keys a query may see, by the Triton kernels in Triton's interpreter.

It needs a process of its own, started with ``TRITON_INTERPRET=1``, as those of test_triton.py.
"""

import dataclasses
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, make_case
from inputs import allowed_by, with_any_bytes
from interpreter import in_interpreter
from torch import Tensor

import convnn_kernels
from convnn_kernels.triton import configs
from convnn_kernels.triton.launch import Launch, Pointers, forget_plans
from python_ref import assert_forward, assert_select

pytestmark = in_interpreter

ops = torch.ops.convnn
QUICK, ALL = 10, 200
MOST_ROWS = 300
F32, F16 = torch.float32, torch.float16
INSTEAD = {torch.float64: F32, torch.bfloat16: F16}


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    """Triton's, and no plan that was made with configurations of another test."""
    forget_plans()
    with convnn_kernels.backend("triton"):
        yield
    forget_plans()


def cases() -> Iterator[Case]:
    seed = 0
    while True:
        case = make_case(seed, restricted=True)
        seed += 1
        # The gradient of value rounds a similarity, as rho, to 16 bits, whichever keys are allowed.
        is_rounded = case.rho == "similarity" and case.content == "scales"
        is_small = math.prod(case.lead) * max(case.N, case.M) <= MOST_ROWS
        if is_small and max(case.D, case.C) <= 130 and not is_rounded:
            yield dataclasses.replace(
                case,
                query_dtype=INSTEAD.get(case.query_dtype, case.query_dtype),
                value_dtype=INSTEAD.get(case.value_dtype, case.value_dtype),
            )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=[] if i < QUICK else [pytest.mark.slow])
        for i, case in enumerate(islice(cases(), ALL))
    ],
)
def test_random_case(case: Case) -> None:
    assert_forward(ops.forward, **case.arguments(), exact=case.exact, seed=case.seed)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    """Whose dot products and distances are exact, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def drawn(high: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def ranges(begin: Tensor, end: Tensor, M: int) -> Tensor:
    return torch.stack([begin.expand_as(end), end], dim=-1).clamp(0, M)


def causal(N: int, M: int) -> Tensor:
    """Of N queries, the last of which is at the last key."""
    return ranges(torch.tensor(0), torch.arange(N) + 1 + M - N, M)


def window(N: int, M: int, width: int) -> Tensor:
    end = torch.arange(N) + 1 + M - N
    return ranges(end - width, end, M)


def by_hand(
    query: Tensor, key: Tensor, k: int, key_range: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """select for query [N, D] and key [M, D] with a batch element of each query, of which the range
    is a mask."""
    mask = with_any_bytes(allowed_by(key_range, len(key)))
    key = key.expand(len(query), *key.shape)
    s, I = ops.select(query[:, None], key, k, key_mask=mask, **options)
    return s[:, 0], I[:, 0]


# Sizes that reach each strategy with dot in 16 bits: M, k, candidates, and the kernel.
STRATEGIES: dict[str, Any] = {
    "one_tile": (100, 5, False, "select_network_kernel"),
    "candidates_of_one_tile": (300, 5, True, "select_network_kernel"),
    "all_columns": (100, 20, False, "exact_topk_kernel"),
    "long_lists": (100, 40, False, "exact_topk_kernel"),
    "in_passes": (280, 270, False, "exact_topk_kernel"),
    "sweep": (300, 5, False, "sweep_kernel"),
    "many_groups": (200, 40, False, "sweep_kernel"),
    "candidates": (150, 20, True, "exact_topk_kernel"),
}


class Reads:
    """How many rows of a tensor each kernel loads, one as often as it is loaded, and which."""

    def __init__(self, of: Tensor) -> None:
        self.of, self.rows, self._kernel = of, dict[str, list[int]](), ""

    def begin(self, kernel: str) -> None:
        self._kernel = kernel
        self.rows.setdefault(kernel, [])

    def note(self, addresses: Any, mask: Any) -> None:
        of_all = np.broadcast_arrays(addresses, mask)
        used = of_all[0][of_all[1].astype(bool)].astype(np.int64) - self.of.data_ptr()
        of_row = self.of.stride(-2) * self.of.element_size()
        used = used[(used >= 0) & (used < of_row * self.of.shape[-2])]
        self.rows[self._kernel] += (used[used % of_row == 0] // of_row).tolist()


@pytest.fixture
def key() -> Tensor:
    """[300, 16], whose rows are read as they are: float32 would be read in pieces."""
    return integers(300, 16, seed=1, dtype=F16)


@pytest.fixture
def reads(key: Tensor, monkeypatch: pytest.MonkeyPatch) -> Reads:
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    found = Reads(key)
    by_triton, load = Launch.by_triton, Builder.create_masked_load

    def launch(self: Launch, pointers: Pointers) -> Any:
        found.begin(self.kernel.name)
        return by_triton(self, pointers)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found.note(pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(Launch, "by_triton", launch)
    monkeypatch.setattr(Builder, "create_masked_load", masked_load)
    return found


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize(
    ("metric", "order", "dtype"),
    [
        ("dot", "similarity", F16),
        pytest.param("dot", "index", F32, marks=pytest.mark.slow),
        pytest.param("euclidean", "similarity", F32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("in_passes", "many_groups") else [])
        for name in STRATEGIES
    ],
)
def test_causal_equals_masks(
    strategy: str, metric: str, order: str, dtype: torch.dtype, key: Tensor, reads: Reads
) -> None:
    M, k, some, kernel = STRATEGIES[strategy]
    query, key = integers(21, 16, dtype=dtype), key[:M].to(dtype)
    options: dict[str, Any] = {"metric": metric, "order": order}
    if some:
        options["candidates"] = torch.randperm(M, generator=torch.Generator().manual_seed(3))[:90]
    key_range = causal(21, M)
    # The first queries see fewer keys than neighbors.
    key_range[:4, 1] = torch.tensor([0, 1, 2, k])
    s, I = ops.select(query, key, k, key_range=key_range, **options)
    assert kernel in reads.rows or dtype == F32
    expected = by_hand(query, key, k, key_range, **options)
    assert torch.equal(I, expected[1])
    assert torch.equal(s, expected[0])


RESTRICTIONS: dict[str, Any] = {
    "windows": lambda B, N, M: {"key_range": window(N, M, 40)},
    "ranges": lambda B, N, M: {"key_range": drawn(M + 1, B, N, 2).sort(dim=-1).values},
    "empty": lambda B, N, M: {"key_range": drawn(M + 1, N, 1).expand(N, 2)},
    "some_empty": lambda B, N, M: {
        "key_range": ranges(drawn(2, N) * (M - 9), torch.full((N,), M // 2), M).sort(-1).values
    },
    "self": lambda B, N, M: {"self_indices": drawn(M, B, N)},
    "excluded": lambda B, N, M: {"self_indices": drawn(M, N), "exclude_self": True},
    "each_excluded": lambda B, N, M: {"self_indices": drawn(M, B, N), "exclude_self": True},
    "self_outside": lambda B, N, M: {
        "self_indices": (torch.arange(N) + M - N) % M,
        "key_range": window(N, M, 50) - torch.arange(N)[:, None] % 2,
    },
    "candidates": lambda B, N, M: {
        "candidates": torch.stack([torch.randperm(M)[: M - 7] for _ in range(B)])
    },
    "all": lambda B, N, M: {
        "candidates": torch.stack([torch.randperm(M)[: M - 7] for _ in range(B)]),
        "self_indices": drawn(M, B, N),
        "key_mask": torch.rand(B, M) < 0.8,
        "key_range": drawn(M + 1, B, N, 2).sort(dim=-1).values,
        "exclude_self": True,
    },
}


@pytest.mark.quick_one_in(7)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("M", "k"), [(70, 4), pytest.param(260, 9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_restrictions_are_exact(restriction: str, M: int, k: int, shared: bool) -> None:
    """With few columns and many; and with keys that all batch elements share."""
    B, N = 3, 19
    torch.manual_seed(0)
    query, key = integers(B, N, 6), integers(B, M, 6, seed=1)
    key = key[:1].expand(B, M, 6) if shared else key
    options = RESTRICTIONS[restriction](B, N, M)
    for metric in ("dot", "euclidean"):
        assert_select(
            ops.select, query, key, k, metric=metric, exact=True, backward=False, **options
        )


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("M", [60, 200])
def test_exclude_self_is_the_rest_after_self(M: int, metric: str) -> None:
    """Rows of key that equal the token itself are neighbors all the same."""
    key = integers(2, M // 2, 16, dtype=F16).repeat(1, 2, 1)
    query, own = key[:, 10:31], torch.arange(10, 31)
    s, I = ops.select(query, key, 7, self_indices=own, metric=metric)
    others = ops.select(query, key, 6, self_indices=own, metric=metric, exclude_self=True)
    assert torch.equal(others[0], s[..., 1:])
    assert torch.equal(others[1], I[..., 1:])
    assert (I[..., 0] == own).all()
    assert (others[1] != own[:, None]).all()
    assert (query == key.gather(1, others[1][..., :1].expand(-1, -1, 16))).all(-1).any()


def test_self_outside_its_range_is_no_neighbor() -> None:
    for M in (30, 200):
        key = integers(1, M, 8)
        own = torch.arange(20)
        before = ranges(torch.tensor(0), own, M)
        s, I = ops.select(key[:, :20], key, 3, self_indices=own, key_range=before, metric="dot")
        found = s > -math.inf
        assert torch.equal(found.sum(-1)[0], own.clamp(max=3))
        assert (own[:, None] > I)[found].all()
        _, I = ops.select(key[:, :20], key, 3, self_indices=own, key_range=causal(20, 20))
        assert torch.equal(I[0, :, 0], own)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_outside_a_range_is_not_seen(strategy: str, key: Tensor) -> None:
    M, k, some, _ = STRATEGIES[strategy]
    query, key = integers(20, 16, dtype=F16), key[:M].clone()
    key[M // 2 :] = math.nan
    key[0] = math.nan
    options: dict[str, Any] = {"candidates": torch.arange(M).flip(0)} if some else {}
    key_range = ranges(torch.tensor(1), torch.arange(20) + M // 2 - 19, M)
    s, I = ops.select(query, key, k, key_range=key_range, metric="dot", **options)
    assert not s.isnan().any()
    key = key.nan_to_num(5.0)
    expected = ops.select(query, key, k, key_range=key_range, metric="dot", **options)
    assert torch.equal(I, expected[1])
    assert torch.equal(s, expected[0])


@pytest.mark.parametrize(("k", "kernel"), [(4, "sweep_kernel"), (70, "exact_topk_kernel")])
def test_keys_outside_all_ranges_are_not_read(
    k: int, kernel: str, key: Tensor, reads: Reads
) -> None:
    """But by the kernels of norms and columns, which have no queries."""
    middle = torch.tensor([140, 160]).expand(19, 2)
    s, I = ops.select(integers(19, 16, dtype=F16), key, k, metric="dot", key_range=middle)
    found = s > -math.inf
    assert torch.equal(found.sum(-1), torch.full((19,), min(k, 20)))
    assert ((I >= 140) & (I < 160))[found].all()
    # The tiles of both have up to 128 columns.
    assert 140 - 128 < min(reads.rows[kernel]) <= 140
    assert 159 <= max(reads.rows[kernel]) < 160 + 128


@pytest.mark.parametrize(("k", "kernel"), [(4, "sweep_kernel"), (70, "exact_topk_kernel")])
def test_work_follows_the_ranges(k: int, kernel: str, key: Tensor, reads: Reads) -> None:
    # Queries of every part of the keys, in blocks of 16 and 8.
    at = torch.arange(0, 300, 75)[:, None] + torch.arange(16)
    at = at.flatten()

    def rows(begin: Tensor, end: Tensor) -> int:
        reads.rows.clear()
        query = integers(64, 16, dtype=F16)
        ops.select(query, key, k, metric="dot", key_range=ranges(begin, end, 300))
        return len(reads.rows[kernel])

    whole = rows(at * 0, at * 0 + 300)
    assert rows(at * 0, at + 1) < 0.65 * whole
    assert rows(at - 30, at + 1) < 0.5 * whole
    assert rows(at, at) == 0


@pytest.mark.parametrize(
    ("splits", "dtype", "metric"),
    [
        (1, F16, "dot"),
        (3, F16, "dot"),
        pytest.param(1, F32, "euclidean", marks=pytest.mark.slow),
        pytest.param(3, F16, "cosine", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_of_a_block_with_ranges_far_apart(
    splits: int, dtype: torch.dtype, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of some lengths, one of them empty, and queries that see less than k keys or all;
    with a sample of the tiles, and columns divided among programs."""
    monkeypatch.setattr(configs, "column_splits", lambda *_: splits)
    sweep = configs.sweep
    monkeypatch.setattr(configs, "sweep", lambda *sizes: sweep(*sizes) | {"sample_step": 3})
    lengths = torch.tensor([3, 0, 170, 41, 136, 300])
    M, ends = int(lengths.sum()), lengths.cumsum(0)
    key_range = torch.stack([ends - lengths, ends], dim=-1)[torch.arange(22) % 6]
    key_range[-3:] = torch.tensor([0, M])
    query, key = integers(22, 20, dtype=dtype), integers(M, 20, seed=1, dtype=dtype)
    options: dict[str, Any] = {"key_range": key_range, "metric": metric}
    exact = metric != "cosine"
    assert_select(ops.select, query, key, 5, **options, exact=exact, backward=False)


def test_forward_of_ranges_in_one_plan() -> None:
    """The end of a sweep, with missing neighbors, is the same as a convolution of its own."""
    query, key, value = integers(2, 20, 18), integers(2, 200, 18, seed=1), torch.randn(2, 200, 8)
    options = {"key_range": causal(20, 20), "self_indices": torch.arange(20), "exclude_self": True}
    weight, bias = torch.randn(8, 1, 4), torch.randn(8)
    Y, s, I = ops.forward(query, key, value, 4, weight, bias, metric="dot", **options)
    expected = ops.aggregate(value, s, I, weight, bias)
    torch.testing.assert_close(Y, expected)
    assert torch.equal(Y[:, 0], bias.expand(2, 8))
    assert torch.equal((s > -math.inf).sum(-1)[0], torch.arange(20).clamp(max=4))
