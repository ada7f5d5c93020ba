# SPDX-License-Identifier: MIT
"""Tokens on which ``tools.count_hits`` counts: photographs, CIFAR-10, features of a VGG-11."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.models.vgg import VGG, vgg11
from benchmarks.paper import data
from benchmarks.workloads import PHOTOGRAPHS, photograph, photograph_tokens

DARK = ("hubble_deep_field", "rocket", "retina")
# Where most rows have more ties than any queue holds.
EXTREMES = ("constant", "40 distinct keys", "dark photographs, RGB as stored")


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10, as a VGG-11 sees it that was trained on the first images for one epoch."""

    model: VGG
    test: Tensor
    mean: Tensor
    deviation: Tensor
    accuracy: float

    def normalized(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.deviation


def train(archive: Path, images: int) -> Cifar:
    """Reads the archive, and trains on `images` images once."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
        dataset = data.load(Path(folder), "cifar10", images, 512)
    mean, deviation = dataset.mean_and_deviation()
    torch.manual_seed(0)
    model = vgg11(10, "conv2d", hidden=128, dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    for batch in order.split(128):
        outputs = model((dataset.train.images[batch] / 255 - mean) / deviation)
        loss = F.cross_entropy(outputs, dataset.train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = dataset.test.images / 255
    with torch.no_grad():
        right = model.eval()((test - mean) / deviation).argmax(1) == dataset.test.labels
    return Cifar(model, test, mean, deviation, right.float().mean().item())


def picture(name: str, side: int) -> Tensor:
    """A photograph, [1, 3, side, side] of numbers in [0, 1]."""
    pixels = torch.from_numpy(photograph(name) / 255.0).float().permute(2, 0, 1)[None]
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


def mosaics(images: Tensor, side: int) -> list[Tensor]:
    """Eight pictures [1, 3, side, side] of images [N, 3, 32, 32] side by side."""
    n = side // 32
    return [
        some.unflatten(0, (n, n)).permute(2, 0, 3, 1, 4).reshape(1, 3, side, side)
        for some in images[: 8 * n * n].split(n * n)
    ]


def tokens(features: Tensor) -> Tensor:
    """[1, C, H, W] to [H W, C]."""
    return features[0].flatten(1).T


def token_sets(side: int, cifar: Cifar | None) -> Iterator[tuple[str, list[Tensor]]]:
    """Name and tokens [side * side, D] of several pictures."""
    torch.manual_seed(0)
    yield "random", [torch.randn(side * side, 64) for _ in range(8)]
    yield "constant", [torch.ones(side * side, 64)]
    yield "40 distinct keys", [torch.randn(40, 64)[torch.randint(40, (side * side,))]]
    dark = [torch.from_numpy(photograph(n)[:side, :side].copy()).float() for n in DARK]
    yield "dark photographs, RGB as stored", [pixels.flatten(0, 1) for pixels in dark]
    yield "photographs, RGB", [photograph_tokens(n, side, 3) for n in PHOTOGRAPHS]
    yield "photographs, pixels with context", [photograph_tokens(n, side, 64) for n in PHOTOGRAPHS]
    patches = (F.pixel_unshuffle(picture(n, 4 * side) - 0.5, 4) for n in PHOTOGRAPHS)
    yield "photographs, patches of 4x4", [tokens(each) for each in patches]
    if cifar is None:
        return
    normal, layers = cifar.normalized, cifar.model.features
    yield "CIFAR-10, RGB", [tokens(normal(each)) for each in mosaics(cifar.test, side)]
    for depth, scale, last in ((1, 2, 4), (2, 4, 8)):
        inputs = mosaics(cifar.test, scale * side)[: max(1, 512 // (scale * side // 32) ** 2)]
        if scale * side <= 256:
            features = [tokens(layers[:last](normal(each))) for each in inputs]
            yield f"CIFAR-10, VGG layer {depth}", features
        inputs = [picture(n, scale * side) for n in PHOTOGRAPHS]
        features = [tokens(layers[:last](normal(each))) for each in inputs]
        yield f"photographs, VGG layer {depth}", features
