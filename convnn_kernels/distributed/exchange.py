# SPDX-License-Identifier: MIT
"""Rows of other ranks: fetched in blocks, and their gradients sent back.

For a block of queries, a rank fetches each row that is a neighbor of one of them once, from the
rank that has it, into a table. A table has at most about as many rows as a rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from convnn_kernels.distributed import messages
from convnn_kernels.distributed.agreement import Ranks

# A table may have at least so many rows, so that few rows do not take many exchanges.
LEAST_TABLE_ROWS = 4096


@dataclass(frozen=True)
class Block:
    """A block of queries, all leading dimensions as one, and the rows that are their neighbors.

    queries: which of them.
    similarities, indices: [n, k], the indices rows of the table.
    rows: [T, C], the table.
    requested: the rows of this rank that were requested, by all ranks one after the other.
    sent, received: how many rows were sent to, and received from, each rank.
    """

    queries: slice
    similarities: Tensor
    indices: Tensor
    rows: Tensor
    requested: Tensor
    sent: list[int]
    received: list[int]


def as_rows(X: Tensor) -> Tensor:
    """[..., C] with all dimensions but the last as one."""
    return X.reshape(X.shape[:-1].numel(), X.shape[-1])


def blocks(X: Tensor, similarities: Tensor, indices: Tensor, ranks: Ranks) -> Iterator[Block]:
    """The queries of this rank in blocks, each with the rows of X that are their neighbors.

    All ranks make the same number of exchanges, which the sizes of all of them give.

    Args:
        X: [..., M_r, C], the rows of this rank.
        similarities: [..., N_r, k].
        indices: [..., N_r, k], rows among those of all ranks.
        ranks: the process group.
    """
    batch, k = X.shape[:-2].numel(), indices.shape[-1]
    mean_rows = -(-batch * ranks.total_keys // ranks.size)
    size = max(max(mean_rows, LEAST_TABLE_ROWS) // k, 1)
    rows, s = as_rows(X), as_rows(similarities)
    ids = as_rows(_row_ids(similarities, indices, ranks))
    for first in range(0, batch * max(ranks.queries), size):
        queries = slice(min(first, len(s)), min(first + size, len(s)))
        yield _fetch(rows, queries, s[queries], ids[queries], batch, ranks)


def send_back(gradients: Tensor, block: Block, to: Tensor, ranks: Ranks) -> None:
    """Adds gradients of the rows of a table, [T, C], to those of the ranks that have the rows.

    Args:
        gradients: of the rows of ``block``.
        block: the block.
        to: [rows, C], the gradients of this rank's rows. What the ranks send is added in an order
            that is the same in every run.
        ranks: the process group.
    """
    requested, parts = block.requested.split(block.sent), gradients.split(block.received)
    for source, arrived in _exchange_rows(parts.__getitem__, block.sent, gradients, ranks):
        to.index_add_(0, requested[source], arrived.to(to.dtype))


def _row_ids(similarities: Tensor, indices: Tensor, ranks: Ranks) -> Tensor:
    """A number for the row of each neighbor, [..., N_r, k]; -1 for a missing one.

    Rows are numbered by rank, then by batch element.
    """
    batch = indices.shape[:-2].numel()
    ends = torch.tensor(ranks.keys, device=indices.device).cumsum(0)
    counts = torch.tensor(ranks.keys, device=indices.device)
    # Where values are not checked, an index out of range must not be sent to a rank.
    i = indices.clamp(0, max(ranks.total_keys - 1, 0))
    owner = torch.searchsorted(ends, i, right=True).clamp_(max=ranks.size - 1)
    first = (ends - counts)[owner]
    element = torch.arange(batch, device=i.device).view(*indices.shape[:-2], 1, 1)
    ids = batch * first + element * counts[owner] + i - first
    return ids.masked_fill(similarities == -torch.inf, -1)


def _fetch(
    rows: Tensor, queries: slice, similarities: Tensor, ids: Tensor, batch: int, ranks: Ranks
) -> Block:
    """Fetches the rows of a block. ``rows``: [batch * M_r, C]; ``ids``: [n, k] of ``_row_ids``."""
    needed, places = torch.unique(ids, sorted=True, return_inverse=True)
    missing = int(needed[:1].eq(-1).sum())  # all missing ones are one number, the first
    needed, places = needed[missing:], (places - missing).clamp_(min=0)
    firsts = batch * torch.tensor([ranks.first_key(rank) for rank in range(ranks.size + 1)])
    bounds = torch.searchsorted(needed, firsts.to(needed.device))
    to_receive = bounds.diff()
    to_send = torch.empty_like(to_receive)
    dist.all_to_all_single(to_send, to_receive, group=ranks.group)
    received, sent = to_receive.tolist(), to_send.tolist()
    needed = needed - firsts.to(needed.device)[:-1].repeat_interleave(to_receive)
    requested = needed.new_empty(sum(sent))
    dist.all_to_all_single(requested, needed, sent, received, group=ranks.group)
    table = rows.new_empty(sum(received), rows.shape[1])
    parts, of_rank = table.split(received), requested.split(sent)
    for source, arrived in _exchange_rows(
        lambda to: rows.index_select(0, of_rank[to]), received, rows, ranks
    ):
        parts[source].copy_(arrived)
    return Block(queries, similarities, places, table, requested, sent, received)


def _exchange_rows(
    rows_for: Callable[[int], Tensor], received: list[int], like: Tensor, ranks: Ranks
) -> Iterator[tuple[int, Tensor]]:
    """Sends rows to each rank, and yields each rank with the rows that it sent.

    One rank after the other: a rank that has the rows of all blocks holds those of one at a time.

    Args:
        rows_for: gives the rows for a rank.
        received: how many rows each rank sends.
        like: a tensor [..., C] of their dtype.
        ranks: the process group.
    """
    yield ranks.rank, rows_for(ranks.rank)
    for step in range(1, ranks.size):
        following, previous = (ranks.rank + step) % ranks.size, (ranks.rank - step) % ranks.size
        sent = rows_for(following).contiguous()
        arrived = like.new_empty(received[previous], like.shape[-1])
        for work in messages.begin(sent, following, arrived, previous, ranks):
            work.wait()
        yield previous, arrived
