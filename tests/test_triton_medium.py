# SPDX-License-Identifier: MIT
"""`select_medium_kernel`, for some hundred columns of 16 bits, in Triton's interpreter.

They need a process of their own, started with ``TRITON_INTERPRET=1``, as those of test_triton.py.
"""

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

import convnn_kernels
from convnn_kernels.triton import configs
from python_ref import assert_forward, assert_select

pytestmark = in_interpreter

ops = torch.ops.convnn
F16 = torch.float16


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with convnn_kernels.backend("triton"):
        yield


@pytest.fixture(autouse=True)
def _fresh_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plan that was made with configurations of another test, and few queries are enough."""
    monkeypatch.setattr(configs, "BUSY", 1)
    forget_plans()
    yield
    monkeypatch.undo()
    forget_plans()


def forget_plans() -> None:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How many blocks of rows there were, and how many went each way that is not the usual one."""
    from convnn_kernels.triton import select_medium

    found: collections.Counter[str] = collections.Counter()

    def watch(name: str, way: str) -> None:
        function = getattr(select_medium, name)

        def count(*arguments: Any) -> Any:
            found[way] += 1
            return function(*arguments)

        monkeypatch.setattr(select_medium, name, count)

    watch("_threshold", "blocks")
    watch("_append_ties", "ties")
    watch("_one_by_one", "one by one")
    return found


def integers(*shape: int, most: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(F16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(F16)


@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize(
    ("B", "N", "M", "k", "most"),
    [(3, 16, 257, 15, 60), (1, 37, 320, 9, 60), (2, 16, 333, 9, 1), (1, 16, 1280, 1, 3)],
)
def test_the_same_bits_as_the_other_strategies(
    B: int, N: int, M: int, k: int, most: int, order: str, ways: collections.Counter[str]
) -> None:
    """Sums are exact. Numbers of up to 1 tie in every place, larger ones hardly."""
    query, key = integers(B, N, 16, most=most), integers(B, M, 16, most=most, seed=1)
    options = {"metric": "dot", "order": order}
    s, I = assert_select(ops.select, query, key, k, **options, exact=True, backward=False)
    assert ways["blocks"] >= B
    configs.BUSY = 2**15
    forget_plans()
    other = ops.select(query, key, k, **options)
    assert torch.equal(s, other[0])
    assert torch.equal(I, other[1])


@pytest.mark.parametrize("D", [1, 3, 16])
def test_random_rows(D: int, ways: collections.Counter[str]) -> None:
    assert_select(ops.select, normal(2, 20, D), normal(2, 300, D, seed=1), 9, backward=False)
    if D > 1:
        assert set(ways) == {"blocks"}


@pytest.mark.parametrize("order", ["similarity", "index"])
def test_equal_keys(order: str, ways: collections.Counter[str]) -> None:
    """The first ones, though no queue holds them."""
    key = torch.ones(1, 300, 3, dtype=F16)
    _, I = ops.select(key[:, :33], key, 9, order=order)
    assert torch.equal(I, torch.arange(9).expand(1, 33, 9))
    assert ways["ties"] == ways["blocks"] == 3
    assert "one by one" not in ways


def test_equal_keys_behind_others(ways: collections.Counter[str]) -> None:
    """In order: four that are nearer, each in another tile, and the first that equal one another;
    the first columns and others are masked."""
    key = torch.tensor([1.0, 0.5, 0.0]).repeat(1, 400, 1)
    nearer = torch.tensor([390, 300, 150, 33])
    key[0, nearer, 1] = torch.tensor([0.0, 0.1, 0.2, 0.2])
    mask = torch.ones(1, 400, dtype=torch.bool)
    mask[0, :20], mask[0, 22], mask[0, 320:350] = False, False, False
    query = torch.tensor([1.0, 0.0, 0.0]).repeat(1, 16, 1)
    _, I = assert_select(ops.select, query.to(F16), key.to(F16), 9, key_mask=mask, backward=False)
    assert I[0, 0].tolist() == [390, 300, 33, 150, 20, 21, 23, 24, 25]
    assert ways == {"blocks": 1, "ties": 1}


def test_rows_beside_one_with_ties(ways: collections.Counter[str]) -> None:
    """They are searched with it, and have just k hits where the best are in different groups."""
    query, key = normal(1, 16, 16), normal(1, 300, 16, seed=1)
    query[:, 0], key[:, ::2] = torch.eye(16, dtype=F16)[0], torch.eye(16, dtype=F16)[0]
    query[:, 1:, 0] = -1.0
    assert_select(ops.select, query, key, 9, backward=False)
    assert ways == {"blocks": 1, "ties": 1}


def test_few_values(ways: collections.Counter[str]) -> None:
    key = integers(1, 300, 2, most=1)
    assert_select(ops.select, key[:, :40], key, 9, backward=False)
    assert ways["ties"] == ways["blocks"]
    assert "one by one" not in ways


@pytest.mark.parametrize("left", [0, 4, 12, 150])
def test_masked_keys(left: int, ways: collections.Counter[str]) -> None:
    mask = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)).argsort(1) < left
    query, key = normal(2, 16, 5), normal(2, 300, 5, seed=1)
    key[:, 7] = key[:, 8] = torch.inf
    mask[:, 7:9] = False
    assert_select(ops.select, query, key, 9, key_mask=mask, backward=False)
    assert set(ways) == {"blocks"}


