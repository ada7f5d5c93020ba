# SPDX-License-Identifier: MIT
"""Every operator and function refuses by name a tensor whose storage was freed or made too small.

``tensor.untyped_storage().resize_(0)`` frees memory that shape and strides still describe, as FSDP
does with parameters.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from convnn_kernels import functional
from convnn_kernels.backends import selection
from convnn_kernels.triton import backend as triton

convnn = torch.ops.convnn


def arguments(op: str) -> dict[str, Any]:
    """A valid call: batch 2, N = 6, M = 8, D = 4, C = 5, O = 7, R = 5, k = 3."""
    select = {"query": torch.randn(2, 6, 4), "key": torch.randn(2, 8, 4)}
    restrictions = {
        "candidates": torch.tensor([6, 0, 2, 3, 7]),
        "self_indices": torch.arange(6),
        "key_mask": torch.ones(2, 8, dtype=torch.bool),
        "key_range": torch.tensor([[0, 8]] * 6),
    }
    neighbors = {
        "similarities": torch.randn(2, 6, 3),
        "indices": torch.randint(8, (2, 6, 3)),
    }
    value = {"value": torch.randn(2, 8, 5), "weight": torch.randn(7, 5, 3)}
    grads = {"grad_output": torch.randn(2, 6, 7), "grad_similarities": torch.randn(2, 6, 3)}
    options = {"metric": "cosine", "rho": "softmax", "scale": 1.0, "has_bias": True}
    needs = {f"need_{each}": True for each in ("query", "key", "value", "weight", "bias")}
    given = select | restrictions | neighbors | value | grads | options | needs
    given |= {"k": 3, "bias": torch.randn(7), "need_similarities": True}
    schema = getattr(convnn, op).default._schema
    return {each.name: given.get(each.name, each.default_value) for each in schema.arguments}


OPERATORS = (
    "forward",
    "select",
    "aggregate",
    "forward_backward",
    "select_backward",
    "aggregate_backward",
)
CASES = [
    (op, name) for op in OPERATORS for name, X in arguments(op).items() if isinstance(X, Tensor)
]


def message(op: str, name: str, tensor: Tensor, bytes_left: int) -> str:
    needed = tensor.numel() * tensor.element_size()
    return (
        f"convnn::{op}: {name} must have a storage of at least {needed} bytes for its shape "
        f"{list(tensor.shape)}, got one of {bytes_left} bytes"
    )


def refused(op: str, args: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as error:
        getattr(convnn, op)(**args)
    return str(error.value).splitlines()[0]


@pytest.mark.parametrize("left", ["nothing", "all but one element"])
@pytest.mark.parametrize(("op", "name"), CASES, ids=[f"{op}-{name}" for op, name in CASES])
def test_freed_storage(op: str, name: str, left: str) -> None:
    args = arguments(op)
    getattr(convnn, op)(**args)
    storage = args[name].untyped_storage()
    bytes_left = 0 if left == "nothing" else storage.nbytes() - args[name].element_size()
    storage.resize_(bytes_left)
    assert refused(op, args) == message(op, name, args[name], bytes_left)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize(("op", "name"), CASES, ids=[f"{op}-{name}" for op, name in CASES])
def test_freed_storage_where_python_runs_the_call(
    op: str, name: str, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for CUDA tensors, with a stand-in for Triton; such a call has been checked before."""
    ran = []
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "refuses", lambda *call: None)
    monkeypatch.setattr(triton, "run", lambda *call: ran.append(call))
    for remembered in ("_chosen", "_checked"):
        monkeypatch.setattr(selection, remembered, {})
    run = selection.cuda_kernel(getattr(convnn, op).default)
    args = arguments(op)
    X = args[name]
    args[name] = torch.cat([X.new_zeros(offset), X.reshape(-1)])[offset:].view(X.shape)
    run(*args.values())
    args[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError) as error:
        run(*args.values())
    needed = (offset + X.numel()) * X.element_size()
    assert f"{op}: {name} must have a storage of at least {needed} bytes" in str(error.value)
    assert len(ran) == 1


