# SPDX-License-Identifier: MIT
"""What `tools.predict` assumes of each CUDA C++ kernel, as expected.py of each Triton kernel.

A line may be named with another that calls its function, behind an @.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tools import cuda_code, cuda_hits
from tools.expected import cdiv, filled

MULTIPROCESSORS = 132

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
    busiest: what the multiprocessor that has most to do has of it, over the mean.
    """

    loops: Table = field(default_factory=dict)
    branches: Table = field(default_factory=dict)
    shares: Table = field(default_factory=dict)
    copied: Table = field(default_factory=dict)
    busiest: Callable[[Numbers], float] = lambda n: 1.0


def in_waves(pieces: float) -> float:
    """What the multiprocessor has that has most of so many equal pieces, over the mean."""
    return cdiv(pieces, MULTIPROCESSORS) * MULTIPROCESSORS / pieces


# Of the sweep and the finish


def _rules(n: Numbers) -> cuda_hits.Rules:
    """Of the sweep, or of the one before a finish."""
    sweep = n if hasattr(n, "step") else n.before["hopper_sweep_kernel"]
    return cuda_hits.Rules(
        columns=round(sweep.columns / sweep.splits),
        k=sweep.k,
        step=sweep.step,
        groups=32 if sweep.k <= 16 else 64,
        halvings=cuda_code.constant("hopper_sweep.cuh", "kBisections"),
        slots=sweep.slots,
        moved=cuda_code.constant("hopper_sweep.cuh", "kMoved"),
        list=sweep.list,
    )


def _hits(n: Numbers) -> cuda_hits.Hits:
    return cuda_hits.simulate(_rules(n), n.d)


def _tiles(n: Numbers) -> float:
    return n.tiles / n.splits


def _sampled(n: Numbers) -> float:
    return cdiv(_tiles(n), n.step)


def _share_of_drains(n: Numbers) -> float:
    """Of the looks at how many slots are left: two for each half of a tile."""
    return _hits(n).drains / (4 * _tiles(n))


def _share_that_hits(n: Numbers) -> float:
    """Of the stores to lists, four of each slot and lane, those that are one."""
    hits = _hits(n)
    turns = hits.drains * hits.passes * hits.moves + hits.last_passes * hits.last_moves
    # A store of 8 bytes takes a sector of 32.
    return 4 * hits.stored / (4 * turns)


_SWEEP = Expected(
    {
        "for (int i = blockIdx.x": lambda n: n.items / n.blocks,
        "while (left > 0) @ sweep_tiles<kColumns>": lambda n: 2 * _sampled(n),
        "while (left > 0) @ sweep_tiles<kTileColumns>": _tiles,
        "for (int step = 0; step < kBisections": lambda n: _rules(n).halvings,
        "} while (__any_sync(kAllLanes, move > 0)) @ drain(true)": lambda n: _hits(n).last_passes,
        "} while (__any_sync(kAllLanes, move > 0))": lambda n: _hits(n).passes,
        "while (slot_ != last) @ drain(true)": lambda n: _hits(n).last_moves,
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
        "if (p_.k <= kGroups)": lambda n: float(n.k <= 16),
        "if (part == 0) @ sweep_tiles<kColumns>": lambda n: 0.5,
        "if (++part == @ sweep_tiles<kColumns>": lambda n: 0.5,
        "if (__any_sync(kAllLanes, slot_ >": _share_of_drains,
        "if (mask_)": lambda n: _hits(n).headers,
        "if (!crowded) break @ drain(true)": lambda n: _hits(n).last_crowded,
        "if (!crowded) break": lambda n: _hits(n).crowded,
        "if (!__any_sync(kAllLanes, cut)) continue": lambda n: _hits(n).quarters / 4,
        "if (!(inverse > 0))": lambda n: 0,
    },
    {
        '"f"(x[2]), "f"(x[3]), "r"(bit)': lambda n: _hits(n).lanes,
        '"r"(__float_as_uint(a))': _share_that_hits,
        # Read from L2 once, when room is made, and then again and again.
        "return __uint_as_float(uint32_t(hits[4 * i]": lambda n: 1 / (5 + _hits(n).cut),
    },
    {
        "CONVNN_PTX( @ load_box(": lambda n: 128 * 128,
        "CONVNN_PTX( @ bulk_copy(": lambda n: 128 * 4,
    },
    lambda n: cdiv(n.items, n.blocks) * n.blocks / n.items,
)


