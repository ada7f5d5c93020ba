# SPDX-License-Identifier: MIT
"""The machine's rates of multiplying and copying, from which bounds are computed."""

from __future__ import annotations

import torch

from ..workloads import Inputs, Workload
from .base import Call, Peer, require_fast_product

# Rows and columns of the matrices: large enough for the full rate of torch.mm.
SIDE = 2048
# Larger than caches.
COPY_BYTES = 2**28


def _matmul(workload: Workload, inputs: Inputs) -> Call:
    require_fast_product(inputs.query)
    generator = torch.Generator().manual_seed(0)
    shape, device = (SIDE, SIDE), inputs.query.device
    a, b = (torch.randn(shape, generator=generator).to(device, inputs.query.dtype) for _ in "ab")
    out = torch.empty_like(a)

    def forward() -> tuple[torch.Tensor, ...]:
        return (torch.mm(a, b, out=out),)

    return Call(forward, {"a": a, "b": b})


def _copy(workload: Workload, inputs: Inputs) -> Call:
    source = torch.ones(COPY_BYTES // 4, device=inputs.query.device)
    target = torch.zeros_like(source)

    def forward() -> tuple[torch.Tensor, ...]:
        return (target.copy_(source),)

    return Call(forward, {"source": source})


PEERS = {
    "mm": Peer(f"torch.mm, {SIDE}×{SIDE}", "rate", _matmul, ("forward",)),
    "copy": Peer(f"copy of {COPY_BYTES // 2**20} MiB", "copy", _copy, ("forward",)),
}
