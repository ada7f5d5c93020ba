# SPDX-License-Identifier: MIT
"""Context parallel: ranks with shards of the tokens get what one process gets."""

import random
from typing import Any

import pytest
import torch
from cases import make_case
from ranks import Ranks, groups
from torch import Tensor

import python_ref.compare as compare
from convnn_kernels import distributed, functional
from convnn_kernels.distributed import exchange, order

# Arguments of which each rank has its rows, and the dimension of the rows.
QUERIES = {"query": -2, "self_indices": -1, "key_range": -2}
KEYS = {"key": -2, "value": -2, "key_mask": -1}
PARAMETERS = ("weight", "bias")


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


def run(
    size: int, table_rows: int, arguments: dict[str, Any], needed: dict[str, bool]
) -> list[Tensor]:
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


def over(ranks: Ranks, size: int, draw: random.Random, table_rows: int | None = None) -> Any:
    """`forward` computed by so many ranks, with shards of random sizes."""

    def operator(*args: Any) -> Any:
        named = dict(zip(torch_arguments(), args, strict=True))
        tensors = [named.pop(name) for name in ("query", "key", "value", *PARAMETERS)]
        N, M = tensors[0].shape[-2], tensors[1].shape[-2]
        split = sizes(draw, N, size), sizes(draw, M, size)
        return OverRanks.apply(
            ranks, split, table_rows or draw.choice((1, 40, 4096)), named, *tensors
        )

    return operator


def torch_arguments() -> list[str]:
    return [each.name for each in torch.ops.convnn.forward.default._schema.arguments]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def assert_same(found: Any, expected: Any) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert same_bits(one, other), f"result {i} differs"


def check_case(ranks: Ranks, seed: int, restricted: bool) -> None:
    case = make_case(seed, restricted)
    draw = random.Random(seed)
    arguments = case.arguments()
    found = compare.assert_forward(
        over(ranks, draw.choice((2, 3)), draw), **arguments, exact=case.exact
    )
    assert_same(found, torch.ops.convnn.forward(**arguments))


def seeds(count: int, quick: int) -> list[Any]:
    return [
        pytest.param(seed, marks=[] if seed < quick else [pytest.mark.slow])
        for seed in range(count)
    ]


@pytest.mark.parametrize("seed", seeds(150, 1))
def test_random_cases(seed: int, ranks: Ranks) -> None:
    check_case(ranks, seed, restricted=False)


@pytest.mark.parametrize("seed", seeds(150, 2))
def test_random_restricted_cases(seed: int, ranks: Ranks) -> None:
    check_case(ranks, seed, restricted=True)


def test_restrictions_of_each_batch_element(ranks: Ranks) -> None:
    B, N, M = 2, 23, 40
    arguments: dict[str, Any] = {
        "query": torch.randn(B, N, 4),
        "key": torch.randn(B, M, 4),
        "value": torch.randn(B, M, 3),
        "k": 6,
        "candidates": torch.rand(B, M).argsort(-1)[:, :15],
        "self_indices": torch.randint(M, (B, N)),
        "key_range": torch.randint(M + 1, (B, N, 2)).sort(-1).values,
        "key_mask": torch.rand(B, M) < 0.9,
    }
    for exclude_self in (False, True):
        arguments["exclude_self"] = exclude_self
        found = compare.assert_forward(over(ranks, 3, random.Random(1)), **arguments)
        assert_same(found, torch.ops.convnn.forward(**arguments))


