# SPDX-License-Identifier: MIT
"""Neighbors within a radius."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from inputs import one_thread
from torch import Tensor

from convnn_kernels.functional import edge_index, select_neighbors, window_ranges

pytestmark = one_thread

RADII = (0.0, 1.0, 2.0, math.sqrt(2), math.sqrt(5), 3.5, 100.0)


def by_hand(s: Tensor, I: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """The neighbors that are no farther than r, in their order, then missing ones."""
    kept_s, kept_I = torch.full_like(s, -torch.inf), torch.zeros_like(I)
    for row in np.ndindex(*s.shape[:-1]):
        near = [j for j in range(s.shape[-1]) if float(s[row][j]) >= -round(r * r, 9)]
        kept_s[row][: len(near)] = s[row][near]
        kept_I[row][: len(near)] = I[row][near]
    return kept_s, kept_I


@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("has_self", [False, True])
@pytest.mark.parametrize("radius", RADII)
def test_neighbors_within_a_radius(radius: float, has_self: bool, order: Any) -> None:
    """On a grid, whose distances are exact: those at the radius are within."""
    x = torch.randint(0, 4, (2, 20, 2)).float()
    options: dict[str, Any] = {"metric": "euclidean", "order": order}
    if has_self:  # another row than that of the query, so that it may lie beyond
        options["self_indices"] = torch.randperm(20)
    for k in (1, 4, 25):
        expected = by_hand(*select_neighbors(x, x, k, **options), radius)
        got = select_neighbors(x, x, k, **options, within=radius)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_the_boundary_is_that_of_the_rounded_square() -> None:
    """0.1 * 0.1 rounded to float32 is less than the square of 0.1 rounded to float32."""
    x = torch.tensor([[0.0], [0.1]])
    s, _ = select_neighbors(x, x, 2, metric="euclidean")
    least = float(np.float32(0.1 * 0.1))
    assert -s[0, 1] > least
    assert (select_neighbors(x, x, 2, metric="euclidean", within=0.1)[0][0, 1]) == -torch.inf
    above = math.nextafter(math.sqrt(-float(s[0, 1])), 1.0)
    assert select_neighbors(x, x, 2, metric="euclidean", within=above)[0][0, 1] == s[0, 1]
    # sqrt(3) ** 2 is less than 3 in float64, but not in float32.
    corner = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    for dtype, kept in ((torch.float32, 2), (torch.float64, 1)):
        y = corner.to(dtype)
        s, _ = select_neighbors(y, y, 2, metric="euclidean", within=math.sqrt(3))
        assert int((s != -torch.inf).sum()) == 2 * kept


def test_no_radius_is_too_large() -> None:
    x = torch.randn(5, 2)
    expected = select_neighbors(x, x, 3, metric="euclidean")
    for radius in (1e30, 1e200):
        got = select_neighbors(x, x, 3, metric="euclidean", within=radius)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nan_is_seen() -> None:
    x = torch.tensor([[0.0], [math.nan], [1.0]])
    s, I = select_neighbors(x, x, 3, metric="euclidean", within=0.5)
    assert s[0, 0].isnan()
    assert I[0].tolist() == [1, 0, 0]
    assert s[0, 1:].tolist() == [0.0, -math.inf]


def test_with_ranges_and_without_self() -> None:
    x = torch.arange(6.0).unsqueeze(1)
    s, I = select_neighbors(
        x,
        x,
        3,
        self_indices=torch.arange(6),
        metric="euclidean",
        key_range=window_ranges(6, causal=True),
        exclude_self=True,
        within=2,
    )
    assert I.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 1, 0], [3, 2, 0], [4, 3, 0]]
    edges = edge_index(I, s)
    assert edges.tolist() == [[0, 1, 0, 2, 1, 3, 2, 4, 3], [1, 2, 2, 3, 3, 4, 4, 5, 5]]


@pytest.mark.parametrize("order", ["similarity", "index"])
def test_the_gradient_is_that_of_the_kept(order: Any) -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    s, I = select_neighbors(x, x, 5, metric="euclidean", order=order, within=1.5)
    kept = s != -torch.inf
    assert bool(kept.any())
    assert not bool(kept.all())
    grad = torch.randn_like(s)
    (got,) = torch.autograd.grad(s, x, grad)
    rows = x.gather(1, I.flatten(1).unsqueeze(-1).expand(-1, -1, 3)).view(2, 9, 5, 3)
    by_rows = -(x.unsqueeze(2) - rows).square().sum(-1)
    (expected,) = torch.autograd.grad(by_rows[kept], x, grad[kept])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("order", ["similarity", "index"])
def test_compile_and_vmap(order: Any) -> None:
    def select(x: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        return select_neighbors(x, x, 4, metric="euclidean", order=order, within=radius)

    compiled = torch.compile(select, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(3, 8, 2)
    for radius in (0.5, 1.25):
        expected = select(x, radius)
        got = compiled(x, radius)
        folded = torch.vmap(lambda each, radius=radius: select(each, radius))(x)
        for a, b, c in zip(got, folded, expected, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, c)


@pytest.mark.parametrize(
    ("within", "kind", "message"),
    [
        (-1, RuntimeError, "within must be finite and at least 0, got -1"),
        (math.inf, RuntimeError, "within must be finite and at least 0, got inf"),
        (math.nan, RuntimeError, "within must be finite and at least 0, got nan"),
        (10**400, RuntimeError, "within must be finite and at least 0, got inf"),
        ("1", TypeError, "within must be a number, got '1'"),
        (True, TypeError, "within must be a number, got True"),
        (
            torch.tensor(1.0),
            TypeError,
            "within must be a number, got a tensor (within.item() reads its number)",
        ),
    ],
)
def test_what_is_no_radius(within: Any, kind: type[Exception], message: str) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(kind) as error:
        select_neighbors(x, x, 2, metric="euclidean", within=within)
    assert str(error.value) == f"select_neighbors: {message}"


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_only_distances_have_a_radius(metric: Any) -> None:
    x = torch.randn(4, 2)
    message = f"within must be None unless metric is 'euclidean', got 0.5 with metric '{metric}'"
    with pytest.raises(RuntimeError, match=message):
        select_neighbors(x, x, 2, metric=metric, within=0.5)


def test_numbers_of_numpy() -> None:
    x = torch.randn(6, 2)
    expected = select_neighbors(x, x, 3, metric="euclidean", within=1.0)
    for within in (1, np.float32(1), np.int64(1)):
        got = select_neighbors(x, x, 3, metric="euclidean", within=within)
        assert torch.equal(got[0], expected[0])
