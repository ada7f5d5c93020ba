# SPDX-License-Identifier: MIT
"""Configurations: for each kernel, its blocks, warps and stages. They are chosen here only.

`arch` is a compute capability without its point, such as 90, or INTERPRETER. An architecture
without a row of its own takes that of the next older one. Nothing is tuned at run time.

A row is keyed by what the kernel depends on: the bits of an element (16 or 32), and more where the
table says so.
"""

import math
from typing import Any

INTERPRETER = 0

# The longest list of neighbors that a program keeps; k beyond it takes several passes.
LONGEST_LIST = 256
# Bytes of the workspace for the hits of queries, in any case: with more, the launches are several.
WORKSPACE = 2**26
# Of a query in the temporaries of backward_small.py.
SLOTS = 16
# Per-thread register cap. Without it ptxas targets higher occupancy and may spill inside loops.
MOST_REGISTERS = 255

# Of an H100; programs that are a little fewer, or many, keep a chip of any size busy.
_MULTIPROCESSORS = 132

Config = dict[str, Any]


def _config(**blocks: int) -> Config:
    return blocks


def row(table: dict[int, Any], arch: int) -> Any:
    """The row of an architecture, or of the newest one that is not newer."""
    return table[max(each for each in table if each <= arch)]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _log2(n: int) -> int:
    return power_of_two(n).bit_length() - 1


def screen_precision(bits: int, tf32: bool, metric: str) -> str:
    """How products of float32 are computed: "tf32", or "split" into three bfloat16.

    A piece is what the 8 leading bits of a number leave of it, down to the last of its 24. Six of
    nine products of pieces are taken; one of a middle piece with a last one, or of two last
    ones, is left out.

    Where float32 sums are exact, these are: let all products q_d k_d of a pair be multiples of a
    power of two, g, and the sum of their magnitudes less than 2^24 g. Then those of pieces are
    multiples of g, too, and as pieces have the sign of the whole, no sum of any of them
    reaches 2^24 g. What is left out is 0: a middle piece takes a q_d of more than 8 bits from its
    first to its last, a last piece a k_d of more than 16, and |q_d k_d| would reach 2^24 g.

    In general, with u = 2^-24 and D channels, a sum is off by at most 9 u for what is left out, 2 u
    for each of D / 16 steps of truncated accumulation, and 2 u for adding the small products at
    the end. Pieces of numbers below 2^-110 lose bits at the end of bfloat16's range: up to 2^-133
    times the other factor. Rows of `cosine` have been scaled.
    """
    if metric == "euclidean":
        # A tolerance that covers the errors of tf32 would let nearly all columns pass.
        tf32 = False
    return "tf32" if bits == 16 or tf32 else "split"  # without effect on 16 bits


def needs_bounds(bits: int, D: int, metric: str, tf32: bool) -> bool:
    """Whether products only bound similarities, which are then computed again for the hits.

    From D = 32 on, the error of a sum of pieces (`screen_precision`) is below the D u that the
    certificate of a selection allows. In a sum of products of 16 bits, each term but the largest
    may lose a unit of 2^-24 of that one, and the whole two more when it is cut off: D + 1 in all
    where one step has all terms. The certificate allows `dot` D of them, which matters for less
    than a step of 16, and the product of `cosine` D + 6, for a scaling of the rows that here comes
    after the sum, under a bound of its own.
    """
    if metric == "euclidean":
        return True
    if bits == 16:
        return metric == "dot" and D < 16
    return not tf32 and D < 32


def exact_topk(arch: int, bits: int, D: int, k: int, metric: str) -> Config:
    """Blocks of `exact_topk_kernel`. One warp has no barriers.

    Short lists take the best of a tile one by one, long ones are merged with a sorted tile.
    """
    log_list = max(1, _log2(min(k, LONGEST_LIST)))
    # On sm_100, float32 spills with tiles of 64 columns, and with 8 of the longest lists.
    spills = arch >= 100 and bits == 32
    log_tile = max(log_list, 5 if spills else 6)
    by_fma = bits == 32 or metric == "euclidean"
    block_d = min(16 if by_fma else 64, max(16, power_of_two(D)))
    return _config(
        ROWS=4 if spills and log_list == 8 else 8,
        LOG_LIST=log_list,
        LOG_TILE=log_tile,
        ONE_BY_ONE=log_list <= 5,
        BLOCK_D=64 if arch == INTERPRETER else block_d,
        # Without tensor cores, one warp spills.
        num_warps=(2 if by_fma else 1) if log_list <= 5 else 8,
        num_stages=3,
        maxnreg=MOST_REGISTERS,
    )


