# SPDX-License-Identifier: MIT
"""The least work of a call: its flops, and the bytes that must cross the memory bus once.

ConvNN is counted with the whole similarity matrix, which an exact search computes, and the
aggregation; its backward pass gathers k rows instead. Attention is counted by its definition:
2 products forward and 5 backward, one of which is recomputed. Bytes are those of inputs, outputs
and gradients.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from .environment import RESULTS
from .peers import Peer, ranges
from .peers.rates import COPY_BYTES, SIDE
from .workloads import Workload


def flops(name: str, peer: Peer, workload: Workload, passes: str) -> float | None:
    """None for a model."""
    w, backward = workload, passes == "forward+backward"
    pairs = w.batch * w.tokens * w.rows
    if peer.computes == "model":
        return None
    if peer.computes == "rate":
        return 2.0 * SIDE**3
    if peer.computes == "copy":
        return 0.0
    if peer.computes == "product":
        return 2.0 * pairs * w.channels
    if peer.computes == "attention":
        return 2.0 * pairs * w.channels * (7 if backward else 2)
    outputs = w.outputs or w.channels
    if peer.computes == "convolution":
        return 2.0 * w.batch * w.tokens * 9 * w.channels * outputs * (3 if backward else 1)
    restricted = min(w.candidates, w.rows) if ("random" in name or "spatial" in name) else w.rows
    searched = ranges.pairs(name, w.tokens) or w.tokens * restricted
    search = 2.0 * w.batch * searched * w.channels
    # Products with the k rows of key, for the gradients of query and key.
    search_backward = 4.0 * w.batch * w.tokens * w.k * w.channels
    weights = outputs if "dense" in name else 2
    gather = 2.0 * w.batch * w.tokens * w.k * w.channels * weights
    if peer.computes == "select":
        return search
    if peer.computes == "aggregate":
        return gather * (3 if backward else 1)
    return search + gather + (search_backward + 2 * gather if backward else 0.0)


def moved_bytes(name: str, peer: Peer, workload: Workload, passes: str) -> float | None:
    w, backward = workload, passes == "forward+backward"
    element = w.torch_dtype.itemsize
    if peer.computes == "model":
        return None
    if peer.computes == "rate":
        return 3.0 * element * SIDE**2
    if peer.computes == "copy":
        return 2.0 * COPY_BYTES
    queries, keys = w.batch * w.tokens * w.channels, w.batch * w.rows * w.channels
    outputs = w.batch * w.tokens * (w.outputs or w.channels)
    neighbors = w.batch * w.tokens * w.k * (4 + 8)
    if peer.computes == "product":
        return float(element * (queries + keys) + 4 * w.batch * w.tokens * w.rows)
    if peer.computes == "select":
        return float(element * (queries + keys) + neighbors)
    if peer.computes == "convolution":
        return float(element * (keys + outputs) * (2 if backward else 1))
    if peer.computes == "aggregate":
        return float((element * (keys + outputs) + neighbors) * (2 if backward else 1))
    found = 0 if peer.computes == "attention" else neighbors
    return float((element * (queries + 2 * keys + outputs) + found) * (2 if backward else 1))


# bfloat16 flops and copied bytes per second that others measured on an H200.
_H200_FLOPS, _H200_BYTES = 790e12, 4.3e12


def kernel_microseconds(kernel: str, workload: Workload) -> float | None:
    """The least time of one of our kernels on an H200, by its products or its gathered bytes."""
    w = workload
    gathered = w.batch * w.tokens * w.k * w.channels
    if kernel == "sweep_kernel":
        pairs = w.batch * w.tokens * w.rows
        return round(2e6 * pairs * w.channels / _H200_FLOPS, 2)
    if "dense" in kernel:
        return round(2e6 * gathered * (w.outputs or w.channels) / _H200_FLOPS, 2)
    if kernel in ("query_side_kernel", "key_side_kernel"):
        gathered *= 2
    if "depthwise" in kernel or kernel in ("query_side_kernel", "key_side_kernel"):
        return round(1e6 * w.torch_dtype.itemsize * gathered / _H200_BYTES, 2)
    return None


@functools.cache
def _predictions() -> dict[str, Any]:
    return json.loads((RESULTS / "predicted.json").read_text())


def _size(w: Workload) -> tuple[object, ...]:
    return w.batch, w.tokens, w.rows, w.channels, w.outputs, w.k, w.dtype


def predicted_microseconds(
    kernel: str, workload: Workload, passes: str, backend: str
) -> float | None:
    """All launches of a kernel in a pass at the full rates, counted from machine code.

    From results/predicted.json, which `python -m tools.predict` writes for some workloads.
    """
    for row in _predictions()["rows"] if backend == "triton" else ():
        if row["pass"] == passes and _size(Workload(**row["workload"])) == _size(workload):
            for each in row["kernels"]:
                if each["kernel"] == kernel:
                    return float(each["least"])
    return None