@pytest.mark.slow
def test_gradients_of_16_bits_are_rounded_once(ranks: Ranks) -> None:
    """They are sums over as many blocks as there are queries."""
    query, key, value = (torch.randn(n, 8).bfloat16() for n in (300, 4, 4))
    weight, bias = torch.randn(6, 8, 4).bfloat16(), torch.randn(6).bfloat16()
    operator = over(ranks, 2, random.Random(1), table_rows=1)
    compare.assert_forward(operator, query, key, value, 4, weight, bias)


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("order", ["similarity", "index"])
def test_total_order_across_shards(k: int, order: str, ranks: Ranks) -> None:
    """Ties, NaN, both zeros, and similarities of -inf, which are not missing neighbors."""
    key = torch.tensor([-3e38, 0.0, 1.0, torch.nan, -0.0, 1.0, -3e38, torch.nan, 2.0, torch.inf])
    key = key.repeat(3)[:, None]
    query = torch.tensor([[10.0], [1.0], [-1.0], [0.0], [torch.nan]])
    mask = torch.arange(30) != 11
    for own in (None, torch.tensor([0, 11, 3, 29, 6])):
        arguments = {
            "query": query,
            "key": key,
            "k": k,
            "key_mask": mask,
            "self_indices": own,
            "metric": "dot",
            "order": order,
        }
        expected = functional.select_neighbors(**arguments)
        split = [2, 0, 3], [10, 7, 13]
        found = ranks.call(select, [(3, each) for each in shards(arguments, *split)])
        assert_same([torch.cat(parts) for parts in zip(*found, strict=True)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_similarities(dtype: torch.dtype) -> None:
    """The same places whichever of the equal ones comes first; bits are kept."""
    nan, other_nan = torch.tensor([0x7FC00000, 0xFFC00001 - 2**32], dtype=torch.int32).view(
        torch.float32
    )
    best = [nan, other_nan, torch.inf, 1e-40, 0.0, -0.0, 0.0, -1e-40, -2.0, -torch.inf]
    s = torch.tensor(best).to(dtype)
    i = torch.arange(10)
    for _ in range(5):
        places = torch.randperm(10)
        one, other = places.split([4, 6])
        found = order.best_of([s[one], s[other]], [i[one], i[other]], 9)
        assert_same(found, (s[:9], i[:9]))


def select(size: int, arguments: dict[str, Any]) -> Any:
    return distributed.select_neighbors(**arguments, group=groups[size])


@pytest.mark.parametrize(
    ("of_queries", "of_keys"),
    [([0, 0, 5], [0, 12, 0]), ([5, 0, 0], [0, 0, 12]), ([2, 2, 1], [0, 0, 0]), ([0] * 3, [4] * 3)],
)
def test_empty_shards(of_queries: list[int], of_keys: list[int], ranks: Ranks) -> None:
    arguments: dict[str, Any] = {
        "query": torch.randn(2, sum(of_queries), 3),
        "key": torch.randn(2, sum(of_keys), 3),
        "value": torch.randn(2, sum(of_keys), 4),
        "k": 3,
        "bias": torch.randn(4),
    }
    each = shards(arguments, of_queries, of_keys)
    needed = dict.fromkeys(("query", "key", "value", "bias"), True)
    found = ranks.call(run, [(3, 1, own, needed) for own in each])
    results = [torch.cat(parts, -2) for parts in zip(*found, strict=True)]
    assert_same(results, torch.ops.convnn.forward(**arguments))
    grads = ranks.call(run_backward, [tuple(map(torch.ones_like, own[:2])) for own in found])
    for own, gradients in zip(each, grads, strict=True):
        for name in ("query", "key", "value"):
            assert gradients[name].shape == own[name].shape


def test_one_rank_and_all_agree(ranks: Ranks) -> None:
    """A group of one, and gradients that are the same in every run."""
    arguments = {
        "query": torch.randn(2, 50, 8),
        "key": torch.randn(2, 60, 8),
        "value": torch.randn(2, 60, 5),
        "k": 7,
        "weight": torch.randn(6, 5, 7),
    }
    expected = torch.ops.convnn.forward(**arguments)
    needed = dict.fromkeys(("query", "key", "value", "weight"), True)
    for of_queries, of_keys in (([50], [60]), ([20, 30], [31, 29])):
        each = shards(arguments, of_queries, of_keys)
        runs = []
        for _ in range(2):
            found = ranks.call(run, [(len(each), 30, own, needed) for own in each])
            results = [torch.cat(parts, -2) for parts in zip(*found, strict=True)]
            assert_same(results, expected)
            ones = [tuple(map(torch.ones_like, own[:2])) for own in found]
            runs.append(ranks.call(run_backward, ones))
        for first, second in zip(*runs, strict=True):
            assert all(same_bits(first[name], second[name]) for name in needed)


def under_autocast(arguments: dict[str, Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        output = distributed.convnn(**arguments, group=groups[2])
    arguments["value"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distributed.convnn(**arguments, group=groups[2]).sum().backward()
    return output, arguments["value"].grad


def test_autocast(ranks: Ranks) -> None:
    rows = torch.randn(40, 4)
    arguments = {"query": rows, "key": rows, "value": rows, "k": 3, "weight": torch.randn(4, 1, 3)}
    found = ranks.call(under_autocast, [(own,) for own in shards(arguments, [10, 30], [25, 15])])
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.convnn(**arguments)
    assert expected.dtype is torch.bfloat16
    assert same_bits(torch.cat([output for output, _ in found]), expected)
    assert all(gradient.dtype is torch.float32 for _, gradient in found)


def aggregate(arguments: dict[str, Any]) -> Tensor:
    return distributed.aggregate_neighbors(**arguments, group=groups[2])


def test_aggregate_neighbors(ranks: Ranks) -> None:
    """With neighbors that are given, some of them missing."""
    value, similarities = torch.randn(2, 20, 3), torch.randn(2, 11, 4)
    similarities[:, ::3, 2:] = -torch.inf
    indices = torch.randint(20, (2, 11, 4))
    expected = functional.aggregate_neighbors(value, similarities, indices)
    rows = value.split([13, 7], 1), similarities.split([5, 6], 1), indices.split([5, 6], 1)
    names = ("value", "similarities", "indices")
    each = [
        ({name: X.clone() for name, X in zip(names, own, strict=True)},)
        for own in zip(*rows, strict=True)
    ]
    assert same_bits(torch.cat(ranks.call(aggregate, each), 1), expected)


def raised(transform: str) -> str:
    """In a rank: what a transform of a function over ranks raises."""
    X = torch.randn(2, 10, 3, requires_grad=True)

    def function(X: Tensor) -> Tensor:
        return distributed.convnn(X.sin(), X, X, 3, group=groups[1]).sum()

    def second_derivative(X: Tensor) -> Any:
        (gradient,) = torch.autograd.grad(function(X), X, create_graph=True)
        return torch.autograd.grad(gradient.sum(), X)

    transforms = {
        "vmap": lambda: torch.vmap(function)(X.detach()),
        "grad": lambda: torch.func.grad(function)(X.detach()),
        "second derivative": lambda: second_derivative(X),
    }
    try:
        transforms[transform]()
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ("vmap", "distributed.convnn: vmap and the other transforms of torch.func cannot be used"),
        ("grad", "distributed.convnn: vmap and the other transforms of torch.func cannot be used"),
        ("second derivative", "distributed.select_neighbors: second derivatives are not"),
    ],
)
def test_transforms_raise(transform: str, expected: str, ranks: Ranks) -> None:
    (found,) = ranks.call(raised, [(transform,)])
    assert found.startswith(expected)


def compiled(of_rank: Tensor) -> tuple[bool, bool, list[str]]:
    """In a rank: whether output and gradient are the same with torch.compile, and what it saw."""
    seen: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(node.name for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    def function(X: Tensor) -> Tensor:
        return distributed.convnn(X.sin(), X, X, 3, group=groups[2]) * 2

    results = []
    for run in (function, torch.compile(function, backend=backend)):
        X = of_rank.clone().requires_grad_()
        output = run(X)
        output.sum().backward()
        results.append((output, X.grad))
    (output, gradient), (other, other_gradient) = results
    return torch.equal(output, other), torch.equal(gradient, other_gradient), seen


@pytest.mark.slow
def test_compile(ranks: Ranks) -> None:
    """The graphs have what is around the function, and nothing of the function."""
    found = ranks.call(compiled, [(torch.randn(9, 4),), (torch.randn(7, 4),)])
    assert found == [(True, True, ["sin", "mul"])] * 2
