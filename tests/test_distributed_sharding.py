# SPDX-License-Identifier: MIT
"""DTensor and tensor parallel: two ranks get what one process gets, forward and backward."""

import copy
from typing import Any

import pytest
import torch
from ranks import Ranks, groups
from torch import Tensor

import convnn_kernels.nn as cnn
from convnn_kernels import distributed

SIZE = 2  # how many ranks

B, H, N, M, D, C, K = 2, 4, 10, 12, 5, 6, 3

# By which dimension tensors are sharded; the others are replicated.
OF_ALL = ("query", "key", "value", "key_mask", "similarities", "indices", "output")
OF_QUERIES = {"query": 2, "key_range": 2, "self_indices": 2, "similarities": 2, "indices": 2}
LAYOUTS = {
    "replicated": {},
    "batch": dict.fromkeys((*OF_ALL, "key_range", "self_indices", "candidates"), 0),
    "heads": dict.fromkeys((*OF_ALL, "key_range", "self_indices", "candidates"), 1),
    "queries": OF_QUERIES | {"output": 2},
    # Redistributed, since no rule fits.
    "keys": {"key": 2, "value": 2, "key_mask": 2},
    "query alone": {"query": 0},
}


@pytest.fixture(autouse=True)
def _registered(ranks: Ranks) -> None:
    ranks.call(distributed.register_sharding, [()] * SIZE)


def mesh() -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(groups[SIZE], "cpu")


