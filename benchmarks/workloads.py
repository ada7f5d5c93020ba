# SPDX-License-Identifier: MIT
"""What is measured: tokens of real photographs, and random features of the same shapes.

**Embedding of a photograph.** The photograph is cropped to its central square, resized to H x W
pixels (bilinear, anti-aliased), and each color channel is shifted and scaled to mean 0 and
variance 1 over the pixels. The token of a pixel is its w x w RGB neighborhood (edge pixels repeated
outwards), flattened to 3 w^2 numbers and projected to C channels by a random matrix with
orthonormal columns (seed 0, the same for all photographs). w is the smallest odd number with
3 w^2 >= C: 5 for C = 64, 7 for C = 128, 9 for C = 192. So N = H W, row-major.

Query, key and value hold the same tokens, as in the paper's convolutional setting, where the
projections are the identity (in a search, key and value hold those of the next photograph). They
are three tensors, so that a backward pass computes three gradients, as it would with learned
projections. With one head, cosine similarity, softmax and a
depthwise weight this is Algorithm 1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

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

SOURCES = ("photographs", "random")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, order=True)
class Workload:
    """One shape and where its tokens come from.

    batch x tokens queries of `channels` numbers, k neighbors among `keys` rows (as many as tokens
    if None, and then the tokens themselves); `candidates` of them where a peer restricts its
    search; `outputs` channels of a dense weight (`channels` if None). Random features have any
    number of tokens, photographs H^2, or H^2 + 1: the last is then a class token, the mean of the
    others.
    """

    batch: int
    tokens: int
    channels: int
    k: int
    source: str = "photographs"
    keys: int | None = None
    candidates: int = 64
    outputs: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "channels", "k", "keys", "candidates", "outputs"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if self.k > self.rows:
            raise ValueError(f"k must be at most the rows of key ({self.rows}), got {self.k}")
        for name, known in (("source", SOURCES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.source == "photographs":
            for count in (self.tokens, self.rows):
                if count - math.isqrt(count) ** 2 not in (0, 1):
                    raise ValueError(
                        "tokens of photographs must be a square (a map of H x H) or one more "
                        f"(with a class token), got {count}"
                    )

    @property
    def rows(self) -> int:
        """M, the rows of key."""
        return self.tokens if self.keys is None else self.keys

    @property
    def side(self) -> int | None:
        """H = W of the map, None where the tokens are not one."""
        side = math.isqrt(self.tokens)
        return side if side**2 == self.tokens else None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> str:
        """(B, N, C, k), with the number of keys where it differs from N."""
        keys = "" if self.keys is None else f" of {self.keys}"
        return f"({self.batch}, {self.tokens}{keys}, {self.channels}, {self.k})"

    def __str__(self) -> str:
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{self.shape} {self.source}{dtype}"


# What the project is held to: (B, N, C, k).
REQUIRED = (
    Workload(8, 197, 192, 9),
    Workload(8, 1024, 64, 9),
    Workload(1, 4096, 64, 9),
    Workload(1, 16384, 64, 16),
    Workload(1, 16384, 128, 64),
)

# The paper's models: ViT-Tiny on 224 x 224 images, and the input of each layer of VGG-11.
VIT_TINY = Workload(256, 197, 192, 9)
VGG11 = tuple(
    Workload(128, tokens, channels, min(9, tokens), outputs=outputs)
    for tokens, channels, outputs in (
        (1024, 3, 64),
        (256, 64, 128),
        (64, 128, 256),
        (64, 256, 256),
        (16, 256, 512),
        (16, 512, 512),
        (4, 512, 512),
        (4, 512, 512),
    )
)

# Long sequences: batch x heads that fill a GPU.
LONG = tuple(
    Workload(max(1, 2**18 // tokens), tokens, channels, 9, dtype="bfloat16")
    for tokens in (4096, 16384, 65536)
    for channels in (64, 128)
)

# What a GPU is held to, in bfloat16 (B, N, C, k).
GPU_SELECT = tuple(
    Workload(batch, tokens, 64, 9, dtype="bfloat16")
    for batch, tokens in ((64, 4096), (8, 16384), (1, 65536))
)
GPU_LAYERS = tuple(
    Workload(batch, tokens, channels, 9, dtype="bfloat16")
    for batch, tokens, channels in (
        (64, 4096, 64),
        (8, 16384, 64),
        (64, 4096, 128),
        (8, 16384, 128),
        (256, 1024, 64),
    )
)
GPU_VIT = replace(VIT_TINY, candidates=32, dtype="bfloat16")
GPU_VGG11 = tuple(replace(w, batch=256, candidates=64, dtype="bfloat16") for w in VGG11)
GPU_FLOAT32 = Workload(1, 16384, 64, 9)
# A call whose time is that of the host.
TINY = Workload(1, 8, 8, 2, "random")

# Search: few queries on many keys that are not the queries.
SEARCH = tuple(
    Workload(1, 16384, 128, k, "random", keys=100_000, dtype="bfloat16") for k in (8, 16, 32, 64)
)
# On a photograph: 316 x 316 keys.
SEARCH_PHOTOGRAPHS = tuple(replace(w, source="photographs", keys=99_856) for w in SEARCH)


def scaled(workload: Workload, largest: int) -> Workload:
    """The workload with the batch, then queries and keys, cut until tokens x keys x batch fits."""
    while workload.batch * workload.tokens * workload.rows > largest:
        if workload.batch > 1:
            workload = replace(workload, batch=workload.batch // 2)
        elif workload.keys is not None:
            workload = replace(workload, tokens=workload.tokens // 2, keys=workload.keys // 2)
        else:
            workload = replace(workload, tokens=workload.tokens // 4)
    return workload


@dataclass(frozen=True)
class Inputs:
    """What every peer computes from. Tensors require gradients where a backward pass needs them.

    query: [B, N, C]; key, value: [B, M, C]; weight: [C, 1, k]; dense_weight: [O, C, k];
    conv_weight: [O, C, 3, 3]; grad_output: [B, N, C]; grad_dense: [B, N, O]; all of the dtype of
    the workload.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    dense_weight: Tensor
    conv_weight: Tensor
    grad_output: Tensor
    grad_dense: Tensor


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