@pytest.mark.parametrize("op", OPERATORS)
def test_storage_that_is_just_enough(op: str) -> None:
    """Views with an offset, strides and repetitions, of storages without a spare element."""

    def view(X: Any) -> Any:
        if not isinstance(X, Tensor):
            return X
        last = X.new_empty(1 + X.numel() * 2).as_strided(X.shape, [2 * s for s in X.stride()], 1)
        last.copy_(X)
        assert last.untyped_storage().nbytes() == (1 + 2 * X.numel()) * X.element_size()
        last.untyped_storage().resize_(last.untyped_storage().nbytes() - X.element_size())
        return last

    args = arguments(op)
    expected = getattr(convnn, op)(**args)
    got = getattr(convnn, op)(**{name: view(X) for name, X in args.items()})
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_tensors_without_elements_need_no_storage() -> None:
    query, key = torch.randn(2, 0, 4), torch.randn(2, 8, 4)
    query.untyped_storage().resize_(0)
    similarities, indices = convnn.select(query, key, 3)
    assert similarities.shape == indices.shape == (2, 0, 3)


def test_storage_freed_between_forward_and_backward() -> None:
    """As FSDP does; what it does not do is free what backward still needs."""
    X, value = torch.randn(6, 4, requires_grad=True), torch.randn(6, 5)
    output, _, _ = convnn.forward(X, X, value, 3)
    value.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="convnn::forward_backward: value must have a storage"):
        output.sum().backward()


FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "edge_index": (
        functional.edge_index,
        {"indices": torch.zeros(2, 3, dtype=torch.int64), "similarities": torch.ones(2, 3)},
    ),
    "segment_ranges": (
        functional.segment_ranges,
        {"lengths": torch.tensor([2, 3]), "key_lengths": torch.tensor([4, 3])},
    ),
}
OF_FUNCTIONS = [(name, each) for name, (_, args) in FUNCTIONS.items() for each in args]


def shrunk(X: Tensor, bytes_left: int) -> Tensor:
    X = X.clone()
    X.untyped_storage().resize_(bytes_left)
    return X


@pytest.mark.parametrize("bytes_left", [0, 3])
@pytest.mark.parametrize(("function", "name"), OF_FUNCTIONS)
def test_freed_storage_in_functions(function: str, name: str, bytes_left: int) -> None:
    call, args = FUNCTIONS[function]
    X = args[name]
    with pytest.raises(RuntimeError) as error:
        call(**args | {name: shrunk(X, bytes_left)})
    expected = message(function, name, X, bytes_left).removeprefix("convnn::")
    assert str(error.value) == expected


@pytest.mark.parametrize("name", ["indices", "similarities"])
def test_freed_storage_under_transforms_of_edge_index(name: str) -> None:
    _, args = FUNCTIONS["edge_index"]
    X = args[name]

    def call(X: Tensor) -> Tensor:
        return functional.edge_index(**args | {name: X})

    expected = f"edge_index: {name} must have a storage of at least"
    with pytest.raises(RuntimeError, match=expected):
        torch.func.functionalize(call)(shrunk(X, 0))
    with pytest.raises(RuntimeError, match=expected):
        torch.vmap(call)(shrunk(X.expand(4, 2, 3), 0))
    if name == "similarities":
        with pytest.raises(RuntimeError, match=expected):
            torch.func.grad(lambda X: (call(X) * X.sum()).sum())(shrunk(X, 0))


class Wrapper(Tensor):
    """A subclass without memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, storage_size=0)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [X.inner if isinstance(X, cls) else X for X in args]
        return func(*unwrapped, **(kwargs or {}))


def test_subclasses_without_memory() -> None:
    _, args = FUNCTIONS["edge_index"]
    wrapped = {name: Wrapper(X) for name, X in args.items()}
    assert all(X.untyped_storage().nbytes() == 0 for X in wrapped.values())
    assert torch.equal(functional.edge_index(**wrapped), functional.edge_index(**args))
