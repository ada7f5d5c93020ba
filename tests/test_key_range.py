# SPDX-License-Identifier: MIT
"""Which keys a query may see: ranges, the token itself excluded, and what is given for each batch
element."""

from typing import Any

import pytest
import torch
from inputs import allowed_by
from torch import Tensor

import convnn_kernels  # noqa: F401
import python_ref
from python_ref import assert_forward, assert_select

convnn = torch.ops.convnn
METRICS = ("cosine", "dot", "euclidean")
ORDERS = ("similarity", "index")


def integers(*shape: int) -> Tensor:
    """Whose dot products and distances are exact, with many ties."""
    return torch.randint(-2, 3, shape).float()


def ranges_of(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs)


def causal(N: int) -> Tensor:
    """Query i sees keys 0 to i."""
    return torch.stack([torch.zeros(N, dtype=torch.int64), torch.arange(1, N + 1)], dim=-1)


def segments(lengths: list[int]) -> Tensor:
    """Queries see the keys of their own sequence, of consecutive ones with these lengths."""
    ends = torch.tensor(lengths).cumsum(0)
    pairs = torch.stack([ends - torch.tensor(lengths), ends], dim=-1)
    return pairs.repeat_interleave(torch.tensor(lengths), dim=0)


def by_hand(
    query: Tensor, key: Tensor, k: int, key_range: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """select with a call for each query, whose range is a mask of keys."""
    (B, N, _), M = query.shape, key.shape[1]
    self_indices = options.pop("self_indices", None)
    found = []
    for i in range(N):
        mask = allowed_by(key_range[..., i, :], M)
        of_self = {} if self_indices is None else {"self_indices": self_indices[..., i : i + 1]}
        one = query[:, i : i + 1]
        found.append(convnn.select(one, key, k, key_mask=mask.expand(B, M), **of_self, **options))
    s, I = zip(*found, strict=True)
    return torch.cat(s, dim=1), torch.cat(I, dim=1)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("N", [5, 70, 300])
def test_causal_equals_masks(N: int, metric: str, order: str) -> None:
    query, key = torch.randn(2, N, 20), torch.randn(2, N, 20)
    options = {"metric": metric, "order": order}
    found = convnn.select(query, key, 6, key_range=causal(N), **options)
    assert_same(found, by_hand(query, key, 6, causal(N), **options))


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_random_ranges_of_each_batch_element_are_exact(
    metric: str, order: str, exclude_self: bool
) -> None:
    N, M = 40, 150
    query, key = integers(3, N, 6), integers(3, M, 6)
    key_range = torch.randint(M + 1, (3, N, 2)).sort(dim=-1).values
    assert_select(
        convnn.select,
        query,
        key,
        7,
        candidates=torch.stack([torch.randperm(M)[:90] for _ in range(3)]),
        self_indices=torch.randint(M, (3, N)),
        key_mask=torch.rand(3, M) < 0.8,
        metric=metric,
        order=order,
        key_range=key_range,
        exclude_self=exclude_self,
        exact=True,
    )


@pytest.mark.parametrize("weight", ["none", "depthwise", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_sequences_equal_each_alone(dtype: torch.dtype, weight: str) -> None:
    lengths, C, k = [7, 0, 1, 130, 3, 64, 19], 24, 5
    shapes = {"none": None, "depthwise": (C, 1, k), "dense": (10, C, k)}
    W = None if weight == "none" else torch.randn(shapes[weight], dtype=dtype)
    packed = [torch.randn(1, sum(lengths), C, dtype=dtype, requires_grad=True) for _ in range(3)]
    results = convnn.forward(*packed, k, W, key_range=segments(lengths))
    gradient = torch.randn_like(results[0])
    of_packed = torch.autograd.grad(results[0], packed, gradient)
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        alone = [X.detach()[:, rows].clone().requires_grad_() for X in packed]
        Y, s, I = convnn.forward(*alone, k, W)
        missing = s == -torch.inf
        assert torch.equal(results[0][:, rows], Y)
        assert torch.equal(results[1][:, rows], s)
        assert torch.equal(results[2][:, rows], (I + first).masked_fill(missing, 0))
        of_alone = torch.autograd.grad(Y, alone, gradient[:, rows])
        for of_all, of_one in zip(of_packed, of_alone, strict=True):
            # Dense, the sum over the queries of a key is divided among tasks.
            bounds = {} if weight == "dense" else {"rtol": 0.0, "atol": 0.0}
            torch.testing.assert_close(of_all[:, rows], of_one, **bounds)
        first += length


def test_empty_ranges_give_the_bias_and_no_gradient() -> None:
    query, key, value = (torch.randn(2, 4, 8, requires_grad=True) for _ in range(3))
    weight, bias = torch.randn(8, 1, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    key_range = ranges_of((0, 0), (2, 2), (4, 4), (1, 1))
    Y, s, I = convnn.forward(query, key, value, 3, weight, bias, key_range=key_range)
    assert torch.equal(Y, bias.expand_as(Y))
    assert torch.equal(s, torch.full_like(s, -torch.inf))
    assert torch.equal(I, torch.zeros_like(I))
    Y.sum().backward()
    for X in (query, key, value, weight):
        assert not X.grad.any()
    assert torch.equal(bias.grad, torch.full_like(bias, 8.0))


def test_a_nan_outside_a_range_is_not_seen() -> None:
    query, key, value = (torch.randn(1, 80, 16) for _ in range(3))
    expected = convnn.forward(query, key, value, 4, key_range=causal(80))
    key[:, 50:], value[:, 50:] = torch.nan, torch.nan
    found = convnn.forward(query, key, value, 4, key_range=causal(80))
    assert_same(tuple(X[:, :50] for X in found), tuple(X[:, :50] for X in expected))
    assert found[1][:, 50:].isnan().any(dim=-1).all()


def test_candidates_outside_a_range_are_missing() -> None:
    query, key = torch.randn(1, 3, 4), torch.randn(1, 10, 4)
    key_range = ranges_of((0, 4), (5, 6), (4, 10))
    s, I = convnn.select(
        query, key, 3, candidates=torch.tensor([9, 5, 4]), key_range=key_range, order="index"
    )
    assert I.tolist() == [[[0, 0, 0], [5, 0, 0], [4, 5, 9]]]
    assert (s == -torch.inf).tolist() == [[[True] * 3, [False, True, True], [False] * 3]]


def test_self_outside_its_range_is_no_neighbor() -> None:
    query = key = integers(1, 6, 3)
    self_indices, key_range = torch.arange(6), ranges_of(*[(0, i) for i in range(6)])
    _, I = convnn.select(query, key, 6, self_indices=self_indices, key_range=key_range)
    assert (torch.arange(6).clamp(min=1).unsqueeze(-1) > I).all()
    # Of those in range it is the first.
    _, I = convnn.select(query, key, 2, self_indices=self_indices, key_range=causal(6))
    assert torch.equal(I[..., 0], self_indices.unsqueeze(0))


@pytest.mark.parametrize("N", [9, 200])
def test_exclude_self_is_the_rest_after_self(N: int) -> None:
    """Rows of key that equal the token itself are neighbors all the same."""
    query = key = integers(2, N, 3)
    self_indices = torch.randperm(N)
    s, I = convnn.select(query, key, 6, self_indices=self_indices, metric="dot")
    without = convnn.select(
        query, key, 5, self_indices=self_indices, metric="dot", exclude_self=True
    )
    assert_same(without, (s[..., 1:], I[..., 1:]))
    assert (without[1] != self_indices.view(1, N, 1)).all()


def test_exclude_self_where_self_is_no_candidate() -> None:
    query, key = torch.randn(2, 5, 4), torch.randn(2, 9, 4)
    options = {"candidates": torch.tensor([1, 8, 3])}
    expected = convnn.select(query, key, 2, **options)
    found = convnn.select(
        query, key, 2, self_indices=torch.tensor([0, 2, 4, 5, 6]), exclude_self=True, **options
    )
    assert_same(found, expected)


def test_exclude_self_leaves_one_place_missing() -> None:
    x = torch.randn(1, 4, 4)
    s, I = convnn.select(x, x, 4, self_indices=torch.arange(4), exclude_self=True)
    assert (s[..., 3] == -torch.inf).all()
    assert not I[..., 3].any()
    assert (s[..., :3] > -torch.inf).all()


@pytest.mark.parametrize("lead", [(3,), (2, 2)])
def test_restrictions_of_each_batch_element_equal_calls_of_each(lead: tuple[int, ...]) -> None:
    N, M, C, k = 12, 30, 8, 4
    inputs = [torch.randn(*lead, rows, C) for rows in (N, M, M)]
    weight = torch.randn(5, C, k, requires_grad=True)
    gradient = torch.randn(*lead, N, 5)
    each = {
        "candidates": torch.rand(*lead, M).argsort(dim=-1)[..., :17],
        "self_indices": torch.randint(M, (*lead, N)),
        "key_range": torch.randint(M + 1, (*lead, N, 2)).sort(dim=-1).values,
    }

    def run(inputs: list[Tensor], each: dict[str, Tensor], gradient: Tensor) -> list[Tensor]:
        leaves = [X.clone().requires_grad_() for X in inputs]
        Y, s, I = convnn.forward(*leaves, k, weight, **each)
        return [Y.detach(), s.detach(), I, *torch.autograd.grad(Y, leaves, gradient)]

    together = run(inputs, each, gradient)
    for b in range(torch.Size(lead).numel()):
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(b), lead))
        alone = run([X[at] for X in inputs], {n: X[at] for n, X in each.items()}, gradient[at])
        assert_same(tuple(X[at] for X in together), tuple(alone))


def test_a_shared_bank_of_keys_with_ranges_of_each_batch_element() -> None:
    bank = torch.randn(1, 90, 16).expand(4, 90, 16)
    query = torch.randn(4, 33, 16)
    key_range = torch.randint(91, (4, 33, 2)).sort(dim=-1).values
    self_indices = torch.randint(90, (4, 33))
    options = {"self_indices": self_indices, "key_range": key_range}
    found = convnn.select(query, bank, 5, **options)
    assert_same(found, convnn.select(query, bank.clone(), 5, **options))
    assert_forward(convnn.forward, query, bank, bank, 5, **options)


def test_a_query_that_decodes_equals_the_last_of_a_causal_call() -> None:
    x = torch.randn(2, 500, 32)
    all_of_them = convnn.select(x, x, 9, key_range=causal(500))
    last = convnn.select(x[:, -1:], x, 9, key_range=ranges_of((0, 500)))
    assert_same(last, tuple(X[:, -1:] for X in all_of_them))


@pytest.mark.parametrize("name", ["candidates", "self_indices", "key_range"])
def test_backward_of_restrictions_of_each_batch_element_is_compiled(name: str) -> None:
    x = torch.randn(2, 10, 8, requires_grad=True)
    each = {
        "candidates": torch.rand(2, 10).argsort(dim=-1)[:, :6],
        "self_indices": torch.randint(10, (2, 10)),
        "key_range": causal(10).expand(2, 10, 2),
    }

    def step(x: Tensor, each: Tensor) -> Tensor:
        return convnn.forward(x, x, x, 3, **{name: each})[0].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(step(x, each[name]), x)
    (found,) = torch.autograd.grad(compiled(x, each[name]), x)
    assert torch.equal(found, expected)


def test_reference_of_ranges() -> None:
    """The reference itself, against a loop over pairs."""
    query, key = integers(2, 5, 3).double(), integers(2, 7, 3).double()
    key_range = torch.randint(8, (2, 5, 2)).sort(dim=-1).values
    self_indices = torch.randint(7, (2, 5))
    allowed, is_self = python_ref.allowed_keys(
        query, key, None, self_indices, None, key_range, exclude_self=True
    )
    for b in range(2):
        for i in range(5):
            begin, end = key_range[b, i].tolist()
            for j in range(7):
                expected = begin <= j < end and j != self_indices[b, i]
                assert bool(allowed[b, i, j]) == expected
    assert not is_self.any()
