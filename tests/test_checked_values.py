# SPDX-License-Identifier: MIT
"""Wrong calls that differ little from right ones: some of the leading dimensions, and similarities
that are infinite, but not those of missing neighbors."""

import pytest
import torch

import convnn_kernels  # noqa: F401

convnn = torch.ops.convnn
INFINITY = float("inf")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lead", [(3,), (2,), (1,), (2, 1), (1, 3), (2, 3, 1), (3, 2)])
@pytest.mark.parametrize(
    ("name", "own", "shown"),
    [("candidates", (4,), "R"), ("self_indices", (5,), "5"), ("key_range", (5, 2), "5, 2")],
)
def test_restrictions_have_all_leading_dimensions_or_none(
    name: str, own: tuple[int, ...], shown: str, lead: tuple[int, ...], device: str
) -> None:
    query, key = torch.randn(2, 3, 5, 4, device=device), torch.randn(2, 3, 6, 4, device=device)
    given = torch.zeros(*lead, *own, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError) as error:
        convnn.select(query, key, 2, **{name: given})
    message = str(error.value).splitlines()[0]
    expected = f"convnn::select: {name} must have shape [{shown}] or [2, 3, {shown}], "
    assert message.startswith(expected)
    assert message.endswith(f"got shape {list(given.shape)}")


@pytest.mark.parametrize("wrong", [INFINITY, 0.5, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_rows_of_value_all_neighbors_are_missing(dtype: torch.dtype, wrong: float) -> None:
    value, indices = torch.randn(1, 0, 3), torch.zeros(1, 2, 3, dtype=torch.int64)
    similarities = torch.full((1, 2, 3), -INFINITY, dtype=dtype)
    assert convnn.aggregate(value, similarities, indices).eq(0).all()
    similarities[0, 1, 2] = wrong
    message = f"convnn::aggregate: similarities must be -inf without rows of value, got {wrong:g} "
    with pytest.raises(RuntimeError) as error:
        convnn.aggregate(value, similarities, indices)
    assert str(error.value).splitlines()[0] == message + "at position 5"
