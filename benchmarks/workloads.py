# SPDX-License-Identifier: MIT
"""What is measured: tokens of real photographs, and random features of the same shapes.

**Embedding of a photograph.** The photograph is cropped to its central square, resized to H x W
pixels (bilinear, anti-aliased), and each color channel is shifted and scaled to mean 0 and
variance 1 over the pixels. The token of a pixel is its w x w RGB neighborhood (edge pixels repeated
outwards), flattened to 3 w^2 numbers and projected to C channels by a random matrix with
orthonormal columns (seed 0, the same for all photographs). w is the smallest odd number with
3 w^2 >= C: 5 for C = 64, 9 for C = 192. So N = H W, row-major.

Query, key and value hold the same tokens, as in the paper's convolutional setting, where the
projections are the identity. They are three tensors, so that a backward pass computes three
gradients, as it would with learned projections. With one head, cosine similarity, softmax and a
depthwise weight this is Algorithm 1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# RGB pictures that are inside scikit-image's wheel: loading them needs no network.
# A batch of B takes the first B of them, and starts again after the last.
PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "stereo_motorcycle",
    "retina",
    "immunohistochemistry",
    "hubble_deep_field",
)

# (B, N, C, k) that the project is held to, and the points for scaling in N.
REQUIRED = ((8, 1024, 64, 9), (1, 4096, 64, 9))
SCALING = ((1, 256, 64, 9), (1, 1024, 64, 9), (1, 16384, 64, 9))

SOURCES = ("photographs", "random")


@dataclass(frozen=True, order=True)
class Workload:
    """One shape and where its tokens come from: B x N tokens of C channels, k neighbors."""

    batch: int
    tokens: int
    channels: int
    k: int
    source: str = "photographs"

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "channels", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens must be a square (a map of H x H), got {self.tokens}")
        if self.k > self.tokens:
            raise ValueError(f"k must be at most tokens ({self.tokens}), got {self.k}")
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")

    @property
    def side(self) -> int:
        """H = W of the map."""
        return math.isqrt(self.tokens)

    @property
    def shape(self) -> str:
        return f"({self.batch}, {self.tokens}, {self.channels}, {self.k})"

    def __str__(self) -> str:
        return f"{self.shape} {self.source}"


@dataclass(frozen=True)
class Inputs:
    """What every peer computes from. Tensors require gradients where a backward pass needs them.

    query, key, value: [B, N, C] float32; weight: [C, 1, k]; conv_weight: [C, C, 3, 3];
    grad_output: [B, N, C].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    conv_weight: Tensor
    grad_output: Tensor

    @property
    def side(self) -> int:
        return math.isqrt(self.query.shape[1])


@functools.cache
def photograph(name: str) -> np.ndarray:
    """The central square of a scikit-image photograph, [S, S, 3] uint8."""
    import skimage.data

    image = getattr(skimage.data, name)()
    if isinstance(image, tuple):  # a stereo pair with its disparity: the left view
        image = image[0]
    height, width = image.shape[:2]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size, :3]


@functools.cache
def _projection(rows: int, columns: int) -> Tensor:
    """Orthonormal columns, float64."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(gaussian).Q


@functools.cache
def photograph_tokens(name: str, side: int, channels: int) -> Tensor:
    """Tokens [side * side, channels] float32 of one photograph; the embedding is stated above."""
    pixels = torch.from_numpy(photograph(name) / 255.0).permute(2, 0, 1)
    size = (side, side)
    pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    std, mean = torch.std_mean(pixels, dim=(1, 2), keepdim=True)
    pixels = (pixels - mean) / std

    window = next(w for w in range(1, channels + 2, 2) if 3 * w * w >= channels)
    padded = F.pad(pixels[None], [window // 2] * 4, mode="replicate")
    neighborhoods = F.unfold(padded, window)[0].T
    return (neighborhoods @ _projection(3 * window * window, channels)).float()


def _features(workload: Workload) -> Tensor:
    if workload.source == "random":
        generator = torch.Generator().manual_seed(1)
        shape = (workload.batch, workload.tokens, workload.channels)
        return torch.randn(shape, generator=generator)
    names = [PHOTOGRAPHS[i % len(PHOTOGRAPHS)] for i in range(workload.batch)]
    return torch.stack(
        [photograph_tokens(name, workload.side, workload.channels) for name in names]
    )


def make_inputs(workload: Workload, device: str = "cpu", requires_grad: bool = False) -> Inputs:
    """The same numbers for the same workload, whatever the device."""
    features = _features(workload)
    channels, k = workload.channels, workload.k
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(std)

    def place(tensor: Tensor, differentiable: bool = True) -> Tensor:
        # Always a copy: query, key and value must not share storage.
        return tensor.to(device, copy=True).requires_grad_(requires_grad and differentiable)

    return Inputs(
        query=place(features),
        key=place(features),
        value=place(features),
        weight=place(normal(channels, 1, k, std=k**-0.5)),
        conv_weight=place(normal(channels, channels, 3, 3, std=(9 * channels) ** -0.5)),
        grad_output=place(normal(*features.shape), differentiable=False),
    )


def random_candidates(tokens: int, count: int) -> Tensor:
    """`count` rows drawn without replacement with a fixed seed, or all of them if fewer exist."""
    generator = torch.Generator().manual_seed(3)
    return torch.randperm(tokens, generator=generator)[:count]


def spatial_candidates(side: int, count: int) -> Tensor:
    """The rows of an evenly spaced sqrt(count) x sqrt(count) grid of a side x side map."""
    per_axis = min(math.isqrt(count), side)
    # The middle of each of per_axis equal parts, so that the grid lies centered on the map.
    axis = ((torch.arange(per_axis, dtype=torch.float64) + 0.5) * side / per_axis).long()
    return (axis[:, None] * side + axis[None, :]).reshape(-1)


def default_workloads(quick: bool = False) -> list[Workload]:
    """The required shapes from both sources, then scaling in N on a photograph."""
    if quick:
        return [Workload(1, tokens, 64, 9) for tokens in (256, 1024)]
    workloads = [Workload(*shape, source) for source in SOURCES for shape in REQUIRED]
    return workloads + [Workload(*shape) for shape in SCALING]
