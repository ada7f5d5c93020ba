# SPDX-License-Identifier: MIT
"""forward_backward gives the bits of aggregate_backward followed by select_backward."""

from typing import Any

import pytest
import torch
from cases import DTYPES, METRICS, SHORT
from torch import Tensor

import convnn_kernels  # noqa: F401
from benchmarks.call_checks import CallChecks

ops = torch.ops.convnn

B, N, M, D, C, O, K = 2, 43, 61, 7, 10, 6, 5
NEEDS = ("query", "key", "value", "weight", "bias")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
each_metric = pytest.mark.parametrize("metric", METRICS)
each_rho = pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
each_kind = pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])


def make_call(
    dtype: torch.dtype, metric: str, rho: str, kind: str, value_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The arguments of forward_backward, but for the needed gradients. Some neighbors are missing,
    and every query of the second batch element chose key 3."""
    value_dtype = dtype if value_dtype is None else value_dtype
    query = torch.randn(B, N, D).to(dtype)
    key = torch.randn(B, M, D)
    key[1, 3] = 100 * query[1].float().mean(dim=0)
    key = key.to(dtype)
    value = torch.randn(B, M, C).to(value_dtype)
    shape = {"none": None, "depthwise": (C, 1, K), "dense": (O, C, K)}[kind]
    weight = None if shape is None else torch.randn(shape).to(value_dtype)
    mask = torch.arange(M).expand(B, M) < torch.tensor([[K - 2], [M]])
    scale = 0.7 if rho == "softmax" else 1.0
    Y, s, I = ops.forward(
        query, key, value, K, weight, key_mask=mask, metric=metric, rho=rho, scale=scale
    )
    assert bool(s[0].isinf().any())
    return {
        "grad_output": torch.randn(Y.shape).to(value_dtype),
        "grad_similarities": torch.randn(s.shape).to(s.dtype),
        **{"query": query, "key": key, "value": value, "weight": weight},
        **{"similarities": s, "indices": I, "has_bias": True},
        **{"metric": metric, "rho": rho, "scale": scale},
    }


def in_two_steps(call: dict[str, Any], needed: tuple[str, ...] = NEEDS) -> dict[str, Tensor]:
    """The needed gradients from aggregate_backward and select_backward."""
    x = call
    through_output = ("query" in needed or "key" in needed) and x["rho"] != "ones"
    grad_value, grad_s, grad_weight, grad_bias = ops.aggregate_backward(
        *(x["grad_output"], x["value"], x["similarities"], x["indices"], x["weight"]),
        *(x["has_bias"], x["rho"], x["scale"]),
        *("value" in needed, through_output, "weight" in needed, "bias" in needed),
    )
    grads = {"value": grad_value, "weight": grad_weight, "bias": grad_bias}
    if x["grad_similarities"] is not None:
        grad_s = grad_s + x["grad_similarities"] if through_output else x["grad_similarities"]
    elif not through_output:
        zeros = {name: torch.zeros_like(x[name]) for name in ("query", "key")}
        return {name: (zeros | grads)[name] for name in needed}
    grads["query"], grads["key"] = ops.select_backward(
        *(grad_s, x["query"], x["key"], x["similarities"], x["indices"], x["metric"]),
        *("query" in needed, "key" in needed),
    )
    return {name: grads[name] for name in needed}


def assert_same_bits(call: dict[str, Any], needed: tuple[str, ...] = NEEDS) -> None:
    results = ops.forward_backward(**call, **{f"need_{name}": name in needed for name in NEEDS})
    expected = in_two_steps(call, needed)
    for name, grad in zip(NEEDS, results, strict=True):
        if name in needed:
            assert grad.dtype == expected[name].dtype, name
            assert torch.equal(grad, expected[name]), f"gradient of {name}"
            assert torch.equal(grad.signbit(), expected[name].signbit()), f"gradient of {name}"
        else:
            assert grad.shape == (0,), name


@each_dtype
@each_metric
@each_kind
@each_rho
def test_same_bits(rho: str, kind: str, metric: str, dtype: torch.dtype) -> None:
    call = make_call(dtype, metric, rho, kind)
    assert_same_bits(call)
    assert_same_bits({**call, "grad_similarities": None})


@each_kind
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "output-only"])
@pytest.mark.parametrize("needed", range(2 ** len(NEEDS)))
def test_same_bits_for_every_set_of_gradients(needed: int, direct: bool, kind: str) -> None:
    call = make_call(torch.float32, "cosine", "softmax", kind)
    if not direct:
        call["grad_similarities"] = None
    assert_same_bits(call, tuple(name for i, name in enumerate(NEEDS) if needed >> i & 1))


@each_metric
@each_kind
def test_same_bits_where_query_and_key_are_one_tensor(kind: str, metric: str) -> None:
    """The norms are computed once then."""
    X = torch.randn(B, M, D)
    weight = {"none": None, "depthwise": torch.randn(C, 1, K), "dense": torch.randn(O, C, K)}[kind]
    Y, s, I = ops.forward(X, X, torch.randn(B, M, C), K, weight, metric=metric)
    call = {
        **{"grad_output": torch.randn_like(Y), "grad_similarities": torch.randn_like(s)},
        **{"query": X, "key": X, "value": torch.randn(B, M, C), "weight": weight},
        **{"similarities": s, "indices": I, "has_bias": False},
        **{"metric": metric, "rho": "softmax", "scale": 1.0},
    }
    needed = ("query", "key", "value") if weight is None else ("query", "key", "value", "weight")
    assert_same_bits(call, needed)
    separate = {**call, "key": X.clone()}
    for one, other in zip(
        in_two_steps(call).values(), in_two_steps(separate).values(), strict=True
    ):
        assert torch.equal(one, other)


@each_kind
@pytest.mark.parametrize(
    ("dtype", "value_dtype"),
    [(torch.float64, torch.bfloat16), (torch.float16, torch.float64)],
    ids=["f64-bf16", "f16-f64"],
)
def test_same_bits_where_the_value_has_another_dtype(
    dtype: torch.dtype, value_dtype: torch.dtype, kind: str
) -> None:
    assert_same_bits(make_call(dtype, "euclidean", "softmax", kind, value_dtype))


def test_same_bits_for_arguments_that_are_not_contiguous() -> None:
    call = make_call(torch.float32, "cosine", "softmax", "dense")
    for name, X in call.items():
        if isinstance(X, Tensor):
            call[name] = X.mT.contiguous().mT
    assert_same_bits(call)


def test_candidates_change_nothing() -> None:
    """On CPU; also where neighbors are not among them."""
    call = make_call(torch.float32, "cosine", "softmax", "depthwise")
    assert_same_bits({**call, "candidates": torch.tensor([5, 3, 8])})


def test_the_backward_of_forward_has_its_candidates() -> None:
    x = make_call(torch.float32, "dot", "ones", "none")
    value, candidates = x["value"].requires_grad_(), torch.tensor([5, 3, 8])
    Y, _, _ = ops.forward(x["query"], x["key"], value, 2, candidates=candidates)
    with CallChecks() as recorded:
        Y.sum().backward()
    ((name, given, _),) = recorded.calls
    assert name == "forward_backward"
    assert torch.equal(given["candidates"], candidates)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (
            torch.zeros(3, 3, dtype=torch.int64),
            r"candidates must have shape \[R\] or \[2, R\], got",
        ),
        (torch.zeros(3), "candidates must be int64, got float32"),
    ],
    ids=["shape", "dtype"],
)
def test_candidates_are_checked(candidates: Tensor, message: str) -> None:
    call = make_call(torch.float32, "cosine", "softmax", "depthwise")
    with pytest.raises(RuntimeError, match=f"convnn::forward_backward: {message}"):
        assert_same_bits({**call, "candidates": candidates})


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
def test_same_bits_of_an_empty_call(shape: tuple[int, int]) -> None:
    batch, rows = shape
    query, key, value = (
        torch.randn(batch, rows, 3),
        torch.randn(batch, 5, 3),
        torch.randn(batch, 5, 4),
    )
    Y, s, I = ops.forward(query, key, value, 2)
    call = {
        **{"grad_output": Y, "grad_similarities": s, "query": query, "key": key, "value": value},
        **{"weight": None, "similarities": s, "indices": I, "has_bias": True},
        **{"metric": "cosine", "rho": "softmax", "scale": 1.0},
    }
    assert_same_bits(call, ("query", "key", "value", "bias"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grad_output", r"grad_output must have shape \[2, 43, 6\], got shape \[2, 43, 5\]"),
        (
            "grad_similarities",
            r"grad_similarities must have shape \[2, 43, 5\], got shape \[2, 43, 4\]",
        ),
        (
            "indices",
            r"indices must have the shape \[2, 43, 5\] of similarities, got shape \[2, 43, 4\]",
        ),
        ("key", r"value must have the 60 rows of key, got shape \[2, 61, 10\]"),
    ],
    ids=["grad_output", "grad_similarities", "indices", "key"],
)
def test_shapes_are_checked(name: str, message: str) -> None:
    call = make_call(torch.float32, "dot", "softmax", "dense")
    call[name] = call[name][:, :-1] if name == "key" else call[name][..., :-1]
    with pytest.raises(RuntimeError, match=f"convnn::forward_backward: {message}"):
        assert_same_bits(call)
