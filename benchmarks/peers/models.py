# SPDX-License-Identifier: MIT
"""The paper's VGG-11 and ViT-Tiny as a whole, with each of the layers that it compares.

Images are random because the cost of a model does not depend on them. Dropout is off, so that every
pass computes the same; batch normalization uses the statistics of the batch in a training pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from ..workloads import Inputs, Workload
from .base import TRAINING, Build, Call, Peer

_CLASSES = 10
# Pixels per token of ViT-Tiny, vertically and horizontally.
_PATCH = 16


def _model_call(
    make: Callable[[int], nn.Module], size: int, workload: Workload, inputs: Inputs
) -> Call:
    """`make` takes the height and width of the images."""
    training, device = inputs.query.requires_grad, inputs.query.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(size).to(device, workload.torch_dtype).train(training)
        images = torch.randn(workload.batch, 3, size, size).to(device, workload.torch_dtype)
        grad_output = torch.randn(workload.batch, _CLASSES).to(device, workload.torch_dtype)
    model.requires_grad_(training)

    def forward() -> tuple[torch.Tensor, ...]:
        return (model(images),)

    def exact() -> torch.Tensor:
        return copy.deepcopy(model).double()(images.double())

    return Call(forward, dict(model.named_parameters()), grad_output, exact=exact)


def _vgg(layer: str) -> Build:
    def build(workload: Workload, inputs: Inputs) -> Call:
        from ..models import vgg11

        size = math.isqrt(workload.tokens)
        return _model_call(lambda _: vgg11(_CLASSES, layer, dropout=0.0), size, workload, inputs)

    return build


def _vit(layer: str) -> Build:
    def build(workload: Workload, inputs: Inputs) -> Call:
        from ..models import vit_tiny

        def make(size: int) -> nn.Module:
            return vit_tiny(_CLASSES, layer, workload.k, image_size=size, dropout=0.0)

        return _model_call(make, _PATCH * math.isqrt(workload.tokens), workload, inputs)

    return build


def _peer(label: str, build: Build, baseline: str) -> Peer:
    return Peer(label, "model", build, TRAINING, baseline=baseline)


PEERS = {
    "vgg11-conv2d": _peer("VGG-11 of Conv2d 3×3", _vgg("conv2d"), "vgg11-conv2d"),
    "vgg11-hybrid": _peer("VGG-11 of Conv2d ∥ ConvNN", _vgg("hybrid"), "vgg11-conv2d"),
    "vgg11-convnn": _peer("VGG-11 of ConvNN", _vgg("convnn"), "vgg11-conv2d"),
    "vit-attention": _peer("ViT-Tiny of attention (SDPA)", _vit("attention"), "vit-attention"),
    "vit-convnn": _peer("ViT-Tiny of ConvNN", _vit("convnn"), "vit-attention"),
    "vit-local": _peer("ViT-Tiny of local attention", _vit("local"), "vit-attention"),
}
