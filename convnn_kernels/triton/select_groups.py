# SPDX-License-Identifier: MIT
"""Select where there are many columns: groups of columns are ruled out before any is scored.

The columns of a row of S = Q K^T (keys, or candidates in ascending order) are divided into groups
of GROUP consecutive ones:

1. `group_maxima_kernel`: tiles of S on tensor cores, of which only the maximum of each group is
   stored. A program has BLOCK_N queries and a range of columns; the tile of S stays in registers.
   The maxima of different columns never meet, so a single row block can fill the chip. A row of
   maxima has room for `stride_g` groups, a multiple of 16 whatever their number G; the excess is
   never read.
2. `top_groups_kernel`: the k groups of each query with the largest maxima, ties by group.
3. `exact_topk_kernel` (exact_topk.py): the similarities of the members of those groups, each one
   fixed sum over D in float32, and the k largest of them.

Every neighbor is a member of one of the k groups: a group ranked before the neighbor's group
holds, by its maximum or at a tie by its lower columns, a key that precedes the neighbor, and
fewer than k do. Ties, constant rows and NaN need no special path, and nothing can overflow.

Rows are processed in blocks of BLOCK_N, which do not cross batch elements. The maxima of all rows
may exceed the workspace; then there are several launches, each from `first_block` on.
"""

import torch
import triton
import triton.language as tl

from . import configs, hardware
from .exact_topk import prepare_exact_topk
from .integers import aligned
from .launch import Kernel, Launch, Plan, Pointers, cache_plans
from .metrics import COSINE, EUCLIDEAN
from .order import NOTHING, index_of, merge, orderable, pack
from .search import Search
from .tensors import cdiv