def slots_of_listed_rows(arch: int, batch: int) -> int:
    """Programs of a batch element that share its listed rows, of which there may be none."""
    return 2 if arch == INTERPRETER else max(4, 1024 // batch)


def finish(arch: int, N: int, C: int, k: int, sample_step: int, rescore: bool) -> Config:
    """Blocks of `finish_kernel` for N queries of a batch element, of which ROWS must not be more.

    A warp has no barriers; with several rows, the addresses of a program are computed once. A row
    with a threshold from every `sample_step`-th tile has about k * sample_step hits.
    """
    log_k = max(1, _log2(k))
    # A warp has no registers for more than 128 hits of a row.
    log_list = min(7, max(5, log_k, _log2(7 * k * sample_step // 4)))
    rows = 16 if arch == INTERPRETER else 4 if log_list <= 6 and not rescore else 1
    rows = min(rows, 1 << (N.bit_length() - 1))
    return _config(
        ROWS=rows,
        AT_ONCE=max(1, 4 // rows),
        LOG_LIST=log_list,
        LOG_K=log_k,
        ONE_BY_ONE=k <= 32,
        BLOCK_D=16,
        BLOCK_C=min(128, max(16, power_of_two(C))),
        num_warps=1,
        maxnreg=(96 if arch >= 90 else 112) if log_list == 5 and not rescore else MOST_REGISTERS,
    )


def allows_select_small(bits: int, D: int, columns: int, k: int, metric: str) -> bool:
    """Whether the sizes allow `select_small_kernel`.

    It returns sums of tensor cores, in which each term but the largest may lose a unit of 2^-24 of
    that one, and the whole two more when it is cut off: D + 1 in all where one step has all terms.
    The certificate of a selection allows `dot` D of them, which matters where D is small: not for
    less than a step of 16. It allows the product of `cosine` D + 6, for a scaling of the rows that
    here comes after the sum, under a bound of its own.
    """
    of_tensor_cores = metric == "cosine" or (metric == "dot" and D >= 16)
    return bits == 16 and of_tensor_cores and columns <= 1024 and k <= 32


def select_small(arch: int, D: int, k: int, rows: int) -> Config:
    """Blocks of `select_small_kernel` for `rows` queries in all.

    A warp has 16 rows, so that no row is spread over warps.
    """
    log_list = max(1, _log2(k))
    if arch == INTERPRETER:
        return _config(LOG_LIST=log_list, BLOCK_N=32, BLOCK_M=64, BLOCK_D=32)
    # Fewer rows in a program where there are too few to fill the chip.
    warps = 4 if rows >= 2**14 else 1
    return _config(
        LOG_LIST=log_list,
        BLOCK_N=16 * warps,
        BLOCK_M=64,
        # Loads of single elements take more registers.
        BLOCK_D=min(16 if D % 16 else 64, max(16, power_of_two(D))),
        num_warps=warps,
        num_stages=2,
    )


def allows_select_network(
    arch: int,
    bits: int,
    D: int,
    columns: int,
    k: int,
    metric: str,
    tf32: bool,
    has_self: bool,
    has_candidates: bool,
    has_mask: bool,
    has_range: bool = False,
) -> bool:
    """Whether the sizes allow `select_network_kernel`, which returns sums of tensor cores.

    With a tile of 128 columns, some options take more registers than there are: the token itself
    beside candidates; before sm_90 also ranges, a mask beside the token, and loads of single
    elements; on sm_100 ranges beside the latter two.
    For sm_100, Triton keeps a sum of split products in each place where it is added to, which is
    more than there is room for.
    """
    if needs_bounds(bits, D, metric, tf32) or (arch >= 100 and bits == 32 and not tf32):
        return False
    narrow = has_self and has_candidates
    if 80 <= arch < 90:
        narrow = narrow or has_range or (has_self and has_mask) or D % 16 != 0
    elif arch >= 100 and has_range:
        narrow = narrow or (has_self and has_mask) or D % 16 != 0
    return columns <= (64 if narrow else 256) and k <= 15


def select_network(arch: int, bits: int, N: int, D: int, columns: int, k: int) -> Config:
    """Blocks of `select_network_kernel` for N queries of a batch element.

    Lists have some numbers more than a row has neighbors, so that few rows do without a network.

    A warp has 16 rows. With `wgmma`, of 64 rows and more, no row is spread over warps. float32 and
    loads of single elements take more registers.
    """
    narrow, single = columns <= 64, D % 16 != 0
    fewest = 64 if not narrow else 32 if bits == 32 and single else 16
    rows = min(128, max(fewest, power_of_two(N)))
    wide = bits == 16 or (90 <= arch < 100 and rows == 128 and not single)
    tiles = 1 if narrow else 2 if wide else 4
    if narrow and arch >= 100:
        tiles = 2  # of which the compiler does not fail; the second one has no columns
    # On sm_100, some options spill with more channels.
    few_channels = bits == 32 or 80 <= arch < 90 or arch >= 100 or D <= 16 or single
    return _config(
        LIST=12 if k <= 10 else 16,
        BLOCK_N=min(32, max(16, power_of_two(N))) if arch == INTERPRETER else rows,
        TILES=tiles,
        BLOCK_M=64 if narrow else 256 // tiles,
        BLOCK_D=16 if few_channels else 32,
        AGAIN_M=64 if bits == 16 else 32,
        num_warps=rows // 16,
        num_stages=2,
    )


def aggregate_small(arch: int, bits: int, C: int, is_aligned: bool) -> Config:
    """Blocks of `select_network_kernel` for the convolution; is_aligned: all rows of V are.

    On tensor cores, BLOCKS blocks of 32 channels at a time, as many as there are registers for.
    """
    # Loads of single elements take more registers.
    widest = 32 if C % 16 else 64
    blocks = -(-C // 32) if bits == 16 and is_aligned and C % 16 == 0 else 0
    most = 4 if arch >= 100 else 6
    return _config(
        BLOCK_C=min(widest, max(16, power_of_two(C))),
        BLOCKS=-(-blocks // max(1, -(-blocks // most))),
    )


# The sweep: how the columns of a tile are divided among the queues of a row follows from how tensor
# cores leave a tile in registers, so that no product moves: column (a QUEUES + q) PAIR + p belongs
# to queue q.
# A row "16" is for D up to 128 and 64 groups, "16, groups" for more groups, "16, D" for a larger D,
# and "16, ranges", where it is there, for ranges of keys: they take registers, and fewer rows have
# fewer tiles between the least begin and the greatest end.
# A tile begins ADVANCE columns after the one before, not BLOCK_M: image widths divide BLOCK_M, and
# vertical neighbors would all share one queue and one group.
_SWEEP: dict[int, dict[str, Config]] = {
    INTERPRETER: {
        "16": _config(BLOCK_N=16, BLOCK_M=64, QUEUES=4, PAIR=2),
        "32": _config(BLOCK_N=16, BLOCK_M=128, QUEUES=4, PAIR=2),
    },
    # Warps divide the columns of a tile as well as its rows.
    80: {
        "16": _config(BLOCK_N=128, BLOCK_M=128, QUEUES=16, PAIR=2, num_warps=8, num_stages=3),
        "16, D": _config(
            BLOCK_N=128,
            BLOCK_M=64,
            QUEUES=8,
            PAIR=2,
            num_warps=8,
            num_stages=2,
            maxnreg=MOST_REGISTERS,
        ),
        "16, ranges": _config(
            BLOCK_N=128,
            BLOCK_M=64,
            QUEUES=8,
            PAIR=2,
            num_warps=8,
            num_stages=2,
            maxnreg=MOST_REGISTERS,
        ),
        "32": _config(BLOCK_N=64, BLOCK_M=32, QUEUES=4, PAIR=2, num_warps=4, num_stages=2),
    },
    90: {
        # With 16 warps, and half of the registers, some variants spill.
        "16": _config(
            BLOCK_N=256,
            BLOCK_M=128,
            QUEUES=4,
            PAIR=2,
            num_warps=8,
            num_stages=2,
            maxnreg=MOST_REGISTERS,
        ),
        "16, groups": _config(
            BLOCK_N=128, BLOCK_M=128, QUEUES=4, PAIR=2, num_warps=8, num_stages=2
        ),
        "16, D": _config(BLOCK_N=128, BLOCK_M=128, QUEUES=4, PAIR=2, num_warps=8, num_stages=2),
        "16, ranges": _config(
            BLOCK_N=128, BLOCK_M=128, QUEUES=4, PAIR=2, num_warps=8, num_stages=2
        ),
        "32": _config(BLOCK_N=128, BLOCK_M=128, QUEUES=4, PAIR=2, num_warps=8, num_stages=2),
        "32, D": _config(BLOCK_N=128, BLOCK_M=64, QUEUES=4, PAIR=2, num_warps=8, num_stages=2),
    },
    100: {
        "16": _config(BLOCK_N=128, BLOCK_M=64, QUEUES=2, PAIR=32, num_warps=8, num_stages=3),
        "32": _config(
            BLOCK_N=128,
            BLOCK_M=64,
            QUEUES=2,
            PAIR=32,
            num_warps=8,
            num_stages=2,
            maxnreg=MOST_REGISTERS,
        ),
    },
}
# Channels in a step of the sweep: all of them up to the first number, else the second; with rows as
# above.
_SWEEP_BLOCK_D: dict[int, dict[str, tuple[int, int]]] = {
    INTERPRETER: {"16": (256, 128), "32": (128, 64)},
    80: {"16": (256, 128), "32": (128, 64), "32, ranges": (64, 64)},
    90: {"16": (256, 128), "32": (128, 64)},
    100: {"16": (256, 128), "32": (64, 32), "32, ranges": (32, 32)},
}


def allows_sweep(
    arch: int, bits: int, D: int, columns: int, k: int, has_range: bool = False
) -> bool:
    """Whether there are enough columns, and enough groups of them for a threshold that few columns
    reach."""
    fewest = 128 if arch == INTERPRETER else 512
    groups = sweep(arch, bits, D, columns, k, has_range)["GROUPS"]
    return columns >= fewest and k <= 64 and 3 * groups >= 4 * k


def sweep(arch: int, bits: int, D: int, columns: int, k: int, has_range: bool = False) -> Config:
    """Blocks of `sweep_kernel` and `threshold_kernel`, groups, sample and queues.

    Groups, sample and length of the queues follow from the cost on real features in
    benchmarks/results/hits.json, which ``python -m tools.count_hits`` writes.
    """
    rows = row(_SWEEP, arch)
    groups = 64 if k <= 32 else 128
    widest = 128 if bits == 16 else 64
    special = f"{bits}, D" if widest < D else f"{bits}, groups" if groups > 64 else ""
    of_ranges = f"{bits}, ranges" if has_range else ""
    config = rows.get(of_ranges, rows.get(special, rows[str(bits)])).copy()
    config["ADVANCE"] = config["BLOCK_M"] - (2 if config["BLOCK_M"] >= 64 else 0)
    config["GROUPS"] = min(groups, config["BLOCK_M"])
    config["sample_step"] = max(1, min(8, math.isqrt(columns // (100 * k))))
    config["CAP"] = max(16, 128 // config["QUEUES"]) * (1 if k <= 16 else 2)
    steps = row(_SWEEP_BLOCK_D, arch)
    whole, step = steps.get(of_ranges, steps[str(bits)])
    config["BLOCK_D"] = step if whole < D else max(16, power_of_two(D))
    if arch == INTERPRETER:
        config["CAP"] = 16
    return config


# The fewest queries in all that keep a chip busy with `select_medium_kernel`.
BUSY = 2**15
# As in _SWEEP; and as many programs as a chip has room for at a time.
_MEDIUM: dict[int, Config] = {
    INTERPRETER: _config(BLOCK_N=16, BLOCK_M=64, GROUPS=64, QUEUES=4, PAIR=2, programs=4),
    90: _config(BLOCK_N=128, BLOCK_M=128, GROUPS=64, QUEUES=4, PAIR=2, programs=132, num_warps=8),
    100: _config(BLOCK_N=128, BLOCK_M=64, GROUPS=64, QUEUES=2, PAIR=32, programs=148, num_warps=8),
}


def allows_select_medium(
    arch: int, bits: int, D: int, columns: int, k: int, metric: str, B: int, N: int
) -> bool:
    """Whether the sizes allow `select_medium_kernel`, which sums as `select_small_kernel` does, and
    whether there are enough queries to keep a chip busy.

    With more than one step of tensor cores, registers do not hold the queries, too, and before
    sm_90 some options spill in any case. An image of 32 x 32 pixels has 1,156 columns with its
    padding; more than 1,280 were not counted.
    """
    if INTERPRETER < arch < 90:
        return False
    sums = allows_select_small(bits, D, 256, k, metric)
    fits = 256 < columns <= 1280 and k <= 15 and D <= 16 and select_medium(arch)["BLOCK_N"] <= N
    return sums and fits and B * N >= BUSY


def select_medium(arch: int) -> Config:
    """Blocks of `select_medium_kernel`."""
    config = row(_MEDIUM, arch).copy()
    config |= {"ROTATE": 6, "CAP": max(16, 64 // config["QUEUES"]), "BLOCK_D": 16}
    config["LATE"] = min(64, config["BLOCK_N"])
    if arch != INTERPRETER:
        config |= {"num_stages": 1, "maxnreg": MOST_REGISTERS}
    return config


def queue_length(CAP: int, splits: int) -> int:
    """Entries of a queue where the columns are divided, each range with a part of the hits."""
    return CAP if splits == 1 else max(16, CAP // 2)


def column_splits(arch: int, BLOCK_N: int, row_blocks: int, tiles: int) -> int:
    """Into how many ranges the columns of a row block are divided: enough programs to fill a chip
    twice, each with several tiles. A multiprocessor has room for 256 rows."""
    programs = 4 if arch == INTERPRETER else 264 * 256 // BLOCK_N
    return max(1, min(programs // row_blocks, tiles // 8, 8))


def allowed_memory(B: int, N: int, M: int, D: int, C: int, k: int) -> int:
    """Bytes that a call may take, as the README promises: eight for each element of neighbors,
    query, key and value, and a fixed workspace."""
    return 8 * B * (N * (k + D) + M * (D + C)) + WORKSPACE


def columns(arch: int, D: int) -> Config:
    """Blocks of `columns_kernel`, which has a tile of columns or ROWS rows."""
    return _config(ROWS=64, BLOCK_D=min(64, max(16, power_of_two(D))), num_warps=8)


def norms(arch: int, D: int) -> Config:
    """Blocks of `norms_kernel`."""
    rows = 64 if arch == INTERPRETER else 8
    return _config(ROWS=rows, BLOCK_D=min(128, max(16, power_of_two(D))), num_warps=4)


def block_k(k: int) -> int:
    """Similarities of a row that are read at a time."""
    return min(32, power_of_two(k))


# Channels of several neighbors in a product of few: those of 9 neighbors with 3 each.
_FEW_CHANNELS = 32


def has_few_channels(C: int, rho: str) -> bool:
    """Whether products have channels of several neighbors, because C are too few for tensor cores.

    Their sums have any rho already, as which a similarity may be beyond the range of float16.
    """
    return C < 16 and rho != "similarity"


def aggregate_dense(
    arch: int, bits: int, rows: int, C: int, O: int, few_channels: bool, has_rho: bool
) -> Config:
    """Blocks of `aggregate_dense_kernel` for `rows` queries of all batch elements.

    Wide blocks read V less often, but should be enough to fill a chip. With rho, products and their
    sum are both in registers, which has no room for the widest.
    """
    block_o, largest = max(16, power_of_two(O)), 64 if bits == 16 else 32
    if arch == INTERPRETER:
        block_n, most_o, warps = 32, 64, 4
    elif bits == 32 or arch < 90:
        # Before sm_90 sums and products of tensor cores take more registers.
        block_n, most_o, warps = (64 if arch < 90 else 128), (64 if bits == 32 else 128), 8
    else:
        tiles = [(128, 128, 8), (64, 64, 4)]
        if not has_rho:
            tiles.insert(0, (128, 256, 8))
        busy = 0.8 * _MULTIPROCESSORS
        fill = (t for t in tiles if -(-rows // t[0]) * -(-O // min(t[1], block_o)) >= busy)
        block_n, most_o, warps = next(fill, tiles[-1])
    return _config(
        BLOCK_N=block_n,
        BLOCK_O=min(most_o, block_o),
        BLOCK_C=_FEW_CHANNELS if few_channels else min(largest, max(16, power_of_two(C))),
        num_warps=warps,
        num_stages=3,
    )


def aggregate_depthwise(arch: int, C: int, k: int) -> Config:
    """Blocks of `aggregate_depthwise_kernel`."""
    rows = 32 if arch == INTERPRETER else 16
    return _config(
        BLOCK_N=rows, BLOCK_C=min(128, max(16, power_of_two(C))), BLOCK_K=block_k(k), num_warps=4
    )


def modulate(arch: int, k: int) -> Config:
    """Blocks of `modulate_backward_kernel`."""
    return _config(ROWS=128 if arch == INTERPRETER else 32, BLOCK_K=block_k(k), num_warps=4)


def dense_inputs(arch: int, k: int) -> Config:
    """Blocks of `dense_inputs_kernel`."""
    return modulate(arch, k) | _config(BLOCK=64, BLOCK_O=32)


def rho_grad_dense(arch: int, bits: int, C: int, O: int) -> Config:
    """Blocks of `rho_grad_dense_kernel`."""
    large = bits == 16 and arch >= 90
    most_c = 128 if large else 32 if bits == 32 and 80 <= arch < 90 else 64
    return _config(
        BLOCK_N=128 if large else 64,
        BLOCK_O=min(64 if bits == 16 else 32, max(16, power_of_two(O))),
        BLOCK_C=min(most_c, max(16, power_of_two(C))),
        num_warps=8 if large else 4,
        num_stages=3,
    )


def value_grad_dense(arch: int, bits: int, C: int, O: int) -> Config:
    """Blocks of `value_grad_dense_kernel`."""
    return _config(
        BLOCK_M=64,
        BLOCK_O=min(32, max(16, power_of_two(O))),
        BLOCK_C=min(64, max(32, power_of_two(C))),
        num_warps=4,
        num_stages=2,
        maxnreg=MOST_REGISTERS,
    )


def allows_one_hot(bits: int, N: int, M: int) -> bool:
    """Whether the gradient of value multiplies all keys of a batch element with all of its queries:
    where keys are so few that this takes less than finding the pairs of each.

    By `tools.predict` it takes a fifth of the time with M = 256 and O = 128, and a third with 484;
    with 784 and O = 64 it takes longer. A program has all queries of its keys, which should not be
    many: of a single image, it takes as long as the pairs.
    """
    return bits == 16 and M <= 512 and N <= 1024


def value_grad_one_hot(arch: int, M: int, C: int, O: int, with_rho: bool) -> Config:
    """Blocks of `value_grad_one_hot_kernel`: what fits in registers. `with_rho`: which the gradient
    of rho takes, too."""
    block_n, most_o = (128, 256) if 90 <= arch < 100 else (64, 128)
    if O % 16:
        # Single elements are loaded, which takes registers.
        block_n, most_o = 64, 64
    if arch == INTERPRETER:
        block_n, most_o = 16, 32
    one_block_o = most_o >= O
    block_o = max(16, power_of_two(O)) if one_block_o else min(most_o, 64)
    wide = M > 128 and block_n == 128 and one_block_o and block_o <= 128
    if wide and with_rho:
        block_o = min(block_o, 64)
        one_block_o = block_o >= O
    return _config(
        BLOCK_M=32 if arch == INTERPRETER else 256 if wide else 128,
        BLOCK_N=block_n,
        BLOCK_O=block_o,
        BLOCK_C=min(32 if arch == INTERPRETER else 64, max(16, power_of_two(C))),
        ONE_BLOCK_O=one_block_o,
        num_warps=8,
        num_stages=3 if block_o < 256 else 1 if with_rho else 2,
    )


def value_grad_chunks(arch: int, O: int) -> Config:
    """Blocks of `value_grad_chunks_kernel`.

    CHUNK grows with the outputs: the sums of all chunks are no more numbers than the pairs.
    """
    block_o = min(64, max(16, power_of_two(O)))
    if arch == INTERPRETER:
        return _config(ROWS=16, PAIRS=8, CHUNK=16, BLOCK_O=block_o, num_warps=4)
    chunk = max(64, power_of_two(O))
    return _config(ROWS=1, PAIRS=16, CHUNK=chunk, BLOCK_O=block_o, num_warps=2)


def inverse_list_parts(batch: int, pairs: int, keys: int) -> tuple[int, int]:
    """In how many tiles the pairs of each batch element are sorted, and how many pairs have each.

    With more tiles there are more programs, and more counts, which fit in half of the workspace.
    """
    block = sort()["PAIRS"]
    most = max(1, (WORKSPACE // 8 - 1) // (batch * (keys + 1)))
    tiles = max(1, min(most, -(-pairs // (16 * block))))
    each = -(-pairs // (tiles * block)) * block
    return -(-pairs // each), each


def sort() -> Config:
    """Blocks of `count_pairs_kernel` and `store_pairs_kernel`."""
    return _config(PAIRS=64, num_warps=2)


def query_side(arch: int, bits: int, C: int, D: int, k: int, align: int) -> Config:
    """Blocks of `query_side_kernel`: one warp, in which sums over channels are shuffles.

    Of ROWS queries, both the rows of the output's gradient and one neighbor each are in registers.
    float32, and loads of single elements, take more of them.
    """
    largest = 64 if arch == INTERPRETER else 256
    block_c, block_d = (min(largest, max(16, power_of_two(X))) for X in (C, D))
    packed = bits == 16 and C % 16 == D % 16 == align % 16 == 0
    elements = 2048 if packed else 1024
    widest = max(64, block_c, block_d)
    registers = MOST_REGISTERS
    if arch >= 90 and packed and widest <= 128:
        # 10 warps on a multiprocessor, or 9, where that does not spill.
        registers = 200 if arch < 100 and widest == 64 else 224
    rows = 32 if arch == INTERPRETER else elements // widest
    return _config(
        ROWS=rows,
        BLOCK_N=rows // 2,
        BLOCK_K=block_k(k),
        BLOCK_C=block_c,
        BLOCK_D=block_d,
        num_warps=1,
        maxnreg=registers,
    )


def rows_each(arch: int, B: int, N: int, C: int, k: int, key_blocks: int) -> int:
    """The queries in a tile of `query_side_kernel`: 32, 64, or a multiple of 128.

    Enough tiles to fill a chip; but their counts of pairs, tiles * key_blocks, must be no more than
    a few for each query, and all programs that sort pairs read all counts of a batch element. Each
    tile has a part of dW of k C numbers: no more than the output has, or four for each pair.
    """
    rows = 64 if arch == INTERPRETER else power_of_two(min(128, max(32, B * N // 2048)))
    rows = max(rows, key_blocks // 4, N // 256, min(k, C // 4))
    return power_of_two(rows) if rows <= 128 else -(-rows // 128) * 128


def allowed_backward(B: int, N: int, M: int, C: int, D: int, k: int) -> int:
    """Bytes of temporary memory of the depthwise backward: what the README promises."""
    return 8 * B * (N * (k + max(C, D)) + M * (C + D)) + WORKSPACE


def allows_backward_small(bits: int, N: int, M: int, k: int, metric: str, stride: int) -> bool:
    """Whether sizes and metric allow the kernels of backward_small.py.

    Queries and keys are numbers of 8 bits, and slots of 4; a program sorts the pairs of a batch
    element. Rows of V, which are so far apart, begin at offsets of 32 bits.
    """
    few = N <= 256 and 0 < M <= 256 and k <= SLOTS and stride < 2**22
    return bits == 16 and few and metric != "euclidean"


def query_side_small(arch: int, B: int, N: int, C: int, align: int, float16: bool) -> Config:
    """Blocks of `query_side_small_kernel`. Loads of single elements take more registers.

    With 128 rows, those of V are read from L2 half as often; of few queries, programs would be too
    few.
    """
    packed = C % 16 == align % 16 == 0
    rows = 128 if packed and 90 <= arch < 100 and not float16 and B * N >= 2**15 else 64
    registers = 168 if packed and arch >= 90 and not float16 and rows == 64 else MOST_REGISTERS
    return _config(
        QUERIES=max(16, power_of_two(N)),
        BLOCKS=16,
        ROWS=16 if arch == INTERPRETER else rows,
        BLOCK_C=min(64 if packed else 32, max(16, power_of_two(C))),
        num_warps=4 if packed else 8,
        num_stages=1,
        maxnreg=registers,
    )


def key_side_small(arch: int, C: int, D: int, align: int, float16: bool) -> Config:
    """Blocks of `key_side_small_kernel`.

    Pairs are sorted by KEYS keys, and those of TILE keys are taken together. Rows of W have WIDTH
    channels, as many as all blocks.
    """
    packed = C % 16 == D % 16 == align % 16 == 0
    tile = 32 if arch == INTERPRETER else 64
    # Loads of single elements, and powers of two, take more registers.
    block = min(64 if packed else 32, max(16, power_of_two(C)))
    blocks = -(-C // block)
    # What belongs to a pair is found once for all blocks that are taken together: as many as leave
    # the fewest of them empty.
    most = (1,) if not packed or arch < 90 else (2, 1) if float16 else (3, 2, 1)
    chunks = min(most, key=lambda count: -blocks % count)
    return _config(
        KEYS=16,
        TILE=tile,
        PAIRS=tile if packed else 32,
        BLOCK=block,
        CHUNKS=chunks,
        WIDTH=power_of_two(-(-blocks // chunks) * chunks * block),
        ROWS=64 if packed else 32,
        BLOCK_D=min(64, max(16, power_of_two(D))),
        PARTS=64,
        COLUMNS=16,
        num_warps=4,
        num_stages=1,
    )


def search_grad_small(arch: int, M: int, D: int, align: int) -> Config:
    """Blocks of `search_grad_small_kernel`: what fits in registers.

    All keys of a batch element, and a block of channels, whose sums are there.
    """
    packed = D % 16 == align % 16 == 0
    return _config(
        ROWS=16 if arch == INTERPRETER else 64,
        COLUMNS=max(16, power_of_two(M)),
        BLOCK_D=min(16 if not packed else 64 if arch >= 90 else 32, max(16, power_of_two(D))),
        num_warps=8,
        num_stages=1,
    )


def programs_at_a_time(arch: int) -> int:
    """The programs of `search_grad_small_kernel`: what runs at a time."""
    return 2 if arch == INTERPRETER else 2 * _MULTIPROCESSORS


def keys_each(arch: int, programs: int) -> int:
    """The keys of a program of `key_side_small_kernel`; so many programs could have all keys of a
    batch element. With more of them, each row is read from L2 less often; of few batch elements,
    programs would be too few, and each would take long."""
    if arch == INTERPRETER:
        return 32
    return 256 if programs >= 256 else 64


def allows_backward_candidates(
    arch: int,
    bits: int,
    B: int,
    N: int,
    M: int,
    C: int,
    D: int,
    k: int,
    R: int,
    metric: str,
    align: int,
    float16: bool,
) -> bool:
    """Whether sizes and metric allow the kernels of backward_candidates.py.

    A program has all queries of a batch element: of few elements, programs would be too few. Loads
    of single elements take more registers than there are; so do other architectures. With the
    powers of two of float16 they take as long as those of backward_small.py. Rows have a number for
    each candidate, which should be fewer than the keys.
    """
    single = C % 16 or D % 16 or align % 16
    if arch != INTERPRETER and (single or float16 or B < 32 or not 90 <= arch < 100):
        return False
    few = 0 < R <= 32 and R < M
    return few and allows_backward_small(bits, N, M, k, metric, stride=1)


def query_side_candidates(arch: int, N: int, C: int, D: int, R: int, float16: bool) -> Config:
    """Blocks of `query_side_candidates_kernel`."""
    rows = 32 if arch == INTERPRETER else 128 if N > 64 and not float16 else 64
    block_c = min(16 if arch == INTERPRETER else 64, max(16, power_of_two(C)))
    return _config(
        ROWS=rows,
        TILE=16 if arch == INTERPRETER else 64,
        COLUMNS=max(16, power_of_two(R)),
        BLOCKS=min(2, -(-C // block_c)),
        BLOCK_C=block_c,
        BLOCK_D=min(64, max(16, power_of_two(D))),
        num_warps=(rows if not float16 else 2 * rows) // 16,
        num_stages=1,
    )


def key_side_candidates(arch: int, B: int, N: int, C: int, D: int, R: int) -> Config:
    """Blocks of `key_side_candidates_kernel`."""
    return _config(
        QUERIES=max(16, power_of_two(N)),
        BLOCK=min(32 if arch == INTERPRETER else 64, max(16, power_of_two(max(C, D)))),
        num_warps=4,
        num_stages=1,
    )


def sum_parts() -> Config:
    """Blocks of `sum_parts_kernel`."""
    return _config(PARTS=64, SUMS=16, num_warps=4)


def sort_pairs(arch: int) -> Config:
    """Blocks of `sort_pairs_kernel`."""
    return _config(PAIRS=32, TILES=8, BINS=128, PARTS=64, COLUMNS=16, num_warps=1)


def key_side(arch: int, bits: int, C: int, D: int, N: int, M: int, k: int) -> Config:
    """Blocks of `key_side_kernel`.

    A chunk has more pairs than most blocks of keys, and KEYS * channels sums, which all together
    are at most the elements of key and value, or else the pairs.
    """
    channels = power_of_two(max(C, D))
    chunk = min(power_of_two(16 * k * max(1, N // M)), 16 * channels)
    return _config(
        KEYS=16,
        # float32, and loads of single elements, take more registers.
        PAIRS=16 if bits == 32 or C % 16 or D % 16 else 32,
        BLOCK=min(64, max(16, channels)),
        CHUNK=64 if arch == INTERPRETER else max(256, chunk),
        num_warps=2,
        num_stages=1,
    )


def weight_grad_dense(
    arch: int, bits: int, C: int, O: int, few_channels: bool, in_float: bool
) -> Config:
    """Blocks of `weight_grad_dense_kernel`. `in_float`: products of float32 at any dtype."""
    # Products of float32 take more registers.
    largest = 128 if bits == 16 and not in_float and arch >= 90 else 64
    most_c = 32 if bits == 32 and 80 <= arch < 90 else largest
    return _config(
        BLOCK_N=64 if largest == 128 else 32,
        BLOCK_O=min(largest, max(16, power_of_two(O))),
        BLOCK_C=_FEW_CHANNELS if few_channels else min(most_c, max(16, power_of_two(C))),
        num_warps=8 if largest == 128 else 4,
        num_stages=3 if largest == 128 else 2,
    )


def add_parts() -> Config:
    """Blocks of `add_parts_kernel`."""
    return _config(BLOCK=64, BLOCK_O=32, num_warps=4)


def parts(rows: int, size: int, bound: int, programs: int) -> tuple[int, int]:
    """In how many parts the gradient of a weight of `size` elements is summed; rows of each.

    Depends on shapes and the architecture: the same sums in every run. All parts together
    have fewer than `bound` elements, or fit in half of the workspace, unless it is one. There are
    as few as let `programs` for each keep the last multiprocessors busy to the end.
    """
    most = max(1, min(128, max(WORKSPACE // 8, bound - 1) // max(1, size), rows // 256))
    waves = [count * programs / _MULTIPROCESSORS for count in range(1, most + 1)]
    enough = (i for i, w in enumerate(waves, 1) if w >= 0.8 * math.ceil(w))
    each = -(-rows // next(enough, most))
    each = -(-each // 64) * 64
    return -(-rows // each), each
