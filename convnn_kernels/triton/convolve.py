# SPDX-License-Identifier: MIT
"""The depthwise convolution over modulated neighbors (Eq. 6) in 16 bits, on tensor cores:

    y_i = sum_j rho_ij (w_j o V[I_ij]) + bias        o: channel by channel

diag(w_j) X^T, with a row of V in each column of X^T, has w_j o x in its columns: in float32, and
exactly, as only one term of a sum is not 0. The instruction mma.m16n8k16 does that for 16 channels
of 8 rows, and so takes the place of 24 that take pairs of 16 bits apart, convert and multiply.

Its operands are what loads leave in registers. Lane 4 g + q has 8 adjacent channels of 32, from
8 q on, of row g: four words of two channels, a pair of words for each of two instructions, of which
they are rows 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q of column g. diag(w_j) is a table in memory, as its
lanes have it: what is not 0 are two numbers of lane (g, g / 2), in the half g % 2 of the first and
the last of four words. The product has channels in other lanes: lane (g, q) has rows 2 q and
2 q + 1, and what it has of 8 channels, from 8 (g / 2) on, is every other one, from g % 2 on. So it
takes rho of these rows; sums are put in order when all neighbors have been added.

Triton does not say which elements it gives to a lane. If they are others, which they are in no
version compiled so far, sums become NaN (row_products.py). What is not finite in V makes NaN of 16
channels, too, by its products with 0. Either is seen in half of the channels, and the caller
computes the rows in another way.
"""

import triton
import triton.language as tl

from .integers import as_int64, wide
from .row_products import checked, numbers_of_elements, on_diagonal
from .tensors import cdiv


def _text(kind: str) -> str:
    """PTX for operands $0... products, $8... words of a row, $12... and $16... of the table."""
    lines = ["{ .reg .f32 z; mov.f32 z, 0f00000000;"]
    for step in (0, 4):
        results, table = (", ".join(f"${i + step + j}" for j in range(4)) for i in (0, 12))
        words = f"${8 + step // 2}, ${9 + step // 2}"
        lines += [
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            f"{{{results}}}, {{{table}}}, {{{words}}}, {{z, z, z, z}};"
        ]
    return "\n".join((*lines, "}"))


# Triton's cache key has constants of one name in the order of the addresses of their modules, which
# differs from process to process: no names that row_products has, too.
_CONVOLVE_BFLOAT16, _CONVOLVE_FLOAT16 = (tl.constexpr(_text(kind)) for kind in ("bf16", "f16"))
_CONVOLVE_OPERANDS = tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 12))


@triton.jit
def _of_instruction(b_x, b_w, STEP: tl.constexpr):
    """What an instruction makes of b_x and the table [rows, 32], as its lanes have it, [rows / 8,
    8 g, 4 q, 2, 2]; for the interpreter."""
    blocks: tl.constexpr = b_x.shape[0] // 8
    b_w = tl.reshape(b_w.to(tl.float32), [blocks, 8, 4, 2, 2, 2])
    # Word 2 h + i of lane (g, q) has row g + 8 i, columns 8 h + 2 q and 8 h + 2 q + 1.
    b_w = tl.reshape(tl.permute(b_w, [0, 4, 1, 3, 2, 5]), [blocks, 16, 16])
    b_x = tl.reshape(b_x.to(tl.float32), [blocks, 8, 4, 2, 2, 2])
    b_x, b_other = tl.split(tl.permute(b_x, [0, 1, 4, 2, 5, 3]))
    if STEP == 1:
        b_x = b_other
    b_x = tl.reshape(b_x, [blocks, 1, 8, 16])
    b_y = tl.sum(b_w[:, :, None, :] * b_x, 3)
    return tl.permute(tl.reshape(b_y, [blocks, 2, 8, 4, 2]), [0, 2, 3, 1, 4])


@triton.jit
def _products(
    b_x,  # [rows, 32]: of rows of V
    b_w,  # [rows, 32]: the table, for the first instruction
    b_other_w,  # for the second
    INTERPRETED: tl.constexpr,
):
    """w o x in float32, where instructions leave it; see `_in_order`."""
    if INTERPRETED:
        b_y = tl.join(_of_instruction(b_x, b_w, 0), _of_instruction(b_x, b_other_w, 1))
        return tl.reshape(tl.permute(b_y, [0, 1, 2, 5, 3, 4]), b_x.shape)
    TEXT: tl.constexpr = _CONVOLVE_BFLOAT16 if b_x.dtype == tl.bfloat16 else _CONVOLVE_FLOAT16
    operands = [b_x, b_w, b_other_w]
    return tl.inline_asm_elementwise(TEXT, _CONVOLVE_OPERANDS, operands, tl.float32, True, 8)