def test_the_best_columns_in_few_groups(ways: collections.Counter[str]) -> None:
    """The best 128 have eight groups, and more than a queue has room for."""
    config = configs.select_medium(configs.INTERPRETER)
    key = normal(1, 1024, 3)
    for tile in range(16):
        for i, place in enumerate((0, 1, 8, 9, 16, 17, 24, 25)):
            column = tile * 64 + (place + config["ROTATE"] * tile) % 64
            key[0, column] = torch.tensor([1.0, 1e-4 * (8 * tile + i + 1), 0.0])
    query = torch.tensor([1.0, 0.0, 0.0]).repeat(1, 32, 1).to(F16)
    query[0, 16:] = normal(16, 3)
    assert_select(ops.select, query, key, 9, backward=False)
    assert ways == {"blocks": 2, "ties": 1, "one by one": 1}


@pytest.mark.parametrize("what", ["query", "key"])
def test_rows_that_are_not_numbers(what: str, ways: collections.Counter[str]) -> None:
    query, key = normal(2, 20, 3), normal(2, 300, 3, seed=1)
    rows = query if what == "query" else key
    rows[0, 3], rows[0, 5, 1] = torch.nan, torch.inf
    rows[0, 7] = 0.0
    assert_select(ops.select, query, key, 9, backward=False)
    # The last of two blocks of 16 rows has rows of the first one.
    assert ways["one by one"] == 2
    assert ways["blocks"] == 4


def test_zero_rows_have_the_first_keys_as_neighbors(ways: collections.Counter[str]) -> None:
    query, key = normal(1, 16, 3), normal(1, 300, 3, seed=1)
    query[0, 2] = 0.0
    key[0, 100:110] = 0.0
    s, I = assert_select(ops.select, query, key, 9, backward=False)
    assert torch.equal(I[0, 2], torch.arange(9))
    assert torch.equal(s[0, 2], torch.zeros(9))
    assert ways["ties"] == 1


def test_rows_that_count_as_zero(
    ways: collections.Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products are not zero, and in some order. Numbers of float16 are too large for that."""
    import triton.language as tl

    from convnn_kernels.triton import select_network

    monkeypatch.setattr(select_network, "_ZERO", tl.constexpr(1e-4))
    query, key = normal(1, 16, 3), normal(1, 300, 3, seed=1)
    query[0, 2] *= 1e-3
    s, I = ops.select(query, key, 9)
    assert torch.equal(I[0, 2], torch.arange(9))
    assert torch.equal(s[0, 2].abs(), torch.zeros(9))
    assert ways["ties"] == 1


def test_many_batch_elements(ways: collections.Counter[str]) -> None:
    """More than there are programs."""
    query, key = normal(9, 20, 3), normal(9, 260, 3, seed=1)
    assert_select(ops.select, query, key, 9, backward=False)
    assert ways["blocks"] == 18


def test_dense_forward(ways: collections.Counter[str]) -> None:
    query, key = normal(1, 20, 3), normal(1, 300, 3, seed=1)
    W = normal(16, 3, 9)
    assert_forward(ops.forward, query, key, key, 9, W, rho="ones", backward=False)
    assert ways["blocks"] == 2
