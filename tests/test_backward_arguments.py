# SPDX-License-Identifier: MIT
"""Wrong calls of the backward operators, each with its complete message.

The dtype of every tensor, the shape of every gradient, and the range of the indices, which would be
read or written out of bounds.
"""

from typing import Any

import pytest
import torch
from inputs import OUT_OF_RANGE
from torch import Tensor

import convnn_kernels  # noqa: F401

B, N, M, D, C, O, K = 2, 4, 7, 3, 5, 6, 2
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
FLOATING = "float64, float32, float16 or bfloat16"


def arguments(op: str, dtype: torch.dtype = F32) -> dict[str, Any]:
    """A right call; query, key, value and weight have the dtype."""
    of_similarities = F64 if dtype == F64 else F32
    neighbors = {
        "similarities": torch.randn(B, N, K, dtype=of_similarities),
        "indices": torch.randint(M, (B, N, K)),
    }
    select = {
        "grad_similarities": torch.randn(B, N, K, dtype=of_similarities),
        "query": torch.randn(B, N, D, dtype=dtype),
        "key": torch.randn(B, M, D, dtype=dtype),
        "metric": "dot",
        "need_query": True,
        "need_key": True,
        **neighbors,
    }
    aggregate = {
        "grad_output": torch.randn(B, N, O, dtype=dtype),
        "value": torch.randn(B, M, C, dtype=dtype),
        "weight": torch.randn(O, C, K, dtype=dtype),
        **{"has_bias": True, "rho": "softmax", "scale": 1.0},
        **{"need_value": True, "need_weight": True, "need_bias": True},
        **neighbors,
    }
    if op == "select_backward":
        return select
    if op == "aggregate_backward":
        return aggregate | {"need_similarities": True}
    return select | aggregate | {"candidates": torch.arange(5)}


OPS = ("select_backward", "aggregate_backward", "forward_backward")


def assert_refused(op: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.convnn, op)(**args)
    assert str(error.value).splitlines()[0] == f"convnn::{op}: {message}"


def dtype_cases() -> list[Any]:
    """Operator, dtype of the call, argument, its wrong dtype, message."""
    cases = []

    def add(op: str, dtype: torch.dtype, name: str, wrong: torch.dtype, must: str) -> None:
        cases.append((op, dtype, name, wrong, f"{name} must be {must}, got {short(wrong)}"))

    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    for op in OPS:
        names = arguments(op)
        for name, wrong in (("indices", torch.int32), ("indices", F32)):
            add(op, F32, name, wrong, "int64")
        for dtype, right, wrongs in (
            (F64, "float64", (F32, F16)),
            (F32, "float32", (F64, BF16, torch.int64)),
            (F16, "float32", (F64, F16)),
        ):
            for wrong in wrongs if "query" in names else ():
                add(op, dtype, "grad_similarities", wrong, right)
        if op == "select_backward":
            add(op, F64, "similarities", F32, "float64")
            add(op, F32, "similarities", F64, "float32")
            add(op, F16, "similarities", F16, "float32")
        else:
            right = "float32" if op == "forward_backward" else "float32 or float64"
            add(op, F32, "similarities", F16, right)
            for dtype, wrong in ((F64, F32), (F32, F64), (F16, F32), (BF16, F16)):
                add(op, dtype, "grad_output", wrong, short(dtype))
                add(op, dtype, "weight", wrong, f"{short(dtype)} as value is")
            add(op, F32, "value", torch.int32, FLOATING)
        if "query" in names:
            add(op, F32, "key", F64, "float32 as query is")
            add(op, F32, "query", torch.int64, FLOATING)
        if op == "forward_backward":
            add(op, F64, "similarities", F32, "float64")
            add(op, F32, "similarities", F64, "float32")
            add(op, F32, "candidates", torch.int32, "int64")
    return cases


@pytest.mark.parametrize(
    ("op", "dtype", "name", "wrong", "message"),
    dtype_cases(),
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_dtypes(op: str, dtype: torch.dtype, name: str, wrong: torch.dtype, message: str) -> None:
    args = arguments(op, dtype)
    assert_refused(op, args | {name: args[name].to(wrong)}, message)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("position", [0, B * N * K - 1])
@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_indices_out_of_range(wrong: int, position: int, op: str) -> None:
    """Also of a missing neighbor."""
    args = arguments(op)
    args["indices"].view(-1)[position] = wrong
    message = f"indices must be in [0, {M}), got {wrong} at position {position}"
    assert_refused(op, args, message)
    args["similarities"].view(-1)[position] = -torch.inf
    assert_refused(op, args, message)


@pytest.mark.parametrize("op", OPS)
def test_indices_at_the_ends(op: str) -> None:
    args = arguments(op)
    args["indices"].view(-1)[:2] = torch.tensor([0, M - 1])
    getattr(torch.ops.convnn, op)(**args)


def without_rows(op: str) -> dict[str, Any]:
    args = arguments(op)
    for name in {"key", "value"} & args.keys():
        args[name] = args[name][:, :0]
    args |= {"candidates": None} if "candidates" in args else {}
    return args | {"indices": torch.zeros_like(args["indices"])}


@pytest.mark.parametrize("op", OPS)
def test_without_rows_all_neighbors_must_be_missing(op: str) -> None:
    args = without_rows(op)
    missing = torch.full_like(args["similarities"], -torch.inf)
    grads = getattr(torch.ops.convnn, op)(**args | {"similarities": missing})
    assert not any(bool(grad.any()) for grad in grads if grad is not grads[-1])
    for wrong, printed in ((torch.inf, "inf"), (0.0, "0"), (float("-nan"), "nan")):
        similarities = missing.clone()
        similarities[1, 2, 0] = wrong
        assert_refused(
            op,
            args | {"similarities": similarities},
            "similarities must be -inf without rows of value, "
            f"got {printed} at position {N * K + 2 * K}",
        )


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        (op, name, shape)
        for op in OPS
        for name, shape in (("grad_similarities", (B, N, K)), ("grad_output", (B, N, O)))
        if name in arguments(op)
    ],
)
def test_shapes_of_gradients(op: str, name: str, shape: tuple[int, ...]) -> None:
    args = arguments(op)
    for i in range(3):
        wrong: Tensor = torch.zeros([size + (i == dim) for dim, size in enumerate(shape)])
        message = f"{name} must have shape {list(shape)}, got shape {list(wrong.shape)}"
        assert_refused(op, args | {name: wrong}, message)
    assert_refused(
        op,
        args | {name: torch.zeros(shape[1:])},
        f"{name} must have shape {list(shape)}, got shape {list(shape[1:])}",
    )
