# SPDX-License-Identifier: MIT
"""What `tools.predict` assumes of each CUDA C++ kernel, as expected.py of each Triton kernel.

A line may be named with another that calls its function, behind an @.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tools import cuda_code, cuda_hits
from tools.expected import cdiv, filled, poisson

MULTIPROCESSORS = 132
# Of a multiprocessor, beside 64 KiB of shared memory.
L1_BYTES = 192 << 10
# Of a multiprocessor, beside up to 132 KiB: what four blocks of the query side have.
L1_BESIDE_ARRAYS = 124 << 10

# Of a launch: what cuda_plan/*_numbers.h tells, and predict_cuda.numbers_of().
Numbers = Any
Table = Mapping[str, Callable[[Numbers], Any]]


@dataclass
class Expected:
    """Functions of the numbers of a launch, by how a line begins.

    loops: the trips of a loop, each time that it is reached.
    branches: how probable it is that what an `if` may skip is executed; 1 if not named.
    shares: of the lanes of a warp, those that access memory there; or of global memory, L2.
    copied: bytes of an asynchronous copy.
    generic_is_shared: whether pointers to either memory are to shared memory.
    busiest: what the multiprocessor that has most to do has, over that of equal blocks.
    """

    loops: Table = field(default_factory=dict)
    branches: Table = field(default_factory=dict)
    shares: Table = field(default_factory=dict)
    copied: Table = field(default_factory=dict)
    generic_is_shared: bool = False
    busiest: Callable[[Numbers], float] = lambda n: 1.0


def in_waves(pieces: int, blocks: int) -> float:
    """What the multiprocessor that has most has of so many equal pieces, over what it has of as
    many blocks, each of which takes one after the other."""

    def most(count: int) -> float:
        return cdiv(count, MULTIPROCESSORS) / count

    return most(pieces) / most(blocks)


# Of the sweep and the finish


def _rules(n: Numbers) -> cuda_hits.Rules:
    """Of the sweep, or of the one before a finish."""
    sweep = n if hasattr(n, "step") else n.before["hopper_sweep_kernel"]
    return cuda_hits.Rules(
        columns=round(sweep.columns / sweep.splits),
        k=sweep.k,
        step=sweep.step,
        groups=32 if sweep.k <= cuda_code.constant("warp_sweep.cuh", "kFewNeighbors") else 64,
        halvings=cuda_code.constant("warp_sweep.cuh", "kBisections"),
        slots=sweep.slots,
        moved=cuda_code.constant("warp_sweep.cuh", "kMoved"),
        list=sweep.list,
        period=_period(sweep),
    )


def _period(n: Numbers) -> int:
    """Tiles between planned drains, as find_hits() chooses them."""
    if n.d > 64:
        return 0
    period = 1
    while 2 * period * n.k * n.step <= (n.slots - 8) // 2 * int(_tiles(n)):
        period *= 2
    return period


def _hits(n: Numbers) -> cuda_hits.Hits:
    return cuda_hits.simulate(_rules(n), n.d)


def _tiles(n: Numbers) -> float:
    return n.tiles / n.splits


def _sampled(n: Numbers) -> float:
    return cdiv(_tiles(n), n.step)


def _share_of_drains(n: Numbers) -> float:
    """Of the looks at how many slots are left: two for each part of a tile."""
    return _hits(n).drains / (4 * _tiles(n))


def _share_that_hits(n: Numbers) -> float:
    """Of the stores to lists, four of each slot and lane, those that are one."""
    hits = _hits(n)
    turns = hits.drains * hits.passes * hits.moves
    turns += hits.planned * hits.planned_passes * hits.planned_moves
    # A store of 8 bytes takes a sector of 32.
    return 4 * hits.stored / (4 * turns)


_SWEEP = Expected(
    {
        "for (int i = blockIdx.x": lambda n: n.items / n.blocks,
        "for (this->begin(blockIdx.x)": lambda n: n.items / n.blocks,
        "for (; left_ > 0; left_ -= step)": _sampled,
        "for (int part = 0; part < kTileColumns / kPart": lambda n: 2,
        "while (left_ > end) @ look_at_tiles(": lambda n: _tiles(n) / _hits(n).planned,
        "} while (kTogether && left_ > 0)": lambda n: _hits(n).planned,
        "while (2 * period * p_.k": lambda n: math.log2(max(1, _period(n))),
        "for (int step = 0; step < kBisections": lambda n: _rules(n).halvings,
        "} while (__any_sync(kAllLanes, move > 0)) @ this->drain(!kTogether": lambda n: (
            _hits(n).planned_passes
        ),
        "} while (__any_sync(kAllLanes, move > 0))": lambda n: _hits(n).passes,
        "while (slot_ != last) @ this->drain(!kTogether": lambda n: _hits(n).planned_moves,
        "while (slot_ != last)": lambda n: _hits(n).moves,
        # What makes room
        "for (int i = 0; i < 4; ++i)": lambda n: 4,
        **dict.fromkeys(
            ("for (int i = 0; i < list.count", "for (int i = 0; i < count"), lambda n: n.list
        ),
        "while (__any_sync": lambda n: _hits(n).cut,
        "for (int i = 0; i < 32": lambda n: 0,  # no ties
        "while (low < high)": lambda n: 32,
        # The thread that loads
        "for (int sweep = 0": lambda n: 2,
        "for (int tile = 0": lambda n: (_tiles(n) + _sampled(n)) / 2,
        "while (!barrier_test": lambda n: 0,
        "CONVNN_PTX(": lambda n: 1,
    },
    {
        "if (warpgroup == 0)": lambda n: 1 / 3,
        "if (threadIdx.x == 0) load_tiles": lambda n: 1 / 4,
        "if (threadIdx.x == 0)": lambda n: 1 / 12,
        "if (p_.pairs)": lambda n: n.pairs,
        "if (p_.k <= kFewNeighbors)": lambda n: float(_rules(n).groups == 32),
        "if (__any_sync(kAllLanes, slot_ >": _share_of_drains,
        "if (mask_)": lambda n: _hits(n).headers,
        "if (!crowded) break @ this->drain(!kTogether": lambda n: _hits(n).planned_crowded,
        "if (!crowded) break": lambda n: _hits(n).crowded,
        "if (!__any_sync(kAllLanes, cut)) continue": lambda n: _hits(n).quarters / 4,
        "if (!(inverse > 0))": lambda n: 0,
    },
    {
        " @ append(slot_": lambda n: _hits(n).lanes,
        " @ put_hit(": _share_that_hits,
        # Read from L2 once, when room is made, and then again and again.
        "return __uint_as_float(uint32_t(hits[i]": lambda n: 1 / (5 + _hits(n).cut),
    },
    {
        "CONVNN_PTX( @ load_box(": lambda n: 128 * 128,
        "CONVNN_PTX( @ bulk_copy(": lambda n: 128 * 4,
    },
    busiest=lambda n: in_waves(n.items, n.blocks),
)


def _lanes(n: Numbers) -> int:
    """Of a row, in the finish."""
    return 8 if int(n.template[1]) <= 16 else 32


def _of_finish(n: Numbers) -> cuda_hits.Finish:
    most = int(n.template[1])
    sweep = n.before["hopper_sweep_kernel"]
    kept = 16 if most == 10 else 2 * most
    return cuda_hits.finish(_rules(n), sweep.d, kept, 32 // _lanes(n), _usual(n))


def _usual(n: Numbers) -> int:
    """Hits of a list for which kShort registers of each lane suffice."""
    step = _lanes(n) // 2
    long = cdiv(n.list, step) * 2
    short = 10 if _lanes(n) == 8 else (long * 3 // 4 + 1) // 2 * 2
    return short // 2 * step


def _places(n: Numbers) -> float:
    """Of the lanes that store similarities and indices, those that have one."""
    return filled(n.k, _lanes(n))


def _in_l1(gathered: float, rows: int, row: float, others: float, cache: int) -> float:
    """Of the random rows that a multiprocessor gathers one after the other from so many, those that
    are still in L1 from before. row: the bytes of one; others: what else is read and written for
    each; cache: bytes, of which these rows have their share."""
    capacity = cache / (row + others)
    kept = min(capacity, rows * (1 - math.exp(-gathered / rows)))
    filled_after = -rows * math.log(1 - kept / rows) if kept < rows else math.inf
    found = filled_after - kept + (gathered - filled_after) * kept / rows
    return min(1.0, found / gathered)


def _value_in_l1(n: Numbers) -> float:
    """Of the rows of V that the finish gathers."""
    if not n.aggregates:
        return 0.0
    row = 2 * n.c
    others = 8 * _hits(n.before["hopper_sweep_kernel"]).stored + 12 * n.k + row
    gathered = 256 * n.row_blocks / n.processors * n.k
    return _in_l1(gathered, n.m, row, others / n.k, L1_BYTES)


def _gathered_in_l1(n: Numbers) -> float:
    """Of the rows of V and K that the query side gathers, of one batch element after the other."""
    both = 2 * (n.c + n.d)
    others = 3 * both / 2 + 30 * n.k
    elements = max(1.0, n.rows / n.n / n.processors)
    gathered = n.rows / n.processors * n.k / elements
    return _in_l1(gathered, n.m, both, others / n.k, L1_BESIDE_ARRAYS)


_FINISH = Expected(
    {
        "for (int unit = begin + number": lambda n: 4 * n.row_blocks / n.blocks,
        "for (int i = finish.group()": lambda n: 64 * _lanes(n) / 128,
        "for (int split = 0": lambda n: n.splits,
        "} while (__any_sync(kAllLanes, high - low > 1))": lambda n: (
            _of_finish(n).halvings / max(1e-9, _of_finish(n).many)
        ),
        "for (int step = 0; step < 64": lambda n: 0,  # no ties
        "for (int j = 0; j < count; j += 2)": lambda n: (_of_finish(n).left + 0.5) / 2,
        "for (int first = 0; first < w_.c": lambda n: cdiv(n.c, 64),
        "for (; j + 2 * kStep < count": lambda n: cdiv(8 * n.k, _lanes(n)) // 3,
        "for (; j < count; j += kStep) @ gather<true>": lambda n: cdiv(8 * n.k, _lanes(n)) % 3,
        "for (; j < count; j += kStep)": lambda n: cdiv(8 * n.k, _lanes(n)),
        "for (int c = own": lambda n: cdiv(n.c, 64),
        "for (int j = first": lambda n: n.k / 2,
    },
    {
        "if (w.weight_staged)": lambda n: n.weight_staged,
        "kept = __any_sync": lambda n: _of_finish(n).long,
        "return __any_sync(kAllLanes, low_of(bound) != 0)": lambda n: 0,  # no ties
        "if (!__any_sync(kAllLanes, too_many)) return": lambda n: _of_finish(n).many,
        "if (__any_sync(kAllLanes, low != high))": lambda n: 0,
        "if (!__any_sync(kAllLanes, some_infinite)) return": lambda n: 0,
        "if (w_.by_index)": lambda n: n.by_index,
        "if (w_.rows)": lambda n: 0,
        "if (!w_.value)": lambda n: n.aggregates,
        "if (w_.value)": lambda n: n.aggregates,
        "if (w_.rho != Rho::softmax)": lambda n: 0,
        "if (w_.vectors && !gaps)": lambda n: n.vectors,
        "if (w_.bias)": lambda n: n.bias,
    },
    {
        # Whole sectors. What is beyond kUsual, with what is usual.
        **dict.fromkeys(
            (
                " @ if (e / 2 * Shape::kStep < own) @ ? merge<Shape::kLong>",
                "if (e / 2 * Shape::kStep < own) @ ? merge<Shape::kLong>",
            ),
            lambda n: _of_finish(n).sectors * 4 / n.list,
        ),
        **dict.fromkeys(
            (" @ if (e / 2 * Shape::kStep < own)", "if (e / 2 * Shape::kStep < own)"),
            lambda n: _of_finish(n).sectors * 4 / _usual(n),
        ),
        # One number of each row
        **dict.fromkeys(
            (" @ if (exists) copy4(&counts", "const int found = select(local"),
            lambda n: 1 / _lanes(n),
        ),
        **dict.fromkeys(("similarities[e * kLanes] =", "indices[e * kLanes] ="), _places),
        "to[j * row] =": lambda n: 0,  # read by all blocks
        " @ load_columns<kFast>(row_of(": lambda n: 1 - _value_in_l1(n),
        " @ load_columns<kFast>(w_.bias": lambda n: n.bias,
    },
    busiest=lambda n: in_waves(4 * n.row_blocks, n.blocks),
)

_KEYS = Expected(
    {"for (int i = 0; i < kRowsOfWarp": lambda n: 8},
    {
        "if (copy) copy_rows": lambda n: n.copies,
        "if (w.cosine)": lambda n: n.cosine,
        "if (__any_sync(kAllLanes, huge))": lambda n: 0,
        "if (vectors)": lambda n: n.vectors,
        "if (w.inverse_sample)": lambda n: n.sampled,
    },
)

# Of the gradients. A group of eight lanes has 64 columns of 16 bits at a time.


def _columns(of: int) -> int:
    return cdiv(of, 64)


_UNIT = {"if (!(sum >= kLeast": lambda n: 0}
_UNIT_LOOPS = {"for (int64_t i = 0; i < d": lambda n: 0}

_UNITS = Expected(
    {"for (int64_t c = member() * kVector<T>": lambda n: _columns(n.argument3), **_UNIT_LOOPS},
    _UNIT,
)

_QUERY_SIDE = Expected(
    {
        **_UNIT_LOOPS,
        "for (Row first = begin": lambda n: n.rows / (n.blocks * n.warps * 4 * int(n.template[2])),
        "for (int64_t j = 0; j < w.k": lambda n: n.k,
        "for (int64_t c = member() * kVector<T>": lambda n: _columns(n.d),
        "for (int64_t c = member() * kCount; c - member() * kCount < w.c": lambda n: _columns(n.c),
        "for (int64_t c = member() * kCount; c - member() * kCount < w.d": lambda n: _columns(n.d),
        "for (int64_t i = lane()": lambda n: cdiv(n.part, 32),
        "for (int64_t i = threadIdx.x": lambda n: cdiv(n.part, 128),
        "for (int of_warp = 0": lambda n: n.warps,
    },
    {
        **_UNIT,
        "if (has && is_double)": lambda n: 0,
        "is_double ? differentiate_rho<double>": lambda n: 0,
        "if (w.metric == Metric::euclidean)": lambda n: 0,
        "if (direct)": lambda n: n.direct,
        "if (result && row < w.rows)": lambda n: n.similarities,
        "if (w.of_bias)": lambda n: n.of_bias,
        "if (w.of_weight)": lambda n: n.of_weight,
    },
    {
        # Read twice, and then once more.
        "const S s = similarities[j]": lambda n: 0.5,
        "along += ds * A(similarities[j])": lambda n: 0,
        " @ for (int t = 0; t < kRows; ++t) v[t] = load_row(w.value": lambda n: (
            1 - _gathered_in_l1(n)
        ),
        " @ for (int t = 0; t < kTogether; ++t) x[t] = load_row(w.key": lambda n: (
            1 - _gathered_in_l1(n)
        ),
        # k rows, which all warps read
        " @ unpack<T>(load_row(w.weight": lambda n: 0,
        "if (direct)": lambda n: n.direct,
        "if (result && row < w.rows)": lambda n: n.similarities,
    },
    generic_is_shared=True,  # for k of the goals
)

_SUM_PARTS = Expected(
    {
        "for (int64_t i = threadIdx.x / kGroup": lambda n: cdiv(n.argument2, 16),
        "for (int i = 0; i < kThreads / kGroup": lambda n: 16,
    },
    {"if (threadIdx.x >= kGroup": lambda n: 1 / 4},
)


def _keys_of_block(n: Numbers) -> float:
    return n.m / n.ranges


_COUNT_PAIRS = Expected(
    {
        "for (int i = int(threadIdx.x); i < own.keys": lambda n: _keys_of_block(n) / 128,
        "for (int64_t at = own.first": lambda n: n.each / 128,
    }
)
_PLACE_KEYS = Expected(
    {
        "for (int64_t tile = 0": lambda n: n.tiles,
        "for (int span = 1": lambda n: 7,
    }
)
_SCATTER_PAIRS = Expected(
    {
        "for (int64_t i = threadIdx.x; i < first_block": lambda n: (
            (n.m - _keys_of_block(n)) / 2 / 128 / 128
        ),
        "for (int i = 0; i < kThreads": lambda n: 128,
        "for (int64_t first = 0; first < own.keys": lambda n: _keys_of_block(n) / 128,
        "for (int64_t start = own.first": lambda n: n.each / 128,
        "for (int turn = 0": lambda n: 4,
    },
    {
        "if (own.tile == 0)": lambda n: 1 / n.tiles,
        "if (warp() == turn)": lambda n: 1 / 4,
    },
)


def _turns(n: Numbers, pairs: int) -> float:
    """Of four keys at once, of which one has most pairs, in turns of so many."""
    mean, turns, below = n.pairs / n.keys, 0.0, 0.0
    for count in range(int(mean + 12 * mean**0.5) + 20):
        if count % pairs == 0:
            # More than `count` pairs
            turns += 1 - min(1.0, below + poisson(count, mean)) ** 4
        below += poisson(count, mean)
    return turns


_KEY_SIDE = Expected(
    {
        "for (int64_t start = 0; start < most": lambda n: _turns(n, 8),
        "for (int u = 0; u < kGroup": lambda n: _turns(n, 4) / _turns(n, 8),
        "for (int64_t c = member() * kCount; c - member()": lambda n: _columns(max(n.c, n.d)),
        "for (int64_t c = member() * kCount; c < w.d": lambda n: n.key_sums * _columns(n.d),
        "for (int64_t chunk = run.first_chunk": lambda n: 0,
    },
    {
        "if (last - first < chunk)": lambda n: 0,
        "if (run.chunks <= 0)": lambda n: 0,
        "if (w.metric == Metric::euclidean)": lambda n: 0,
    },
    {
        # One number for a key
        **dict.fromkeys(
            (
                "run = run_of_key(",
                "int64_t(static_cast<const Id*>(w.list.ends)[key])",
                "const A unit = projects",
            ),
            lambda n: 1 / 8,
        ),
        **dict.fromkeys(
            ("const Id pair = static_cast", "factors = w.factors["),
            lambda n: n.pairs / n.keys / (8 * _turns(n, 8)),
        ),
        " @ unpack<T>(load_row(w.key": lambda n: 1,
        # Of G and query, which the machine code does not tell from W: k rows, which all warps read.
        " @ return load_if(": lambda n: n.pairs / n.keys / (4 * _turns(n, 4)) * 2 / (2 + n.weight),
    },
)
# No list has a whole chunk.
_CHUNKS = Expected(
    {
        "while (high - low > 1)": lambda n: math.ceil(math.log(n.keys, 32)),
        "for (int64_t c = member() * kVector<T>": lambda n: 0,
        "for (int64_t start = 0; start < most": lambda n: 0,
        "for (int u = 0; u < kGroup": lambda n: 0,
        "for (int span = kGroup": lambda n: 0,
    },
    {
        "if (int64_t(static_cast<const Id*>(w.list.begins)[key]) > first)": lambda n: 0,
    },
)

EXPECTED: dict[str, Expected] = {
    "permute_weight_kernel": Expected({"for (int64_t i = grid_thread()": lambda n: 1}),
    "units_kernel": _UNITS,
    "query_side_kernel": _QUERY_SIDE,
    "sum_parts_kernel": _SUM_PARTS,
    "count_pairs_kernel": _COUNT_PAIRS,
    "place_keys_kernel": _PLACE_KEYS,
    "scatter_pairs_kernel": _SCATTER_PAIRS,
    "key_side_chunks_kernel": _CHUNKS,
    "key_side_kernel": _KEY_SIDE,
    "hopper_keys_kernel": _KEYS,
    "hopper_sweep_kernel": _SWEEP,
    "hopper_finish_kernel": _FINISH,
}
