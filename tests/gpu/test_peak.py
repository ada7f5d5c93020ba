# SPDX-License-Identifier: MIT
"""Peak memory on the GPU: of a forward what its tensors take, and of all an upper bound."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from allocations import Live

ops = torch.ops.convnn
pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.cuda_only]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WORKSPACE = 2**26


@dataclass(frozen=True)
class Shape:
    B: int
    N: int
    M: int
    C: int
    k: int
    dtype: torch.dtype
    weight: str = "depthwise"

    def inputs(self, device: torch.device) -> list[torch.Tensor]:
        B, N, M, C, k = self.B, self.N, self.M, self.C, self.k
        weight = (C, 1, k) if self.weight == "depthwise" else (C, C, k)
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(s, generator=generator, device=device).to(self.dtype).requires_grad_()
            for s in ((B, N, C), (B, M, C), (B, M, C), weight)
        ]


SHAPES = [
    Shape(256, 197, 197, 192, 9, BF16),
    Shape(256, 197, 197, 192, 9, F32),
    Shape(64, 4096, 4096, 64, 9, BF16),
    Shape(64, 4096, 4096, 64, 9, F16),
    Shape(8, 16384, 16384, 128, 9, BF16),
    Shape(8, 16384, 16384, 64, 9, F32),
    Shape(1, 65536, 65536, 64, 9, BF16),
    Shape(1, 16384, 100_000, 128, 64, BF16),
    Shape(128, 1024, 1024, 64, 9, BF16, "dense"),
    Shape(4, 4096, 4096, 64, 300, F32),
]


def cuda_forward_bytes(shape: Shape) -> int:
    """One forward of the CUDA backend above its inputs: similarities and indices, and then either
    the output or the memory of the selection: scaled rows of query and key, a power of two and an
    inverse norm of each, and its workspace.
    """
    B, N, M, C, k = shape.B, shape.N, shape.M, shape.C, shape.k
    size = shape.dtype.itemsize
    scaled = 0 if shape.dtype == F16 else size * C
    work = B * (N + M) * (scaled + 8)
    group = 8 if M < 4096 else 16 if M < 16384 else 32 if M < 2**18 else 64
    if k <= 256 and max(256, 2 * k * group) < M:
        of_block = 4 * 64 * (-(-M // group) + k)
        work += of_block * max(1, min(B * -(-N // 64), WORKSPACE // of_block))
    # rho of each neighbor, and a dense weight in the order of the kernel.
    output = B * N * (C * size + 4 * k)
    if shape.weight == "dense":
        output += C * C * k * size
    return B * N * k * 12 + max(work, output)


def triton_forward_bytes(arguments: tuple[torch.Tensor, ...], k: int) -> int:
    """One forward of the Triton backend above its inputs: the tensors that it makes."""
    from convnn_kernels.triton import backend

    forward = backend.operators()["convnn::forward"]
    options = (None, None, None, None, "cosine", "softmax", 1.0, "similarity")
    with Live() as live:
        forward(*arguments[:3], k, arguments[3], *options)
    return live.peak


def rise(run: Callable[[], object]) -> int:
    """The peak of allocated memory above what was allocated before."""
    run()  # libraries allocate their workspaces
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(
    shape: Shape,
    backend: str,
    device: torch.device,
    record_property: Callable[[str, object], None],
) -> None:
    tensors = [X.detach() for X in shape.inputs(device)]
    measured = rise(lambda: ops.forward(*tensors[:3], shape.k, tensors[3]))
    expected = (
        triton_forward_bytes(tuple(tensors), shape.k)
        if backend == "triton"
        else cuda_forward_bytes(shape)
    )
    record_property("forward bytes", measured)
    assert measured == pytest.approx(expected, rel=0.02), f"{measured / expected:.3f} of it"
    B, N, M, C, k = shape.B, shape.N, shape.M, shape.C, shape.k
    results = B * N * (12 * k + C * shape.dtype.itemsize)
    bound = results + 8 * B * (N * k + N * C + M * 2 * C) + WORKSPACE
    assert measured <= bound, f"{measured / bound:.3f} of the bound"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(
    shape: Shape,
    device: torch.device,
    record_property: Callable[[str, object], None],
) -> None:
    """The contract's bound: 8 bytes for each of N k + N D + M (D + C) elements of a batch element,
    outputs, gradients and a fixed workspace."""
    tensors = shape.inputs(device)

    def run() -> object:
        Y, s, I = ops.forward(*tensors[:3], shape.k, tensors[3])
        grads = torch.autograd.grad([Y, s], tensors, [torch.ones_like(Y), torch.ones_like(s)])
        return Y, s, I, grads

    measured = rise(run)
    B, N, M, C, k = shape.B, shape.N, shape.M, shape.C, shape.k
    results = B * N * (12 * k + C * shape.dtype.itemsize)
    given = sum(X.numel() * X.element_size() for X in tensors)
    # Gradients are as large as the inputs; grad_output is as large as the output.
    bound = 2 * results + given + 8 * B * (N * k + N * C + M * 2 * C) + 2 * WORKSPACE
    record_property("backward bytes", measured)
    assert measured <= bound, f"{measured / bound:.3f} of the bound"
