# SPDX-License-Identifier: MIT
"""Configurations: for each kernel, its blocks, warps and stages. They are chosen here only.

`arch` is a compute capability without its point, such as 90, or INTERPRETER. An architecture
without a row of its own takes that of the next older one. Nothing is tuned at run time.

A row is keyed by what the kernel depends on: the bits of an element (16 or 32) and, for
`group_maxima`, whether it computes differences.
"""

from typing import Any

INTERPRETER = 0

# The longest list of neighbors that a program keeps; k beyond it takes several passes.
LONGEST_LIST = 256
# Bytes of the workspace for group maxima: with more rows, the launches are several.
WORKSPACE = 2**26
# Bytes that the partial sums of a weight's gradient may take in any case.
SMALL_WORKSPACE = 2**21
# Per-thread register cap. Without it ptxas targets higher occupancy and may spill inside loops.
MOST_REGISTERS = 255

Config = dict[str, Any]


def _config(**blocks: int) -> Config:
    return blocks


_GROUP_MAXIMA: dict[int, dict[str, Config]] = {
    INTERPRETER: {
        "16": _config(BLOCK_N=32, BLOCK_M=64, BLOCK_D=64, num_warps=4, num_stages=2),
        "32": _config(BLOCK_N=32, BLOCK_M=64, BLOCK_D=64, num_warps=4, num_stages=2),
        "differences": _config(BLOCK_N=32, BLOCK_M=32, BLOCK_D=32, num_warps=4, num_stages=2),
    },
    80: {
        "16": _config(BLOCK_N=128, BLOCK_M=64, BLOCK_D=128, num_warps=8, num_stages=3),
        "32": _config(BLOCK_N=64, BLOCK_M=64, BLOCK_D=32, num_warps=8, num_stages=3),
        "differences": _config(BLOCK_N=64, BLOCK_M=64, BLOCK_D=1, num_warps=8, num_stages=2),
    },
    90: {
        "16": _config(BLOCK_N=128, BLOCK_M=128, BLOCK_D=128, num_warps=8, num_stages=3),
        "32": _config(BLOCK_N=128, BLOCK_M=64, BLOCK_D=32, num_warps=8, num_stages=3),
        "differences": _config(BLOCK_N=64, BLOCK_M=64, BLOCK_D=1, num_warps=8, num_stages=2),
    },
}
# With 128 columns, sums that come from tensor memory spill.
_GROUP_MAXIMA[100] = _GROUP_MAXIMA[90] | {"16": _GROUP_MAXIMA[90]["16"] | {"BLOCK_M": 64}}


def row(table: dict[int, Any], arch: int) -> Any:
    """The row of an architecture, or of the newest one that is not newer."""
    return table[max(each for each in table if each <= arch)]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _log2(n: int) -> int:
    return power_of_two(n).bit_length() - 1


def group_maxima(arch: int, bits: int, D: int, differences: bool) -> Config:
    """Blocks of `group_maxima_kernel`."""
    config = row(_GROUP_MAXIMA, arch)["differences" if differences else str(bits)].copy()
    if not differences:
        config["BLOCK_D"] = min(config["BLOCK_D"], max(16, power_of_two(D)))
    return config


def group_maxima_precision(bits: int, D: int, tf32: bool) -> str:
    """How `group_maxima_kernel` multiplies float32: "ieee", "tf32", or "split" into three bfloat16.

    A piece is what the 8 leading bits of a number leave of it, down to the last of its 24. Six of
    nine products of pieces are taken; one of a middle piece with a last one, or of two last
    ones, is left out.

    Where float32 sums are exact, these are: let all products q_d k_d of a pair be multiples of a
    power of two, g, and the sum of their magnitudes less than 2^24 g. Then those of pieces are
    multiples of g, too, and as pieces have the sign of the whole, no sum of any of them
    reaches 2^24 g. What is left out is 0: a middle piece takes a q_d of more than 8 bits from its
    first to its last, a last piece a k_d of more than 16, and |q_d k_d| would reach 2^24 g.

    In general, with u = 2^-24 and D columns, a sum is off by at most 9 u for what is left out, 2 u
    for each of D / 16 steps of truncated accumulation, and 2 u for adding the small products at
    the end; the sum of `exact_topk_kernel` by log2(D) + 2 roundings. From D = 32 all together are
    below the D u that the certificate of a selection allows. For less, products are those of
    float32. Pieces of numbers below 2^-110 lose bits at the end of bfloat16's range: up to 2^-133
    times the other factor. Rows of `cosine` have been scaled.
    """
    if bits == 16:
        return "tf32"  # without effect
    if tf32:
        return "tf32"
    return "split" if D >= 32 else "ieee"


