# SPDX-License-Identifier: MIT
"""What only a device can get wrong: order of work, memory, streams, graphs, compilation."""

from typing import Any

import pytest
import torch
from torch import Tensor

import convnn_kernels
from convnn_kernels import functional
from convnn_kernels.backends import choose

ops = torch.ops.convnn
pytestmark = pytest.mark.usefixtures("backend")


def inputs(
    device: torch.device, N: int = 300, M: int = 1500, C: int = 64, k: int = 9
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, N, C), (2, M, C), (2, M, C), (C, C, k))
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


def both_ways(query: Tensor, key: Tensor, value: Tensor, W: Tensor, k: int = 9) -> list[Tensor]:
    Y, s, I = ops.forward(query, key, value, k, W)
    tensors = [query, key, value, W]
    return [Y, s, I, *torch.autograd.grad([Y, s], tensors, [torch.cos(Y), torch.cos(s)])]


def small(device: torch.device) -> list[Tensor]:
    """Sizes that the interpreter can do, too."""
    return inputs(device, 300, 1500) if device.type == "cuda" else inputs(device, 9, 40, 16)


def test_the_same_from_run_to_run(device: torch.device) -> None:
    tensors = small(device)
    first = both_ways(*tensors)
    for _ in range(3):
        assert all(map(torch.equal, first, both_ways(*tensors)))


def test_memory_that_was_used_before(device: torch.device) -> None:
    """Whatever is allocated is full of NaN and of large integers."""
    tensors = small(device)
    expected = both_ways(*tensors)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device=device).isnan().all()
    assert all(map(torch.equal, expected, both_ways(*tensors)))


@pytest.mark.cuda_only
def test_a_side_stream(device: torch.device) -> None:
    """Inputs are ready, and results are read, on a stream that is not the default one."""
    tensors = inputs(device)
    expected = both_ways(*tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(X) for X in tensors]
        torch.cuda._sleep(50_000_000)
        for X, Y in zip(late, tensors, strict=True):
            X.copy_(Y.detach())
        got = both_ways(*(X.requires_grad_() for X in late))
        torch.cuda._sleep(50_000_000)
        got = [X.clone() for X in got]
    stream.synchronize()
    assert all(map(torch.equal, expected, got))


@pytest.mark.cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_after_warmup(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled while a graph is captured, and it computes what it should."""
    tensors = [X.detach().to(dtype).requires_grad_() for X in inputs(device, 210, 1300)]
    query, key, value, W = tensors
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        convnn_kernels.warmup(query, key, value, 9, W)
    torch.cuda.current_stream().wait_stream(stream)
    compiled = compilations(monkeypatch)

    def step() -> list[Tensor]:
        Y = functional.convnn(query, key, value, 9, W)
        return [Y, *torch.autograd.grad(Y.float().square().sum(), tensors)]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assert compiled == []
    with torch.no_grad():
        for X in tensors:
            X.copy_(torch.randn_like(X))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, step()))


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with every compilation of Triton from now on."""
    try:
        from triton import knobs
    except ImportError:
        return []
    done: list[Any] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda *args, **named: done.append(named or args)
    )
    return done


@pytest.mark.cuda_only
def test_compilations_are_seen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if choose._forced != "triton":
        return
    compiled = compilations(monkeypatch)
    X = torch.randn(3, 39, 23, device=device)
    functional.convnn(X, X, X, 7)
    assert compiled
