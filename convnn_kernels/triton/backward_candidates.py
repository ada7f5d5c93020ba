# SPDX-License-Identifier: MIT
"""The backward of `forward` with a depthwise weight or none for few tokens and 16 bits, as that of
backward_small.py, where few of the tokens are candidates, in three launches.

| launch | file | what |
|---|---|---|
| `query_side_candidates_kernel` | query_side_candidates.py | ds, norms, a part of dW |
| `key_side_candidates_kernel` | key_side_candidates.py | dV, dk and dq; the other part, and db |
| `sum_parts_kernel` | key_side_candidates.py | dW and db; not where neither is needed |

All neighbors of a query are candidates but for one, which is the query's own row. Then products
with all candidates take the place of rows gathered for each neighbor. Candidates are at most 32,
and distinct. If a query has more rows that
are no candidates, its gradients are wrong, but nothing is read or written out of bounds.
"""

from typing import Any

import torch

from . import configs
from .aggregation import RHOS
from .backward_call import Backward
from .key_side_candidates import key_side_candidates_kernel, sum_parts_kernel
from .launch import Plan, Workspace
from .metrics import METRICS
from .norms import rescales
from .query_side_candidates import NUMBERS, query_side_candidates_kernel
from .tensors import cdiv

_F32, _I32 = torch.float32, torch.int32


def plan_candidates(call: Backward) -> Plan | None:
    """All gradients; None where there are too many candidates, or plan_small has no plan, or where
    not all gradients but those of weight and bias are needed."""
    B, N, M, k, C, D = call.B, call.N, call.M, call.k, call.V.D, call.Q.D
    dtypes, bits = {call.query_dtype, call.value_dtype}, 8 * call.value_dtype.itemsize
    if len(dtypes) > 1 or not call.through_rho or "similarities" in call.needed:
        return None
    if not call.needed >= {"query", "key", "value"}:
        return None
    if (call.value_dtype, call.metric, call.rho) == (torch.float16, "dot", "similarity"):
        return None  # rho may be beyond its range
    sizes, float16 = (B, N, M, C, D, k, call.R), call.value_dtype == torch.float16
    if not configs.allows_backward_candidates(
        call.arch, bits, *sizes, call.metric, call.align, float16
    ):
        return None
    query_blocks = configs.query_side_candidates(call.arch, N, C, D, call.R, float16)
    key_blocks = configs.key_side_candidates(call.arch, B, N, C, D, call.R)
    names = _unneeded(call)
    workspace = _workspace(call, query_blocks, names)
    if workspace.bytes > configs.allowed_backward(call.batch, N, M, C, D, k):
        return None
    numbers = _numbers(call, query_blocks, key_blocks, names)
    programs = {
        query_side_candidates_kernel: (B * numbers["tiles"], query_blocks),
        key_side_candidates_kernel: (B * numbers["blocks"], key_blocks),
        sum_parts_kernel: (numbers["part_programs"], configs.sum_parts()),
    }
    launches = [
        kernel.prepare(count, blocks, names, **numbers)
        for kernel, (count, blocks) in programs.items()
        if count
    ]
    return Plan(launches, workspace)


def _numbers(
    call: Backward,
    query_blocks: configs.Config,
    key_blocks: configs.Config,
    names: dict[str, str | None],
) -> dict[str, Any]:
    """Numbers and constants that the kernels share, by parameter."""
    B, N, k, C, D = call.B, call.N, call.k, call.V.D, call.Q.D
    tiles, sums = cdiv(N, query_blocks["ROWS"]), configs.sum_parts()["SUMS"]
    of_value, of_key = (cdiv(size, key_blocks["BLOCK"]) for size in (C, D))
    of_weight, of_bias = (
        0 if f"p_{name}_part" in names else cdiv(size, sums)
        for name, size in (("weight", C * k), ("bias", C))
    )
    return {
        "N": N,
        "M": call.M,
        "C": C,
        "D": D,
        "R": call.R,
        "k": k,
        "K": k,
        "scale": call.scale,
        "B": B,
        "B2": call.B2,
        "tiles": tiles,
        "rows": tiles * query_blocks["ROWS"],
        "value_blocks": of_value,
        "blocks": of_value + of_key,
        "weight_parts": B * tiles + B,
        "weight_programs": of_weight,
        "part_programs": of_weight + of_bias,
        **call.Q.strides("q"),
        **call.K.strides("k"),
        **call.V.strides("v"),
        "ALIGN": call.align,
        "RHO": RHOS[call.rho],
        "METRIC": METRICS[call.metric],
        "RESCALE": rescales(call.query_dtype),
        "SLOTS": configs.SLOTS,
        "TILE": query_blocks["TILE"],
        "COLUMNS": query_blocks["COLUMNS"],
        "WHOLE": C % (query_blocks["BLOCKS"] * query_blocks["BLOCK_C"]) == 0,
    }


def _workspace(
    call: Backward, query_blocks: configs.Config, names: dict[str, str | None]
) -> Workspace:
    """The temporary memory."""
    B, k, C = call.B, call.k, call.V.D
    columns, tiles = query_blocks["COLUMNS"], cdiv(call.N, query_blocks["ROWS"])
    rows = tiles * query_blocks["ROWS"]
    # The range of float16 is too small.
    factors = _F32 if call.value_dtype == torch.float16 else call.value_dtype
    sizes = {
        "p_positions": (B * tiles * 256, torch.int8),
        "p_columns": (B * k * rows, torch.int8),
        "p_slots": (B * rows * columns, torch.int16),
        "p_rho": (B * rows * columns, call.value_dtype),
        "p_factor": (B * rows * columns, factors),
        "p_own": (B * rows, _I32),
        "p_numbers": (B * rows * NUMBERS.value, _F32),
        "p_ranges": (B * rows // query_blocks["TILE"] * 2, _I32),
        "p_along": (B * tiles * columns, _F32),
        "p_inverse": (B * columns, _F32),
        "p_flags": (B * tiles * 2, _F32),
        "p_weight_rows": (k * C, call.value_dtype),
        "p_weight_part": (B * (tiles + 1) * k * C, _F32),
        "p_bias_part": (B * C, _F32),
    }
    return Workspace(**{name: size for name, size in sizes.items() if name not in names})


def _unneeded(call: Backward) -> dict[str, str | None]:
    """The pointers that the kernels do without."""
    of_weight, of_bias = "weight" in call.needed, "bias" in call.needed
    cosine = call.metric == "cosine"
    needed = {
        "p_weight": call.has_weight,
        "p_weight_rows": call.has_weight,
        "p_direct": call.has_direct,
        "p_along": cosine,
        "p_inverse": cosine,
        "p_weight_part": of_weight,
        "p_weight_grad": of_weight,
        "p_bias_part": of_bias,
        "p_bias_grad": of_bias,
    }
    return {name: None for name, is_needed in needed.items() if not is_needed}
