# SPDX-License-Identifier: MIT
"""Tensors on several devices are refused, whichever of them are on which.

A tensor on the meta device among others on the CPU would have the dispatcher call the fake kernel,
whose results have no memory.
"""

import contextlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_storage import OPERATORS, arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from convnn_kernels import functional

convnn = torch.ops.convnn
FUNCTIONS = {
    "forward": functional.convnn,
    "select": functional.select_neighbors,
    "aggregate": functional.aggregate_neighbors,
}


def mixtures(args: dict[str, Any], other: str) -> list[dict[str, Any]]:
    """The call with some of its tensors, but not all, on another device, in all ways."""
    names = [name for name, X in args.items() if isinstance(X, Tensor)]
    moved = {name: args[name].to(other) for name in names}
    return [
        args | {name: moved[name] for name in some}
        for count in range(1, len(names))
        for some in itertools.combinations(names, count)
    ]


def refused(call: Callable[..., Any], args: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as error:
        call(**args)
    return str(error.value).splitlines()[0]


def assert_names_devices(op: str, message: str, args: dict[str, Any]) -> None:
    before, _, got = message.rpartition(" is, got ")
    name, _, expected = before.removeprefix(f"convnn::{op}: ").partition(" must be on ")
    device, _, other = expected.partition(" as ")
    assert got == str(args[name].device)
    assert device == str(args[other].device)
    assert got != device


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("cuda:0", "cuda:1")])
@pytest.mark.parametrize("op", OPERATORS)
def test_the_library_checks_by_itself(op: str, devices: tuple[str, str]) -> None:
    """Called without the dispatcher, which would choose the fake kernel."""
    one, other = devices
    overload = getattr(convnn, op).default
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    names = [argument.name for argument in overload._schema.arguments]
    with FakeTensorMode() if one == "cuda:0" else contextlib.nullcontext():
        calls = mixtures(tree_map_only(Tensor, lambda X: X.to(one), arguments(op)), other)
    for args in calls:
        given = [args[name] for name in names if name in args]
        message = refused(lambda given=given: overload.redispatch(cpu, *given), {})
        found = re.fullmatch(rf"convnn::{op}: (\w+) must be on .+ as (\w+) is, got .+", message)
        assert found, message
        assert args[found[1]].device != args[found[2]].device


@pytest.mark.parametrize("op", OPERATORS)
def test_meta_among_cpu(op: str) -> None:
    for args in mixtures(arguments(op), "meta"):
        assert_names_devices(op, refused(getattr(convnn, op), args), args)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_meta_among_cpu_in_a_function(op: str) -> None:
    names = arguments(op).keys() - {"has_bias"}
    for args in mixtures({name: arguments(op)[name] for name in names}, "meta"):
        assert_names_devices(op, refused(FUNCTIONS[op], args), args)


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("device", ["meta", "cuda:0"])
@pytest.mark.parametrize("op", OPERATORS)
def test_fake_tensors(op: str, device: str) -> None:
    args = arguments(op)
    with FakeTensorMode() as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, args)
        getattr(convnn, op)(**fake)
        for mixed in mixtures(fake, device):
            assert_names_devices(op, refused(getattr(convnn, op), mixed), mixed)


def test_gradients_of_a_mixed_call() -> None:
    """In backward, too, where the gradient that is passed is on the meta device."""
    X = torch.randn(2, 6, 4, requires_grad=True)
    similarities, _ = convnn.select(X, X, 3)
    node: Any = similarities.grad_fn
    with pytest.raises(RuntimeError, match="grad_similarities must be on cpu as query is"):
        node.apply(torch.ones(2, 6, 3, device="meta"), None)