@Kernel
def group_flags_kernel(
    p_columns,  # [R] int64, or None
    p_mask,  # [B, M] bool, or None
    p_flags,  # [B, stride_g] int8
    M,
    columns,
    B2,
    stride_g,
    stride_mb1,
    stride_mb2,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Whether a group has a column that may be a neighbor."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(stride_g, GROUPS)
    b = pid // blocks
    o_g = (pid % blocks) * GROUPS + tl.arange(0, GROUPS)
    o_c = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_c = o_c < columns
    row = o_c
    if p_columns is not None:
        row = tl.load(p_columns + o_c, m_c, -1)
        m_c = m_c & (row >= 0) & (row < M)
    if p_mask is not None:
        p_b = p_mask + (b // B2) * stride_mb1 + (b % B2) * stride_mb2
        m_c = m_c & (tl.load(p_b + row, m_c, 0) != 0)
    b_flag = tl.max(m_c.to(tl.int32), 1).to(tl.int8)
    tl.store(p_flags + b * stride_g + o_g, b_flag, o_g < stride_g)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_maxima(b_s, INTERPRETED: tl.constexpr):
    """The maximum over the last axis of b_s [rows, groups, GROUP], NaN if there is a NaN."""
    if INTERPRETED:
        # The interpreter runs a custom reduction element by element.
        b_nan = b_s != b_s
        b_max = tl.max(tl.where(b_nan, float("-inf"), b_s), 2)
        b_max = tl.where(tl.max(b_nan.to(tl.int32), 2) > 0, float("nan"), b_max)
    else:
        b_max = tl.reduce(b_s, 2, _larger_or_nan)
    return b_max


@triton.jit
def _leading_bits(b_x):
    """float32 without its last 16 bits, which is a bfloat16, not larger than b_x in magnitude."""
    return (b_x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pieces(b_x, INTERPRETED: tl.constexpr):
    """Three bfloat16 of b_x (float32), whose sum it is; of the same sign, so that none overflows.

    Of NaN, the first is NaN. Of infinity, the first is infinity, and the others are NaN.
    """
    # The bits of a NaN that mark it as such may be the last ones.
    b_high = tl.where(b_x == b_x, _leading_bits(b_x), b_x)
    b_rest = b_x - b_high
    b_middle = _leading_bits(b_rest)
    b_low = b_rest - b_middle
    if not INTERPRETED:
        # Without rounding: each has 8 bits. The interpreter does not know bfloat16.
        b_high, b_middle = b_high.to(tl.bfloat16), b_middle.to(tl.bfloat16)
        b_low = b_low.to(tl.bfloat16)
    return b_high, b_middle, b_low


@triton.jit
def _split_dot(b_q, b_k, b_s, b_rest, INTERPRETED: tl.constexpr):
    """Adds b_q b_k to b_s + b_rest, with b_s the products of the largest pieces only.

    Six of the nine products of pieces. The others are below 2^-21 of the whole, and 0 wherever a
    float32 sum is exact: see `configs.group_maxima_precision`.
    """
    q_high, q_middle, q_low = _pieces(b_q, INTERPRETED)
    k_high, k_middle, k_low = _pieces(b_k, INTERPRETED)
    b_rest = tl.dot(q_low, k_high, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_middle, k_middle, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_high, k_low, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_middle, k_high, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_high, k_middle, b_rest, input_precision="ieee")
    b_s = tl.dot(q_high, k_high, b_s, input_precision="ieee")
    return b_s, b_rest


@Kernel
def group_maxima_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_inverse,  # [B, N] float32, or None: no cosine
    p_key_inverse,  # [B, M] float32, or None: no cosine
    p_columns,  # [R] int64, or None
    p_mask,  # [B, M] bool, or None
    p_maxima,  # [blocks of the launch * BLOCK_N, stride_g] float32
    first_block,
    N,
    M,
    D,
    columns,
    B2,
    row_blocks,
    tiles_each,
    stride_g,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_mb1,
    stride_mb2,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
):
    """Maxima of the groups of S, for BLOCK_N rows and `tiles_each` tiles of BLOCK_M columns.

    A maximum decides only which groups are scored. ||q|| is applied to it rather than to S.
    """
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    GROUPS: tl.constexpr = BLOCK_M // GROUP
    stride_g = aligned(stride_g, 16)
    tiles = stride_g // GROUPS
    splits = tl.cdiv(tiles, tiles_each)
    pid = tl.program_id(0).to(tl.int64)
    local = pid // splits
    block = first_block + local
    b = block // row_blocks
    o_n = (block % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_d = tl.arange(0, BLOCK_D)
    p_q = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2 + o_n * stride_qn
    p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2
    if p_mask is not None:
        p_m = p_mask + (b // B2) * stride_mb1 + (b % B2) * stride_mb2

    inverse_q = tl.full([BLOCK_N], 1.0, tl.float32)
    if METRIC == COSINE:
        inverse_q = tl.load(p_query_inverse + b * N + o_n, m_n, 0.0)
    if ONE_BLOCK_D:
        m_q = m_n[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_q[:, None] + o_d[None, :], m_q, 0.0)

    first = (pid % splits) * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    for tile in range(first, last):
        # Scalars of 64 bits, ranges of 32: every thread has half of the columns.
        o_m = tl.arange(0, BLOCK_M)
        m_c = o_m < tl.minimum(columns - tile * BLOCK_M, BLOCK_M).to(tl.int32)
        row = tile * BLOCK_M + o_m
        if METRIC == COSINE:
            p_inverse = p_key_inverse + (b * M + tile * BLOCK_M) + o_m
        if p_columns is not None:
            row = tl.load(p_columns + row, m_c, -1)
            m_c = m_c & (row >= 0) & (row < M)
            if METRIC == COSINE:
                p_inverse = p_key_inverse + b * M + row
        if p_mask is not None:
            m_c = m_c & (tl.load(p_m + row, m_c, 0) != 0)
        b_s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        b_rest = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if ONE_BLOCK_D and METRIC != EUCLIDEAN:
            p = p_k + row[None, :] * stride_km + o_d[:, None]
            b_k = tl.load(p, m_c[None, :] & (o_d < D)[:, None], 0.0)
            if PRECISION == "split":
                b_s, b_rest = _split_dot(b_q, b_k, b_s, b_rest, INTERPRETED)
            else:
                b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
        else:
            for d in range(0, D, BLOCK_D):
                o_x = d + o_d
                m_d = o_x < D
                p = p_q[:, None] + o_x[None, :]
                b_q = tl.load(p, m_n[:, None] & m_d[None, :], 0.0)
                p = p_k + row[None, :] * stride_km + o_x[:, None]
                b_k = tl.load(p, m_c[None, :] & m_d[:, None], 0.0)
                if METRIC == EUCLIDEAN:
                    b_q3 = b_q.to(tl.float32)[:, None, :]
                    b_diff = b_q3 - tl.trans(b_k).to(tl.float32)[None, :, :]
                    b_s -= tl.sum(b_diff * b_diff, 2)
                elif PRECISION == "split":
                    b_s, b_rest = _split_dot(b_q, b_k, b_s, b_rest, INTERPRETED)
                else:
                    b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
        if PRECISION == "split":
            # Not a number only where b_s is infinite or not a number, too.
            b_s += tl.where(b_rest == b_rest, b_rest, 0.0)
        if METRIC == COSINE:
            # What may not be a neighbor was read as zeros, so that -inf can be added to it: an
            # instruction for each similarity, and not three.
            inverse_k = tl.load(p_inverse, m_c, 0.0)
            b_s = b_s * inverse_k[None, :] + tl.where(m_c, 0.0, float("-inf"))[None, :]
        else:
            b_s = tl.where(m_c[None, :], b_s, float("-inf"))
        b_max = _group_maxima(tl.reshape(b_s, [BLOCK_N, GROUPS, GROUP]), INTERPRETED)
        if METRIC == COSINE:
            b_max = b_max * inverse_q[:, None]
        o_g = tile * GROUPS + tl.arange(0, GROUPS)
        p_out = p_maxima + (local * BLOCK_N + tl.arange(0, BLOCK_N))[:, None] * stride_g
        tl.store(p_out + o_g[None, :], b_max, m_n[:, None])


@Kernel
def top_groups_kernel(
    p_maxima,  # [blocks of the launch * BLOCK_N, stride_g] float32
    p_flags,  # [B, stride_g] int8, or None
    p_groups,  # [blocks of the launch * BLOCK_N, 2**LOG_LIST] int32, -1 where there is none
    first_block,
    N,
    G,
    row_blocks,
    stride_g,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_LIST: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """The groups with the largest maxima, the largest first, for ROWS rows."""
    stride_g = aligned(stride_g, 16)
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    o_r = row0 + tl.arange(0, ROWS)
    block = first_block + row0 // BLOCK_N
    b = block // row_blocks
    m_n = (block % row_blocks) * BLOCK_N + row0 % BLOCK_N + tl.arange(0, ROWS) < N
    b_list = tl.full([ROWS, 1 << LOG_LIST], NOTHING, tl.int64)
    for g in range(0, G, 1 << LOG_TILE):
        o_g = g + tl.arange(0, 1 << LOG_TILE)
        m_row = o_g < stride_g
        p_max = p_maxima + o_r[:, None] * stride_g + o_g[None, :]
        b_max = tl.load(p_max, m_n[:, None] & m_row[None, :], 0.0)
        m_g = o_g < G
        if p_flags is not None:
            m_g = m_g & (tl.load(p_flags + b * stride_g + o_g, m_row, 0) != 0)
        m = m_n[:, None] & m_g[None, :]
        b_key = tl.where(m, pack(orderable(b_max), o_g[None, :].to(tl.int64)), NOTHING)
        b_list = merge(b_list, b_key, LOG_TILE, LOG_LIST)
    b_group = tl.where(b_list == NOTHING, -1, index_of(b_list)).to(tl.int32)
    o_l = tl.arange(0, 1 << LOG_LIST)
    tl.store(p_groups + (o_r[:, None] << LOG_LIST) + o_l[None, :], b_group, m_n[:, None])


@cache_plans
def plan_select_groups(search: Search) -> Plan:
    Q, arch, k, norms = search.Q, search.arch, search.k, search.norms()
    group = configs.group_size(arch, search.columns, k)
    config = configs.group_maxima(arch, search.bits, Q.D, search.metric == "euclidean")
    top_config = configs.top_groups(arch, k)
    block_n, row_blocks = config["BLOCK_N"], cdiv(Q.N, config["BLOCK_N"])
    G = cdiv(search.columns, group)
    # Whole tiles, and loads of 16 bytes, for any number of groups.
    stride_g = 16 * cdiv(G, 16)
    numbers = search.numbers() | {
        "G": G,
        "stride_g": stride_g,
        "row_blocks": row_blocks,
        "GROUP": group,
        "BLOCK_N": block_n,
        "PRECISION": configs.screen_precision(search.bits, search.tf32),
        "INTERPRETED": hardware.interpreted(),
        "ONE_BLOCK_D": 0 < Q.D <= config["BLOCK_D"],
    }
    blocks, list_length = Q.B * row_blocks, 1 << top_config["LOG_LIST"]
    row_bytes = 4 * (stride_g + list_length)
    at_once = max(1, min(blocks, configs.WORKSPACE // (block_n * row_bytes)))
    tiles = stride_g * group // config["BLOCK_M"]

    names = norms.names
    buffers = norms.buffers | {
        "p_maxima": (at_once * block_n * stride_g, torch.float32),
        "p_groups": (at_once * block_n * list_length, torch.int32),
    }
    launches = [*norms.launches]
    if search.has_candidates or search.has_mask:
        flag_config = configs.group_flags(group)
        programs = Q.B * cdiv(stride_g, flag_config["GROUPS"])
        launches.append(group_flags_kernel.prepare(programs, flag_config, **numbers))
        buffers["p_flags"] = (Q.B * stride_g, torch.int8)
    else:
        names = names | {"p_flags": None}

    def some_rows(first_block: int) -> tuple[Launch, ...]:
        count = min(at_once, blocks - first_block)
        each = configs.tiles_each(arch, count, tiles)
        of_step = numbers | {"first_block": first_block, "tiles_each": each}
        programs, rows = count * cdiv(tiles, each), count * block_n
        return (
            group_maxima_kernel.prepare(programs, config, names, **of_step),
            top_groups_kernel.prepare(rows // top_config["ROWS"], top_config, names, **of_step),
            prepare_exact_topk(search, count, block_n, group, first_block),
        )

    for first_block in range(0, blocks, at_once):
        launches += some_rows(first_block)
    return Plan(launches, **buffers)


def select_groups(search: Search, pointers: Pointers) -> None:
    """Select by the maxima of groups of columns."""
    candidates = pointers.tensor("p_columns")
    if candidates is not None:
        # Groups of ascending columns: at a tie, the lower group then has the lower rows of key.
        pointers.add(p_columns=candidates.sort().values)
    plan_select_groups(search)(pointers)
