# SPDX-License-Identifier: MIT
"""ViT-Tiny (Dosovitskiy et al., 2021) with attention, a variant of it, or ConvNN."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models import as_run
from benchmarks.models.peers import Attention, LocalAttention, SparseAttention
from convnn_kernels.functional import Metric
from convnn_kernels.nn import Candidates, ConvNNAttention
from convnn_kernels.nn.candidates import require_maker

LAYERS = ("attention", "convnn", "kvt", "local", "sparse")


class Block(nn.Module):
    """[B, N, E] → [B, N, E]: attention and an MLP, each with a norm before it and a residual."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        attention: nn.Module,
        dropout: float,
        residual_dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = attention
        self.attention_dropout = nn.Dropout(residual_dropout)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, embed_dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x)))
        return x + self.mlp(self.mlp_norm(x))


class ViT(nn.Module):
    """[B, 3, image_size, image_size] → [B, num_classes]. No norm before the head."""

    positions: Tensor

    def __init__(
        self,
        num_classes: int,
        make_attention: Callable[[], nn.Module],
        image_size: int,
        patch_size: int,
        embed_dim: int,
        mlp_dim: int,
        depth: int,
        dropout: float,
        residual_dropout: float,
        class_token_deviation: float,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.patch_norm = nn.LayerNorm(embed_dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.normal_(self.class_token, std=class_token_deviation)
        length = (image_size // patch_size) ** 2 + 1
        self.register_buffer("positions", sinusoids(length, embed_dim), persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, mlp_dim, make_attention(), dropout, residual_dropout)
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_norm(self.patches(x).flatten(2).mT)  # [B, patches, E]
        # [B, 1 + patches, E]
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.head(self.blocks(tokens + self.positions)[:, 0])


def sinusoids(length: int, width: int) -> Tensor:
    """The positional encoding of Vaswani et al. (2017), section 3.5: [length, width]."""
    positions = torch.arange(length, dtype=torch.float32).unsqueeze(1)  # [length, 1]
    # [width / 2]
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack(
        [(positions * frequencies).sin(), (positions * frequencies).cos()], -1
    ).flatten(1)


def vit_tiny(
    num_classes: int,
    layer: str = "convnn",
    k: int = 9,
    *,
    metric: Metric = "cosine",
    candidates: Callable[[], Candidates] | None = None,
    window: int = 128,
    stride: int = 14,
    image_size: int = 224,
    patch_size: int = 16,
    embed_dim: int = 192,
    mlp_dim: int = 768,
    depth: int = 12,
    dropout: float = 0.1,
    residual_dropout: float = 0.0,
    class_token_deviation: float = 0.02,
) -> ViT:
    """ViT-Tiny as in the paper's section 6.2, with one head.

    Args:
        num_classes: classes.
        layer: "attention", "convnn", "kvt" (k-NN attention), "local" or "sparse"; or a layer as the
            authors ran it, see ``as_run.make_attention``.
        k: neighbors, for "convnn" and "kvt".
        metric: of "convnn". With "dot", similarities are divided by √embed_dim.
        candidates: returns the candidates of one layer of "convnn"; all tokens if None. It must be
            given for "convnn-candidates".
        window: how far local attention reaches to either side; for "band", the width of the band.
            The paper gives neither. Theirs were 128 and 49.
        stride: of sparse attention: √196, one row of patches.
        image_size: height and width of the images.
        patch_size: height and width of a patch; it divides image_size.
        embed_dim: width of the tokens. A head of local attention has a third of it, 64, which the
            paper's parameter count implies.
        mlp_dim: hidden width of the MLPs.
        depth: blocks.
        dropout: of attention and MLPs.
        residual_dropout: of what attention adds to the tokens. The paper mentions none.
        class_token_deviation: the standard deviation with which the class token is drawn.

    Raises:
        ValueError: if layer is unknown, if patch_size does not divide image_size, or if candidates
            is not a function or is missing.
    """
    if image_size % patch_size:
        raise ValueError(
            f"vit_tiny: patch_size must divide image_size {image_size}, got {patch_size}"
        )

    known = (*LAYERS, *as_run.LAYERS)
    if layer not in known:
        raise ValueError(f"vit_tiny: layer must be one of {known}, got {layer!r}")
    require_maker("vit_tiny", candidates)

    def make_attention() -> nn.Module:
        if layer == "attention":
            return Attention(embed_dim, dropout)
        if layer == "local":
            return LocalAttention(embed_dim, window, dropout, head_dim=embed_dim // 3)
        if layer == "sparse":
            return SparseAttention(embed_dim, stride, dropout)
        if layer == "kvt":
            return ConvNNAttention(embed_dim, 1, k, dropout, metric="dot", aggregation="sum")
        if layer in as_run.LAYERS:
            return as_run.make_attention(layer, embed_dim, k, window, candidates, dropout)
        searched = None if candidates is None else candidates()
        return ConvNNAttention(embed_dim, 1, k, dropout, metric=metric, candidates=searched)

    return ViT(
        num_classes,
        make_attention,
        image_size,
        patch_size,
        embed_dim,
        mlp_dim,
        depth,
        dropout,
        residual_dropout,
        class_token_deviation,
    )
