# SPDX-License-Identifier: MIT
"""Attention: dense, with each kernel that PyTorch offers, local, and over the k nearest."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..workloads import Inputs, Workload
from .base import PASSES, TRAINING, Call, Peer, Unavailable, whole_matrices

# How far local attention reaches to either side.
WINDOW = 128
# Rows and columns of natten's neighborhood.
NEIGHBORHOOD = 3


def _heads(tensor: Tensor) -> Tensor:
    """[B, 1, N, D]: a leaf of its own, so that no call pays for a change of shape."""
    return tensor.detach().unsqueeze(1).requires_grad_(tensor.requires_grad)


def _call(attend: Callable[[Tensor, Tensor, Tensor], Any], inputs: Inputs) -> Call:
    query, key, value = (_heads(each) for each in (inputs.query, inputs.key, inputs.value))

    def forward() -> tuple[Tensor, ...]:
        results = attend(query, key, value)
        return results if isinstance(results, tuple) else (results,)

    leaves = {"query": query, "key": key, "value": value}
    return Call(forward, leaves, inputs.grad_output.unsqueeze(1))


def _sdpa(workload: Workload, inputs: Inputs) -> Call:
    return _call(F.scaled_dot_product_attention, inputs)


def _sdpa_kernel(backend: SDPBackend) -> Callable[[Workload, Inputs], Call]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    def build(workload: Workload, inputs: Inputs) -> Call:
        call = _call(attend, inputs)
        on_cpu = inputs.query.device.type == "cpu"
        if on_cpu and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            raise Unavailable("PyTorch has no such kernel for the CPU")
        try:
            call.forward()
        except RuntimeError as error:
            if not re.search("no (available kernel|viable backend)", str(error), re.IGNORECASE):
                raise
            raise Unavailable("PyTorch does not offer this kernel for the call") from error
        return call

    return build


def knn_attention(query: Tensor, key: Tensor, value: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """KVT (Wang et al., 2022): the whole matrix, of which all but the k largest are masked.

    The output and the keys of each query.
    """
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    values, indices = torch.topk(logits, k, dim=-1)
    masked = torch.full_like(logits, -math.inf).scatter(-1, indices, values)
    return torch.softmax(masked, dim=-1) @ value, indices


def _kvt(workload: Workload, inputs: Inputs) -> Call:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return knn_attention(query, key, value, workload.k)

    return _call(attend, inputs)


def _local(workload: Workload, inputs: Inputs) -> Call:
    from ..models.peers import LocalAttention

    if workload.keys is not None:
        raise Unavailable("a local window needs tokens that are their own keys")
    # Its projections are not used.
    attend = LocalAttention(1, WINDOW).attend
    query, key, value = inputs.query, inputs.key, inputs.value

    def forward() -> tuple[Tensor, ...]:
        return (attend(query, key, value),)

    return Call(forward, {"query": query, "key": key, "value": value}, inputs.grad_output)


def neighborhood(side: int, device: torch.device) -> Tensor:
    """[N, N]: the pairs of a 3x3 neighborhood that is moved inwards at the border of the map."""
    places = torch.arange(side, device=device)
    first = (places - NEIGHBORHOOD // 2).clamp(0, side - NEIGHBORHOOD)
    near = (places >= first[:, None]) & (places < first[:, None] + NEIGHBORHOOD)
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(side**2, side**2)


def _natten(workload: Workload, inputs: Inputs) -> Call:
    try:
        from natten.functional import na2d
    except ImportError as error:
        raise Unavailable(f"natten is not installed (pip install natten): {error}") from error
    side = workload.side
    if side is None or side < NEIGHBORHOOD or workload.keys is not None:
        raise Unavailable("a neighborhood needs a map of tokens")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # [B, H, W, heads, D]
        maps = (each.transpose(1, 2).unflatten(1, (side, side)) for each in (query, key, value))
        return na2d(*maps, kernel_size=NEIGHBORHOOD).flatten(1, 2).transpose(1, 2)

    call = _call(attend, inputs)
    try:
        call.forward()
    except Exception as error:
        raise Unavailable(f"did not run: {type(error).__name__}: {error}") from error
    return call


def _near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= WINDOW


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation for a shape; sizes that vary would make the kernel slower.
    return torch.compile(flex_attention, dynamic=False)


def _flex_local(workload: Workload, inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    if workload.keys is not None:
        raise Unavailable("a local window needs tokens that are their own keys")
    device = inputs.query.device.type
    if device == "cpu" and inputs.query.requires_grad:
        raise Unavailable("FlexAttention has no backward pass on the CPU")
    tokens = workload.tokens
    mask = create_block_mask(_near, None, None, tokens, tokens, device=device)
    return _call(lambda q, k, v: _flex()(q, k, v, block_mask=mask), inputs)


def _kernel_peers() -> dict[str, Peer]:
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "math": SDPBackend.MATH,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    return {
        f"sdpa-{name}": Peer(
            f"SDPA, {name} kernel",
            "attention",
            _sdpa_kernel(backend),
            TRAINING,
            family="sdpa",
            bytes_needed=whole_matrices(2, 4) if name == "math" else lambda w, b: 0.0,
        )
        for name, backend in kernels.items()
    }


PEERS = {
    "sdpa": Peer("SDPA", "attention", _sdpa, PASSES, family="sdpa"),
    **_kernel_peers(),
    "flex-local": Peer(
        f"FlexAttention, {WINDOW} to either side", "local attention", _flex_local, TRAINING
    ),
    "local": Peer(f"local attention, {WINDOW} to either side", "local attention", _local, TRAINING),
    "natten": Peer(
        f"natten, {NEIGHBORHOOD}×{NEIGHBORHOOD}", "neighborhood attention", _natten, TRAINING
    ),
    "kvt": Peer(
        "KVT (k-NN attention)",
        "k-NN attention",
        _kvt,
        TRAINING,
        bytes_needed=whole_matrices(4, 6),
    ),
}