def _features(workload: Workload, count: int, seed: int) -> Tensor:
    """[B, count, C] float32."""
    if workload.source == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(workload.batch, count, workload.channels, generator=generator)
    side = math.isqrt(count)
    names = [PHOTOGRAPHS[(i + seed - 1) % len(PHOTOGRAPHS)] for i in range(workload.batch)]
    tokens = torch.stack([photograph_tokens(name, side, workload.channels) for name in names])
    if side**2 == count:
        return tokens
    return torch.cat([tokens, tokens.mean(dim=1, keepdim=True)], dim=1)


@functools.lru_cache(maxsize=2)
def _numbers(workload: Workload) -> dict[str, Tensor]:
    """By the names of Inputs, float32 on the CPU. The cases of a group share them."""
    query = _features(workload, workload.tokens, seed=1)
    rows = query if workload.keys is None else _features(workload, workload.keys, seed=2)
    channels, k = workload.channels, workload.k
    outputs = workload.outputs or channels
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(std)

    return {
        "query": query,
        "key": rows,
        "value": rows,
        "weight": normal(channels, 1, k, std=k**-0.5),
        "dense_weight": normal(outputs, channels, k, std=(k * channels) ** -0.5),
        "conv_weight": normal(outputs, channels, 3, 3, std=(9 * channels) ** -0.5),
        "grad_output": normal(*query.shape),
        "grad_dense": normal(*query.shape[:2], outputs),
    }


def make_inputs(workload: Workload, device: str = "cpu", requires_grad: bool = False) -> Inputs:
    """The same numbers for the same workload, whatever the device."""

    def place(name: str, tensor: Tensor) -> Tensor:
        # Always a copy: query, key and value must not share storage.
        tensor = tensor.to(device, workload.torch_dtype, copy=True)
        return tensor.requires_grad_(requires_grad and not name.startswith("grad"))

    return Inputs(**{name: place(name, each) for name, each in _numbers(workload).items()})


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
