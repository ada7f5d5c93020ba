# SPDX-License-Identifier: MIT
"""The k nearest keys of every query: S = Q K^T (Eq. 3), s_i = k-max and I_i = k-argmax (Eq. 4, 5).

S is never stored. This file chooses among four strategies, which return the same neighbors:

| file | strategy | where |
|---|---|---|
| select_small.py | one launch, tiles of S in registers | 16 bits, up to 1024 columns, k <= 32 |
| exact_topk.py | every similarity by a sum over D, in one launch | few columns |
| select_groups.py | maxima of groups rule most columns out | many columns |
| exact_topk.py | a pass for each 256 neighbors | k > 256 |

Shapes in all of them: query [B, N, D], key [B, M, D], columns [R] or None, mask [B, M] or None,
self [N] or None. The batch B is two dimensions of any strides, b = b1 * B2 + b2.
"""

from torch import Tensor

from . import configs
from .exact_topk import select_all_columns, select_in_passes
from .search import prepare
from .select_groups import select_groups
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
) -> tuple[Tensor, Tensor]:
    """Similarities [..., N, k] and indices [..., N, k] of the neighbors; see schemas.py."""
    search = prepare(query, key, k, candidates, self_indices, key_mask, metric, order)
    D, columns = query.shape[-1], search.columns
    # With candidates, the token itself need not be one of the columns of a tile.
    in_columns = candidates is None or self_indices is None
    if search.indices.numel() == 0:
        pass
    elif in_columns and configs.allows_select_small(search.bits, D, columns, k, metric):
        select_small(search)
    elif k > configs.LONGEST_LIST:
        select_in_passes(search)
    elif group := configs.group_size(search.arch, columns, k):
        select_groups(search, group)
    else:
        select_all_columns(search)
    return search.similarities, search.indices
