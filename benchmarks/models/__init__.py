# SPDX-License-Identifier: MIT
"""The two models of the paper's section 6, with a choice of layers."""

from benchmarks.models.vgg import VGG, vgg11
from benchmarks.models.vit import ViT, vit_tiny

__all__ = ["VGG", "ViT", "vgg11", "vit_tiny"]
