# SPDX-License-Identifier: MIT
"""The attention layers that the paper's Table 2 compares with ConvNN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Scaled dot-product attention with one head (Vaswani et al., 2017).

    [B, N, E] → [B, N, E]; projections without bias. Subclasses restrict the pairs.
    """

    def __init__(self, embed_dim: int, dropout: float = 0.0, head_dim: int | None = None) -> None:
        super().__init__()
        width = embed_dim if head_dim is None else head_dim
        self.query_projection = nn.Linear(embed_dim, width, bias=False)
        self.key_projection = nn.Linear(embed_dim, width, bias=False)
        self.value_projection = nn.Linear(embed_dim, width, bias=False)
        self.output_projection = nn.Linear(width, embed_dim, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_projection(x), self.key_projection(x), self.value_projection(x)
        return self.output_projection(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v, None)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class LocalAttention(Attention):
    """Every token attends to those at most `window` away (Aguilera-Martos et al., 2024).

    The sequence is split into blocks of `window` tokens. Each attends to itself and to the adjacent
    blocks, so that time and memory are O(N · window).
    """

    def __init__(
        self, embed_dim: int, window: int, dropout: float = 0.0, head_dim: int | None = None
    ) -> None:
        super().__init__(embed_dim, dropout, head_dim)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        q, k, v = self.blocks(q, k, v)
        mask = self.mask(q.shape[1], length, q.device)
        return self._attend(q, k, v, mask).flatten(1, 2)[:, :length]

    def blocks(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries by block, [B, blocks, w, d], and keys and values of three blocks, [.., 3w, d]."""
        length, w = q.shape[1], self.window
        blocks = -(-length // w)
        spare = blocks * w - length
        q = F.pad(q, (0, 0, 0, spare)).unflatten(1, (blocks, w))
        # With one more block on either side, without a copy.
        k, v = (F.pad(each, (0, 0, w, w + spare)).unfold(1, 3 * w, w).mT for each in (k, v))
        return q, k, v

    def mask(self, blocks: int, keys: int, device: torch.device) -> Tensor:
        """[blocks, w, 3w]: which of the first `keys` tokens a token may attend to."""
        w = self.window
        positions = torch.arange(blocks * w, device=device).view(blocks, w, 1)
        # [blocks, 1, 3w]
        others = torch.arange(-w, 2 * w, device=device) + w * torch.arange(
            blocks, device=device
        ).view(blocks, 1, 1)
        mask = (positions - others).abs() <= w
        mask &= (others >= 0) & (others < keys)
        # Padding tokens of the last block are queries, too, and what they get is not used.
        return mask | (positions >= keys)


class SparseAttention(Attention):
    """Strided sparse attention (Child et al., 2019), not causal.

    As in section 4.2 of that paper, a token attends to those less than a stride away and to those
    whose distance is a multiple of the stride. The pattern is an [N, N] mask: it shows what the
    layer learns, not how fast block-sparse kernels are.
    """

    def __init__(self, embed_dim: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, dropout)
        self.stride = stride

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[1], device=q.device)
        distance = (positions.unsqueeze(1) - positions).abs()  # [N, N]
        mask = (distance < self.stride) | (distance % self.stride == 0)
        return self._attend(q, k, v, mask)
