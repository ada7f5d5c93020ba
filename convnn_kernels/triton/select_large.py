# SPDX-License-Identifier: MIT
"""Select where there are many columns, in four launches.

| kernel | what it does |
|---|---|
| `columns_kernel` | what the sweep reads of each column, and norms of keys |
| `threshold_kernel` | only where columns are divided among programs: maxima of groups |
| `sweep_kernel` | norms of queries; a threshold for each, and the columns that reach it: hits |
| `exact_topk_kernel` | rows with more hits than a queue holds |
| `finish_kernel` | the k best hits; in `forward`, rho and a depthwise convolution of them |
"""

from typing import Any, NamedTuple

import torch

from . import configs, hardware
from .aggregation import Aggregation
from .columns import columns_kernel
from .exact_topk import prepare_exact_topk
from .finish import prepare_finish
from .launch import Buffer, Launch, Plan, Pointers, Workspace, cache_plans
from .search import Search
from .sweep import sweep_kernel, threshold_kernel
from .tensors import Layout, alignment, cdiv


class Sweep(NamedTuple):
    """A search by threshold and hits: what its launches have in common."""

    search: Search
    config: dict[str, Any]
    precision: str
    needs_bounds: bool  # whether products are bounds of similarities and not similarities
    splits: int

    @property
    def tiles(self) -> int:
        return _tiles(self.search.columns, self.config)

    @property
    def row_bytes(self) -> int:
        """Temporary memory for each query."""
        of_threshold = 4 * self.config["GROUPS"] if self.splits > 1 else 0
        of_queues = self.config["QUEUES"] * (8 * self.config["CAP"] + 4)
        return self.splits * (of_threshold + of_queues)

    @property
    def needs_query_norms(self) -> bool:
        """Whether norms of the queries are needed, and are not those of the keys."""
        is_cosine = self.search.metric == "cosine"
        return (is_cosine and not self.search.one_tensor) or (self.needs_bounds and not is_cosine)

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """The queries and keys that the first kernel of the sweep reads."""
        Q, K = self.search.Q, self.search.K
        scaled = self.search.scales_rows
        if scaled and self.search.one_tensor:
            Q = Q.contiguous()
        return Q, K.contiguous() if scaled or self.precision == "split" else K

    @property
    def stride_piece(self) -> int:
        """Elements of a piece of all keys, a multiple of 16 so that pieces are aligned."""
        return 16 * cdiv(_rows(self.search.K), 16) if self.precision == "split" else 0

    @property
    def tolerance(self) -> float:
        """A bound of the error of a product of D channels and of a sum of squared differences,
        relative to ||q||^2 + ||k||^2: for each channel a unit of 2^-24 of either, and 32 for what
        else is rounded; see `configs.screen_precision` and `needs_bounds`."""
        return (2 * self.search.Q.D + 32) * 2.0**-24 if self.needs_bounds else 0.0

    def numbers(self) -> dict[str, Any]:
        """Numbers and constants that the kernels share, by parameter."""
        D, block_d = self.search.Q.D, self.config["BLOCK_D"]
        return self.search.numbers() | {
            "B": self.search.Q.B,
            "splits": self.splits,
            "tiles_each": cdiv(self.tiles, self.splits),
            "tolerance": self.tolerance,
            "stride_piece": self.stride_piece,
            "PRECISION": self.precision,
            "RESCALE": self.search.scales_rows,
            "BOUNDS": self.needs_bounds,
            "INTERPRETED": hardware.interpreted(),
            "ONE_BLOCK_D": block_d >= D,
            "WHOLE_D": block_d == D,
        }


def _tiles(columns: int, config: dict[str, Any]) -> int:
    """As `tiles_of` in columns.py."""
    return cdiv(columns - (config["BLOCK_M"] - config["ADVANCE"]), config["ADVANCE"])


def sweep_of(search: Search) -> Sweep:
    Q, metric, bits = search.Q, search.metric, search.bits
    config = configs.sweep(search.arch, bits, Q.D, search.columns, search.ranks, search.has_range)
    tiles = _tiles(search.columns, config)
    row_blocks = Q.B * cdiv(Q.N, config["BLOCK_N"])
    splits = configs.column_splits(search.arch, config["BLOCK_N"], row_blocks, tiles)
    # No range without tiles.
    splits = cdiv(tiles, cdiv(tiles, splits))
    config["CAP"] = configs.queue_length(config["CAP"], splits)
    precision = configs.screen_precision(bits, search.tf32, metric)
    needs_bounds = configs.needs_bounds(bits, Q.D, metric, search.tf32)
    return Sweep(search, config, precision, needs_bounds, splits)


