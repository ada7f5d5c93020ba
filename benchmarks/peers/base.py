# SPDX-License-Identifier: MIT
"""What a peer is, what it is called on, and how a pass of it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..workloads import Inputs, Workload

# The first runs under torch.no_grad, the last under torch.inference_mode.
PASSES = ("forward", "forward+backward", "inference")
TRAINING = PASSES[:2]


class Unavailable(RuntimeError):
    """A peer cannot run here; the message says why."""


def require_fast_product(tensor: Tensor) -> None:
    """Raises Unavailable where PyTorch would multiply one number after the other.

    On a processor without instructions for the dtype that takes a minute for matrices of 2048 rows.
    """
    if tensor.device.type != "cpu" or tensor.dtype.itemsize != 2:
        return
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[tensor.dtype]
    if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise Unavailable(f"PyTorch has no fast matrix product in {dtype} on this processor")


@dataclass(frozen=True)
class Call:
    """A peer made ready for one workload.

    forward: takes no arguments; the tensors it returns start with the output.
    leaves: the tensors that a backward pass differentiates, by name.
    grad_output: has the layout of the output.
    candidates: the rows of key that may be neighbors besides the token itself; None for all.
    key_range: the rows of key that each query may see [N, 2]; None for all.
    indices: the neighbors [B, N, k], where they are an input.
    sample: returns the seconds of one pass; only for calls that are timed in a special way.
    exact: returns the output in float64, where there is no reference for it.
    metric, scale: of the search and of the softmax.
    block: passes run in such a block; entering it is not timed.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    grad_output: Tensor | None = None
    candidates: Tensor | None = None
    key_range: Tensor | None = None
    indices: Tensor | None = None
    sample: Callable[[], float] | None = None
    exact: Callable[[], Tensor] | None = None
    metric: str = "cosine"
    scale: float = 1.0
    block: Callable[[], AbstractContextManager[object]] = nullcontext


Build = Callable[[Workload, Inputs], Call]


@dataclass(frozen=True)
class Peer:
    """An implementation that is measured.

    computes: what its result is checked against; result_check.py and bounds.py list the names.
    passes: the passes that it supports.
    baseline: the peer that computes the same in plain PyTorch; for a model, the original one.
    exacting: it must keep the operator's contract: ties in index order, errors no larger than twice
        those of eager PyTorch. The others only have to compute what their name says.
    matrices: how many N x M matrices it holds at once in a forward and in a backward pass. Those
        that would exhaust the memory of the machine are left out.
    """

    label: str
    computes: str
    build: Build
    passes: tuple[str, ...] = PASSES
    baseline: str | None = None
    exacting: bool = False
    matrices: tuple[int, int] = (0, 0)

    def bytes_needed(self, workload: Workload, backward: bool) -> float:
        pairs = workload.batch * workload.tokens * workload.rows
        return workload.torch_dtype.itemsize * self.matrices[backward] * pairs


def gradient_mode(passes: str) -> AbstractContextManager[object]:
    if passes == "inference":
        return torch.inference_mode()
    return torch.no_grad() if passes == "forward" else torch.enable_grad()


@contextmanager
def around(call: Call, passes: str) -> Iterator[None]:
    """What a pass runs in."""
    with call.block(), gradient_mode(passes):
        yield


def run_pass(call: Call, passes: str) -> tuple[Tensor, ...]:
    """Runs one pass, within `around`; gradients follow the output in a backward pass."""
    if passes != "forward+backward":
        return call.forward()
    output = call.forward()[0]
    return output, *torch.autograd.grad(output, tuple(call.leaves.values()), call.grad_output)