def placed(name: str, X: Any, dims: dict[str, int]) -> Any:
    """In a rank: an argument as a DTensor."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not isinstance(X, Tensor):
        return X
    # What all leading dimensions share does not have these.
    dim = dims.get(name, -1) - (2 if X.dim() < 3 else 0)
    placement = Shard(dim) if dim >= 0 else Replicate()
    return distribute_tensor(X, mesh(), [placement])


def compute(
    operator: str,
    arguments: dict[str, Any],
    needed: list[str],
    grads: dict[str, Tensor],
    dims: dict[str, int] | None,
) -> dict[str, Any]:
    """Results and gradients by name; with DTensors, in a rank, if there are `dims`."""

    def given(name: str, X: Any) -> Any:
        return X if dims is None else placed(name, X, dims)

    def whole(X: Any) -> Any:
        return X.detach() if dims is None else X.full_tensor().detach()

    leaves = {name: given(name, X) for name, X in arguments.items()}
    for name in needed:
        leaves[name].requires_grad_()
    op = getattr(torch.ops.convnn, operator).default
    results = op(**leaves)
    names = [each.name or "output" for each in op._schema.returns]
    named = dict(zip(names, results if len(names) > 1 else [results], strict=True))
    found = torch.autograd.grad(
        [named[name] for name in grads],
        [leaves[name] for name in needed],
        [given(name, X) for name, X in grads.items()],
    )
    gradients = {f"gradient of {name}": X for name, X in zip(needed, found, strict=True)}
    return {name: whole(X) for name, X in {**named, **gradients}.items()}


def assert_equal_to_one_process(
    ranks: Ranks,
    operator: str,
    arguments: dict[str, Any],
    needed: list[str],
    grads: dict[str, Tensor],
    layout: str,
) -> None:
    expected = compute(operator, copy.deepcopy(arguments), needed, grads, None)
    call = (operator, arguments, needed, grads, LAYOUTS[layout])
    for found in ranks.call(compute, [call] * SIZE):
        assert found.keys() == expected.keys()
        for name, X in expected.items():
            if name.startswith("gradient"):
                torch.testing.assert_close(found[name], X, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(found[name], X), name


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def of_forward() -> dict[str, Any]:
    sizes = {"query": (N, D), "key": (M, D), "value": (M, C)}
    return {name: randn(B, H, *size) for name, size in sizes.items()} | {"k": K}


def ranges(*lead: int) -> Tensor:
    return torch.randint(M + 1, (*lead, N, 2)).sort(-1).values


RESTRICTIONS = {
    "none": lambda: {},
    "shared": lambda: {
        "candidates": torch.randperm(M)[:8],
        "self_indices": torch.arange(N),
        "key_range": ranges(),
        "order": "index",
    },
    "for each": lambda: {
        "candidates": torch.rand(B, H, M).argsort(-1)[..., :8],
        "self_indices": torch.randint(M, (B, H, N)),
        "key_range": ranges(B, H),
        "key_mask": torch.rand(B, H, M) < 0.8,
        "exclude_self": True,
    },
}
WEIGHTS = {
    "sum": lambda: {},
    "depthwise": lambda: {"weight": randn(C, 1, K), "rho": "similarity"},
    "dense": lambda: {"weight": randn(7, C, K), "bias": randn(7), "scale": 2.0},
}


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("restriction", "weight"), [("none", "dense"), ("shared", "depthwise"), ("for each", "sum")]
)
def test_forward(restriction: str, weight: str, layout: str, ranks: Ranks) -> None:
    arguments = of_forward() | RESTRICTIONS[restriction]() | WEIGHTS[weight]()
    names = ("query", "key", "value", "weight", "bias")
    needed = [name for name in names if name in arguments]
    outputs = 7 if weight == "dense" else C
    grads = {"output": randn(B, H, N, outputs), "similarities": randn(B, H, N, K)}
    for given in (grads, {"output": grads["output"]}):
        assert_equal_to_one_process(ranks, "forward", arguments, needed, given, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_select_and_aggregate(layout: str, ranks: Ranks) -> None:
    arguments = of_forward()
    value = arguments.pop("value")
    similarities, indices = torch.ops.convnn.select(**arguments)
    grads = {"similarities": randn(B, H, N, K)}
    assert_equal_to_one_process(ranks, "select", arguments, ["query", "key"], grads, layout)
    arguments = {"value": value, "similarities": similarities, "indices": indices}
    arguments |= WEIGHTS["depthwise"]() | {"bias": randn(C)}
    grads = {"output": randn(B, H, N, C)}
    for needed in (["value"], ["weight", "bias"], ["value", "similarities", "weight", "bias"]):
        assert_equal_to_one_process(ranks, "aggregate", arguments, needed, grads, layout)


def test_rules_are_kept_for_all_arguments(ranks: Ranks) -> None:
    """After a call with another k, and after one that needs other gradients."""
    grads = {"similarities": randn(B, H, N, 1)}
    arguments = of_forward() | {"k": 1}
    arguments.pop("value")
    for needed in (["query"], ["key"], ["query", "key"]):
        assert_equal_to_one_process(ranks, "select", arguments, needed, grads, "queries")


def attention() -> cnn.ConvNNAttention:
    torch.manual_seed(3)
    return cnn.ConvNNAttention(
        16, num_heads=4, k=K, bias=True, causal=True, query_norm=torch.nn.RMSNorm(4)
    ).double()


def step(layer: Any, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    tokens = tokens.clone().requires_grad_()
    output = layer(tokens, key_mask=mask)
    output.square().sum().backward()
    parameters = {name: X.grad for name, X in layer.named_parameters()}
    found = {"output": output, "tokens": tokens.grad, **parameters}
    return {name: getattr(X, "full_tensor", lambda X=X: X)().detach() for name, X in found.items()}


def over_heads(tokens: Tensor, mask: Tensor) -> tuple[int, dict[str, Tensor]]:
    """In a rank: the step of a layer with half of the heads, and how many queries it projects."""
    import torch.distributed as dist
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    layer = attention()
    plan = {f"{name}_projection": ColwiseParallel() for name in ("query", "key", "value")}
    parallelize_module(layer, mesh(), {**plan, "output_projection": RowwiseParallel()})

    def sum_over_heads(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=mesh().get_group())
        return gradient

    for parameter in (layer.weight, layer.bias, *layer.query_norm.parameters()):
        parameter.register_hook(sum_over_heads)
    found = step(layer, tokens, mask)
    similarities, _ = layer.neighbors(tokens)
    return similarities.shape[1], found


def test_tensor_parallel_attention(ranks: Ranks) -> None:
    tokens, mask = randn(3, 20, 16), torch.rand(3, 20) < 0.8
    expected = step(attention(), tokens, mask)
    for heads, found in ranks.call(over_heads, [(tokens, mask)] * SIZE):
        assert heads == 2
        assert found.keys() == expected.keys()
        for name, X in expected.items():
            torch.testing.assert_close(found[name], X, rtol=1e-12, atol=1e-12, msg=name)
