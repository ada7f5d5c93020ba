# SPDX-License-Identifier: MIT
"""vmap of each operator with each tensor mapped alone, and each alone not mapped.

The backward operators also with each gradient needed alone.
"""

from typing import Any

import pytest
import torch
from inputs import one_thread
from torch import Tensor

from convnn_kernels import schemas

pytestmark = one_thread
B, N, M, D, C, O, R, K, SIZE = 2, 4, 7, 3, 5, 6, 6, 3, 3


def restrictions(lead: tuple[int, ...]) -> dict[str, Any]:
    return {
        "candidates": torch.rand(*lead, M).argsort(dim=-1)[..., :R],
        "self_indices": torch.randint(M, (*lead, N)),
        "key_mask": torch.rand(B, M) < 0.7,
        "key_range": torch.randint(M + 1, (*lead, N, 2)).sort(dim=-1).values,
    }


def example(op: str, kind: str = "each") -> dict[str, Any]:
    """All arguments of a call; kind "shared": the batch shares what it can."""
    lead = (B,) if kind == "each" else ()
    query, key, value = torch.randn(B, N, D), torch.randn(B, M, D), torch.randn(B, M, C)
    weight = torch.randn(O, C, K) if kind == "each" else torch.randn(C, 1, K)
    outputs = O if kind == "each" else C
    selection = {"query": query, "key": key, "k": K, **restrictions(lead)}
    convolution = {"value": value, "weight": weight, "bias": torch.randn(outputs)}
    neighbors = {
        "similarities": torch.randn(B, N, K),
        "indices": torch.randint(M, (B, N, K)),
    }
    grads = {
        "grad_output": torch.randn(B, N, outputs),
        "grad_similarities": torch.randn(B, N, K),
    }
    backward = {
        **{"has_bias": True, "metric": "cosine", "rho": "softmax", "scale": 0.5},
        **{name: selection[name] for name in ("query", "key")},
        **{"candidates": torch.randperm(M)[:R]},
    }
    every = selection | convolution | neighbors
    every |= grads | backward if op.endswith("backward") else {}
    fields = schemas.arguments(f"convnn::{op}")._fields
    return {name: every[name] for name in fields if name in every}


def other(X: Tensor, i: int) -> Tensor:
    """Another argument like X."""
    if X.is_floating_point():
        return torch.randn_like(X)
    return X.roll(i, -2 if X.shape[-1] == 2 else -1)


def call(op: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    results = getattr(torch.ops.convnn, op)(**args)
    return (results,) if isinstance(results, Tensor) else results


def assert_vmap(op: str, args: dict[str, Any], mapped: list[str]) -> None:
    """Asserts that vmap over the arguments `mapped` gives the results of a call for each entry."""
    entries = [args | {name: other(args[name], i) for name in mapped} for i in range(SIZE)]
    stacked = [torch.stack([entry[name] for entry in entries]) for name in mapped]
    results = torch.vmap(lambda *X: call(op, args | dict(zip(mapped, X, strict=True))))(*stacked)
    expected = zip(*(call(op, entry) for entry in entries), strict=True)
    for i, (result, right) in enumerate(zip(results, expected, strict=True)):
        if right[0].shape != (0,):  # else a gradient that is not needed
            assert torch.equal(result, torch.stack(right)), f"result {i} with {mapped} mapped"


def assert_vmap_of_each(op: str, args: dict[str, Any]) -> None:
    names = [name for name, X in args.items() if isinstance(X, Tensor)]
    assert_vmap(op, args, names)
    for name in names:
        assert_vmap(op, args, [name])
        assert_vmap(op, args, [each for each in names if each != name])


@pytest.mark.parametrize("kind", ["each", "shared"])
@pytest.mark.parametrize("op", ["forward", "select", "aggregate"])
def test_each_argument_mapped_or_not(op: str, kind: str) -> None:
    assert_vmap_of_each(op, example(op, kind))


NEEDS = {
    "select_backward": ("query", "key"),
    "aggregate_backward": ("value", "similarities", "weight", "bias"),
    "forward_backward": ("query", "key", "value", "weight", "bias"),
}


@pytest.mark.parametrize(
    ("op", "needed"), [(op, name) for op, names in NEEDS.items() for name in names]
)
def test_each_gradient_alone(op: str, needed: str) -> None:
    needs = {f"need_{name}": name == needed for name in NEEDS[op]}
    assert_vmap_of_each(op, example(op) | needs)


@pytest.mark.parametrize("op", NEEDS)
def test_all_gradients(op: str) -> None:
    assert_vmap_of_each(op, example(op, "shared") | {f"need_{name}": True for name in NEEDS[op]})
