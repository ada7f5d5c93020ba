# SPDX-License-Identifier: MIT
"""The settings with which a ConvNN layer is a convolution: section 5.1."""

import math
from typing import Any

from torch import nn

from convnn_kernels.nn import settings


def as_convolution(owner: str, conv: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    """The arguments of the layer that equals `conv`."""
    _require_convolution(owner, conv)
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "k": math.prod(conv.kernel_size),
        "padding": conv.kernel_size[0] // 2,
        "stride": conv.stride[0],
        "projections": "coordinates",
        "rho": "ones",
        "metric": "euclidean",
        "order": "index",
        "aggregation": "dense" if conv.groups == 1 else "depthwise",
        "bias": conv.bias is not None,
        "positional_encoding": "similarity",
        "coordinates": "pixel",
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }


def _require_convolution(owner: str, conv: nn.Conv1d | nn.Conv2d) -> None:
    kind = nn.Conv1d if owner == "from_conv1d" else nn.Conv2d
    # Transposed convolutions have the same attributes, and subclasses may compute something else.
    if type(conv) is not kind:
        raise ValueError(
            f"{owner}: conv must be an nn.{kind.__name__} and not of a subclass, "
            f"got {type(conv).__name__}"
        )
    settings.require_dtype(owner, "conv.weight", conv.weight, *settings.FLOATING)
    dimensions, kernel, size = len(conv.kernel_size), conv.kernel_size, conv.kernel_size[0]
    if dimensions == 2:
        settings.require(
            kernel in ((1, 1), (3, 3), (5, 5)),
            owner,
            "kernel_size",
            "1x1, 3x3 or 5x5, because the taps of larger kernels are not the nearest tokens",
            kernel,
        )
    settings.require(size % 2 == 1, owner, "kernel_size", "odd", kernel)
    settings.require(
        all(each == conv.stride[0] for each in conv.stride),
        owner,
        "stride",
        "the same along both axes",
        conv.stride,
    )
    settings.require(
        all(each == 1 for each in conv.dilation), owner, "dilation", "1", conv.dilation
    )
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    settings.require(
        conv.groups == 1 or depthwise,
        owner,
        "groups",
        f"1, or {conv.in_channels} with the same number of output channels",
        conv.groups,
    )
    settings.require(
        conv.padding_mode == "zeros", owner, "padding_mode", "'zeros'", conv.padding_mode
    )
    settings.require(
        conv.padding in ("same", (size // 2,) * dimensions),
        owner,
        "padding",
        f"{size // 2}, half the kernel",
        conv.padding,
    )
