# SPDX-License-Identifier: MIT
"""What can only go wrong on a device: order of work, memory, streams, graphs, compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_device import ON_CPU
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import convnn_kernels
from benchmarks.call_checks import CallChecks
from benchmarks.paper.rows import ROWS
from convnn_kernels import functional
from convnn_kernels.backends import selection

ops = torch.ops.convnn
pytestmark = pytest.mark.usefixtures("backend")


def inputs(
    device: torch.device, N: int = 300, M: int = 1500, C: int = 64, k: int = 9
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, N, C), (2, M, C), (2, M, C), (C, C, k))
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


def forward(query: Tensor, key: Tensor, value: Tensor, W: Tensor, k: int = 9) -> list[Tensor]:
    with torch.no_grad():
        return list(ops.forward(query, key, value, k, W))


def both_ways(query: Tensor, key: Tensor, value: Tensor, W: Tensor, k: int = 9) -> list[Tensor]:
    Y, s, I = ops.forward(query, key, value, k, W)
    tensors = [query, key, value, W]
    return [Y, s, I, *torch.autograd.grad([Y, s], tensors, [torch.cos(Y), torch.cos(s)])]


def small(device: torch.device) -> list[Tensor]:
    """Sizes that are not too large for the interpreter."""
    return inputs(device, 300, 1500) if device.type == "cuda" else inputs(device, 9, 40, 16)


# Selection by groups and in one launch, and each kind of convolution.
RERUN = {
    "groups-dense": ((2, 300, 1500, 64, 9), "dense"),
    "groups-depthwise": ((3, 1100, 1100, 40, 17), "depthwise"),
    "few-depthwise": ((16, 197, 197, 64, 9), "depthwise"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*RERUN][: 1 if ON_CPU else 3])
@pytest.mark.parametrize("deterministic", [False, True], ids=["plain", "deterministic"])
def test_the_same_from_run_to_run(
    deterministic: bool,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    record_property: Callable[[str, object], None],
) -> None:
    """Forward always, backward under deterministic algorithms, which fill new tensors with NaN."""
    (B, N, M, C, k), weight = RERUN[kind]
    runs = 100
    if ON_CPU:
        if dtype == torch.bfloat16:
            pytest.skip("the interpreter computes bfloat16 wrongly")
        (B, N, M, C, k), runs = (1, 9, 40, 16, 5), 3
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, N, C), (B, M, C), (B, M, C), (C, C, k) if weight == "dense" else (C, 1, k))
    tensors = [
        torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes
    ]
    torch.use_deterministic_algorithms(deterministic)
    run = both_ways if deterministic else forward
    first = run(*tensors, k)
    assert not any(X.isnan().any() for X in first)
    # Compared on the device, which would be idle between runs otherwise.
    same = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(runs):
        for X, Y in zip(first, run(*tensors, k), strict=True):
            same &= (X == Y).all()
    assert same
    record_property("reruns", runs)


def test_memory_that_was_used_before(device: torch.device) -> None:
    """Fills all allocated memory with NaN and large integers."""
    tensors = small(device)
    expected = both_ways(*tensors)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device=device).isnan().all()
    assert all(map(torch.equal, expected, both_ways(*tensors)))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(half: torch.dtype, device: torch.device) -> None:
    """Value and weight are cast, query and key are not; gradients have the arguments' dtypes."""
    if ON_CPU and half == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    tensors = small(device)
    query, key, *others = [X.detach() for X in tensors]
    cast = [X.requires_grad_() for X in (query, key, *[X.to(half) for X in others])]
    expected = both_ways(*cast)
    with torch.autocast(device.type, dtype=half):
        got = both_ways(*tensors)
    assert got[0].dtype == half
    assert got[1].dtype == torch.float32
    assert [X.dtype for X in got[3:]] == [torch.float32] * 4
    assert all(torch.equal(X, Y.to(X.dtype)) for X, Y in zip(got, expected, strict=True))


@pytest.mark.cuda_only
def test_compile_with_inductor(device: torch.device) -> None:
    """One compilation serves all sizes; results equal those without compilation."""
    counter = CompileCounterWithBackend("inductor")
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(query: Tensor, key: Tensor, value: Tensor, W: Tensor) -> Tensor:
        return functional.convnn(query, key, 2.0 * value, 9, W).relu()

    for N, M in ((300, 1500), (210, 1300), (40, 90)):
        tensors = inputs(device, N, M)
        query, key, value, W = tensors
        got = step(*tensors)
        expected = functional.convnn(query, key, 2.0 * value, 9, W).relu()
        assert torch.equal(got, expected)
        grad = torch.cos(expected.detach())
        for X, Y in zip(
            torch.autograd.grad(got, tensors, grad),
            torch.autograd.grad(expected, tensors, grad),
            strict=True,
        ):
            torch.testing.assert_close(X, Y)
    assert counter.frame_count == 1


@pytest.mark.cuda_only
@pytest.mark.parametrize("model", ["vgg11/hybrid-0.5", "vit/convnn-all", "vit/convnn-random-32"])
def test_operators_in_a_model(model: str, device: torch.device) -> None:
    """Compares every operator call in a training step with the reference at its inputs."""
    row = ROWS[model]
    network = row.build(10, reduced=True).to(device)
    size = row.image_size(reduced=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, size, size, generator=generator).to(device)
    with CallChecks() as calls:
        network(images).square().sum().backward()
    assert calls.check() >= 8
    assert all(P.grad is None or P.grad.isfinite().all() for P in network.parameters())


@pytest.mark.cuda_only
def test_a_side_stream(device: torch.device) -> None:
    """Inputs are written, and results read, on a stream other than the default one."""
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
    """Nothing is compiled while a graph is captured, and its results are correct."""
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
    """Collects the names of all kernels that Triton compiles from now on."""
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
    if selection._forced != "triton":
        return
    compiled = compilations(monkeypatch)
    X = torch.randn(3, 39, 23, device=device)
    functional.convnn(X, X, X, 7)
    assert compiled
