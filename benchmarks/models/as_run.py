# SPDX-License-Identifier: MIT
"""What the authors ran otherwise than the paper says and the library has no setting for.

docs/paper.md lists all differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.peers import Attention, LocalAttention
from convnn_kernels import functional
from convnn_kernels.nn import Candidates, RandomCandidates
from convnn_kernels.nn.positional import count


class PaddedRandomCandidates(RandomCandidates):
    """r tokens drawn among those of the padded map, padding included.

    All tokens are candidates where there are fewer than r.
    """

    def forward(self, shape: Sequence[int], padding: int, device: torch.device) -> Tensor | None:
        tokens = count(shape, padding)
        return None if self.r > tokens else torch.randperm(tokens, device=device)[: self.r]


class FlatRowCandidates(Candidates):
    """A side×side grid of the unpadded map, whose row numbers are read as those of the padded one.

    The grid goes from the first to the last token along each axis. The token at (y, x) of a map of
    width W has row y·W + x there, but rows of the padded map are longer: the candidates are its
    first H·W rows, in slanted lines, among them padding, and none is at the lower edge. All tokens
    are candidates where the map is smaller than the grid.
    """

    def __init__(self, side: int, include_self: bool = True) -> None:
        super().__init__(include_self)
        self.side = side

    def forward(self, shape: Sequence[int], padding: int, device: torch.device) -> Tensor | None:
        height, width = shape
        if self.side > height:
            return None
        steps = torch.arange(self.side, device=device)
        y, x = (steps * (size - 1) // max(self.side - 1, 1) for size in (height, width))
        return (y.unsqueeze(1) * width + x).flatten()

    def extra_repr(self) -> str:
        return f"{self.side}, include_self={self.include_self}"


class RotaryLocalAttention(LocalAttention):
    """Local attention with rotary embeddings, which also attends to the padding of the last block.

    A block has the positions from 0 among its keys, which begin a block earlier, and from 2·window
    among its queries, so that a token's own key seems to be `window` tokens away. Keys of padding
    are zero: each adds exp(0) to the sum of the softmax, and nothing to the values.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, w = q.shape[1], self.window
        q, k, v = self.blocks(q, k, v)
        angles = self._angles(3 * w, q)
        q, k = _rotated(q, angles[2 * w :]), _rotated(k, angles)
        blocks = q.shape[1]
        mask = self.mask(blocks, blocks * w, q.device)
        return self._attend(q, k, v, mask).flatten(1, 2)[:, :length]

    @staticmethod
    def _angles(length: int, like: Tensor) -> Tensor:
        """[length, d]"""
        width, precise = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width
        frequencies = (1.0 / 10000.0**exponents).to(precise).repeat(2)
        return torch.arange(length, dtype=precise, device=like.device).unsqueeze(1) * frequencies


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + d/2])."""
    first, second = x.chunk(2, dim=-1)
    rotated = x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return rotated.to(x.dtype)


class BandAttention(Attention):
    """Attention to those at most window // 2 away, with dropout in evaluation, too."""

    def __init__(self, embed_dim: int, window: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, dropout)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[1], device=q.device)
        mask = (positions.unsqueeze(1) - positions).abs() <= self.window // 2  # [N, N]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout)


class TopKAttention(Attention):
    """Attention to the k most similar tokens, with dropout of the weights, as in other attention.

    ConvNNAttention drops channels of what it has aggregated.
    """

    def __init__(self, embed_dim: int, k: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, dropout)
        self.k = k

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q @ k.mT) / math.sqrt(q.shape[-1])  # [B, N, N]
        chosen = logits.topk(min(self.k, q.shape[1]), dim=-1).indices
        others = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, chosen, False)
        weights = logits.masked_fill(others, -torch.inf).softmax(-1)
        return F.dropout(weights, self.dropout, self.training).to(v.dtype) @ v


class CandidateAttention(Attention):
    """ConvNN among candidates, where a token may be its own neighbor twice.

    It is the first neighbor, with similarity 1. The others are the most similar candidates, among
    which its own similarity is -0.1 and not the lowest, as that of another may be smaller.
    Similarities are divided by √d, these two are not.
    """

    def __init__(
        self, embed_dim: int, k: int, candidates: Candidates, dropout: float = 0.0
    ) -> None:
        super().__init__(embed_dim, dropout)
        self.k = k
        self.candidates = candidates
        self.weight = nn.Parameter(torch.ones(embed_dim, 1, k))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length, width = q.shape
        tokens = torch.arange(length, device=q.device)
        drawn = self.candidates((length,), 0, q.device)
        drawn = tokens if drawn is None else drawn  # [R]
        similarities = (q @ k[:, drawn].mT) / math.sqrt(width)  # [B, N, R]
        # The operator takes no similarities in 16 bits.
        similarities = similarities.to(torch.promote_types(similarities.dtype, torch.float32))
        similarities = similarities.masked_fill(tokens.unsqueeze(1) == drawn, -0.1)
        similarities, chosen = similarities.topk(self.k - 1, dim=-1)
        own = tokens.view(1, -1, 1).expand(batch, -1, -1)  # [B, N, 1]
        y = functional.aggregate_neighbors(
            v,
            torch.cat([similarities.new_ones(own.shape), similarities], dim=-1),
            torch.cat([own, drawn[chosen]], dim=-1),
            self.weight,
        )
        return F.dropout(y, self.dropout, self.training)


# What ViT's `layer` may name beside the layers of the paper's text.
LAYERS = ("band", "convnn-candidates", "kvt-weights", "local-rotary")


def make_attention(
    layer: str,
    embed_dim: int,
    k: int,
    window: int,
    candidates: Callable[[], Candidates] | None,
    dropout: float,
) -> Attention:
    """One of LAYERS, for ViT.

    Args:
        layer: "band": BandAttention; "convnn-candidates": CandidateAttention; "kvt-weights":
            TopKAttention; "local-rotary": RotaryLocalAttention.
        embed_dim: E.
        k: neighbors.
        window: of the local layers.
        candidates: of CandidateAttention.
        dropout: probability.
    """
    if layer == "band":
        return BandAttention(embed_dim, window, dropout)
    if layer == "kvt-weights":
        return TopKAttention(embed_dim, k, dropout)
    if layer == "local-rotary":
        return RotaryLocalAttention(embed_dim, window, dropout, head_dim=embed_dim // 3)
    if candidates is None:
        raise ValueError(
            "vit_tiny: candidates must be a function that returns them with "
            "layer='convnn-candidates', got None"
        )
    return CandidateAttention(embed_dim, k, candidates(), dropout)