class Columns(NamedTuple):
    """What `columns_kernel` leaves for the others."""

    buffers: dict[str, Buffer]
    own_names: dict[str, str | None]  # the pointers that the kernel does without
    names: dict[str, str | None]  # pointers of the other kernels, by parameter


def columns_of(sweep: Sweep, aggregation: Aggregation | None = None) -> Columns:
    """The buffers of `columns_kernel`, of the sweep's queries, and of the aggregation."""
    search = sweep.search
    Q, K, is_cosine = search.Q, search.K, search.metric == "cosine"
    f32, per_column = torch.float32, Q.B * sweep.tiles * sweep.config["BLOCK_M"]
    splits, scales = sweep.precision == "split", search.scales_rows
    piece = torch.float32 if hardware.interpreted() else torch.bfloat16
    by_bounds = sweep.needs_bounds and not is_cosine
    buffers: dict[str, Buffer] = {
        "p_valid": (Q.B * sweep.tiles * sweep.config["QUEUES"], torch.int32),
        "p_rows": (Q.B * Q.N, torch.int32),
    }
    wanted = {
        "p_is_listed": (sweep.splits > 1, (Q.B * Q.N, torch.int32)),
        "p_factor": (not by_bounds, (per_column, f32)),
        "p_low": (by_bounds, (per_column, f32)),
        "p_high": (by_bounds, (per_column, f32)),
        "p_query_norm": (sweep.needs_query_norms, (Q.B * Q.N, f32)),
        "p_key_norm": (is_cosine, (K.B * K.N, f32)),
        "p_query_scaled": (sweep.needs_query_norms and scales, (_rows(Q), search.dtype)),
        "p_key_scaled": (scales, (_rows(K), search.dtype)),
        "p_key_pieces": (splits, (3 * sweep.stride_piece, piece)),
    }
    own_names: dict[str, str | None] = {}
    for name, (needed, buffer) in wanted.items():
        if needed:
            buffers[name] = buffer
        else:
            own_names[name] = None
    names = dict(own_names)
    if aggregation is not None:
        buffers["p_terms"] = (Q.B * Q.N * search.k, torch.int64)
    if aggregation is None or not aggregation.has_weight:
        own_names |= {"p_weight": None, "p_weight_rows": None}
        names["p_weight_rows"] = None
    else:
        buffers["p_weight_rows"] = (aggregation.V.D * search.k, aggregation.dtype)
    if is_cosine and search.one_tensor:
        names["p_query_norm"] = "p_key_norm"
    if search.scales_rows:
        names["p_key"] = "p_key_scaled"
        names["p_query"] = "p_key_scaled" if search.one_tensor else "p_query_scaled"
    return Columns(buffers, own_names, names)


def prepare_columns(sweep: Sweep, columns: Columns, lists: int) -> Launch:
    """The launch of `columns_kernel`, for lists of so many parts."""
    search = sweep.search
    Q, K = search.Q, search.K
    config = configs.columns(search.arch, Q.D)
    scaled = K.contiguous()
    has_own_keys = search.has_candidates and (search.metric == "cosine" or sweep.stride_piece > 0)
    key_programs = K.B * cdiv(K.N, config["ROWS"]) if has_own_keys else 0
    weight, _ = columns.buffers.get("p_weight_rows", (0, None))
    return columns_kernel.prepare(
        Q.B * sweep.tiles + key_programs,
        config,
        columns.own_names,
        **sweep.numbers()
        | sweep.config
        | K.strides("k")
        | {"stride_ksb1": scaled.stride_b1, "stride_ksb2": scaled.stride_b2}
        | {
            "key_programs": key_programs,
            "lists": lists,
            "C": weight // search.k,
            "ALIGN": alignment(K, scaled),
        },
    )


def _rows(X: Layout) -> int:
    """The elements of X, each row once, however many batch elements share it."""
    once = X.distinct()
    return once.B * once.N * once.D


class Part(NamedTuple):
    """Queries that are searched together: as many as the temporary memory has room for."""

    first_b: int
    count_b: int
    first_n: int
    rows_n: int

    @property
    def rows(self) -> int:
        return self.count_b * self.rows_n


