# SPDX-License-Identifier: MIT
"""Context parallel: ranks with shards of the tokens get what one process gets."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import make_case
from ranks import Ranks, groups, started
from torch import Tensor

import python_ref.compare as compare
from convnn_kernels import distributed
from convnn_kernels.distributed import exchange

# Arguments of which each rank has its rows, and the dimension of the rows.
QUERIES = {"query": -2, "self_indices": -1, "key_range": -2}
KEYS = {"key": -2, "value": -2, "key_mask": -1}
PARAMETERS = ("weight", "bias")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with started(3, tmp_path_factory.mktemp("ranks")) as each:
        yield each


def sizes(draw: random.Random, rows: int, size: int) -> list[int]:
    """How many rows each rank has; some have none."""
    ends = sorted(draw.randint(0, rows) for _ in range(size - 1))
    return [end - begin for begin, end in zip([0, *ends], [*ends, rows], strict=True)]


def shards(
    arguments: dict[str, Any], of_queries: list[int], of_keys: list[int]
) -> list[dict[str, Any]]:
    """The arguments of each rank."""
    each = [dict(arguments) for _ in of_queries]
    for dims, split in ((QUERIES, of_queries), (KEYS, of_keys)):
        for name, dim in dims.items():
            if arguments.get(name) is not None:
                for own, X in zip(each, arguments[name].split(split, dim), strict=True):
                    # Pickled, a view would bring all rows along.
                    own[name] = X.detach().clone()
    return each


# In a rank: the leaves of the last call, by name, and its results.
last: dict[str, Any] = {}


def run(size: int, table_rows: int, arguments: dict[str, Any], needed: dict[str, bool]) -> list[Tensor]:
    """In a rank: output, similarities and indices."""
    exchange.LEAST_TABLE_ROWS = table_rows
    leaves = {
        name: arguments[name].requires_grad_(need)
        for name, need in needed.items()
        if arguments[name] is not None
    }
    output = distributed.convnn(**arguments, group=groups[size])
    selecting = {
        name: X
        for name, X in arguments.items()
        if name not in ("value", "rho", "scale", *PARAMETERS)
    }
    results = [output, *distributed.select_neighbors(**selecting, group=groups[size])]
    last.update(leaves=leaves, results=results)
    return [X.detach() for X in results]


def run_backward(*grads: Tensor) -> dict[str, Tensor | None]:
    """In a rank: the gradients of the last call."""
    leaves = {name: X for name, X in last["leaves"].items() if X.requires_grad}
    found = torch.autograd.grad(last["results"][:2], [*leaves.values()], grads, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


class OverRanks(torch.autograd.Function):
    """`forward` computed by ranks, as an operator with a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        split: tuple[list[int], list[int]],
        table_rows: int,
        options: Any,
        *tensors: Any,
    ) -> Any:
        names = ("query", "key", "value", *PARAMETERS)
        named = dict(zip(names, tensors, strict=True))
        ctx.needed = dict(zip(names, ctx.needs_input_grad[4:], strict=True))
        ctx.ranks, ctx.split = ranks, split
        each = shards({**options, **named}, *split)
        found = ranks.call(run, [(len(each), table_rows, own, ctx.needed) for own in each])
        output, similarities, indices = (torch.cat(parts, -2) for parts in zip(*found, strict=True))
        ctx.mark_non_differentiable(indices)
        return output, similarities, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_queries = ctx.split[0]
        split = [X.contiguous().split(of_queries, -2) for X in grads[:2]]
        each = [tuple(X.clone() for X in own) for own in zip(*split, strict=True)]
        found = ctx.ranks.call(run_backward, each)
        whole: list[Tensor | None] = []
        for name, need in ctx.needed.items():
            parts = [own.get(name) for own in found]
            if not need or parts[0] is None:
                whole.append(None)
            elif name in PARAMETERS:
                whole.append(torch.stack(parts).sum(0))
            else:
                whole.append(torch.cat(parts, -2))
        return None, None, None, None, *whole


def over(ranks: Ranks, size: int, draw: random.Random) -> Any:
    """`forward` computed by so many ranks."""

    def operator(*args: Any) -> Any:
        named = dict(zip(torch_arguments(), args, strict=True))
        tensors = [named.pop(name) for name in ("query", "key", "value", *PARAMETERS)]
        N, M = tensors[0].shape[-2], tensors[1].shape[-2]
        split = sizes(draw, N, size), sizes(draw, M, size)
        return OverRanks.apply(ranks, split, draw.choice((1, 40, 4096)), named, *tensors)

    return operator


def torch_arguments() -> list[str]:
    return [each.name for each in torch.ops.convnn.forward.default._schema.arguments]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def assert_same(found: Any, expected: Any) -> None:
    for name, one, other in zip(("output", "s", "I"), found, expected, strict=True):
        assert one.dtype is other.dtype and one.shape == other.shape
        assert same_bits(one, other), name


def check_case(ranks: Ranks, seed: int, restricted: bool) -> None:
    case = make_case(seed, restricted)
    draw = random.Random(seed)
    arguments = case.arguments()
    found = compare.assert_forward(
        over(ranks, draw.choice((2, 3)), draw), **arguments, exact=case.exact
    )
    assert_same(found, torch.ops.convnn.forward(**arguments))


@pytest.mark.parametrize("seed", range(200))
def test_random_cases(seed: int, ranks: Ranks) -> None:
    check_case(ranks, seed, restricted=False)
