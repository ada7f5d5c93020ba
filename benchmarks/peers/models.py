# SPDX-License-Identifier: MIT
"""Layers in a model: VGG-11 and ViT-Tiny of the paper, each with the layers that it compares.

Images are random: what a model costs does not depend on them. Dropout is off, so that a pass gives
the same numbers each time; batch normalization uses the batch in a training pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from ..workloads import Inputs, Workload
from .base import TRAINING, Call, Peer

_CLASSES = 10


# Height and width of ViT-Tiny's patches, in pixels.
_PATCH = 16


def model_call(
    make: Callable[[int], nn.Module], workload: Workload, inputs: Inputs, pixels: int = 1
) -> Call:
    """`make` takes the side of the images: a square of tokens, each of so many pixels a side."""
    training, device = inputs.query.requires_grad, inputs.query.device
    size = pixels * math.isqrt(workload.tokens)
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


def _vgg(layer: str) -> Callable[[Workload, Inputs], Call]:
    def build(workload: Workload, inputs: Inputs) -> Call:
        from ..models import vgg11

        return model_call(lambda size: vgg11(_CLASSES, layer, dropout=0.0), workload, inputs)

    return build


def _vit(layer: str) -> Callable[[Workload, Inputs], Call]:
    def build(workload: Workload, inputs: Inputs) -> Call:
        from ..models import vit_tiny

        return model_call(
            lambda size: vit_tiny(_CLASSES, layer, workload.k, image_size=size, dropout=0.0),
            workload,
            inputs,
            _PATCH,
        )

    return build


PEERS = {
    **{
        f"vgg11-{layer}": Peer(
            f"VGG-11 of {name}", "model", _vgg(layer), TRAINING, baseline="vgg11-conv2d"
        )
        for layer, name in (
            ("conv2d", "Conv2d 3×3"),
            ("hybrid", "Conv2d ∥ ConvNN"),
            ("convnn", "ConvNN"),
        )
    },
    **{
        f"vit-{layer}": Peer(
            f"ViT-Tiny of {name}", "model", _vit(layer), TRAINING, baseline="vit-attention"
        )
        for layer, name in (
            ("attention", "attention (SDPA)"),
            ("convnn", "ConvNN"),
            ("local", "local attention"),
        )
    },
}
