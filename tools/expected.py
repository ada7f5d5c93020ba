# SPDX-License-Identifier: MIT
"""What `tools.predict` assumes of each Triton kernel: the trips of its loops, which branches are
taken how often, and how much is masked, from the numbers of a launch.

A loop, branch, load or store is named by how the text of its line of source begins. Where numbers
depend on data, they are those of random features; ranges of keys are causal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from convnn_kernels.triton import configs

# Numbers and constants of a launch, by parameter; `programs`; has(p): whether p is not None.
Numbers = Any


@dataclass
class Expected:
    """Functions of the numbers of a launch, by how a line begins.

    loops: the trips of a loop, each time that it is reached.
    branches: how probable it is that what an `if` may skip is executed; 1 if not named.
    A line with several of them, of inline PTX, has a list in the order of the machine code.
    masks: the share of what a line loads or stores that is not masked, and not in L1 anyway; 1 if
        not named.
    """

    loops: Mapping[str, Callable[[Numbers], float | Sequence[float]]] = field(default_factory=dict)
    branches: Mapping[str, Callable[[Numbers], float | Sequence[float]]] = field(
        default_factory=dict
    )
    masks: Mapping[str, Callable[[Numbers], float]] = field(default_factory=dict)


def cdiv(a: float, b: int) -> int:
    return math.ceil(a / b)


def filled(size: int, block: int) -> float:
    """The share of blocks that is not beyond the end."""
    return size / (cdiv(size, block) * block)


def mean(of: Callable[[int], float], count: int) -> float:
    """Over 1, ..., count."""
    return sum(map(of, range(1, count + 1))) / count


def poisson(count: int, expected: float) -> float:
    return math.exp(count * math.log(expected) - expected - math.lgamma(count + 1))


def largest(expected: float, lanes: int) -> float:
    """The expected largest of `lanes` counts, each Poisson with that mean."""
    below, total = 0.0, 0.0
    for i in range(int(expected + 12 * math.sqrt(expected)) + 20):
        below += poisson(i, expected)
        total += 1 - min(1.0, below) ** lanes
    return total


def _turns_of_tile(n: Numbers, tiles: int, rows: int) -> float:
    """The mean over tiles of the columns that enter the list of a row: of the row that has most."""
    return mean(lambda tile: min(n.k, n.columns, largest(n.k / tile, rows)), tiles)


def _share_that_enters(n: Numbers) -> float:
    """The share of tiles with a column that enters the list of one of ROWS rows."""
    return mean(lambda tile: 1 - math.exp(-n.ROWS * n.k / tile), cdiv(n.columns, 1 << n.LOG_TILE))


def _shares_with_ties(n: Numbers) -> tuple[float, float]:
    """The shares of programs with a row of which two of k + 2 neighbors share their first 24 bits,
    and with one of which at least two pairs do.

    Similarities are normal, those of neighbors between one and three of their deviations. The first
    24 bits leave 2^-16 of a number. The j-th largest of M numbers is about 1 / j of a deviation,
    over sqrt(2 log M), above the next.
    """
    deviation = 1 / math.sqrt(2 * math.log(max(2, n.columns)))
    pairs = sum(2.0**-15 * 2 * j / deviation for j in range(1, n.k + 2))
    of_row = (1 - math.exp(-pairs), 1 - math.exp(-pairs) * (1 + pairs))
    one, two = (1 - (1 - share) ** min(n.N, n.BLOCK_N) for share in of_row)
    return one, two


def _turns_of_slot(n: Numbers) -> float:
    """Keys advance through the pairs of a j together, as far as the one that has most of them."""
    return largest(1.0, min(n.M, n.BLOCK_M))


def _rows_drawn(draws: float, rows: int) -> float:
    """How many rows are among so many random draws."""
    return rows * (1 - (1 - 1 / rows) ** draws)


def _once_in_program(n: Numbers) -> float:
    """The share of gathers by ROWS queries that are the first ones of a row in a program."""
    draws = n.ROWS * filled(n.N, n.ROWS) * n.K
    return filled(n.N, n.ROWS) * _rows_drawn(draws, n.M) / draws


def _once_by_keys(n: Numbers) -> float:
    """The same by the queries of a program's keys; and of later gathers, what has left L1 again.

    It has room for about 190 KiB, and two programs use it, each CHUNKS blocks of channels of all
    rows.
    """
    draws = n.N * n.k / n.groups
    first = _rows_drawn(draws, n.N) / draws
    kept = min(1.0, 190 * 2**10 / (2 * n.N * 2 * n.BLOCK * n.CHUNKS))
    return first + (1 - first) * (1 - kept)


def _share_of(n: Numbers, first: int, end: int) -> float:
    """Of the programs from `first` on, those before `end`."""
    return (end - first) / max(1, n.programs - first)


_OVER_D = {
    "for d in range(0, D, BLOCK_D)": lambda n: cdiv(n.D, n.BLOCK_D),
    "for d in range(BLOCK_D, D, BLOCK_D)": lambda n: cdiv(n.D, n.BLOCK_D) - 1,
}
_LATER_BLOCKS = {"if d > 0": lambda n: 1 - 1 / max(1, cdiv(n.D, min(64, n.BLOCK_D)))}
_OVER_K = {"for j in range(0, k, BLOCK_K)": lambda n: cdiv(n.k, n.BLOCK_K)}
_OVER_C = {"for c0 in range(0, C, BLOCK_C)": lambda n: cdiv(n.C, n.BLOCK_C)}
_OVER_O = {"for o0 in range(0, O, BLOCK_O)": lambda n: cdiv(n.O, n.BLOCK_O)}
_OVER_NEIGHBORS = {
    "for start in range(0, k, BLOCK_K)": lambda n: cdiv(n.k, n.BLOCK_K),
    "for j in range(start, tl.minimum(start + BLOCK_K, k))": lambda n: n.k / cdiv(n.k, n.BLOCK_K),
}
_OVER_ROWS = {"for start in range(0, rows_each, BLOCK_N)": lambda n: cdiv(n.rows_each, n.BLOCK_N)}
_OVER_PAIRS = {
    "for start in range(first, last, PAIRS)": lambda n: cdiv(n.N * n.k / n.tiles, n.PAIRS)
}


def _hits(n: Numbers) -> float:
    """Of a row: the columns that reach the k-th largest of the maxima of GROUPS groups.

    Of the sampled ones as many as are drawn until there are k groups; sample_step times as many.
    """
    return n.sample_step * sum(n.GROUPS / (n.GROUPS - i) for i in range(n.k))


def _turns_of_word(n: Numbers) -> float:
    """Turns of the loop that appends the hits of a word: those of the lane that has most."""
    return largest(_hits(n) * n.BLOCK_M / n.QUEUES / n.columns, 32)


def _has_more(n: Numbers) -> float:
    """How probable it is that one of ROWS rows has more than LIST hits.

    That of LIST hits, of which one in sample_step is in the sample, fewer are in it than were drawn
    there.
    """
    chosen = configs.sweep(90, 16, 64, n.columns, n.k)
    groups, share, size = chosen["GROUPS"], 1 / chosen["sample_step"], 1 << n.LOG_LIST
    drawn = math.ceil(sum(groups / (groups - i) for i in range(n.k)))
    of_row = sum(
        math.comb(size, i) * share**i * (1 - share) ** (size - i)
        for i in range(min(drawn, size + 1))
    )
    return 1 - (1 - min(1.0, of_row)) ** n.ROWS


def _elements_of_blocks(n: Numbers) -> float:
    """The batch elements of the row blocks of a program."""
    of_element = cdiv(n.N, n.BLOCK_N)
    return (n.blocks_each + of_element - math.gcd(n.blocks_each, of_element)) / of_element


def _tiles(n: Numbers) -> int:
    return cdiv(n.columns - (n.BLOCK_M - n.ADVANCE), n.ADVANCE)


def _in_ranges(n: Numbers) -> float:
    """The share of tiles that are in the range of a query of a block: of the mean block, half of
    those of the last one, but for candidates, which have no order."""
    return 0.5 if n.has("p_range") and not n.has("p_columns") else 1.0


def _tiles_each(n: Numbers) -> float:
    return _tiles(n) / n.splits * _in_ranges(n)


def _at_an_end(n: Numbers) -> float:
    """The share of sampled tiles with a column that some queries of a block see and others not."""
    return min(1.0, (n.BLOCK_N / n.BLOCK_M + 1) / max(1.0, _tiles(n) / 2))


def _share_of_tiles(n: Numbers) -> float:
    return _tiles(n) * n.B / n.programs


_AT_AN_END = {"if (start < begin_of_all) | (start + BLOCK_M > end_of_all)": _at_an_end}
_OF_RANGE = {
    "for tile in range(first, last, sample_step)": lambda n: cdiv(_tiles_each(n), n.sample_step),
    "for d in range(0, BLOCK_D if ONE_BLOCK_D else D, BLOCK_D)": lambda n: cdiv(n.D, n.BLOCK_D),
    # Norms, in blocks of at most 64 channels.
    "for d in range(0, D, BLOCK_D)": lambda n: cdiv(n.D, min(64, n.BLOCK_D)),
    "for d in range(BLOCK_D, D, BLOCK_D)": lambda n: cdiv(n.D, min(64, n.BLOCK_D)) - 1,
}


_ROWS = {begin: lambda n: filled(n.N, n.BLOCK_N) for begin in ("b_v = tl.load", "b_g = tl.load")}
_FLAT_ROWS = {
    begin: lambda n: filled(n.rows, n.BLOCK_N) for begin in ("b_v = tl.load", "b_g = tl.load")
}


def _sectors_of_row(n: Numbers) -> float:
    """Of a row of E, in which neighbors are anywhere: the bytes of the sectors of 32 bytes that are
    written, over those of a row of slots."""
    sectors = n.columns / 16
    written = sectors * (1 - (1 - 1 / sectors) ** n.k)
    return filled(n.N, n.ROWS) * 32 * written / (2 * n.SLOTS)


EXPECTED = {
    "norms_kernel": Expected(_OVER_D, _LATER_BLOCKS),
    "exact_topk_kernel": Expected(
        _OVER_D
        | {
            # No row is listed.
            "for block in range(pid % slots, tl.cdiv(count, ROWS), slots)": lambda n: (
                0 if n.has("p_listed") else cdiv(n.N, n.ROWS) / n.slots
            ),
            "for start in range(first, last, TILE)": lambda n: (
                cdiv(n.columns, 1 << n.LOG_TILE) * _in_ranges(n)
            ),
            "while tl.max(enters.to(tl.int32), 0) > 0": lambda n: (
                _turns_of_tile(n, cdiv(n.columns, 1 << n.LOG_TILE), n.ROWS) / _share_that_enters(n)
            ),
        },
        {"if tl.max(tl.max(b_enters, 1) * m_n, 0) > 0": _share_that_enters},
        {"b_k = tl.load(p_row[:, None] + o_d": lambda n: filled(n.columns, 1 << n.LOG_TILE)},
    ),
    "select_small_kernel": Expected(
        _OVER_D
        | {
            "for start in range(0, columns, BLOCK_M)": lambda n: cdiv(n.columns, n.BLOCK_M),
            "while tl.max(enters.to(tl.int32), 0) > 0": lambda n: _turns_of_tile(
                n, cdiv(n.columns, n.BLOCK_M), n.BLOCK_N
            ),
        },
        masks={
            "b_q = tl.load": lambda n: filled(n.N, n.BLOCK_N),
            "b_k = tl.load": lambda n: filled(n.columns, n.BLOCK_M),
        },
    ),
    "select_network_kernel": Expected(
        _OVER_D
        | {
            "for start in range(0, columns, BLOCK_M)": lambda n: 0,
            "for start in range(0, C * k, 4 * THREADS)": lambda n: cdiv(n.C * n.k, 8 * n.BLOCK_N),
            "for c in range(0, C, BLOCK_C)": lambda n: cdiv(n.C, n.BLOCK_C),
            "for start in range(0, lanes, LANES)": lambda n: cdiv(
                16 * cdiv(n.C, 32), min(128, 2 * n.BLOCK_N)
            ),
            "for begin in range(0, k + 1, BLOCK // LANES)": lambda n: cdiv(
                n.k + 1, max(1, n.BLOCK_N // 64)
            ),
            "for _ in range(0, k)": lambda n: n.k,
            "for c in range(0, C, 32 * BLOCKS)": lambda n: cdiv(n.C, 32 * max(1, n.BLOCKS)),
            "for j in range(0, k)": lambda n: n.k,
            "while tl.max(enters.to(tl.int32), 0) > 0": lambda n: 0,
        },
        {
            "if columns > tile * BLOCK_M": lambda n: [
                float(n.columns > tile * n.BLOCK_M) for tile in range(1, n.TILES)
            ],
            "if tied > 0": lambda n: _shares_with_ties(n)[0],
            "if tied > 1": lambda n: _shares_with_ties(n)[1],
            **dict.fromkeys(
                (
                    "if unfit_keys > 0",
                    "if unfit_queries > 0",
                    "if ON_CORES and unfit_own > 0",
                    "if test != 0.0",
                ),
                lambda n: 0,
            ),
            # Or with these lines in the machine code.
            **dict.fromkeys(
                (
                    "if again > 0",
                    "m_tied = is_column",
                    "b_order = tl.where(b_order == ORDER_OF_SELF",
                ),
                lambda n: 0,
            ),
        },
        masks={
            "b_q = tl.load": lambda n: filled(n.N, n.BLOCK_N),
            "b_k = tl.load": lambda n: filled(n.columns, n.BLOCK_M),
            # Rows of V of a batch element, each by the first of those that gather it.
            "b_v = tl.load": lambda n: min(1.0, n.M / (n.BLOCK_N * n.k)),
            "b_x = tl.load": lambda n: min(1.0, n.M / (n.BLOCK_N * n.k)),
            "b_x_second = tl.load": lambda n: min(1.0, n.M / (n.BLOCK_N * n.k)),
            "b_w = tl.load": lambda n: 0,
            "b_other_w = tl.load": lambda n: 0,
            "b_v *= as_float32(tl.load": lambda n: 0,  # C rows, which all programs read
        },
    ),
    "select_medium_kernel": Expected(
        {
            "for b in range(begin // row_blocks": _elements_of_blocks,
            "for block in range(first": lambda n: n.blocks_each / _elements_of_blocks(n),
            "for tile in range(0, tiles)": lambda n: cdiv(n.columns, n.BLOCK_M),
            **_OVER_D,
            "b_count = tl.inline_asm_elementwise": lambda n: _turns_of_word(
                SimpleNamespace(**vars(n) | {"sample_step": 1})
            ),
            "for step in range(0, 2 * tiles)": lambda n: 0,
            "for i in range(0, late * (BLOCK_N": lambda n: 0,
            "for start in range(16, tl.max(total, 0), 16)": lambda n: 0,
            "for start in range(0, columns, BLOCK_M)": lambda n: 0,
            "while tl.max(enters.to(tl.int32), 0) > 0": lambda n: 0,
        },
        {
            "if i < k": lambda n: [float(i < n.k) for i in range(15)],
            # Rows of random features have neither many ties nor huge numbers.
            **dict.fromkeys(
                ("if tl.max(m_short.to", "if tl.max(m_unfit.to", "if block >= 0"), lambda n: 0
            ),
        },
    ),
    "aggregate_dense_kernel": Expected(
        {
            "for step in range(0, k * channel_blocks)": lambda n: n.k * cdiv(n.C, n.BLOCK_C),
            "for t0 in range(0, k * C, BLOCK_C)": lambda n: cdiv(n.k * n.C, n.BLOCK_C),
        },
        masks=_FLAT_ROWS,
    ),
    "aggregate_depthwise_kernel": Expected(_OVER_K | _OVER_NEIGHBORS, masks=_ROWS),
    "dense_inputs_kernel": Expected(
        _OVER_K,
        {
            "if pid < row_programs": lambda n: n.row_programs / n.programs,
        },
        masks=dict.fromkeys(
            ("b_s = tl.load(", "b_row = tl.load(", "tl.store(p, tl.where", "tl.store(p_rho"),
            lambda n: filled(n.k, n.BLOCK_K),
        ),
    ),
    "modulate_backward_kernel": Expected(
        _OVER_K | {"for part in range(1, parts)": lambda n: n.parts - 1}
    ),
    "rho_grad_dense_kernel": Expected(_OVER_C | _OVER_O, masks=_FLAT_ROWS),
    "value_grad_dense_kernel": Expected(
        _OVER_O
        | {
            "for step in range(0, k)": lambda n: n.k,
            "while tl.max(m.to(tl.int32), 0) > 0": _turns_of_slot,
        },
        masks={
            "b_g = tl.load": lambda n: filled(n.M, n.BLOCK_M) / _turns_of_slot(n),
            "b_part = tl.load": lambda n: 0,
        },
    ),
    "value_grad_chunks_kernel": Expected(
        {"for start in range(0, CHUNK, PAIRS)": lambda n: n.CHUNK / n.PAIRS},
        # Hardly any chunk is of one key and j.
        masks={begin: lambda n: 0 for begin in ("b_pair = tl.load", "b_g = tl.load")},
    ),
    "value_grad_one_hot_kernel": Expected(
        {
            **_OVER_O,
            "for start in range(0, queries, BLOCK_N)": lambda n: cdiv(n.elements * n.N, n.BLOCK_N),
            "for step in range(0, k)": lambda n: n.k,
            "while tl.max(m.to(tl.int32), 0) > 0": lambda n: 0,
        },
        {"if test != 0.0": lambda n: 0},
        {
            "b_g = tl.load": lambda n: filled(n.elements * n.N, n.BLOCK_N),
            "b_block = tl.load": lambda n: filled(n.elements * n.N, n.BLOCK_N),
            # From L1, but for the first row of each key.
            "b_v = tl.load": lambda n: n.M / (n.N * n.k) / n.key_blocks,
            "tl.store(p_part": lambda n: 1 / n.key_blocks,
            "tl.store(p, b_dv": lambda n: filled(n.elements * n.M, n.BLOCK_M),
        },
    ),
    "weight_grad_dense_kernel": Expected(_OVER_ROWS),
    "add_parts_kernel": Expected({"for _ in range(0, parts)": lambda n: n.parts}),
    "count_pairs_kernel": Expected(_OVER_PAIRS),
    "store_pairs_kernel": Expected(_OVER_PAIRS),
    "columns_kernel": Expected(
        _OVER_D
        | {
            "for i in range(0, lists)": lambda n: n.lists,
            "for start in range(tile.to(tl.int32) * BLOCK_M, N": lambda n: (
                cdiv(n.N, n.BLOCK_M) / _tiles(n)
            ),
            "for start in range(tile.to(tl.int32) * BLOCK_M, size": lambda n: (
                cdiv(n.C * n.k, n.BLOCK_M) / (_tiles(n) * n.B)
            ),
        },
        {
            "if pid < of_columns": _share_of_tiles,
            "if tile == 0": lambda n: 1 / _tiles(n),
            **_LATER_BLOCKS,
        },
    ),
    "threshold_kernel": Expected(_OF_RANGE, _LATER_BLOCKS | _AT_AN_END),
    "sweep_kernel": Expected(
        _OF_RANGE
        | {
            "for i in range(0, splits)": lambda n: n.splits,
            "for _ in range(1, k)": lambda n: n.k - 1,
            "for tile in range(first, last):": _tiles_each,
            "b_count = tl.inline_asm_elementwise": _turns_of_word,
        },
        {"if tl.max(m_short.to(tl.int32), 0) > 0": lambda n: 0, **_LATER_BLOCKS, **_AT_AN_END},
    ),
    "finish_kernel": Expected(
        _OVER_D
        | {
            "for split in range(splits)": lambda n: n.splits,
            "for start in range(LIST, end, LIST)": lambda n: 1,
            "for start in range(0, k, 2)": lambda n: cdiv(n.k, 2),
            "for j in range(0, k, AT_ONCE)": lambda n: cdiv(n.k, n.AT_ONCE),
            "for c in range(0, C, BLOCK_C)": lambda n: cdiv(n.C, n.BLOCK_C),
        },
        {"if end > LIST": _has_more, "if complete": lambda n: 1, "if not complete": lambda n: 0},
        {
            "b_w = tl.load": lambda n: 0,  # C rows, which all programs read
            **dict.fromkeys(
                ("tl.store(p_s + o", "tl.store(p_i + o"), lambda n: n.k / (1 << n.LOG_LIST)
            ),
            **dict.fromkeys(
                ("b_s = tl.load(p_s + o", "b_row = tl.where(m, tl.load(p_i", "tl.store(p_terms"),
                lambda n: filled(n.k, 1 << n.LOG_K),
            ),
        },
    ),
    "query_side_kernel": Expected(
        {
            **_OVER_C,
            **_OVER_NEIGHBORS,
            **_OVER_D,
            "for d0 in range(0, D, BLOCK_D)": lambda n: cdiv(n.D, n.BLOCK_D),
            "for start in range(0, key_blocks, 128)": lambda n: cdiv(n.key_blocks, 128),
            "for begin in range(0, rows_each, ROWS)": lambda n: cdiv(n.rows_each, n.ROWS),
            "for start in range(begin, begin + ROWS, BLOCK_N)": lambda n: n.ROWS / n.BLOCK_N,
            "for start in range(0, rows, BLOCK_N)": lambda n: cdiv(n.rows_each, n.BLOCK_N),
            "for j in range(0, k)": lambda n: n.k,
        },
        {
            "if tl.max(b_sum, 0) > _LARGE": lambda n: 0,
        },
        {
            "b_drho += tl.load(": lambda n: 1 - 1 / max(1, cdiv(n.C, n.BLOCK_C)),
            # W, and the tile's part of its gradient, of C k elements.
            **dict.fromkeys(("b_w = tl.load(", "b_dw += tl.load("), lambda n: 0),
            # What the same lanes have just loaded or stored for these ROWS queries.
            **dict.fromkeys(
                (
                    "m = tl.load(",
                    "b_s = tl.load(p_similarities + o_s + j, m",
                    "b_rho = modulate(tl.load(",
                    "b_ds = tl.load(",
                    "b_ds = scale * tl.load(",
                ),
                lambda n: 0,
            ),
        },
    ),
    "query_side_small_kernel": Expected(
        {
            **_OVER_C,
            # Also those of lists of pairs, of programs of their own.
            "for j in range(0, k)": lambda n: n.K,
            "for j in range(0, K - 1)": lambda n: n.K - 1,
            "for row in range(0, TILE + 1)": lambda n: n.TILE + 1,
            "for c0 in range(0, WIDTH, 128)": lambda n: cdiv(n.WIDTH, 128),
            # What is not finite is computed again.
            "for begin in range(0, ROWS, 16)": lambda n: 0,
        },
        {
            "if pid < lists": lambda n: n.lists / n.programs,
            "elif pid < first_tile": lambda n: (
                (n.first_tile - n.lists) / max(1, n.programs - n.lists)
            ),
            "if pid > lists": lambda n: 0.9,
            "if test != 0.0": lambda n: 0,
        },
        {
            # A block of channels of all rows of V is in L1 when they have been read.
            "return tl.load(p) if WHOLE": _once_in_program,
            "b_g = tl.load(": lambda n: filled(n.B * n.N, n.ROWS),
            # Of lists and of tiles.
            **dict.fromkeys(
                ("b_s = tl.load(p_similarities", "b_row = tl.load(p_indices"),
                lambda n: filled(n.N, n.QUERIES),
            ),
            "tl.store(p_pairs": lambda n: filled(n.N, n.QUERIES),
            # What the program has just stored or loaded, or of C k elements.
            **dict.fromkeys(
                (
                    "p = p_v + tl.load(p_offset",
                    "b_w = tl.load(",
                    "b_count = tl.load(p, m",
                    "b_rho = tl.load(p_rho + o_p",
                ),
                lambda n: 0,
            ),
        },
    ),
    "key_side_small_kernel": Expected(
        {
            "for first_key in range(begin, end, TILE)": lambda n: cdiv(n.M, n.TILE) / n.groups,
            "for first_key in range(0, M, KEYS)": lambda n: cdiv(n.M, n.KEYS),
            # Half a block of pairs is beyond the last one of a tile or block of keys.
            "for start in range(first, last, PAIRS)": lambda n: (
                n.N * n.k / cdiv(n.M, n.TILE) / n.PAIRS + 0.5
            ),
            "for start in range(first, last, MORE)": lambda n: (
                n.N * n.k / cdiv(n.M, n.KEYS) / 32 + 0.5
            ),
            "for chunk in range(0, CHUNKS)": lambda n: 0,
            "for position in range(first, last)": lambda n: 0,
            "for start in range(0, parts, PARTS)": lambda n: cdiv(n.parts, n.PARTS),
            "for d in range(0, D, BLOCK_D)": lambda n: cdiv(n.D, n.BLOCK_D),
        },
        {
            "if pid < first_norm": lambda n: n.first_norm / n.programs,
            "elif pid < first_norm_k": lambda n: _share_of(n, n.first_norm, n.first_norm_k),
            "elif pid < first_along": lambda n: _share_of(n, n.first_norm_k, n.first_along),
            "elif pid < first_weight": lambda n: _share_of(n, n.first_along, n.first_weight),
            "elif pid < first_bias": lambda n: _share_of(n, n.first_weight, n.first_bias),
            "if test != 0.0": lambda n: 0,
            # The machine code of `if tl.max(b_sum, 0) > _LARGE` bears either line.
            **dict.fromkeys(
                ("if tl.max(b_sum, 0) > _LARGE", "return tl.where(b_sum <= _ZERO"), lambda n: 0
            ),
        },
        {
            # A block of channels of all rows of G is in L1 when they have been read.
            # Of a line in CHUNKS places, one is counted.
            "b_x = tl.load(p_x, m_c": lambda n: n.CHUNKS * _once_by_keys(n),
            "tl.store(p_out, b_sum": lambda n: n.CHUNKS * n.M / (cdiv(n.M, n.TILE) * n.TILE),
            "b_x = tl.load(p_x[:, None]": lambda n: filled(n.N, n.ROWS),
            # k rows, and some ones, which all programs read
            **dict.fromkeys(("b_x = b_x * tl.load(p_weight_row", "b_one = tl.load("), lambda n: 0),
        },
    ),
    "search_grad_small_kernel": Expected(
        {
            "for piece in tl.range(pid, pieces": lambda n: cdiv(n.pieces, n.programs),
            "for begin in tl.range(0, N, ROWS": lambda n: cdiv(n.N, n.ROWS),
            # What is not finite is computed again.
            **dict.fromkeys(
                (
                    "for first in range(0, N, ROWS)",
                    "for j in range(0, K)",
                    "for first_key in range(0, M, KEYS)",
                    "for position in range(first, last)",
                ),
                lambda n: 0,
            ),
        },
        {"if test != 0.0": lambda n: 0},
        {
            "b_e = tl.load(": lambda n: n.columns / n.COLUMNS,
            **dict.fromkeys(
                ("b_column = tl.load(", "b_ds = tl.load(p_ds["), lambda n: filled(n.N, n.ROWS)
            ),
            "tl.store(p_row + b_column": _sectors_of_row,
            **dict.fromkeys(("b_q = tl.load(", "tl.store(p_dq"), lambda n: filled(n.N, n.ROWS)),
            **dict.fromkeys(("b_key = tl.load(", "tl.store(p_dk"), lambda n: n.M / n.COLUMNS),
        },
    ),
    "query_side_candidates_kernel": Expected(
        {
            "for first in range(0, C, BLOCKS * BLOCK_C)": lambda n: cdiv(n.C, n.BLOCKS * n.BLOCK_C),
            "for j in range(0, K)": lambda n: n.K,
            **dict.fromkeys(
                ("for d0 in range(0, D, BLOCK_D)", "for start_d in range(0, D, BLOCK_D)"),
                lambda n: cdiv(n.D, n.BLOCK_D),
            ),
            "for start in range(0, C * K, 2048)": lambda n: cdiv(n.C * n.K, 2048),
            # What is not finite, or too large, is computed again.
            "for c0 in range(0, C, 16)": lambda n: 0,
            "for slot in range(0, K)": lambda n: 0,
            "for d in range(0, D, BLOCK_D)": lambda n: 0,
        },
        {
            "if test != 0.0": lambda n: 0,
            "if tile % tiles == 0": lambda n: 1 / n.tiles,
            "if tl.max(b_sum, 0) > _LARGE": lambda n: 0,
        },
        {
            **dict.fromkeys(
                ("b_x = tl.load(p_q", "b_x = tl.load(p_k"), lambda n: filled(n.N, n.ROWS)
            ),
            # Lines of which each block of channels has a copy.
            **dict.fromkeys(
                ("b_g = tl.load(", "b_t = b_t * tl.load("),
                lambda n: n.BLOCKS * filled(n.N, n.ROWS),
            ),
            **dict.fromkeys(("b_v = tl.load(p_v", "tl.store(p_part + o_j"), lambda n: n.BLOCKS),
            **dict.fromkeys(
                ("b_s = tl.load(p_similarities + offsets", "b_row = tl.load(p_indices"),
                lambda n: filled(n.N, n.ROWS) * n.K / n.SLOTS,
            ),
            "tl.store(p_columns": lambda n: n.K / n.SLOTS,
            # One number of each pair.
            "tl.store(p, tl.broadcast_to(o_j": lambda n: filled(n.N, n.ROWS) * n.K / n.SLOTS,
            # What the program has just stored or loaded, or of C k elements.
            **dict.fromkeys(
                (
                    "b_s = tl.load(p_similarities + o_s",
                    "m = tl.load(p_columns",
                    "b_w = tl.load(p_weight",
                    "b_w = tl.load(p_weight + o_c[:",
                    "return tl.load(p_positions",
                ),
                lambda n: 0,
            ),
        },
    ),
    "key_side_candidates_kernel": Expected(
        {
            "for j in range(0, K)": lambda n: n.K,
            "for tile in range(0, tiles)": lambda n: n.tiles,
            "for first_key in range(0, M, TILE)": lambda n: cdiv(n.M, n.TILE),
            # The own rows of a tile of queries are the tile of keys of that number.
            "for tile in range(begin, end)": lambda n: cdiv(n.N, n.TILE) / cdiv(n.M, n.TILE),
            "for first in range(0, tl.maximum(N, M), TILE)": lambda n: cdiv(max(n.N, n.M), n.TILE),
            # What is not finite is computed in another way.
            **dict.fromkeys(
                (
                    "for start in range(0, M, TILE)",
                    "for slot in range(0, 1 if",
                    "for i in range(0, N)",
                    "for c in range(0, b_u.shape",
                ),
                lambda n: 0,
            ),
        },
        {
            "if block < value_blocks": lambda n: n.value_blocks / n.blocks,
            "if (begin * TILE != first)": lambda n: 0,
            "if is_finite": lambda n: 1,
            "if not is_finite": lambda n: 0,
        },
        {
            # Read for own rows just before, of at most 256 rows: it is still in L1.
            "b_x = tl.load(_rows(p_g, o_n, o_c, stride_n)": lambda n: 0,
            **dict.fromkeys(
                ("b_rho = tl.load(p_rho + o_d", "b_slot = tl.load(p_slots + o_d"),
                lambda n: filled(n.N, n.QUERIES),
            ),
            **dict.fromkeys(
                (
                    "b_x = tl.load(_rows(p_g, o_n, o_c, as_int64",
                    "b_q = tl.load(",
                    "b_k = to_float32(tl.load(_rows(p_k, b_own >> 4, o_c, stride_km), m_own",
                    "b_factor = tl.load(p_factor + o_d",
                    "tl.store(_rows(p_dq",
                ),
                lambda n: filled(n.N, n.TILE),
            ),
            # Not loaded where own rows are the queries themselves.
            **dict.fromkeys(
                ("b_q = to_float32(tl.load(", "b_k = to_float32(tl.load("), lambda n: 1
            ),
            "tl.store(p, b_own": lambda n: filled(n.M, n.TILE),
            # k rows, which all programs read
            "b_w = tl.load(_rows(p_weight_rows": lambda n: 0,
        },
    ),
    "sum_parts_kernel": Expected(
        {"for start in range(0, parts, PARTS)": lambda n: cdiv(n.weight_parts, n.PARTS)},
        {"if program < weight_programs": lambda n: n.weight_programs / n.programs},
    ),
    "sort_pairs_kernel": Expected(
        {
            "for start in range(0, key_blocks, BINS)": lambda n: cdiv(n.key_blocks, n.BINS),
            "for t in range(0, tiles, TILES)": lambda n: cdiv(n.tiles, n.TILES),
            "for start in range(0, parts, PARTS)": lambda n: cdiv(n.parts, n.PARTS),
            "for step in range(0, k * rows_each, PAIRS)": lambda n: n.k * n.rows_each / n.PAIRS,
        },
        {
            "if pid >= sort_programs": lambda n: 1 - n.sort_programs / n.programs,
            "if program < weight_programs": lambda n: (
                n.weight_programs / max(1, n.programs - n.sort_programs)
            ),
        },
    ),
    "key_side_kernel": Expected(
        {
            "for d in range(0, D, BLOCK_D)": lambda n: cdiv(n.D, n.BLOCK),
            "for start in range(first, last - (end - begin), PAIRS)": lambda n: (
                0 if n.OF_CHUNKS else n.KEYS * n.pairs / n.M / n.PAIRS + 0.5
            ),
            "for start in range(0, key_blocks, BINS)": lambda n: cdiv(n.key_blocks, 128),
            "for chunk in range(begin // CHUNK, end // CHUNK)": lambda n: 0,
        },
        {"if test != 0.0": lambda n: 0, "if tl.max(b_sum, 0) > _LARGE": lambda n: 0},
        {"b_x = b_x * tl.load(p_weight_rows": lambda n: 0},  # k rows, which all programs read
    ),
}
