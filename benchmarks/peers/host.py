# SPDX-License-Identifier: MIT
"""What the host takes for a call on a GPU, and what is left of it in the replay of a CUDA graph.

The others are timed by the GPU. Here the call is so small that the GPU waits for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..workloads import Inputs, Workload
from .base import Call, Peer, Unavailable
from .convnn import operators

# Calls in a sample: fewer than a stream takes before it makes the host wait.
_CALLS = 50


def _operation(name: str, workload: Workload, inputs: Inputs) -> Callable[[], Any]:
    query, key, value, k = inputs.query, inputs.key, inputs.value, workload.k
    if name == "sdpa":
        q, k_heads, v = (each.unsqueeze(1) for each in (query, key, value))
        return lambda: F.scaled_dot_product_attention(q, k_heads, v)
    forward = operators().forward
    return lambda: forward(query, key, value, k, inputs.weight)


def _forced(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with a backend forced, of which the block itself is not part of the time of a call."""
    import convnn_kernels

    def in_block() -> Any:
        with convnn_kernels.backend(name):
            return run()

    return run if name == "sdpa" else in_block


# Makes ready: what the operation returned, and the seconds of one, averaged over several.
_Ready = tuple[Any, Callable[[], float]]


def _build(
    name: str, make: Callable[[Callable[[], Any]], _Ready]
) -> Callable[[Workload, Inputs], Call]:
    def build(workload: Workload, inputs: Inputs) -> Call:
        if inputs.query.device.type != "cuda":
            raise Unavailable("needs a GPU")
        operation = _operation(name, workload, inputs)
        try:
            with torch.no_grad():
                result, seconds = _forced(name, lambda: make(operation))()
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
        leaves = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
        if name == "sdpa":
            leaves = {each: X.unsqueeze(1) for each, X in leaves.items()}
        else:
            leaves["weight"] = inputs.weight
        results = (result,) if name == "sdpa" else tuple(result)

        def sample(repeats: int) -> float:
            with torch.no_grad():
                return _forced(name, seconds)()

        return Call(lambda: results, leaves, sample=sample)

    return build


def _host(operation: Callable[[], Any]) -> _Ready:
    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            operation()
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return taken / _CALLS

    return operation(), seconds


def _graph(operation: Callable[[], Any]) -> _Ready:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            operation()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = operation()
    graph.replay()

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / _CALLS

    return result, seconds


PEERS = {
    f"{kind}-{name}": Peer(
        f"{label} of {'SDPA' if name == 'sdpa' else f'ConvNN, {name}'}",
        "attention" if name == "sdpa" else "convnn",
        _build(name, make),
        ("forward",),
        exacting=name != "sdpa",
    )
    for kind, label, make in (
        ("host", "time of the host for a call", _host),
        ("graph", "replay of a graph", _graph),
    )
    for name in ("sdpa", "cuda", "triton")
}
