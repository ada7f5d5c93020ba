# SPDX-License-Identifier: MIT
"""The shapes that are measured, and their tokens: of photographs, or random features.

**Embedding of a photograph.** Its central square is resized to H x W pixels (bilinear,
anti-aliased), and each color channel is shifted and scaled to mean 0 and variance 1. The token of a
pixel is its w x w RGB neighborhood (edge pixels are repeated outwards), flattened to 3 w^2 numbers
and projected to C channels by a random matrix with orthonormal columns (seed 0, the same for all
photographs). w is the smallest odd number with 3 w^2 >= C: 5 for C = 64, 7 for C = 128, 9 for
C = 192. So N = H W, in row-major order.

Query, key and value hold the same tokens, as in the paper's convolutional setting, where the
projections are the identity; in a search, key and value come from the next photograph. They are
three tensors, so that a backward pass computes three gradients, as it would with learned
projections. With one head, cosine similarity, softmax and a depthwise weight this is Algorithm 1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# RGB pictures inside scikit-image's wheel, which need no network. A batch of B takes the first B,
# and starts over after the last.
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
    """One shape and the source of its tokens.

    batch x tokens queries with `channels` numbers each search k neighbors among `keys` rows, or
    among the tokens themselves if that is None. A peer that restricts its search has `candidates`
    of them, a dense weight has `outputs` channels (`channels` if None). Random features have any
    number of tokens, photographs H^2, or H^2 + 1 with a class token: the mean of the others.
    `heads` consecutive entries of the batch are the heads of one sequence, for peers with heads.
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
    heads: int = 1

    def __post_init__(self) -> None:
        numbers = ("batch", "tokens", "channels", "k", "keys", "candidates", "outputs", "heads")
        for name in numbers:
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if self.k > self.rows:
            raise ValueError(f"k must be at most the rows of key ({self.rows}), got {self.k}")
        if self.batch % self.heads:
            raise ValueError(f"batch must be a multiple of heads ({self.heads}), got {self.batch}")
        for name, allowed in (("source", SOURCES), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
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
        """H = W of the map of tokens, or None if they are none."""
        side = math.isqrt(self.tokens)
        return side if side**2 == self.tokens else None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> str:
        """(B, N, C, k), with heads and the number of keys if there are any."""
        batch = f"{self.batch // self.heads}×{self.heads}" if self.heads > 1 else self.batch
        keys = "" if self.keys is None else f" of {self.keys}"
        return f"({batch}, {self.tokens}{keys}, {self.channels}, {self.k})"

    def __str__(self) -> str:
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{self.shape} {self.source}{dtype}"


# (B, N, C, k)
CPU_LAYERS = (
    Workload(8, 197, 192, 9),
    Workload(8, 1024, 64, 9),
    Workload(1, 4096, 64, 9),
    Workload(1, 16384, 64, 16),
    Workload(1, 16384, 128, 64),
)

# Few queries among many keys, and one query of each head among the keys of its sequence.
CPU_FEW = (
    Workload(1, 1, 64, 10, "random", keys=200_000),
    Workload(1, 32, 64, 10, "random", keys=200_000),
    Workload(1, 1, 128, 10, "random", keys=1_000_000),
)
# Each query may see some of the keys only.
CPU_RANGES = tuple(Workload(1, 16384, 64, 9, dtype=dtype) for dtype in DTYPES[:2])
DECODING = Workload(4 * 32, 1, 64, 9, "random", keys=4096, heads=32)

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

# Search: the keys are not the queries.
SEARCH = tuple(
    Workload(1, 16384, 128, k, "random", keys=100_000, dtype="bfloat16") for k in (8, 16, 32, 64)
)
# On a photograph: 316 x 316 keys.
SEARCH_PHOTOGRAPHS = tuple(replace(w, source="photographs", keys=99_856) for w in SEARCH)
CPU_SEARCH = tuple(replace(w, tokens=1024, dtype="float32") for w in (SEARCH[0], SEARCH[2]))


@dataclass(frozen=True)
class Inputs:
    """The tensors that peers choose from, in the dtype of the workload.

    query: [B, N, C]; key, value: [B, M, C]; weight: [C, 1, k]; dense_weight: [O, C, k];
    conv_weight: [O, C, 3, 3]; grad_output: [B, N, C]; grad_dense: [B, N, O].
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
    """Tokens [side * side, channels] float32 of one photograph, embedded as described above."""
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
    """The tensors of Inputs by name, float32 on the CPU; shared by the cases of a group."""
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
    """The numbers depend on the workload only, not on the device."""

    def moved(name: str, tensor: Tensor) -> Tensor:
        # Always copied: query, key and value must not share storage.
        tensor = tensor.to(device, workload.torch_dtype, copy=True)
        return tensor.requires_grad_(requires_grad and not name.startswith("grad"))

    return Inputs(**{name: moved(name, each) for name, each in _numbers(workload).items()})


def random_candidates(tokens: int, count: int) -> Tensor:
    """`count` rows drawn without replacement with a fixed seed, or all rows if there are fewer."""
    generator = torch.Generator().manual_seed(3)
    return torch.randperm(tokens, generator=generator)[:count]


def spatial_candidates(side: int, count: int) -> Tensor:
    """The rows of an evenly spaced sqrt(count) x sqrt(count) grid of a side x side map."""
    per_axis = min(math.isqrt(count), side)
    # The middle of each of per_axis equal parts, so that the grid is centered on the map.
    axis = ((torch.arange(per_axis, dtype=torch.float64) + 0.5) * side / per_axis).long()
    return (axis[:, None] * side + axis[None, :]).reshape(-1)
