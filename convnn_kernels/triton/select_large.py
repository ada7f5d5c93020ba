# SPDX-License-Identifier: MIT
"""Select where there are many columns, in four launches.

| kernel | what it does |
|---|---|
| `columns_kernel` | norms, and what the sweep reads of each column |
| `threshold_kernel` | only where columns are divided among programs: maxima of groups |
| `sweep_kernel` | a threshold for each row, and the columns that reach it: hits |
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
from .launch import Buffer, Launch, Plan, Pointers, cache_plans
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
        return self.splits * (of_threshold + of_queues + 4)

    @property
    def query_rows(self) -> Layout:
        """The queries as the sweep reads them."""
        Q = self.search.Q
        return Q.contiguous() if self.search.scales_rows else Q

    @property
    def stride_piece(self) -> int:
        """Elements of a piece of all keys, a multiple of 16 so that pieces are aligned."""
        return 16 * cdiv(_rows(self.search.K), 16) if self.precision == "split" else 0

    @property
    def tolerance(self) -> float:
        """A bound of the error of a product of D channels and of a sum of squared differences,
        relative to ||q||^2 + ||k||^2; see `configs.screen_precision`."""
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
            "INTERPRETED": hardware.interpreted(),
            "ONE_BLOCK_D": block_d >= D,
            "WHOLE_D": block_d == D,
        }


def _tiles(columns: int, config: dict[str, Any]) -> int:
    """As `tiles_of` in columns.py."""
    return cdiv(columns - (config["BLOCK_M"] - config["ADVANCE"]), config["ADVANCE"])


def sweep_of(search: Search) -> Sweep:
    Q, metric, bits = search.Q, search.metric, search.bits
    config = configs.sweep(search.arch, bits, Q.D, search.columns, search.k)
    tiles = _tiles(search.columns, config)
    splits = configs.column_splits(search.arch, Q.B * cdiv(Q.N, config["BLOCK_N"]), tiles)
    # No range without tiles.
    splits = cdiv(tiles, cdiv(tiles, splits))
    config["CAP"] = configs.queue_length(config["CAP"], splits)
    precision = configs.screen_precision(bits, search.tf32)
    needs_bounds = configs.needs_bounds(bits, Q.D, metric, search.tf32)
    return Sweep(search, config, precision, needs_bounds, splits)


def prepare_columns(
    sweep: Sweep, lists: int, aggregation: Aggregation | None = None
) -> tuple[Launch, dict[str, Buffer], dict[str, str | None]]:
    """The launch of `columns_kernel`, its buffers, and the names of pointers for other kernels."""
    search = sweep.search
    Q, K, is_cosine = search.Q, search.K, search.metric == "cosine"
    config = configs.columns(search.arch, Q.D)
    queries_have_norms = is_cosine or sweep.needs_bounds
    own_query = queries_have_norms and not (search.one_tensor and is_cosine)
    f32, per_column = torch.float32, Q.B * sweep.tiles * sweep.config["BLOCK_M"]
    splits = sweep.precision == "split"
    piece = torch.float32 if hardware.interpreted() else torch.bfloat16
    by_bounds = sweep.needs_bounds and not is_cosine
    buffers: dict[str, Buffer] = {
        "p_valid": (Q.B * sweep.tiles * sweep.config["QUEUES"], torch.int32),
        "p_listed": (lists * Q.B, torch.int32),
    }
    wanted = {
        "p_factor": (not by_bounds, (per_column, f32)),
        "p_low": (by_bounds, (per_column, f32)),
        "p_high": (by_bounds, (per_column, f32)),
        "p_query_norm": (own_query, (Q.B * Q.N, f32)),
        "p_key_norm": (is_cosine, (K.B * K.N, f32)),
        "p_query_scaled": (search.scales_rows and own_query, (_rows(Q), search.dtype)),
        "p_key_scaled": (search.scales_rows, (_rows(K), search.dtype)),
        "p_key_pieces": (splits, (3 * sweep.stride_piece, piece)),
    }
    own_names: dict[str, str | None] = {}
    for name, (needed, buffer) in wanted.items():
        if needed:
            buffers[name] = buffer
        else:
            own_names[name] = None
    names = dict(own_names)
    C = 0
    if aggregation is None or not aggregation.has_weight:
        own_names |= {"p_weight": None, "p_weight_rows": None}
        names["p_weight_rows"] = None
    else:
        C = aggregation.V.D
        buffers["p_weight_rows"] = (C * search.k, aggregation.dtype)
    if is_cosine and search.one_tensor:
        names["p_query_norm"] = "p_key_norm"
    if search.scales_rows:
        names["p_key"] = "p_key_scaled"
        names["p_query"] = "p_key_scaled" if search.one_tensor else "p_query_scaled"
    has_own_keys = search.has_candidates and (is_cosine or splits)
    key_programs = K.B * cdiv(K.N, config["ROWS"]) if has_own_keys else 0
    query_programs = Q.B * cdiv(Q.N, config["ROWS"]) if own_query else 0
    launch = columns_kernel.prepare(
        Q.B * sweep.tiles + key_programs + query_programs,
        config,
        own_names,
        **sweep.numbers()
        | sweep.config
        | Q.strides("q")
        | K.strides("k")
        | _batch_strides(Q, "qs")
        | _batch_strides(K, "ks")
        | {
            "key_programs": key_programs,
            "lists": lists,
            "C": C,
            "RESCALE": search.scales_rows,
            "ALIGN": alignment(Q, K, Q.contiguous(), K.contiguous()),
        },
    )
    return launch, buffers, names


def _rows(X: Layout) -> int:
    """The elements of X, each row once, however many batch elements share it."""
    once = X.distinct()
    return once.B * once.N * once.D


def _batch_strides(X: Layout, letters: str) -> dict[str, int]:
    """Strides of batch elements in the scaled rows of X."""
    scaled = X.contiguous()
    return {f"stride_{letters}b1": scaled.stride_b1, f"stride_{letters}b2": scaled.stride_b2}


class Part(NamedTuple):
    """Queries that are searched together: as many as the temporary memory has room for."""

    first_b: int
    count_b: int
    first_n: int
    rows_n: int

    @property
    def rows(self) -> int:
        return self.count_b * self.rows_n


def parts_of(sweep: Sweep) -> list[Part]:
    """Whole batch elements, or row blocks of one."""
    Q, K, block = sweep.search.Q, sweep.search.K, sweep.config["BLOCK_N"]
    allowed = configs.allowed_workspace(Q.B, Q.N, K.N, Q.D, sweep.search.k)
    rows = max(allowed, configs.WORKSPACE) // sweep.row_bytes
    if rows >= Q.N:
        each = rows // Q.N
        return [Part(b, min(each, Q.B - b), 0, Q.N) for b in range(0, Q.B, each)]
    each = max(1, rows // block) * block
    return [Part(b, 1, n, min(each, Q.N - n)) for b in range(Q.B) for n in range(0, Q.N, each)]


def part_numbers(sweep: Sweep, part: Part) -> dict[str, Any]:
    return sweep.numbers() | sweep.config | part._asdict()


def prepare_sweep(
    sweep: Sweep, part: Part, list_number: int, names: dict[str, str | None]
) -> list[Launch]:
    """The hits of some queries."""
    numbers = part_numbers(sweep, part) | {"list_number": list_number}
    blocks = part.count_b * cdiv(part.rows_n, sweep.config["BLOCK_N"])
    own_names = dict(names)
    if not sweep.needs_bounds:
        own_names["p_query_norm"] = None
    if sweep.splits == 1:
        own_names["p_maxima"] = None
    if sweep.precision == "split":
        own_names["p_key"] = "p_key_pieces"
        numbers |= sweep.search.K.contiguous().strides("k")
        numbers["ALIGN"] = alignment(sweep.query_rows, sweep.search.K.contiguous())
    kernels = [threshold_kernel] if sweep.splits > 1 else []
    return [
        kernel.prepare(blocks * sweep.splits, sweep.config, own_names, **numbers)
        for kernel in (*kernels, sweep_kernel)
    ]


def sweep_buffers(sweep: Sweep, rows: int) -> dict[str, Buffer]:
    """What `prepare_sweep` needs for `rows` queries."""
    queues, splits = sweep.splits * sweep.config["QUEUES"], sweep.splits
    buffers: dict[str, Buffer] = {
        "p_queue": (rows * queues * sweep.config["CAP"], torch.int64),
        "p_count": (rows * queues, torch.int32),
        "p_rows": (sweep.search.Q.B * sweep.search.Q.N * splits, torch.int32),
    }
    if splits > 1:
        buffers["p_maxima"] = (rows * splits * sweep.config["GROUPS"], torch.float32)
    return buffers


@cache_plans
def plan_select_large(search: Search, aggregation: Aggregation | None) -> Plan:
    """`select`; with an aggregation, depthwise or without a weight, all of `forward`."""
    sweep = sweep_of(search)
    parts = parts_of(sweep)
    columns, buffers, names = prepare_columns(sweep, len(parts), aggregation)
    buffers |= sweep_buffers(sweep, max(part.rows for part in parts))
    if aggregation is not None:
        buffers["p_terms"] = (search.Q.B * search.Q.N * search.k, torch.int64)
    launches = [columns]
    for number, part in enumerate(parts):
        numbers = part_numbers(sweep, part)
        launches += [
            *prepare_sweep(sweep, part, number, names),
            prepare_exact_topk(search, names, number, sweep.splits),
            prepare_finish(search, sweep.needs_bounds, numbers, names, aggregation),
        ]
    return Plan(launches, **buffers)


def select_large(search: Search, pointers: Pointers, aggregation: Aggregation | None) -> None:
    """Select where there are many columns; see `plan_select_large`."""
    plan_select_large(search, aggregation)(pointers)