@triton.jit
def _of_rows(b_x, ROWS: tl.constexpr):
    """b_x [ROWS], one number for each row, where instructions leave the channels of these rows."""
    b_x = tl.reshape(b_x, [ROWS // 8, 1, 4, 1, 2])
    return tl.reshape(tl.broadcast_to(b_x, [ROWS // 8, 8, 4, 4, 2]), [ROWS, 32])


@triton.jit
def _in_order(b_y):
    """Rows [rows, 32] from where instructions leave them."""
    b_y = tl.reshape(b_y, [b_y.shape[0] // 8, 4, 2, 4, 2, 2, 2])
    return tl.reshape(tl.permute(b_y, [0, 3, 6, 1, 4, 5, 2]), [b_y.shape[0] * 8, 32])


@triton.jit
def store_table(
    p_weight,  # [C, k]
    p_table,  # [k + 1, blocks of 32 channels, 2 instructions, 8 lanes, 8]
    C,
    k,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The table of diag(w_j), and zeros for j = k, which lanes without a weight read.

    Each program stores all of it, and all the same, so that none waits for another.
    """
    o_i = tl.arange(0, 8)[None, :]
    o_x = tl.arange(0, BLOCK)
    lanes = tl.cdiv(C, 32 * BLOCKS) * (16 * BLOCKS)
    for start in range(0, lanes, LANES):
        o_l = start + o_x % LANES
        # An instruction has 4 of 8 channels, and a lane one of the first two and one of the others.
        o_c = o_l // 16 * 32 + o_l % 8 // 2 * 8 + o_l // 8 % 2 * 4 + o_l % 2
        is_odd = (o_l % 2)[:, None]
        p = p_weight + o_c.to(tl.int64) * k
        p_w = p_table + o_l.to(tl.int64)[:, None] * 8 + o_i
        for begin in range(0, k + 1, BLOCK // LANES):
            o_j = begin + (o_x // LANES)
            b_first = tl.load(p + o_j, (o_j < k) & (o_c < C), 0.0)[:, None]
            b_second = tl.load(p + 2 * k + o_j, (o_j < k) & (o_c + 2 < C), 0.0)[:, None]
            b_w = tl.where(o_i == is_odd, b_first, tl.where(o_i == 6 + is_odd, b_second, 0.0))
            m = (o_l < lanes) & (o_j <= k)
            tl.store(p_w + o_j.to(tl.int64)[:, None] * (8 * lanes), b_w, m[:, None])


@triton.jit
def _rows_of_value(p_v, p_rows, bytes_vm, p_y, ALIGN: tl.constexpr):
    """Pointers [rows, 1] to rows of V."""
    BYTES: tl.constexpr = p_y.dtype.element_ty.primitive_bitwidth // 8
    b_bytes = tl.multiple_of(wide(tl.load(p_rows)) * wide(bytes_vm), ALIGN * BYTES)
    p = (p_v.to(tl.pointer_type(tl.int8)) + b_bytes).to(tl.pointer_type(p_y.dtype.element_ty))
    return p[:, None]


@triton.jit
def _where_table_is(p_table, o_g, o_x, C, k, BLOCKS: tl.constexpr):
    """Pointers [rows, 32] to what lanes have of the table for j = 0, and the elements to j + 1."""
    has_weight = o_x // 8 == o_g // 2
    row_of_table = tl.cdiv(C, 32 * BLOCKS) * as_int64(128 * BLOCKS)
    o_w = tl.where(has_weight, 0, k * row_of_table) + (8 * o_g + o_x % 8)
    p_w = p_table + tl.max_contiguous(tl.multiple_of(o_w, [1, 8]), [1, 8])
    return p_w, tl.where(has_weight, row_of_table, 0)


@triton.jit
def _add_neighbor(
    first,  # BLOCKS blocks [ROWS / 2, 32] float32: sums of the first half of rows
    second,
    p,  # rows of V
    p_second,
    p_w,  # the table, or None
    b_w,  # that of ones, where there is none
    b_rho,
    b_rho_second,
    o_c,  # [1, 32]
    C,
    BLOCKS: tl.constexpr,
    WHOLE_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sums with rho (w o x) of a neighbor of each row."""
    new, new_second = (), ()
    b_other_w = b_w
    for i in tl.static_range(BLOCKS):
        if p_w is not None:
            b_w = tl.load(p_w + 128 * i)
            b_other_w = tl.load(p_w + (128 * i + 64))
        if WHOLE_C:
            b_x = tl.load(p + 32 * i)
            b_x_second = tl.load(p_second + 32 * i)
        else:
            m_c = o_c < C - 32 * i
            b_x = tl.load(p + 32 * i, m_c, 0.0)
            b_x_second = tl.load(p_second + 32 * i, m_c, 0.0)
        b_x = _products(b_x, b_w, b_other_w, INTERPRETED)
        b_x_second = _products(b_x_second, b_w, b_other_w, INTERPRETED)
        new += (first[i] + b_rho * b_x,)  # type: ignore[assignment]
        new_second += (second[i] + b_rho_second * b_x_second,)  # type: ignore[assignment]
    return new, new_second


@triton.jit
def _store(sums, p_y, p_bias, m_r, o_c, C, BLOCKS: tl.constexpr):
    """Stores rows of sums and bias."""
    for i in tl.static_range(BLOCKS):
        b_y = _in_order(sums[i])
        m = o_c < C - 32 * i
        if p_bias is not None:
            b_y += tl.load(p_bias + 32 * i, m, 0.0).to(tl.float32)
        tl.store(p_y + 32 * i, b_y.to(p_y.dtype.element_ty), m_r & m)


@triton.jit
def _test(b_y):
    """Of half of the channels, 0, or NaN where one is not finite."""
    b_y, _ = tl.split(tl.permute(tl.reshape(b_y, [b_y.shape[0], 8, 2, 2]), [0, 1, 3, 2]))
    return tl.sum(tl.sum(tl.reshape(b_y, [b_y.shape[0], 16]) * 0.0, 1), 0)


@triton.jit
def convolve(
    p_v,  # a pointer, or [ROWS / 2]: V of the batch element of a row of the first half
    p_v_second,  # of the second half
    p_rho,  # of the program's rows: [k, ROWS] float32
    p_rows,  # [k, ROWS] int32: rows of V
    p_table,  # as `store_table` leaves it, or None
    p_bias,  # [C] contiguous, or None
    p_y,  # of the program's rows: [rows, C]
    left,  # how many rows there are
    C,
    k,
    bytes_vm,  # from row to row of V
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Stores the output of rows without missing neighbors, BLOCKS blocks of 32 channels at a time.

    The result is 0 if it can be relied on, else NaN.
    """
    HALF: tl.constexpr = ROWS // 2
    dtype: tl.constexpr = p_y.dtype.element_ty
    o_r = tl.arange(0, HALF)
    o_x = tl.arange(0, 32)[None, :]
    o_g = (o_r % 8)[:, None]
    p_y += o_r.to(tl.int64)[:, None] * C + o_x
    test = 0.0
    for c in range(0, C, 32 * BLOCKS):
        p_w, step = p_table, 0
        if p_table is not None:
            p_w, step = _where_table_is(p_table + 4 * c, o_g, o_x, C, k, BLOCKS)
        b_ones = tl.where(on_diagonal(numbers_of_elements(HALF)), 1.0, 0.0).to(dtype)
        p, p_second = p_v + c, p_v_second + c
        p_r, p_n = p_rho + o_r, p_rows + o_r
        first = ()
        for _ in tl.static_range(BLOCKS):
            first += (tl.zeros([HALF, 32], tl.float32),)  # type: ignore[assignment]
        second = first
        for _ in range(0, k):
            first, second = _add_neighbor(
                first,
                second,
                _rows_of_value(p, p_n, bytes_vm, p_y, ALIGN) + o_x,
                _rows_of_value(p_second, p_n + HALF, bytes_vm, p_y, ALIGN) + o_x,
                p_w,
                b_ones,
                _of_rows(tl.load(p_r), HALF),
                _of_rows(tl.load(p_r + HALF), HALF),
                c + o_x,
                C,
                BLOCKS,
                WHOLE_C,
                INTERPRETED,
            )
            p_r, p_n = p_r + ROWS, p_n + ROWS
            if p_table is not None:
                p_w += step
        p_b = p_bias
        if p_bias is not None:
            p_b = p_bias + c + o_x
        m_r = (o_r < left)[:, None]
        _store(first, p_y + c, p_b, m_r, c + o_x, C, BLOCKS)
        m_r = (HALF + o_r < left)[:, None]
        _store(second, p_y + (HALF * as_int64(C) + c), p_b, m_r, c + o_x, C, BLOCKS)
        for i in tl.static_range(BLOCKS):
            test += _test(checked(first[i] + second[i], INTERPRETED))
    return test


def elements_of_table(C: int, k: int, blocks: int) -> int:
    return 128 * blocks * cdiv(C, 32 * blocks) * (k + 1)