def group_size(arch: int, columns: int, k: int) -> int:
    """The columns in a group, or 0 where `exact_topk_kernel` takes all columns.

    Larger groups make the list of maxima shorter and the members of k groups more.
    """
    listed = power_of_two(k)
    group = 8 if columns < 4096 else 16 if columns < 16384 else 32 if columns < 2**18 else 64
    all_columns = 2 * listed * group
    if arch != INTERPRETER:
        all_columns = max(all_columns, 256)
    return 0 if k > LONGEST_LIST or columns <= all_columns else group


def tiles_each(arch: int, row_blocks: int, column_tiles: int) -> int:
    """How many tiles a program of `group_maxima_kernel` has: enough programs to fill a chip, and
    long loops where there are more."""
    programs = 4 if arch == INTERPRETER else 1024
    splits = min(column_tiles, -(-programs // row_blocks))
    return -(-column_tiles // splits)


def top_groups(arch: int, k: int) -> Config:
    """Blocks of `top_groups_kernel`."""
    log_list = max(1, _log2(k))
    rows = 16 if arch == INTERPRETER else 4 if log_list <= 5 else 1
    return _config(
        ROWS=rows,
        LOG_LIST=log_list,
        LOG_TILE=max(log_list, 6),
        num_warps=4,
        num_stages=1,
        maxnreg=MOST_REGISTERS,
    )


def exact_topk(arch: int, bits: int, D: int, k: int, metric: str) -> Config:
    """Blocks of `exact_topk_kernel`. A warp has no barriers.

    Short lists take the best of a tile one by one, long ones are merged with a sorted tile.
    """
    log_list = max(1, _log2(min(k, LONGEST_LIST)))
    log_tile = max(log_list, 6)
    block_d = min(16 if bits == 32 or metric == "euclidean" else 64, max(16, power_of_two(D)))
    return _config(
        ROWS=8,
        LOG_LIST=log_list,
        LOG_TILE=log_tile,
        ONE_BY_ONE=log_list <= 5,
        BLOCK_D=64 if arch == INTERPRETER else block_d,
        num_warps=1 if log_list <= 5 else 4,
        num_stages=3,
        maxnreg=MOST_REGISTERS,
    )


def slots_of_listed_rows(arch: int, batch: int) -> int:
    """Programs of a batch element that share its listed rows, of which there may be none."""
    return 2 if arch == INTERPRETER else max(4, 1024 // batch)


def rescores(bits: int, D: int, metric: str) -> bool:
    """Whether `finish_kernel` computes the similarities of hits from their rows.

    `euclidean` is one of differences. Few terms: see `group_maxima_precision` for 32 bits,
    `allows_select_small` for 16.
    """
    few_terms = D < 32 if bits == 32 else metric == "dot" and D < 16
    return metric == "euclidean" or few_terms


def finish(arch: int, N: int, C: int, k: int, rescore: bool) -> Config:
    """Blocks of `finish_kernel` for N queries of a batch element, of which ROWS must not be more.

    A warp has no barriers; with several rows, the addresses of a program are computed once.
    """
    log_k = max(1, _log2(k))
    log_list = 5 if k <= 12 else log_k + 2
    rows = 16 if arch == INTERPRETER else 4 if log_list <= 6 and not rescore else 1
    rows = min(rows, 1 << (N.bit_length() - 1))
    return _config(
        ROWS=rows,
        AT_ONCE=max(1, 4 // rows),
        LOG_LIST=log_list,
        LOG_K=log_k,
        ONE_BY_ONE=k <= 16,
        BLOCK_D=16,
        BLOCK_C=min(128, max(16, power_of_two(C))),
        num_warps=1,
        maxnreg=96 if log_list == 5 and not rescore else MOST_REGISTERS,
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
        BLOCK_D=min(64, max(16, power_of_two(D))),
        num_warps=warps,
        num_stages=2,
    )


def norms(arch: int, D: int) -> Config:
    """Blocks of `norms_kernel`."""
    rows = 64 if arch == INTERPRETER else 8
    return _config(ROWS=rows, BLOCK_D=min(128, max(16, power_of_two(D))), num_warps=4)


def group_flags(group: int) -> Config:
    """Blocks of `group_flags_kernel`."""
    return _config(GROUP=group, GROUPS=2048 // group, num_warps=4)


def block_k(k: int) -> int:
    """Similarities of a row that are read at a time."""
    return min(32, power_of_two(k))


def aggregate_dense(arch: int, bits: int, C: int, O: int, k: int) -> Config:
    """Blocks of `aggregate_dense_kernel`."""
    largest = 64 if bits == 16 else 32
    largest_o = 128 if bits == 16 and arch != INTERPRETER else 64
    return _config(
        # Before sm_90 sums and products of tensor cores take more registers.
        BLOCK_N=32 if arch == INTERPRETER else 64 if arch < 90 else 128,
        BLOCK_O=min(largest_o, max(16, power_of_two(O))),
        BLOCK_C=min(largest, max(16, power_of_two(C))),
        BLOCK_K=block_k(k),
        num_warps=8,
        num_stages=3,
    )


def aggregate_depthwise(arch: int, C: int, k: int) -> Config:
    """Blocks of `aggregate_depthwise_kernel`."""
    rows = 32 if arch == INTERPRETER else 16
    return _config(
        BLOCK_N=rows, BLOCK_C=min(128, max(16, power_of_two(C))), BLOCK_K=block_k(k), num_warps=4
    )


def modulate(arch: int, k: int) -> Config:
    """Blocks of `modulate_kernel` and `softmax_backward_kernel`."""
    return _config(ROWS=128 if arch == INTERPRETER else 32, BLOCK_K=block_k(k), num_warps=4)


def rho_grad_dense(arch: int, bits: int, C: int, O: int) -> Config:
    """Blocks of `rho_grad_dense_kernel`."""
    return _config(
        BLOCK_N=64,
        BLOCK_O=min(64 if bits == 16 else 32, max(16, power_of_two(O))),
        BLOCK_C=min(64, max(16, power_of_two(C))),
        num_warps=4,
        num_stages=3,
    )


def rho_grad_depthwise(arch: int, C: int) -> Config:
    """Blocks of `rho_grad_depthwise_kernel`."""
    rows = 64 if arch == INTERPRETER else 16
    return _config(BLOCK_N=rows, BLOCK_C=min(128, max(16, power_of_two(C))), num_warps=4)


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


def value_grad_depthwise(arch: int, C: int) -> Config:
    """Blocks of `value_grad_depthwise_kernel`."""
    return _over_pairs(arch, C) | {"BLOCK_C": min(64, max(16, power_of_two(C)))}


def key_grad(arch: int, D: int) -> Config:
    """Blocks of `key_grad_kernel`."""
    return _over_pairs(arch, D) | {"BLOCK_D": min(64, max(16, power_of_two(D)))}


def _over_pairs(arch: int, channels: int) -> Config:
    """CHUNK grows with the channels: the sums of all chunks are no more numbers than the pairs."""
    if arch == INTERPRETER:
        return _config(ROWS=16, PAIRS=8, CHUNK=16, num_warps=4)
    return _config(ROWS=1, PAIRS=16, CHUNK=max(64, power_of_two(channels)), num_warps=2)


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


def weight_grad_dense(arch: int, bits: int, C: int, O: int) -> Config:
    """Blocks of `weight_grad_dense_kernel`."""
    return _config(
        BLOCK_N=32,
        BLOCK_O=min(64, max(16, power_of_two(O))),
        BLOCK_C=min(64, max(16, power_of_two(C))),
        num_warps=4,
        num_stages=2,
    )


def weight_grad_depthwise(arch: int, C: int) -> Config:
    """Blocks of `weight_grad_depthwise_kernel`."""
    return _config(BLOCK_N=32, BLOCK_C=min(128, max(16, power_of_two(C))), num_warps=4)


def query_grad(arch: int, D: int, k: int) -> Config:
    """Blocks of `query_grad_kernel`."""
    return _config(
        BLOCK_N=64 if arch == INTERPRETER else 16,
        BLOCK_D=min(128, max(16, power_of_two(D))),
        BLOCK_K=block_k(k),
        num_warps=4,
    )


def parts(rows: int, size: int, bound: int) -> tuple[int, int]:
    """In how many parts the gradient of a weight of `size` elements is summed; rows of each.

    Depends on shapes only: the same sums on every device and in every run. All parts together
    have fewer than `bound` elements, or fit in a small workspace, unless it is one.
    """
    most = max(1, min(64, max(SMALL_WORKSPACE // 4, bound - 1) // max(1, size)))
    each = max(256, -(-rows // most))
    each = -(-each // 32) * 32
    return -(-rows // each), each
