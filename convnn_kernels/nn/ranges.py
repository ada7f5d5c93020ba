# SPDX-License-Identifier: MIT
"""Which keys each query may see: ranges, and masks over pairs that are ranges."""

from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN = -1e4  # what a float mask adds, or less, where a key is hidden


class Visible(NamedTuple):
    """What each query may see: the keys of its range that are not masked."""

    key_mask: Tensor | None = None  # [B, M] bool
    key_range: Tensor | None = None  # [N, 2], [B, N, 2] or [B, heads, N, 2] int64


def intersection(given: Tensor, own: Tensor, M: int) -> Tensor:
    """The rows that are in both ranges; wrong ranges remain, for the operator to name them.

    Args:
        given: [..., N, 2] int64, by a user.
        own: [N, 2] int64.
        M: the number of rows.

    Returns:
        [..., N, 2] int64.
    """
    first, last = given.unbind(-1)
    begin = torch.maximum(first, own[:, 0])
    end = torch.maximum(begin, torch.minimum(last, own[:, 1]))
    is_valid = (first >= 0) & (first <= last) & (last <= M)  # [..., N]
    return torch.where(is_valid.unsqueeze(-1), torch.stack([begin, end], -1), given)


def read_mask(name: str, mask: Tensor, batch: int, queries: int) -> Visible:
    """What a mask of scaled_dot_product_attention lets each query see, as ranges and a key mask.

    Args:
        name: the argument's name, for errors.
        mask: [B or 1, heads or 1, N or 1, M]: bool, True where a key may be attended to; or float,
            0 there, and -10000 or less elsewhere.
        batch: B.
        queries: N.

    Returns:
        A key mask alone if the mask is the same for all queries and heads. Otherwise a range for
        each query, and a key mask if some key is hidden from all.

    Raises:
        ValueError: if the mask is not one of keys and ranges, or adds other numbers. Reading its
            values waits for the GPU, and needs a graph break in ``torch.compile``.
    """
    if mask.numel() == 0:
        return Visible()
    allowed = mask if mask.dtype == torch.bool else mask == 0
    M = allowed.shape[-1]
    # The rows from the first to the last that a query sees, and the keys that some query sees: if
    # there are ranges and key masks that say the same as the mask, these do.
    is_seen = allowed.any(-1)  # [B, heads, N]
    begin = allowed.byte().argmax(-1) * is_seen
    end = (M - allowed.flip(-1).byte().argmax(-1)) * is_seen
    key_mask = allowed.flatten(1, 2).any(1)  # [B, M]
    rows = torch.arange(M, device=mask.device)
    in_range = (begin.unsqueeze(-1) <= rows) & (rows < end.unsqueeze(-1))
    says_the_same = (in_range & key_mask[:, None, None] == allowed).all()
    is_binary = mask.dtype == torch.bool or (allowed | (mask <= HIDDEN)).all()
    of_keys = (allowed == allowed[:, :1, :1]).all()
    is_valid = says_the_same & is_binary
    valid, by_keys, whole = torch.stack([is_valid, of_keys, key_mask.all()]).tolist()
    if not valid:
        raise ValueError(
            f"{name} must let each query see the keys of one range, less some that it hides from "
            f"all queries: other masks over pairs, and biases, are not supported, got one of "
            f"shape {list(mask.shape)}"
        )
    key_mask = key_mask.expand(batch, -1)
    if by_keys:
        return Visible(key_mask)
    key_range = torch.stack([begin, end], -1)  # [B or 1, heads or 1, N or 1, 2]
    if key_range.shape[:2] == (1, 1):
        key_range = key_range[0, 0].expand(queries, -1)  # shared by the batch
    else:
        key_range = key_range.expand(batch, -1, queries, -1)
        key_range = key_range[:, 0] if key_range.shape[1] == 1 else key_range
    return Visible(None if whole else key_mask, key_range)
