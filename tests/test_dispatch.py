# SPDX-License-Identifier: MIT
"""What is registered for the operators, what fakes of their gradients return, and what a node of
autograd keeps and asks for."""

import itertools
from typing import Any

import pytest
import torch
from test_backward_arguments import OPS, arguments
from torch import Tensor

convnn = torch.ops.convnn


@pytest.mark.parametrize("op", ["forward", "select", "aggregate"])
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_autocast_applies_on_both_devices(op: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"convnn::{op}", key)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("weight", ["none", "dense"])
def test_fake_gradients_have_the_shapes_of_real_ones(op: str, weight: str) -> None:
    """Also those that are not needed, and those of a bias that there is not."""
    args = arguments(op)
    if weight == "none" and "weight" in args:
        args |= {"weight": None, "grad_output": torch.randn_like(args["value"][..., :4, :])}
    flags = [name for name in args if name.startswith("need_") or name == "has_bias"]
    fake = {name: X.to("meta") if isinstance(X, Tensor) else X for name, X in args.items()}
    for values in itertools.product([False, True], repeat=len(flags)):
        chosen = dict(zip(flags, values, strict=True))
        real = getattr(convnn, op)(**args | chosen)
        of_meta = getattr(convnn, op)(**fake | chosen)
        assert [X.shape for X in of_meta] == [X.shape for X in real], chosen
        assert [X.dtype for X in of_meta] == [X.dtype for X in real]


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_with_rho_of_ones_the_output_gives_query_and_key_no_gradient() -> None:
    query, key, value = leaves((2, 4, 3), (2, 7, 3), (2, 7, 5))
    output, similarities, _ = convnn.forward(query, key, value, 2, rho="ones")
    grads = torch.autograd.grad(output.sum(), (query, key), allow_unused=True, retain_graph=True)
    assert grads == (None, None)
    both = (output.sum() + similarities.sum(),)
    assert all(grad.any() for grad in torch.autograd.grad(both, (query, key)))


@pytest.mark.parametrize("shared", [True, False])
def test_backward_is_told_the_candidates_of_the_whole_batch(shared: bool) -> None:
    """With them it divides its work; with those of each batch element it must not."""
    query, key, value = leaves((2, 4, 3), (2, 7, 3), (2, 7, 5))
    candidates = torch.tensor([5, 1, 2])
    given = candidates if shared else candidates.repeat(2, 1)
    output: Any = convnn.forward(query, key, value, 2, candidates=given)[0]
    kept = output.grad_fn.saved_tensors[-1]
    assert kept is None if not shared else torch.equal(kept, candidates)


@pytest.mark.parametrize("op", ["forward", "aggregate"])
@pytest.mark.parametrize("shape", [None, (5,)])
def test_backward_is_told_whether_there_is_a_bias(op: str, shape: tuple[int] | None) -> None:
    query, key, value = leaves((2, 4, 3), (2, 7, 3), (2, 7, 5))
    bias = None if shape is None else torch.zeros(shape)
    output: Any = convnn.forward(query, key, value, 2, bias=bias)[0]
    if op == "aggregate":
        neighbors = convnn.select(query, key, 2)
        output = convnn.aggregate(value, *neighbors, bias=bias)
    assert output.grad_fn.has_bias == (bias is not None)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (0, 0, 3), (2, 4, 0)])
def test_empty_results_have_the_strides_of_empty_tensors(shape: tuple[int, ...]) -> None:
    """Which are not 0, as their products with sizes would be."""
    query, key = torch.randn(shape), torch.randn(shape[0], 7, shape[2])
    for result in convnn.forward(query, key, torch.randn(shape[0], 7, 0), 2):
        assert result.stride() == torch.empty(result.shape).stride()
