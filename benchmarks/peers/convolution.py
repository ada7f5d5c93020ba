# SPDX-License-Identifier: MIT
"""The convolution that a ConvNN layer stands in for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..workloads import Inputs, Workload
from .base import TRAINING, Call, Peer, Unavailable


def _convolution(workload: Workload, inputs: Inputs) -> Call:
    side = workload.side
    if side is None or workload.keys is not None:
        raise Unavailable("a convolution needs a map of tokens")

    def as_map(tokens: Tensor) -> Tensor:
        # [B, H W, C] tokens, read as [B, C, H, W], are channels_last without a copy.
        return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)

    needs_gradient = inputs.value.requires_grad
    image = as_map(inputs.value.detach()).requires_grad_(needs_gradient)
    weight = inputs.conv_weight.detach().contiguous(memory_format=torch.channels_last)
    weight.requires_grad_(needs_gradient)

    def forward() -> tuple[Tensor, ...]:
        return (F.conv2d(image, weight, padding=1),)

    return Call(forward, {"image": image, "weight": weight}, as_map(inputs.grad_dense))


PEERS = {"conv2d": Peer("Conv2d 3×3, channels_last", "convolution", _convolution, TRAINING)}
