# SPDX-License-Identifier: MIT
"""The total order of neighbors, for those that were found in several calls.

Similarity descending, NaN first, -0 equal to +0, then index ascending; missing neighbors last.
"""

import torch
from torch import Tensor

# The index of a missing neighbor here: it comes after all others with similarity -inf.
MISSING = torch.iinfo(torch.int64).max


def best_of(similarities: list[Tensor], indices: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The best k of all given neighbors, [..., k] of several [..., any]; missing ones fill up."""
    s, i = torch.cat(similarities, -1), torch.cat(indices, -1)
    by_index = i.argsort(dim=-1, stable=True)
    s, i = s.gather(-1, by_index), i.gather(-1, by_index)
    places = _codes(s).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return s.gather(-1, places), i.gather(-1, places)


def by_index(similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The same neighbors by index, missing ones last."""
    places = indices.argsort(dim=-1, stable=True)
    return similarities.gather(-1, places), indices.gather(-1, places)


def _codes(similarities: Tensor) -> Tensor:
    """Integers in the order of similarities, the best the greatest.

    A sort of the numbers themselves may tell -0 from +0 on some devices, and one NaN from another.
    """
    dtype = torch.int64 if similarities.dtype is torch.float64 else torch.int32
    limits = torch.iinfo(dtype)
    bits = similarities.view(dtype)
    bits = bits.masked_fill(bits == limits.min, 0)  # -0
    codes = torch.where(bits < 0, bits ^ limits.max, bits)
    return codes.masked_fill(similarities.isnan(), limits.max)
