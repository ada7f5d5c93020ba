# SPDX-License-Identifier: MIT
"""Shards that travel from rank to rank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from convnn_kernels.distributed import messages
from convnn_kernels.distributed.agreement import Ranks


def shards(
    key: Tensor, key_mask: Tensor | None, ranks: Ranks
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yields the keys and the mask of every rank, this rank's own first.

    While the caller works on a shard, the next one arrives: up to two shards are held besides the
    rank's own.

    Args:
        key: [..., M_r, D], the rows of this rank.
        key_mask: [..., M_r] bool, or None on every rank.
        ranks: the process group.

    Yields:
        The rank that a shard is of, its key and its key_mask.
    """
    if ranks.size == 1:
        yield ranks.rank, key, key_mask
        return
    following, previous = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    held = _pack(key, key_mask)
    for step in range(ranks.size):
        owner = (ranks.rank - step) % ranks.size
        shard = _unpack(held, key, key_mask, ranks.keys[owner])
        if step + 1 == ranks.size:
            yield owner, *shard
            return
        coming = held.new_empty(_bytes(key, key_mask, ranks.keys[owner - 1]))
        works = messages.begin(held, following, coming, previous, ranks)
        yield owner, *shard
        for work in works:
            work.wait()
        held = coming


def _bytes(key: Tensor, key_mask: Tensor | None, rows: int) -> int:
    """The size of a shard with so many rows."""
    *lead, _, columns = key.shape
    return torch.Size(lead).numel() * rows * (columns * key.itemsize + (key_mask is not None))


def _pack(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """A shard as one message."""
    parts = [key.contiguous().flatten().view(torch.uint8)]
    if key_mask is None:
        return parts[0]
    return torch.cat([*parts, key_mask.contiguous().flatten().view(torch.uint8)])


def _unpack(
    message: Tensor, key: Tensor, key_mask: Tensor | None, rows: int
) -> tuple[Tensor, Tensor | None]:
    """The shard of a message: its key and key_mask, like those but with so many rows."""
    *lead, _, columns = key.shape
    elements = torch.Size(lead).numel() * rows
    size = elements * columns * key.itemsize
    shard = message[:size].view(key.dtype).view(*lead, rows, columns)
    if key_mask is None:
        return shard, None
    return shard, message[size:].view(torch.bool).view(*lead, rows)
