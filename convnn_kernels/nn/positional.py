# SPDX-License-Identifier: MIT
"""Coordinates of tokens (section 4.2.1), and which tokens of a padded map are not padding."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convnn_kernels.nn.settings import CoordinateOrder, Coordinates


def count(shape: Sequence[int], padding: int) -> int:
    """The number of tokens of a map of this shape, with padding on every side."""
    return math.prod([size + 2 * padding for size in shape])


def interior(shape: Sequence[int], padding: int, device: torch.device, stride: int = 1) -> Tensor:
    """The rows of the padded map's tokens that are not padding.

    Args:
        shape: the size of the unpadded map: (L,) or (H, W).
        padding: the number of tokens added on every side.
        device: device of the result.
        stride: takes every stride-th token along each axis, starting with the first.

    Returns:
        [N] int64, ascending.
    """
    rows = torch.arange(count(shape, padding), device=device)  # [M]
    rows = rows.view([size + 2 * padding for size in shape])
    for axis, size in enumerate(shape):
        rows = rows.narrow(axis, padding, size)
    return strided(rows, len(shape), stride).flatten()


def strided(maps: Tensor, dimensions: int, stride: int) -> Tensor:
    """[..., L] or [..., H, W]: every stride-th position along these axes, from the first on."""
    if stride == 1:
        return maps
    return maps[..., ::stride] if dimensions == 1 else maps[..., ::stride, ::stride]


def grid(
    shape: Sequence[int],
    padding: int,
    coordinates: Coordinates,
    dtype: torch.dtype,
    device: torch.device,
    order: CoordinateOrder = "yx",
) -> Tensor:
    """The coordinates of every token of the padded map.

    Args:
        shape: the size of the unpadded map: (L,) or (H, W).
        padding: the number of tokens added on every side.
        coordinates: "unit": each axis of the padded map goes from -1 to 1 (0 for a single token);
            "pixel": the position itself, starting at 0, with the same step along all axes.
        dtype: dtype of the result; coordinates are computed in float32, or in float64 for float64.
        device: device of the result.
        order: "yx": coordinates in the order of shape; "xy": reversed.

    Returns:
        [M, 1] or [M, 2]: the tokens row by row.
    """
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    axes = []
    for size in shape:
        length = size + 2 * padding
        steps = torch.arange(length, dtype=precise, device=device)
        if coordinates == "unit":
            # (2i - (n - 1)) / (n - 1) is exactly symmetric, and 0 for a single token.
            steps = (2.0 * steps - (length - 1)) / max(length - 1, 1)
        axes.append(steps)
    channels = [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]  # [M] each
    return torch.stack(channels if order == "yx" else channels[::-1], -1).to(dtype)
