# SPDX-License-Identifier: MIT
"""The backward of `forward` with a depthwise weight or none for few tokens and 16 bits, in three
launches.

| launch | file | what |
|---|---|---|
| `list_pairs_kernel` | list_pairs.py | the pairs, sorted by key; inverse norms |
| `query_side_small_kernel` | query_side_small.py | dq, ds, parts of dW and db |
| `key_side_small_kernel` | key_side_small.py | dV and dk; dW and db |

As in backward.py, which chooses between the two, what is not needed is not computed.
"""

from typing import Any

import torch

from . import configs
from .aggregation import RHOS
from .backward_call import Backward
from .key_side_small import key_side_small_kernel
from .launch import Buffer, Plan, Workspace
from .list_pairs import list_pairs_kernel
from .metrics import METRICS
from .norms import rescales
from .query_side_small import query_side_small_kernel
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
    if not configs.allows_backward_small(bits, N, M, k, metric):
        return None
    float16 = call.value_dtype == torch.float16
    query_blocks = configs.query_side_small(call.arch, C, D, call.align, float16)
    list_blocks = configs.list_pairs(call.arch, N, D, query_blocks["ROWS"])
    key_blocks = configs.key_side_small(call.arch, N, C, D)
    tiles = cdiv(N, query_blocks["ROWS"])
    rows = tiles * query_blocks["ROWS"]
    names = _unneeded(call, metric == "cosine")
    workspace = _workspace(call, tiles, rows, list_blocks, key_blocks["KEYS"], names)
    if workspace.bytes > configs.allowed_backward(call.batch, N, M, C, D, k):
        return None
    numbers = _numbers(call, metric, tiles, rows, list_blocks, key_blocks, names)
    programs = {
        list_pairs_kernel: (numbers["list_programs"], list_blocks),
        query_side_small_kernel: (B * tiles, query_blocks),
        key_side_small_kernel: (numbers["key_programs"], key_blocks),
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
    rows: int,
    list_blocks: configs.Config,
    key_blocks: configs.Config,
    names: dict[str, str | None],
) -> dict[str, Any]:
    """Numbers and constants that the kernels share, by parameter."""
    B, N, M, k, C, D = call.B, call.N, call.M, call.k, call.V.D, call.Q.D
    of_query, of_key = (
        0 if "p_inverse_q" in names else B * cdiv(count, list_blocks["ROWS"]) for count in (N, M)
    )
    of_value, of_search = (
        cdiv(size, key_blocks["BLOCK"]) if name in call.needed else 0
        for name, size in (("value", C), ("key", D))
    )
    of_weight, of_bias = (
        cdiv(size, key_blocks["COLUMNS"]) if name in call.needed else 0
        for name, size in (("weight", C * k), ("bias", C))
    )
    keys_each = configs.keys_each(call.arch, B * (of_value + of_search))
    groups = cdiv(M, keys_each)
    sums = B * groups * (of_value + of_search)
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
        "key_blocks": cdiv(M, key_blocks["KEYS"]),
        "first_key": B + of_query,
        "first_other": B + of_query + of_key,
        "list_programs": B + of_query + of_key + 1 + k * ("p_weight_rows" not in names),
        "rows": rows,
        "tiles": tiles,
        "parts": B * tiles,
        "groups": groups,
        "keys_each": keys_each,
        "value_blocks": of_value,
        "blocks": of_value + of_search,
        "sum_programs": sums,
        "weight_programs": of_weight,
        "key_programs": sums + of_weight + of_bias,
        **call.Q.strides("q"),
        **call.K.strides("k"),
        **call.V.strides("v"),
        "ALIGN": call.align,
        "RHO": RHOS[call.rho],
        "METRIC": METRICS[metric],
        "RESCALE": rescales(call.query_dtype),
        "RHO_GRAD": call.through_rho,
        "SLOTS": configs.SLOTS,
        "KEYS": key_blocks["KEYS"],
        "WHOLE": C % key_blocks["BLOCK"] == D % key_blocks["BLOCK"] == 0,
    }


def _workspace(
    call: Backward,
    tiles: int,
    rows: int,
    list_blocks: configs.Config,
    keys: int,
    names: dict[str, str | None],
) -> Workspace:
    """The temporary memory for so many tiles and rows of queries of each batch element."""
    parts = call.B * tiles
    B, N, M, k, C = call.B, call.N, call.M, call.k, call.V.D
    of_pairs = B * rows * configs.SLOTS
    sizes: dict[str, Buffer] = {
        "p_rows": (of_pairs, _I32),
        "p_pairs": (B * N * k, _I32),
        "p_next": (B * list_blocks["QUERIES"] * list_blocks["BLOCKS"], torch.int16),
        "p_ends": (B * cdiv(M, keys), _I32),
        "p_ones": ((keys + 1) * keys, call.value_dtype),
        "p_rho": (of_pairs, _F32),
        "p_drho": (of_pairs, _F32),
        "p_unit": (of_pairs, torch.int64),
        "p_factor": (of_pairs, _F32),
        "p_along": (of_pairs, _F32),
        "p_inverse_q": (B * N, _F32),
        "p_inverse_k": (B * M, _F32),
        "p_weight_rows": (k * C, call.value_dtype),
        "p_weight_part": (parts * C * k, _F32),
        "p_bias_part": (parts * C, _F32),
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
        "p_unit": of_query,
        "p_factor": of_key,
        "p_along": cosine and of_key,
        "p_inverse_q": cosine,
        "p_inverse_k": cosine,
        "p_query_grad": of_query,
        "p_key_grad": of_key,
        "p_value_grad": of_value,
        "p_weight_rows": call.has_weight and (of_value or call.through_rho),
        "p_weight_part": of_weight,
        "p_weight_grad": of_weight,
        "p_bias_part": of_bias,
        "p_bias_grad": of_bias,
    }
    return {name: None for name, is_needed in needed.items() if not is_needed}