def _lanes(n: Numbers) -> int:
    """Of a row, in the finish."""
    return 8 if int(n.template[1]) <= 16 else 32


def _of_finish(n: Numbers) -> cuda_hits.Finish:
    most = int(n.template[1])
    sweep = n.before["hopper_sweep_kernel"]
    kept = 16 if most == 10 else 2 * most
    return cuda_hits.finish(_rules(n), sweep.d, kept, 32 // _lanes(n), _held(n))


def _held(n: Numbers) -> int:
    """Hits of a list for which kShort registers of each lane suffice."""
    of_lane = 4 * n.list // _lanes(n)
    short = 8 if of_lane > 8 and _lanes(n) == 8 else of_lane // 2
    return short * _lanes(n) // 4


def _places(n: Numbers) -> float:
    """Of the lanes that store similarities and indices, those that have one."""
    return filled(n.k, _lanes(n))


_FINISH = Expected(
    {
        "for (int unit = int(blockIdx.x)": lambda n: 4 * n.row_blocks / n.blocks,
        "for (int i = finish.group()": lambda n: 64 * _lanes(n) / 128,
        "for (int split = 0": lambda n: n.splits,
        "for (int step = 0; step < 64": lambda n: _of_finish(n).halvings,
        "for (int j = 0; j < count; j += 2)": lambda n: (_of_finish(n).left + 0.5) / 2,
        "for (int first = 0; first < w_.c": lambda n: cdiv(n.c, 64),
        "for (int j = lane_ / 8": lambda n: cdiv(8 * n.k, _lanes(n)),
        "for (int i = int(threadIdx.x)": lambda n: cdiv(n.k * 64 * cdiv(n.c, 64), 128),
    },
    {
        "if (w.weight_staged)": lambda n: n.weight_staged,
        "kept = __any_sync": lambda n: _of_finish(n).long,
        "if (w_.by_index)": lambda n: n.by_index,
        "if (w_.rows)": lambda n: 0,
        "if (!w_.value)": lambda n: n.aggregates,
        "if (w_.value)": lambda n: n.aggregates,
        "if (w_.rho != Rho::softmax)": lambda n: 0,
        "if (w_.vectors && !gaps)": lambda n: n.vectors,
        "if (w_.bias)": lambda n: n.bias,
    },
    {
        # Lists as long as the longest of a row, because four lanes share a sector.
        "hit[e] = @ ? merge<Shape::kLong>": lambda n: _of_finish(n).list / n.list,
        "hit[e] =": lambda n: min(1.0, _of_finish(n).list / _held(n)),
        # One number of each row
        **dict.fromkeys(
            (" @ if (exists) copy4(&counts", "const int found = select(local"),
            lambda n: 1 / _lanes(n),
        ),
        **dict.fromkeys(("w_.similarities[", "w_.indices["), _places),
        "weight[at] =": lambda n: 0,  # read by all blocks
        " @ load_columns<kFast>(w_.bias": lambda n: n.bias,
    },
    busiest=lambda n: in_waves(4 * n.row_blocks),
)

_KEYS = Expected(
    {"for (int i = int(threadIdx.x) / 8": lambda n: 8},
    {
        "if (w.copy || w.cosine)": lambda n: float(n.copies or n.cosine),
        "if (w.cosine)": lambda n: n.cosine,
        "if (w.copy)": lambda n: n.copies,
        "if (vectors)": lambda n: n.vectors,
    },
    {"w.inverse": lambda n: 1 / 8},
)

EXPECTED: dict[str, Expected] = {
    "hopper_keys_kernel": _KEYS,
    "hopper_sweep_kernel": _SWEEP,
    "hopper_finish_kernel": _FINISH,
}
