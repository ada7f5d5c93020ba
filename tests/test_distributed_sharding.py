# SPDX-License-Identifier: MIT
"""DTensor: operators on two ranks give what one process gives, forward and backward."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, make_case
from ranks import Ranks, groups, started
from torch import Tensor

import python_ref.compare as compare
from convnn_kernels import distributed

SIZE = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with started(SIZE, tmp_path_factory.mktemp("ranks")) as each:
        each.call(register, [()] * SIZE)
        yield each


def register() -> None:
    distributed.register_sharding()


def mesh() -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(groups[SIZE], "cpu")


def compute(arguments: dict[str, Any], dims: dict[str, int], grads: Any) -> Any:
    """In a rank: results and gradients of `forward`, and where they lie.

    `dims`: by which dimension tensors are sharded; the others are replicated.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def place(name: str, X: Any) -> Any:
        if not isinstance(X, Tensor):
            return X
        placement = Shard(dims[name]) if name in dims else Replicate()
        return distribute_tensor(X, mesh(), [placement])

    placed = {name: place(name, X) for name, X in arguments.items()}
    leaves = {}
    for name in ("query", "key", "value", "weight", "bias"):
        if placed[name] is not None:
            leaves[name] = placed[name].requires_grad_()
    results = torch.ops.convnn.forward(**placed)
    out = [place(name, grad) for name, grad in zip(("output", "similarities"), grads)]
    found = torch.autograd.grad(results[:2], [*leaves.values()], out, allow_unused=True)
    where = [str(X.placements[0]) for X in (*results, *found) if X is not None]
    return (
        [X.full_tensor().detach() for X in results],
        [None if X is None else X.full_tensor() for X in found],
        where,
    )


def test_x(ranks):
    q, k, v = (torch.randn(4, 6, n, 8) for n in (10, 12, 12))
    w = torch.randn(8, 1, 3)
    a = dict(query=q, key=k, value=v, k=3, weight=w, bias=None)
    g = torch.randn(4, 6, 10, 8), torch.randn(4, 6, 10, 3)
    for dims in (
        {},
        {n: 0 for n in ("query", "key", "value", "output", "similarities")},
        {n: 1 for n in ("query", "key", "value", "output", "similarities")},
        {n: 2 for n in ("query", "output", "similarities")},
        {"query": 0},
    ):
        r = ranks.call(compute, [(a, dims, g)] * 2)
        print(r[0][2])
        e = torch.ops.convnn.forward(**a)
        for x, y in zip(r[0][0], e):
            assert torch.equal(x, y)
    assert 0
