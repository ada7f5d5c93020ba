# SPDX-License-Identifier: MIT
"""The backward of `forward` with a depthwise weight or none for few tokens and 16 bits, in three
launches.

| launch | file | what |
|---|---|---|
| `query_side_small_kernel` | query_side_small.py | ds; parts of dW and db; pairs |
| `key_side_small_kernel` | key_side_small.py | dV; inverse norms and sums by key; dW and db |
| `search_grad_small_kernel` | search_grad_small.py | dq = E K and dk = E^T Q |

E has ds, a row for each query and a column for each key; a program has memory for 64 rows of it. As
in backward.py, which chooses between the two, what is not needed is not computed.
"""

import itertools
from typing import Any

import torch

from . import configs
from .aggregation import RHOS
from .backward_call import Backward
from .key_side_small import key_side_small_kernel
from .launch import Buffer, Plan, Workspace
from .metrics import METRICS
from .norms import rescales
from .query_side_small import query_side_small_kernel
from .search_grad_small import search_grad_small_kernel
from .tensors import cdiv

_F32, _I32 = torch.float32, torch.int32


def plan_small(call: Backward) -> Plan | None:
    """All gradients; None where sizes or metric do not allow it.

    A gradient of similarities that is returned has float32, and no number in it is rounded to 16
    bits.
    """
    B, N, M, k, C, D = call.B, call.N, call.M, call.k, call.V.D, call.Q.D
    metric = call.metric if call.has_search else "dot"
    dtypes = {call.query_dtype, call.value_dtype}
    bits = max(8 * dtype.itemsize for dtype in dtypes)
    if len(dtypes) > 1 or "similarities" in call.needed:
        return None
    if not configs.allows_backward_small(bits, N, M, k, metric, call.V.stride_n):
        return None
    float16 = call.value_dtype == torch.float16
    rows = configs.query_side_small(call.arch, B, N, C, call.align, float16)
    keys = configs.key_side_small(call.arch, C, D, call.align, float16)
    search = configs.search_grad_small(call.arch, M, D, call.align)
    tiles = cdiv(B * N, rows["ROWS"])
    columns = 16 * cdiv(M, 16)
    # Where drho is computed again, in places of what is not needed any more, or not yet.
    names: dict[str, str | None] = {"p_rows": "p_offset", "p_drho": "p_ds"}
    names |= _unneeded(call, metric == "cosine")
    pieces = B * cdiv(D, search["BLOCK_D"]) if call.has_search else 0
    programs_of_search = min(pieces, configs.programs_at_a_time(call.arch))
    tile = programs_of_search * search["ROWS"] * columns
    workspace = _workspace(call, tiles * rows["ROWS"], tiles, tile, rows, keys, names)
    if workspace.bytes > configs.allowed_backward(call.batch, N, M, C, D, k):
        return None
    numbers = _numbers(call, metric, tiles, rows, keys, names)
    numbers |= {
        "columns": columns,
        "search_blocks": cdiv(D, search["BLOCK_D"]),
        "pieces": pieces,
    }
    programs = {
        query_side_small_kernel: (numbers["first_tile"] + tiles, rows),
        key_side_small_kernel: (numbers["key_programs"], keys),
        search_grad_small_kernel: (programs_of_search, search),
    }
    launches = [
        kernel.prepare(count, blocks, names, **numbers)
        for kernel, (count, blocks) in programs.items()
        if count
    ]
    return Plan(launches, workspace)


