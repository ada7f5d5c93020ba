# SPDX-License-Identifier: MIT
"""The backward of `forward` with a depthwise weight or none, in four launches.

| launch | file | what |
|---|---|---|
| `query_side_kernel` | query_side.py | dq, ds, parts of dW and db |
| `sort_pairs_kernel` | pairs.py | the pairs, sorted by blocks of keys; dW and db |
| `key_side_kernel`, of chunks | key_side.py | sums over parts of long lists |
| `key_side_kernel`, of keys | key_side.py | dV and dk |

For few tokens and 16 bits there are three others, in backward_small.py; and three in
backward_candidates.py, where few of them are candidates.

The backward of `aggregate` or of `select` alone is the same without the other part. What is not
needed is not computed: its pointers are None.

Where k is large, the temporaries of all pairs would be more than is allowed. Then the queries are
divided, and these launches follow for each part of them: tiles add to the same parts of dW and db,
and the key side to float32 sums of dV and dk, always in the same order. Where batch elements are so
many that this is not enough, they are divided, too (batch_parts.py).
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import configs, hardware
from .aggregation import RHOS
from .backward_call import Backward
from .backward_candidates import plan_candidates
from .backward_small import plan_small
from .batch_parts import batch_parts, new_sums
from .key_side import key_side_kernel
from .launch import Buffer, Plan, Pointers, Workspace, cache_plans
from .metrics import METRICS
from .norms import rescales
from .pairs import sort_pairs_kernel
from .query_side import query_side_kernel
from .tensors import Layout, cdiv, empty_gradient, rows_of

_F32 = torch.float32
_NO_ROWS = Layout(1, 1, 0, 0, 0, 0, 0)


@cache_plans
def plan_backward(call: Backward) -> Plan:
    """All gradients, from pointers that have the tensors of the call."""
    B, C, D = call.B, call.V.D, call.Q.D
    keys = configs.key_side(call.arch, call.bits, C, D, call.N, call.M, call.k)
    query = configs.query_side(call.arch, call.bits, C, D, call.k, call.align)
    sort = configs.sort_pairs(call.arch)
    rows_each, tiles, query_parts = _divide(call, keys)
    of_weight, of_bias = (
        cdiv(size, sort["COLUMNS"]) if name in call.needed else 0
        for name, size in (("weight", C * call.k), ("bias", C))
    )
    shared = _numbers(call, keys, rows_each, tiles)
    shared |= {"query_parts": query_parts, "weight_programs": of_weight}
    names = _unneeded(call, query["BLOCK_D"] < D, query_parts > 1)
    launches = []
    for part in range(query_parts):
        numbers = shared | {"query_part": part, "first_n": part * tiles * rows_each}
        launches.append(query_side_kernel.prepare(B * tiles, query, names, **numbers))
        # What the tiles add up of dW and db is complete after the last part.
        of_tiles = of_weight + of_bias if part + 1 == query_parts else 0
        programs = numbers["sort_programs"] + of_tiles
        if programs:
            launches.append(sort_pairs_kernel.prepare(programs, sort, names, **numbers))
        if call.sorts:
            launches += [
                key_side_kernel.prepare(
                    B * count * numbers["channel_blocks"],
                    keys,
                    names,
                    **numbers,
                    OF_CHUNKS=of_chunks,
                )
                for of_chunks, count in (
                    (True, numbers["chunks"]),
                    (False, numbers["key_blocks"]),
                )
                if count
            ]
    return Plan(launches, _workspace(call, keys, rows_each, tiles, query_parts > 1))


def _numbers(call: Backward, keys: configs.Config, rows_each: int, tiles: int) -> dict[str, Any]:
    """Numbers and constants that the kernels share, by parameter."""
    Q, K, V, pairs = call.Q, call.K, call.V, min(call.N, tiles * rows_each) * call.k
    return {
        "N": call.N,
        "M": call.M,
        "C": V.D,
        "D": Q.D,
        "k": call.k,
        "scale": call.scale,
        "B2": call.B2,
        "pairs": pairs,
        "tiles": tiles,
        "rows_each": rows_each,
        "key_blocks": cdiv(call.M, keys["KEYS"]),
        "parts": call.B * tiles,
        "sort_programs": call.B * tiles if call.sorts else 0,
        "chunks": pairs // keys["CHUNK"] if call.sorts else 0,
        "channel_blocks": max(cdiv(V.D, keys["BLOCK"]), cdiv(Q.D, keys["BLOCK"])),
        **Q.strides("q"),
        **K.strides("k"),
        **V.strides("v"),
        "ALIGN": call.align,
        "RHO": RHOS[call.rho],
        "METRIC": METRICS[call.metric],
        "RESCALE": rescales(call.query_dtype),
        "RHO_GRAD": call.through_rho,
        "KEYS": keys["KEYS"],
        "PRECISION_V": call.value_precision,
        "PRECISION_K": call.query_precision,
    }


def _divide(call: Backward, keys: configs.Config) -> tuple[int, int, int]:
    """The queries in a tile, the tiles of a batch element at a time, and how many times.

    All at once if their pairs fit in the memory that is allowed; else as many tiles as fit.
    """
    B, N, M, k, C = call.B, call.N, call.M, call.k, call.V.D
    rows = configs.rows_each(call.arch, B, N, C, k, cdiv(M, keys["KEYS"]))
    if rows * k >= 2**31:
        rows = 128  # kernels count the pairs of a tile in 32 bits
    allowed = _allowed(call)

    def taken(rows: int, tiles: int, several: bool = True) -> int:
        return _workspace(call, keys, rows, tiles, several).bytes

    all_tiles = cdiv(N, rows)
    if taken(rows, all_tiles, several=False) <= allowed:
        return rows, all_tiles, 1
    while rows > 32 and taken(rows, 1) > allowed:
        rows = 128 if rows > 128 else rows // 2
    # The fewest parts that fit; with the fewest tiles in them if none do.
    all_tiles = cdiv(N, rows)
    query_parts = next(
        (parts for parts in range(2, all_tiles) if taken(rows, cdiv(all_tiles, parts)) <= allowed),
        all_tiles,
    )
    tiles = cdiv(all_tiles, query_parts)
    return rows, tiles, cdiv(all_tiles, tiles)


def _allowed(call: Backward) -> int:
    return configs.allowed_backward(call.batch, call.N, call.M, call.V.D, call.Q.D, call.k)


@cache_plans
def elements_at_a_time(call: Backward) -> int:
    """How many batch elements' temporaries fit in the memory that is allowed for all of them."""
    parts, each = 1, call.batch
    while each > 1 and _temporary_bytes(call._replace(B=each), parts) > _allowed(call):
        parts = max(parts + 1, parts * 5 // 4)
        each = cdiv(call.batch, parts)
        # Whole inner dimensions, or a part of one; and addresses as well aligned as the first.
        step = next((n for n in (math.lcm(16, call.B2), call.B2, 16) if n <= each), 1)
        each = step * cdiv(each, step)
    return each


@cache_plans
def plan_at_once(call: Backward) -> Plan | None:
    """The plan for all batch elements; None if they are to be divided."""
    for plan in (plan_candidates, plan_small):
        small = plan(call)
        if small is not None:
            return small
    return plan_backward(call) if elements_at_a_time(call) == call.batch else None


def _temporary_bytes(call: Backward, parts: int) -> int:
    """Of a plan for one of so many parts of the batch, and of the sums of all parts."""
    keys = configs.key_side(call.arch, call.bits, call.V.D, call.Q.D, call.N, call.M, call.k)
    rows_each, tiles, query_parts = _divide(call, keys)
    sums = 4 * parts * call.V.D * (call.k + 1) if parts > 1 else 0
    return _workspace(call, keys, rows_each, tiles, query_parts > 1).bytes + sums


def _workspace(
    call: Backward, keys: configs.Config, rows_each: int, tiles: int, several_parts: bool
) -> Workspace:
    """The temporary memory for so many tiles of queries of each batch element."""
    B, N, M, k, C, D = call.B, call.N, call.M, call.k, call.V.D, call.Q.D
    query = configs.query_side(call.arch, call.bits, C, D, k, call.align)
    rows, pairs = tiles * rows_each, min(N, tiles * rows_each) * k
    of_tiles, of_list = (B * rows * k, _F32), (B * pairs, _F32)
    counts = (B * tiles * cdiv(M, keys["KEYS"]), torch.int32 if pairs < 2**31 else torch.int64)
    parts = B * (pairs // keys["CHUNK"]) * keys["KEYS"]
    channel_blocks = max(cdiv(C, keys["BLOCK"]), cdiv(D, keys["BLOCK"]))
    names = _unneeded(call, query["BLOCK_D"] < D, several_parts)

    def needed(**sizes: Buffer) -> dict[str, Buffer]:
        return {name: size for name, size in sizes.items() if name not in names}

    until_sorted = needed(
        p_rows=(of_tiles[0], torch.int32),
        p_rho=of_tiles,
        p_grad_s=of_tiles,
        p_unit=of_tiles,
        p_along=(B * rows, _F32),
        p_inverse=(B * N, _F32),
        p_counts=counts,
    )
    of_chunks = needed(
        p_value_part=(parts * C, _F32),
        p_key_part=(parts * D, _F32),
        p_along_part=(parts, _F32),
    )
    throughout = needed(
        p_weight_part=(B * tiles * k * C, _F32),
        p_bias_part=(B * tiles * C, _F32),
        p_weight_rows=(k * C, call.value_dtype),
        p_next=counts,
        p_pairs=(of_list[0], torch.int64),
        p_pair_rho=of_list,
        p_pair_ds=of_list,
        p_pair_along=of_list,
        p_value_sum=(B * M * C, _F32),
        p_key_sum=(B * M * D, _F32),
        p_along_sum=(B * channel_blocks * M, _F32),
    )
    return Workspace(until_sorted, of_chunks, **throughout)


def _unneeded(call: Backward, several_blocks: bool, several_parts: bool) -> dict[str, str | None]:
    """The pointers that the kernels do without."""
    needs, of_search = call.needed, call.has_search
    cosine = call.metric == "cosine" and of_search
    of_query, of_key, of_value = (name in needs for name in ("query", "key", "value"))
    needed = {
        "p_grad": bool(needs & {"value", "weight", "bias"}) or call.through_rho,
        "p_value": "weight" in needs or call.through_rho,
        "p_weight": call.has_weight,
        "p_query": of_search,
        "p_key": of_search,
        "p_direct": call.has_direct,
        "p_rho": bool(needs & {"value", "weight"}) or (call.through_rho and call.rho == "softmax"),
        "p_grad_s": call.has_direct or call.through_rho,
        "p_similarities_grad": "similarities" in needs,
        "p_along": cosine,
        "p_unit": cosine and of_query and several_blocks,
        "p_inverse": cosine,
        "p_query_grad": of_query,
        "p_weight_part": "weight" in needs,
        "p_bias_part": "bias" in needs,
        "p_weight_grad": "weight" in needs,
        "p_bias_grad": "bias" in needs,
        "p_weight_rows": call.has_weight and (of_value or call.through_rho),
        "p_counts": call.sorts,
        "p_next": call.sorts,
        "p_pairs": call.sorts,
        "p_pair_rho": of_value,
        "p_pair_ds": of_key,
        "p_pair_along": cosine and of_key,
        "p_value_part": of_value,
        "p_key_part": of_key,
        "p_along_part": cosine and of_key,
        "p_value_sum": of_value and several_parts,
        "p_key_sum": of_key and several_parts,
        "p_along_sum": cosine and of_key and several_parts,
        "p_value_grad": of_value,
        "p_key_grad": of_key,
    }
    return {name: None for name, is_needed in needed.items() if not is_needed}


def backward(
    needs: dict[str, bool],
    similarities: Tensor,
    indices: Tensor,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    weight: Tensor | None = None,
    grad_output: Tensor | None = None,
    grad_similarities: Tensor | None = None,
    metric: str = "dot",
    rho: str = "ones",
    scale: float = 1.0,
    candidates: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of the arguments that `needs` names, "bias" among them, in its order; without
    elements where it says False.

    query and key may be absent, or value and grad_output. With candidates, neighbors are among
    these rows of key, but for one of each query.
    """
    tensors = {"query": query, "key": key, "value": value, "weight": weight}
    tensors["similarities"] = similarities
    rows = key if value is None else value
    assert rows is not None
    # The bias itself is not an argument: its gradient has the channels of value.
    grads = {
        name: rows.new_empty(rows.shape[-1:] if is_needed else 0)
        if (X := tensors.get(name)) is None
        else empty_gradient(X, is_needed)
        for name, is_needed in needs.items()
    }
    of_output = value is not None and value.shape[-1] > 0
    if grad_similarities is None and (rho == "ones" or not of_output):
        # Nothing depends on the similarities.
        for name in needs.keys() & {"query", "key", "similarities"}:
            grads[name].zero_()
            needs = needs | {name: False}
    needed = frozenset(name for name, grad in grads.items() if needs[name] and grad.numel())
    if indices.numel() == 0 or rows.shape[-2] == 0:
        _without_pairs(grads, grad_output)
    elif needed:
        tensors |= {"indices": indices, "grad": grad_output, "direct": grad_similarities}
        tensors |= {"candidates": candidates}
        _launch(grads, tensors, rows, needed, metric, rho, scale)
    return tuple(grads.values())


def _launch(
    grads: dict[str, Tensor],
    tensors: dict[str, Tensor | None],
    rows: Tensor,
    needed: frozenset[str],
    metric: str,
    rho: str,
    scale: float,
) -> None:
    """The needed gradients, of which there are some, from pairs, of which there are some."""
    of_output = tensors["value"] is not None and tensors["value"].shape[-1] > 0
    if not needed & {"query", "key"}:
        tensors = tensors | {"query": None, "key": None, "direct": None}
    if not of_output:
        tensors = tensors | {"value": None}
    (Q, Q_layout), (K, K_layout), (V, V_layout) = (
        _rows(tensors[name]) for name in ("query", "key", "value")
    )
    similarities, indices = tensors["similarities"], tensors["indices"]
    assert similarities is not None
    assert indices is not None
    batch = V_layout if of_output else K_layout
    query_dtype = rows.dtype if Q is None else Q.dtype
    call = Backward(
        Q=Q_layout,
        K=K_layout,
        V=V_layout,
        batch=batch.B,
        B=batch.B,
        B2=batch.B2,
        N=indices.shape[-2],
        M=batch.N,
        k=indices.shape[-1],
        R=0 if tensors["candidates"] is None else tensors["candidates"].numel(),
        metric=metric,
        rho=rho,
        scale=scale,
        has_weight=tensors["weight"] is not None and of_output,
        has_direct=tensors["direct"] is not None,
        needed=needed,
        query_dtype=query_dtype,
        value_dtype=rows.dtype,
        query_precision=hardware.product_precision(query_dtype),
        value_precision=hardware.product_precision(rows.dtype),
        arch=hardware.architecture(similarities),
    )
    arguments: dict[str, Tensor | None] = {"p_query": Q, "p_key": K, "p_value": V}
    for name in ("similarities", "indices", "weight", "grad", "direct", "candidates"):
        X = tensors[name]
        # What is compiled does not depend on how a loss made a gradient.
        arguments[f"p_{name}"] = None if X is None else X.contiguous()
    arguments |= {
        f"p_{name}_grad": grads.get(name)
        for name in ("query", "key", "value", "weight", "similarities", "bias")
    }
    plan = plan_at_once(call)
    if plan is not None:
        plan(Pointers(rows.device, **arguments))
    else:
        _launch_in_parts(call, arguments, rows.device)


def _launch_in_parts(
    call: Backward, arguments: dict[str, Tensor | None], device: torch.device
) -> None:
    """The gradients of some batch elements after the other; see batch_parts.py."""
    parts = batch_parts(call.batch, call.B2, elements_at_a_time(call))
    sums = {
        name: new_sums(len(parts), arguments[name]) for name in ("p_weight_grad", "p_bias_grad")
    }
    for number, part in enumerate(parts):
        of_part = call._replace(
            Q=part.layout(call.Q),
            K=part.layout(call.K),
            V=part.layout(call.V),
            B=part.elements,
            B2=part.B2,
        )
        own = {
            "p_query": part.rows(arguments["p_query"], call.Q),
            "p_key": part.rows(arguments["p_key"], call.K),
            "p_value": part.rows(arguments["p_value"], call.V),
            "p_weight": arguments["p_weight"],
            "p_candidates": None,
        }
        own |= {name: X if X is None else X[number] for name, X in sums.items()}
        own |= {name: part.slice(X) for name, X in arguments.items() if name not in own}
        plan_backward(of_part)(Pointers(device, **own))
    for name, X in sums.items():
        grad = arguments[name]
        if X is not None and grad is not None:
            grad.copy_(X.sum(0).view_as(grad))


def _rows(X: Tensor | None) -> tuple[Tensor | None, Layout]:
    return (None, _NO_ROWS) if X is None else rows_of(X)


def _without_pairs(grads: dict[str, Tensor], grad_output: Tensor | None) -> None:
    """Nothing but the gradient of bias depends on anything."""
    for grad in grads.values():
        grad.zero_()
    if "bias" in grads and grads["bias"].numel() and grad_output is not None:
        batch = tuple(range(grad_output.dim() - 1))
        grads["bias"].copy_(grad_output.sum(dim=batch, dtype=_F32))