def parts_of(sweep: Sweep, fixed: int, C: int = 0) -> list[Part]:
    """Whole batch elements, or row blocks of one, where `fixed` bytes are taken whatever the parts,
    and rows of value have C channels."""
    search = sweep.search
    Q, K, block = search.Q, search.K, sweep.config["BLOCK_N"]
    allowed = configs.allowed_memory(Q.B, Q.N, K.N, Q.D, C, search.k)
    rows = max(allowed - fixed, configs.WORKSPACE // 4) // sweep.row_bytes
    if rows >= Q.N:
        each = _equal_parts(Q.B, rows // Q.N, 1)
        return [Part(b, min(each, Q.B - b), 0, Q.N) for b in range(0, Q.B, each)]
    each = _equal_parts(Q.N, rows, block)
    return [Part(b, 1, n, min(each, Q.N - n)) for b in range(Q.B) for n in range(0, Q.N, each)]


def _equal_parts(count: int, most: int, block: int) -> int:
    """The size of the fewest parts that have at most `most` each, but for a multiple of `block`."""
    parts = cdiv(count, max(1, most // block) * block)
    return cdiv(cdiv(count, parts), block) * block


def part_numbers(sweep: Sweep, part: Part) -> dict[str, Any]:
    return sweep.numbers() | sweep.config | part._asdict()


def prepare_sweep(
    sweep: Sweep, part: Part, list_number: int, names: dict[str, str | None]
) -> list[Launch]:
    """The hits of some queries."""
    Q, K = sweep.layouts
    scaled = Q.contiguous()
    numbers = part_numbers(sweep, part) | {
        "list_number": list_number,
        "k": sweep.search.ranks,
        **Q.strides("q"),
        **{f"stride_qs{of}": scaled.strides("q")[f"stride_q{of}"] for of in ("b1", "b2", "n")},
        **K.strides("k"),
        "ALIGN": alignment(Q, scaled, K),
    }
    blocks = part.count_b * cdiv(part.rows_n, sweep.config["BLOCK_N"])
    own_names = dict(names)
    if sweep.needs_query_norms:
        own_names.pop("p_query", None)
    if sweep.splits == 1:
        own_names["p_maxima"] = None
    if sweep.precision == "split":
        own_names["p_key"] = "p_key_pieces"
    kernels = [threshold_kernel] if sweep.splits > 1 else []
    return [
        kernel.prepare(
            blocks * sweep.splits,
            sweep.config,
            own_names,
            **numbers,
            OF_QUERIES=sweep.needs_query_norms and number == 0,
        )
        for number, kernel in enumerate((*kernels, sweep_kernel))
    ]


def sweep_buffers(sweep: Sweep, rows: int) -> dict[str, Buffer]:
    """The hits of `rows` queries."""
    queues, splits = sweep.splits * sweep.config["QUEUES"], sweep.splits
    buffers: dict[str, Buffer] = {
        "p_queue": (rows * queues * sweep.config["CAP"], torch.int64),
        "p_count": (rows * queues, torch.int32),
    }
    if splits > 1:
        buffers["p_maxima"] = (rows * splits * sweep.config["GROUPS"], torch.float32)
    return buffers


@cache_plans
def plan_select_large(search: Search, aggregation: Aggregation | None) -> Plan:
    """`select`; with an aggregation, depthwise or without a weight, all of `forward`."""
    sweep = sweep_of(search)
    columns = columns_of(sweep, aggregation)
    C = 0 if aggregation is None else aggregation.V.D
    parts = parts_of(sweep, Workspace(**columns.buffers).bytes, C)
    buffers = columns.buffers | sweep_buffers(sweep, max(part.rows for part in parts))
    buffers["p_listed"] = (len(parts) * search.Q.B, torch.int32)
    launches = [prepare_columns(sweep, columns, len(parts))]
    for number, part in enumerate(parts):
        numbers = part_numbers(sweep, part)
        launches += [
            *prepare_sweep(sweep, part, number, columns.names),
            prepare_exact_topk(search, columns.names, number),
            prepare_finish(search, sweep.needs_bounds, numbers, columns.names, aggregation),
        ]
    return Plan(launches, **buffers)


def select_large(search: Search, pointers: Pointers, aggregation: Aggregation | None) -> None:
    """Select where there are many columns; see `plan_select_large`."""
    plan_select_large(search, aggregation)(pointers)
