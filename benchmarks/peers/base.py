# SPDX-License-Identifier: MIT
"""What a peer is: who is measured, on what, and how its call is run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..workloads import Inputs, Workload

# The first runs under torch.no_grad, the last under torch.inference_mode.
PASSES = ("forward", "forward+backward", "inference")
TRAINING = PASSES[:2]


class Unavailable(RuntimeError):
    """A peer cannot run here; the message says why. It is then left out by name."""


@dataclass(frozen=True)
class Call:
    """A peer made ready for one workload.

    forward: no arguments; the tensors it returns begin with the output.
    leaves: what a backward pass differentiates, by name; grad_output has the layout of the output.
    candidates: the rows that may be neighbors, or None for all; the token itself is one then too.
    indices: the neighbors [B, N, k] that are given, where they are not searched for.
    sample: the seconds of one pass, averaged over so many, where they run in another process.
    exact: the output in float64, where nothing else defines it.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    grad_output: Tensor | None = None
    candidates: Tensor | None = None
    indices: Tensor | None = None
    sample: Callable[[int], float] | None = None
    exact: Callable[[], Tensor] | None = None


def nothing(workload: Workload, backward: bool) -> float:
    return 0.0


@dataclass(frozen=True)
class Peer:
    """`computes` names what the result is checked against; gate.py and bounds.py know the names.

    passes: those that it can run.
    baseline: the eager peer that computes the same, or, where none does, what it would replace.
    family: peers of a family do the same in different ways; the fastest of them is quoted.
    exacting: held to the operator's contract, ties by index and errors like those of eager PyTorch;
    the others only have to compute what their name says.
    bytes_needed: an estimate of the peak from the workload and whether gradients are needed, by
    which peers that would exhaust the machine are left out.
    """

    label: str
    computes: str
    build: Callable[[Workload, Inputs], Call]
    passes: tuple[str, ...] = PASSES
    baseline: str | None = None
    family: str | None = None
    exacting: bool = False
    bytes_needed: Callable[[Workload, bool], float] = nothing


def whole_matrices(in_forward: int, in_backward: int) -> Callable[[Workload, bool], float]:
    """The estimate for peers that hold so many N x M matrices at a time."""

    def bytes_needed(workload: Workload, backward: bool) -> float:
        matrices = in_backward if backward else in_forward
        element = workload.torch_dtype.itemsize
        return element * matrices * workload.batch * workload.tokens * workload.rows

    return bytes_needed


def gradient_mode(passes: str) -> AbstractContextManager[object]:
    if passes == "inference":
        return torch.inference_mode()
    return torch.no_grad() if passes == "forward" else torch.enable_grad()


def run_pass(call: Call, passes: str) -> tuple[Tensor, ...]:
    """One pass, within its `gradient_mode`; a backward pass has its gradients after the output."""
    if passes != "forward+backward":
        return call.forward()
    output = call.forward()[0]
    return output, *torch.autograd.grad(output, tuple(call.leaves.values()), call.grad_output)
