# SPDX-License-Identifier: MIT
"""scaled_dot_product_attention, with the kernel that PyTorch chooses and with each one."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..workloads import Inputs, Workload
from .base import TRAINING, Build, Call, Peer, Unavailable, require_fast_product


def _call(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], workload: Workload, inputs: Inputs
) -> Call:
    def with_heads(tensor: Tensor) -> Tensor:
        """[B / heads, heads, N, D]: a leaf, so that a call does not have to change the shape."""
        split = tensor.detach().unflatten(0, (-1, workload.heads))
        return split.requires_grad_(tensor.requires_grad)

    query, key, value = (with_heads(each) for each in (inputs.query, inputs.key, inputs.value))

    def forward() -> tuple[Tensor, ...]:
        return (attend(query, key, value),)

    leaves = {"query": query, "key": key, "value": value}
    return Call(forward, leaves, with_heads(inputs.grad_output))


def _sdpa(workload: Workload, inputs: Inputs) -> Call:
    # Only its backward pass is slow then.
    if inputs.query.requires_grad:
        require_fast_product(inputs.query)
    return _call(F.scaled_dot_product_attention, workload, inputs)


def _sdpa_kernel(kernel: SDPBackend) -> Build:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(query, key, value)

    def build(workload: Workload, inputs: Inputs) -> Call:
        call = _call(attend, workload, inputs)
        on_cpu = inputs.query.device.type == "cpu"
        if on_cpu and kernel not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            raise Unavailable("PyTorch has no such kernel for the CPU")
        try:
            call.forward()
        except RuntimeError as error:
            if not re.search("no (available kernel|viable backend)", str(error), re.IGNORECASE):
                raise
            raise Unavailable("PyTorch does not offer this kernel for the call") from error
        return call

    return build


_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

PEERS = {
    "sdpa": Peer("SDPA", "attention", _sdpa),
    **{
        f"sdpa-{name}": Peer(
            f"SDPA, {name} kernel",
            "attention",
            _sdpa_kernel(kernel),
            TRAINING,
            matrices=(2, 4) if name == "math" else (0, 0),
        )
        for name, kernel in _KERNELS.items()
    },
}
