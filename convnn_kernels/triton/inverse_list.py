# SPDX-License-Identifier: MIT
"""The inverse neighbor list, for a dense weight: for every key, the pairs (i, j) with I_ij = key.

A pair is the position of its neighbor in the flattened [B, N, k]. The list is all pairs, sorted by
key, j and i; `keys` has (b * M + m) * k + j of each, or a number beyond all of these for a missing
neighbor.

It is a counting sort, which takes 8 bytes for a pair, or 16 where 32 bits are too few. The pairs of
a batch element are divided into tiles. `count_pairs_kernel` counts the pairs of each key in each
tile; a prefix sum, by key and then by tile, says where they go, and `store_pairs_kernel` stores
them there in their order. Integers are added atomically, which has one result in any order.

A key that many queries chose has a long run in the list, on which one program would work for long.
So the list is also divided, without regard to keys, into chunks of CHUNK pairs. What a kernel sums
over pairs is first summed for each chunk that lies within one key and j, by a program of its own.
The program of a key then sums the pairs before its first chunk and after its last, and the sums of
its chunks: always the same terms in the same order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .integers import as_int64
from .launch import Buffer, Kernel, Plan, Pointers, cache_plans
from .modulate import load_neighbors


@triton.jit
def _load_bins(p_similarities, p_indices, rank, m, N, M, k, B, b):
    """The pairs number `rank` of batch element b; and of each the row of key, or M if the neighbor
    is missing, the bin, and the key.

    Bins are keys b * M + m; and then one for the missing neighbors of each batch element.
    """
    slot = rank // N
    pair = (b * N + rank % N) * k + slot
    _, b_row, present = load_neighbors(p_similarities, p_indices, pair, m, M)
    keys = as_int64(B) * M
    b_bin = tl.where(present, b * M + b_row, keys + b)
    b_key = tl.where(present, b * M + b_row, keys) * k + slot
    return pair, tl.where(present, b_row, M).to(tl.int32), b_bin, b_key


@Kernel
def count_pairs_kernel(
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_sums,  # [2 + B * (M + 1) * tiles], 0 before: the counts, from the third element on
    N,
    M,
    k,
    B,
    tiles,
    pairs_each,
    PAIRS: tl.constexpr,
):
    """How many pairs of each bin there are in one tile of `pairs_each` pairs."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    tile = pid % tiles
    first = tile * pairs_each
    last = tl.minimum(first + pairs_each, N.to(tl.int64) * k)
    for start in range(first, last, PAIRS):
        rank = start + tl.arange(0, PAIRS)
        m = rank < last
        _, _, b_bin, _ = _load_bins(p_similarities, p_indices, rank, m, N, M, k, B, b)
        tl.atomic_add(p_sums + 2 + b_bin * tiles + tile, 1, m, sem="relaxed")


@Kernel
def store_pairs_kernel(
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_sums,  # [2 + B * (M + 1) * tiles]: from the second on, where the next pair of each goes
    p_pairs,  # [B * N * k]
    p_keys,  # [B * N * k]
    N,
    M,
    k,
    B,
    tiles,
    pairs_each,
    PAIRS: tl.constexpr,
):
    """Puts the pairs of one tile into the list, PAIRS at a time."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    tile = pid % tiles
    first = tile * pairs_each
    last = tl.minimum(first + pairs_each, N.to(tl.int64) * k)
    o_p = tl.arange(0, PAIRS)
    for start in range(first, last, PAIRS):
        order = start + o_p
        m = order < last
        pair, b_row, b_bin, b_key = _load_bins(p_similarities, p_indices, order, m, N, M, k, B, b)
        # The first pair of a bin reserves room for all of them; the others follow it in order.
        # Sums over the first axis, in which threads have many elements, are the cheaper ones.
        m_same = (b_row[:, None] == b_row[None, :]) & m[:, None]
        rank = tl.sum((m_same & (o_p[:, None] < o_p[None, :])).to(tl.int32), 0)
        count = tl.sum(m_same.to(tl.int32), 0).to(p_sums.dtype.element_ty)
        m_first = m & (rank == 0)
        begin = tl.atomic_add(p_sums + 1 + b_bin * tiles + tile, count, m_first, sem="relaxed")
        begin = tl.sum(tl.where(m_same & m_first[:, None], begin[:, None], 0), 0)
        tl.store(p_pairs + begin + rank, pair.to(p_pairs.dtype.element_ty), m)
        tl.store(p_keys + begin + rank, b_key.to(p_keys.dtype.element_ty), m)


class Inversion(NamedTuple):
    sums: Buffer
    count_pairs: Plan
    store_pairs: Plan


def list_numbers(B: int, N: int, M: int, k: int) -> dict[str, int]:
    """The numbers by which kernels read the list, by parameter."""
    tiles, _ = configs.inverse_list_parts(B, N * k, M)
    return {"pairs": B * N * k, "stride_o": tiles}


@cache_plans
def plan_invert(B: int, N: int, M: int, k: int) -> Inversion:
    tiles, pairs_each = configs.inverse_list_parts(B, N * k, M)
    numbers: dict[str, Any] = {"N": N, "M": M, "k": k, "B": B}
    numbers |= {"tiles": tiles, "pairs_each": pairs_each}
    config = configs.sort()
    largest = max(B * N * k, (B * M + 1) * k)
    dtype = torch.int32 if largest < 2**31 else torch.int64
    pairs = (B * N * k, dtype)
    count, store = (
        kernel.prepare(B * tiles, config, **numbers)
        for kernel in (count_pairs_kernel, store_pairs_kernel)
    )
    return Inversion(
        sums=(B * (M + 1) * tiles + 2, dtype),
        count_pairs=Plan([count], p_pairs=pairs, p_keys=pairs),
        store_pairs=Plan([store]),
    )


def invert(similarities: Tensor, indices: Tensor, M: int) -> Pointers:
    """The inverse list of similarities and indices [..., N, k], contiguous, as p_pairs [B * N * k],
    p_keys [B * N * k] and p_offsets [B * M + 1] of stride `list_numbers(...)["stride_o"]`.

    Nothing is read by the host.
    """
    N, k = indices.shape[-2:]
    plan = plan_invert(indices.numel() // (N * k), N, M, k)
    size, dtype = plan.sums
    sums = torch.zeros(size, dtype=dtype, device=indices.device)
    pointers = Pointers(
        indices.device,
        p_similarities=similarities,
        p_indices=indices,
        p_sums=sums,
        p_offsets=sums,  # after both launches a sum is where the next bin and tile begin
    )
    plan.count_pairs(pointers)
    sums.cumsum_(0)
    plan.store_pairs(pointers)
    return pointers