def _numbers(
    call: Backward,
    metric: str,
    tiles: int,
    rows: configs.Config,
    keys: configs.Config,
    names: dict[str, str | None],
) -> dict[str, Any]:
    """Numbers and constants that the kernels share, by parameter."""
    B, N, M, k, C, D = call.B, call.N, call.M, call.k, call.V.D, call.Q.D
    lists = B * call.sorts
    value_blocks = cdiv(C, keys["BLOCK"] * keys["CHUNKS"]) if "value" in call.needed else 0
    keys_each = configs.keys_each(call.arch, B * value_blocks)
    groups = cdiv(M, keys_each)
    of_query, of_key = (
        0 if "p_inverse_q" in names else B * cdiv(count, keys["ROWS"]) for count in (N, M)
    )
    of_weight, of_bias = (
        cdiv(size, keys["COLUMNS"]) if name in call.needed else 0
        for name, size in (("weight", C * k), ("bias", C))
    )
    of_key_side = {
        "first_norm": B * groups * value_blocks,
        "first_norm_k": of_query,
        "first_along": of_key,
        "first_weight": 0 if "p_along_k" in names else B,
        "first_bias": of_weight,
        "key_programs": of_bias,
    }
    firsts = itertools.accumulate(of_key_side.values())
    return {
        "N": N,
        "M": M,
        "C": C,
        "D": D,
        "k": k,
        "K": k,
        "scale": call.scale,
        "B": B,
        "B2": call.B2,
        "key_blocks": cdiv(M, keys["KEYS"]),
        "lists": lists,
        "first_tile": lists + (1 + k * ("p_weight_rows" not in names) if call.sorts else 0),
        "parts": tiles,
        "groups": groups,
        "keys_each": keys_each,
        "value_blocks": value_blocks,
        **dict(zip(of_key_side, firsts, strict=True)),
        **call.Q.strides("q"),
        **call.K.strides("k"),
        **call.V.strides("v"),
        "ALIGN": call.align,
        "RHO": RHOS[call.rho],
        "METRIC": METRICS[metric],
        "RESCALE": rescales(call.query_dtype),
        "RHO_GRAD": call.through_rho,
        "SLOTS": configs.SLOTS,
        "KEYS": keys["KEYS"],
        "TILE": keys["TILE"],
        "WIDTH": keys["WIDTH"],
        "WHOLE_C": C % rows["BLOCK_C"] == C % (keys["BLOCK"] * keys["CHUNKS"]) == 0,
    }


def _workspace(
    call: Backward,
    rows: int,
    tiles: int,
    of_tiles: int,
    blocks: configs.Config,
    keys: configs.Config,
    names: dict[str, str | None],
) -> Workspace:
    """The temporary memory for so many rows and tiles of queries, and elements of tiles of E."""
    B, N, M, k, C = call.B, call.N, call.M, call.k, call.V.D
    of_pairs = rows * configs.SLOTS
    sizes: dict[str, Buffer] = {
        "p_offset": (of_pairs, _I32),
        "p_pairs": (B * N * k, _I32),
        "p_next": (B * blocks["QUERIES"] * blocks["BLOCKS"], torch.int16),
        "p_ends": (B * cdiv(M, keys["KEYS"]), _I32),
        "p_ones": ((keys["TILE"] + 1) * keys["TILE"], call.value_dtype),
        "p_rho": (of_pairs, _F32),
        "p_ds": (of_pairs, _F32),
        "p_columns": (of_pairs, torch.int16),
        "p_tiles": (of_tiles, call.query_dtype),
        "p_along_q": (rows, _F32),
        "p_along_k": (B * M, _F32),
        "p_inverse_q": (B * N, _F32),
        "p_inverse_k": (B * M, _F32),
        "p_weight_rows": (k * keys["WIDTH"], call.value_dtype),
        "p_weight_again": (k * C, call.value_dtype),
        "p_weight_part": (tiles * C * k, _F32),
        "p_bias_part": (tiles * C, _F32),
    }
    return Workspace(**{name: size for name, size in sizes.items() if name not in names})


def _unneeded(call: Backward, cosine: bool) -> dict[str, str | None]:
    """The pointers that the kernels do without."""
    needs, of_search = call.needed, call.has_search
    of_query, of_key, of_value = (name in needs for name in ("query", "key", "value"))
    of_weight, of_bias = "weight" in needs, "bias" in needs
    needed = {
        "p_grad": of_value or of_weight or of_bias or call.through_rho,
        "p_value": of_weight or call.through_rho,
        "p_weight": call.has_weight,
        "p_query": of_search,
        "p_key": of_search,
        "p_direct": call.has_direct,
        "p_pairs": call.sorts,
        "p_next": call.sorts,
        "p_ends": call.sorts,
        "p_ones": call.sorts,
        "p_rho": of_value or of_weight or call.through_rho,
        "p_drho": call.through_rho,
        "p_offset": of_weight or call.through_rho,
        "p_rows": of_weight or call.through_rho,
        "p_ds": of_search,
        "p_columns": of_search,
        "p_tiles": of_search,
        "p_along_q": cosine and of_query,
        "p_along_k": cosine and of_key,
        "p_inverse_q": cosine,
        "p_inverse_k": cosine,
        "p_query_grad": of_query,
        "p_key_grad": of_key,
        "p_value_grad": of_value,
        "p_weight_rows": call.has_weight and of_value,
        "p_weight_again": call.has_weight and (of_weight or call.through_rho),
        "p_weight_part": of_weight,
        "p_weight_grad": of_weight,
        "p_bias_part": of_bias,
        "p_bias_grad": of_bias,
    }
    return {name: None for name, is_needed in needed.items() if not is_needed}
