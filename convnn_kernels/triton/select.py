# SPDX-License-Identifier: MIT
"""The k nearest keys of every query: S = Q K^T (Eq. 3), s_i = k-max and I_i = k-argmax (Eq. 4, 5).

S is never stored. This file chooses among six strategies, which return the same neighbors:

| file | strategy | where |
|---|---|---|
| select_network.py | one launch, networks of comparators | up to 256 columns, k <= 15 |
| select_medium.py | one launch, a threshold and the columns that reach it | see below |
| select_small.py | one launch, tiles of S in registers | 16 bits, fewer than 512 columns, k <= 32 |
| select_large.py | a threshold, the columns that reach it, and the best of these | k <= 64 |
| exact_topk.py | all columns, in one launch | fewer than 512 columns, or k <= 256 |
| exact_topk.py | a pass for each 256 neighbors | k > 256 |

select_medium.py is for 16 bits, 257 to 1,280 columns, D <= 16 and k <= 15, and for many queries,
without candidates and self. Some blocks of select_large.py allow only k <= 48 or 24
(`configs.allows_sweep`). What select_network.py leaves out, such as float32 with few channels,
`configs.allows_select_network` says.

Shapes in all of them: query [B, N, D], key [B, M, D], columns [R] or None, mask [B, M] or None,
self [N] or None. The batch B is two dimensions of any strides, b = b1 * B2 + b2.
"""

import torch
from torch import Tensor

from . import configs, self_check
from .exact_topk import select_all_columns, select_in_passes
from .launch import Pointers, cache_plans
from .search import Search, prepare
from .select_large import select_large
from .select_medium import select_medium
from .select_network import select_network
from .select_small import select_small


def select(
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None,
    self_indices: Tensor | None,
    key_mask: Tensor | None,
    metric: str,
    order: str,
    key_range: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Similarities [..., N, k] and indices [..., N, k] of the neighbors; see schemas.py."""
    s, I = empty_results(query, k)
    if I.numel() == 0:
        return s, I
    options = (candidates, self_indices, key_mask, metric, order, key_range, exclude_self)
    search, tensors = prepare(query, key, k, *options)
    pointers = Pointers(query.device, **tensors, p_similarities=s, p_indices=I)
    select_alone(search, pointers, s, I)
    return s, I


def empty_results(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Memory for similarities and indices."""
    shape = (*query.shape[:-1], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)


def select_alone(search: Search, pointers: Pointers, s: Tensor, I: Tensor) -> None:
    """A search without an aggregation; s and I are among the pointers."""
    if is_medium(search, s.device):
        select_medium(search, pointers)
    elif is_large(search, s.device):
        select_large(search, pointers, None)
    elif is_tile(search):
        select_network(search, pointers)
    elif _is_small(search):
        select_small(search, pointers)
    elif search.k > configs.LONGEST_LIST:
        select_in_passes(search, pointers, s, I)
    else:
        select_all_columns(search, pointers)


def is_tile(search: Search) -> bool:
    """Whether `select_network` takes a search that `select_large` does not take."""
    return configs.allows_select_network(
        search.arch,
        *_sizes(search),
        tf32=search.tf32,
        has_self=search.has_self,
        has_candidates=search.has_candidates,
        has_mask=search.has_mask,
        has_range=search.has_range,
    )


def is_medium(search: Search, device: torch.device) -> bool:
    """Whether `select_medium` takes a search of more columns than a tile has."""
    return _has_some_columns(search) and self_check.passes(device, search, is_medium=True)


@cache_plans
def _has_some_columns(search: Search) -> bool:
    sizes = (*_sizes(search), search.Q.B, search.Q.N)
    allowed = configs.allows_select_medium(search.arch, *sizes)
    return allowed and search.is_plain and not (search.has_self or search.has_candidates)


def _is_small(search: Search) -> bool:
    """Whether `select_small` takes a search: the token itself has to be among the columns."""
    self_is_column = not (search.has_candidates and search.has_self)
    return search.is_plain and self_is_column and configs.allows_select_small(*_sizes(search))


def _sizes(search: Search) -> tuple[int, int, int, int, str]:
    return search.bits, search.Q.D, search.columns, search.k, search.metric


def is_large(search: Search, device: torch.device) -> bool:
    """Whether `select_large` takes a search."""
    return _has_many_columns(search) and self_check.passes(device, search)


@cache_plans
def _has_many_columns(search: Search) -> bool:
    if search.has_range and search.has_candidates:
        # Their rows have no order: which tiles have some of a range is not known.
        return False
    return configs.allows_sweep(
        search.arch, search.bits, search.Q.D, search.columns, search.ranks, search.has_range
    )
