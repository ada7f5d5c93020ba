# SPDX-License-Identifier: MIT
"""CUDA C++ in the place of Triton, on a device of compute capability 9.0: the kernels for Hopper,
the way in to them, and gradients."""

import logging

import pytest
import torch
from torch import Tensor

import convnn_kernels
from convnn_kernels.backends import gradients, hopper, selection

ops = torch.ops.convnn
pytestmark = pytest.mark.cuda_only


@pytest.fixture(autouse=True)
def _needs_kernels(device: torch.device) -> None:
    if reason := hopper.unavailable():
        pytest.skip(reason)
    if not hopper.can_run("convnn::forward", device):
        pytest.skip("the device is not of compute capability 9.0")
    if selection._forced is not None:
        pytest.skip("a backend is forced")


@pytest.mark.parametrize("number", range(hopper.KINDS), ids=lambda n: str(hopper.kind_of(n)))
def test_they_pass_their_check(number: int, device: torch.device) -> None:
    assert hopper.faults(device, hopper.kind_of(number)) == []


def tokens(device: torch.device, dtype: torch.dtype, B: int, M: int, D: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, M, D), (B, M, D), (B, M, D), (D, 1, 9), (D,))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "M", "D"), [(4, 4096, 64), (2, 9000, 128), (3, 7001, 33)])
def test_the_way_in(
    B: int,
    M: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By itself, the call goes to these kernels; results agree with those of float32."""
    Q, K, V, W, b = tokens(device, dtype, B, M, D)
    # As if it were the first call.
    monkeypatch.setattr(selection, "_chosen", {})
    monkeypatch.setattr(selection, "_checked", {})
    with caplog.at_level(logging.INFO, "convnn_kernels"), convnn_kernels.backend("cuda"):
        ops.forward(Q, K, V, 9, W, b)
    assert "runs on cuda (Hopper: cosine" in caplog.text
    came = []
    run = selection._run
    monkeypatch.setattr(selection, "_run", lambda *call: came.append(call) or run(*call))
    Y, s, I = ops.forward(Q, K, V, 9, W, b)
    assert not came
    exact = ops.forward(*(X.float() for X in (Q, K, V)), 9, W.float(), b.float())
    torch.testing.assert_close(s, exact[1], atol=2e-5, rtol=0.0)
    torch.testing.assert_close(Y.float(), exact[0], atol=0.05, rtol=0.02)
    assert (exact[2] == I).float().mean() > 0.99


# In one launch, and in four: up to k = 10, a launch has 264 blocks of 256 queries.
SIZES = [4, 64]


@pytest.mark.parametrize("B", SIZES)
def test_captured_in_a_graph(B: int, device: torch.device) -> None:
    tensors = tokens(device, torch.bfloat16, B, 4096, 64)
    convnn_kernels.warmup(*tensors[:3], 9, tensors[3], tensors[4])
    expected = ops.forward(*tensors[:3], 9, *tensors[3:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.forward(*tensors[:3], 9, *tensors[3:])
    for X in results:
        X.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


def test_several_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each batch element, some rows agree with those of float32."""
    Q, K, V, W, b = tokens(device, torch.bfloat16, SIZES[-1], 4096, 64)
    convnn_kernels.warmup(Q, K, V, 9, W, b)
    with monkeypatch.context() as patch:
        patch.setattr(selection, "_run", lambda *call: pytest.fail("this is left to Python"))
        Y, s, I = ops.forward(Q, K, V, 9, W, b)
    rows = torch.tensor([*range(0, 4096, 37), 4095], device=device)
    Q = Q[:, rows]
    exact = ops.forward(*(X.float() for X in (Q, K, V)), 9, W.float(), b.float())
    torch.testing.assert_close(s[:, rows], exact[1], atol=2e-5, rtol=0.0)
    torch.testing.assert_close(Y[:, rows].float(), exact[0], atol=0.05, rtol=0.02)
    assert (exact[2] == I[:, rows]).float().mean() > 0.99


@pytest.mark.parametrize("dtype", gradients.DTYPES, ids=str)
def test_gradients_pass_their_check(dtype: torch.dtype, device: torch.device) -> None:
    assert gradients.faults(device, dtype) == []


@pytest.mark.parametrize("dtype", gradients.DTYPES, ids=str)
def test_gradients_by_default(
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The backward takes the kernels in C++, and agrees with that of float32."""
    tensors = tokens(device, dtype, 4, 4096, 64)
    monkeypatch.setattr(selection, "_chosen", {})
    monkeypatch.setattr(selection, "_checked", {})
    leaves = [X.requires_grad_() for X in tensors]
    Y, s, I = ops.forward(*leaves[:3], 9, *leaves[3:])
    grad = torch.randn(Y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with caplog.at_level(logging.INFO, "convnn_kernels"):
        found = torch.autograd.grad(Y, leaves, grad)
    assert "forward_backward runs on cuda: predicted to be faster than triton" in caplog.text
    Q, K, V, W = (X.detach().float() for X in leaves[:4])
    needs = [True] * 5
    exact = ops.forward_backward(
        grad.float(), None, Q, K, V, W, s, I, True, "cosine", "softmax", 1.0, *needs
    )
    for X, E in zip(found, exact, strict=True):
        atol = float(E.abs().mean()) * 0.02
        torch.testing.assert_close(X.float(), E, atol=atol, rtol=0.02)
