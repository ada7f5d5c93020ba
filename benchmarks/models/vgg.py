# SPDX-License-Identifier: MIT
"""VGG (Simonyan and Zisserman, 2015) with convolutions, ConvNN or both; VGG-11 as in the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from convnn_kernels.functional import Rho
from convnn_kernels.nn import Candidates, ConvNN2d, HybridBranch2d
from convnn_kernels.nn.candidates import require_maker
from convnn_kernels.nn.settings import CoordinateOrder, PositionalEncoding

LAYERS = ("conv2d", "convnn", "hybrid")

# Output channels of the layers; "pool" halves height and width.
CHANNELS = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


def channels_of(repeats: Sequence[int]) -> tuple[int | str, ...]:
    """The channels of a VGG with so many layers before each of its five pooling layers."""
    channels: list[int | str] = []
    for width, n in zip((64, 128, 256, 512, 512), repeats, strict=True):
        channels += [*[width] * n, "pool"]
    return tuple(channels)


# By the number of layers with weights; three of them are the classifier's.
CONFIGURATIONS: dict[int, tuple[int | str, ...]] = {
    11: CHANNELS,
    13: channels_of((2, 2, 2, 2, 2)),
    16: channels_of((2, 2, 3, 3, 3)),
    19: channels_of((2, 2, 4, 4, 4)),
}


class VGG(nn.Module):
    """[B, 3, H, W] → [B, num_classes]. For 32×32 images the last layers see 2×2 maps."""

    def __init__(
        self,
        num_classes: int,
        make_layer: Callable[[int, int], nn.Module],
        channels: Sequence[int | str],
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        inputs = 3
        for outputs in channels:
            if isinstance(outputs, str):
                features.append(nn.MaxPool2d(2))
                continue
            features += [make_layer(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs * 49, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


def vgg11(
    num_classes: int,
    layer: str = "hybrid",
    branch_ratio: float = 0.5,
    k: int = 9,
    *,
    kernel_size: int | None = None,
    positional_encoding: PositionalEncoding = None,
    standardize: bool = False,
    coordinate_order: CoordinateOrder = "yx",
    candidates: Callable[[], Candidates] | None = None,
    rho: Rho = "ones",
    channels: Sequence[int | str] = CHANNELS,
    hidden: int = 4096,
    dropout: float = 0.5,
) -> VGG:
    """VGG-11 as in the paper's section 6.1.

    Args:
        num_classes: classes.
        layer: "conv2d": convolutions; "convnn": ConvNN2d alone, without fusion; "hybrid":
            HybridBranch2d. The paper's ConvNN row is λ = 1 of the latter.
        branch_ratio: the paper's λ.
        k: neighbors. The smallest maps have fewer tokens than that; the padding of a √k kernel, 1
            for k = 9, adds keys.
        kernel_size: of the convolutions; √k if None.
        positional_encoding: None, or "similarity" for the second half of the paper's Table 1, whose
            parameter count implies that coordinates are not aggregated.
        standardize: whether features are divided by their standard deviation before coordinates
            are concatenated.
        coordinate_order: of the concatenated coordinates.
        candidates: returns the candidates of one layer; all tokens if None.
        rho: how neighbors are modulated.
        channels: output channels of the layers, and "pool" for a pooling layer; those of other VGGs
            are in CONFIGURATIONS.
        hidden: width of the classifier.
        dropout: of the classifier.

    Raises:
        ValueError: if layer is unknown, if k is no square and kernel_size is not given, or if
            candidates is not a function.
    """
    if layer not in LAYERS:
        raise ValueError(f"vgg11: layer must be one of {LAYERS}, got {layer!r}")
    require_maker("vgg11", candidates)
    size = math.isqrt(k) if kernel_size is None else kernel_size
    if kernel_size is None and size**2 != k:
        raise ValueError(f"vgg11: k must be a square number unless kernel_size is given, got {k}")
    # Even kernels have no symmetric padding. At least 1 is needed to have k keys on small maps.
    padding = max(size // 2, 1) if k > 1 else 0

    def make_layer(inputs: int, outputs: int) -> nn.Module:
        if layer == "conv2d":
            return nn.Conv2d(inputs, outputs, size, padding="same")
        settings: dict[str, Any] = {
            "k": k,
            "padding": padding,
            "rho": rho,
            "positional_encoding": positional_encoding,
            "standardize": standardize,
            "coordinate_order": coordinate_order,
            "candidates": None if candidates is None else candidates(),
        }
        if layer == "convnn":
            return ConvNN2d(inputs, outputs, projections="identity", **settings)
        return HybridBranch2d(inputs, outputs, size, branch_ratio, **settings)

    return VGG(num_classes, make_layer, channels, hidden, dropout)
