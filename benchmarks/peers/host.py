# SPDX-License-Identifier: MIT
"""Host time of a call on a GPU, and the time of the same call as a replay of a CUDA graph.

The other peers are timed by the GPU. Here the call is so small that the GPU waits for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..workloads import Inputs, Workload
from . import attention, convnn
from .base import TRAINING, Call, Peer, Unavailable, gradient_mode, run_pass

# Calls in a sample. Even with backward passes these are fewer launches than the driver queues
# before it blocks the host.
_CALLS = 20


def _forced(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with that backend forced. Entering the block is not part of the measured time."""
    import convnn_kernels

    def in_block() -> Any:
        with convnn_kernels.backend(name):
            return run()

    return run if name == "sdpa" else in_block


# Prepares an operation; the result returns its seconds, averaged over several calls.
_Make = Callable[[Callable[[], Any]], Callable[[], float]]


def _build(name: str, make: _Make) -> Callable[[Workload, Inputs], Call]:
    def build(workload: Workload, inputs: Inputs) -> Call:
        if inputs.query.device.type != "cuda":
            raise Unavailable("needs a GPU")
        peer = attention.PEERS["sdpa"] if name == "sdpa" else convnn.PEERS["convnn-all"]
        call = peer.build(workload, inputs)
        passes = "forward+backward" if inputs.query.requires_grad else "forward"
        forward = _forced(name, call.forward)
        try:
            with gradient_mode(passes):
                seconds = _forced(name, lambda: make(partial(run_pass, call, passes)))()
        except RuntimeError as error:
            raise Unavailable(str(error)) from error

        def sample() -> float:
            with gradient_mode(passes):
                return _forced(name, seconds)()

        return replace(call, forward=forward, sample=sample)

    return build


def _host(operation: Callable[[], Any]) -> Callable[[], float]:
    operation()

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            operation()
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return taken / _CALLS

    return seconds


def _graph(operation: Callable[[], Any]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            operation()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operation()
    graph.replay()

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / _CALLS

    return seconds


PEERS = {
    f"{kind}-{name}": Peer(
        f"{label} of {'SDPA' if name == 'sdpa' else f'ConvNN, {name}'}",
        "attention" if name == "sdpa" else "convnn",
        _build(name, make),
        TRAINING if kind == "host" else TRAINING[:1],
        exacting=name != "sdpa",
    )
    for kind, label, make in (
        ("host", "host time of a call", _host),
        ("graph", "graph replay", _graph),
    )
    for name in ("sdpa", "cuda", "triton")
}
