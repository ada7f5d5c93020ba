# SPDX-License-Identifier: MIT
"""Select where a row of S is one tile, by networks of comparators, in one launch. With an
aggregation, depthwise or without a weight, it is all of the forward (Eq. 3 to 6).

A program has BLOCK_N queries and all columns. Tensor cores leave a tile of S [BLOCK_N, BLOCK_M] in
registers, one of at most TILES; of float32 they multiply three pieces of each number (products.py).
The norms of the cosine are sums over the same blocks of query and key. Networks (networks.py)
then find the 16 largest numbers of a row, of which k, at most 15, are its neighbors; or 12, where
k is at most 10.

What they compare is one float32 with the similarity in its first 24 bits and the column in its last
8: then no column has to be carried along. The 8 bits that the column takes the place of are kept
aside, four to a word, and the 16 similarities of a row are put together again. They are in order
already, but where two of them share their first 24 bits: then a program sorts its lists again, by
the order of order.py.

The networks do not do where the similarity in place k shares its 24 bits with the last one of the
list, which then may lack others that do, too, and where a product is not finite or its rows should
be scaled (norms.py). A program with such a row computes S again, AGAIN_M columns at a time, exactly
as it should be, and takes the neighbors of those rows out of it one by one, as in select_small.py.

With AGGREGATE the program then computes rho as finish.py does, and sums over the neighbors of all
its rows at once: the rows of V are those of one batch element, so that most are in L1. In 16 bits
tensor cores multiply by the weight (convolve.py). Neither X_nn nor S is stored.

With candidates, the token itself need not be a column: its similarity is a sum in float32.

Shapes as in select.py.
"""

import torch
import triton
import triton.language as tl

from . import configs, hardware
from .aggregation import Aggregation
from .convolve import convolve, elements_of_table, store_table
from .finish import as_float32, numbers_of_value, rho_of_rows
from .integers import aligned, as_int64, wide
from .launch import Buffer, Kernel, Plan, Pointers, cache_plans
from .metrics import COSINE
from .networks import best_of_four, join_16, merge, merge_lists
from .norms import norms_of_rows, rescales
from .order import (
    FIXED,
    NO_ORDER,
    NOTHING,
    ORDER_OF_SELF,
    exchange_adjacent,
    insert,
    largest,
    orderable,
    pack,
    store_list,
)
from .products import pieces, split_dot, sum_of_split
from .ranges import in_ranges, load_ranges
from .row_products import add_products, checked, numbers_of_elements, on_diagonal
from .search import Search
from .tensors import alignment, cdiv

_FIRST_24 = tl.constexpr(-256)
# Beyond these, a product or a sum of squares is not to be relied on.
_LARGEST_SUM = tl.constexpr(3e38)
_LARGEST_SQUARES = tl.constexpr(1e36)
# The largest sum of squares whose root is at most 1e-12 in float32.
_ZERO = tl.constexpr(1e-24)
# Beyond _LARGEST_SUM: the first 24 bits of a column that is none, and those of the token itself.
_NONE = tl.constexpr(-0x800100)
_NONE_AS_FLOAT = tl.constexpr(-(2.0 - 2.0**-15) * 2.0**127)
_SELF = tl.constexpr(0x7F7FFF00)
_SELF_AS_FLOAT = tl.constexpr((2.0 - 2.0**-15) * 2.0**127)


@triton.jit
def _inverse_root(b_squares):
    """1 / sqrt(b_squares) to a unit in the last place; 0 where the root is at most 1e-12."""
    b_root = tl.rsqrt(b_squares)
    b_root += b_root * (0.5 - 0.5 * b_squares * b_root * b_root)
    return tl.where(b_squares <= _ZERO, 0.0, b_root)


@triton.jit
def _inverse(norm):
    """1 / norm, 0 of 0."""
    return tl.where(norm == 0.0, 0.0, tl.div_rn(1.0, tl.where(norm == 0.0, 1.0, norm)))


@triton.jit
def _through_memory(b_x):
    """b_x [n] through shared memory, where each element is written and read by one thread.

    What several threads would compute each for itself, before or behind it, is computed once.
    """
    return tl.gather(b_x, tl.arange(0, b_x.shape[0]), 0)


@triton.jit
def _columns(
    start,
    p_k,  # key of the batch element
    p_columns,  # [R] int64, or None
    p_m,  # [M] bool, or None
    M,
    columns,
    stride_km,
    BLOCK_M: tl.constexpr,
):
    """Of BLOCK_M columns from `start` on: the rows of key, their numbers, and which there are."""
    o_c = start + tl.arange(0, BLOCK_M)
    m_c, row = o_c < columns, o_c.to(tl.int64)
    if p_columns is not None:
        row = tl.load(p_columns + o_c, m_c, -1)
        m_c = m_c & (row >= 0) & (row < M)
    if p_m is not None:
        m_c = m_c & (tl.load(p_m + row, m_c, 0) != 0)
    return p_k + row * stride_km, row, m_c


@triton.jit
def _no_sums(ROWS: tl.constexpr, ON_CORES: tl.constexpr):
    """What `_add_products` adds to: [ROWS], or as tensor cores leave it [ROWS, 32]."""
    if ON_CORES:
        return tl.zeros([ROWS, 32], tl.float32)
    else:
        return tl.zeros([ROWS], tl.float32)


@triton.jit
def _add_products(sums, b_x, b_y, ON_CORES: tl.constexpr, INTERPRETED: tl.constexpr):
    if ON_CORES:
        return add_products(sums, b_x, b_y, INTERPRETED)
    else:
        return sums + tl.sum(as_float32(b_x) * as_float32(b_y), 1)


@triton.jit
def _sums(sums, ON_CORES: tl.constexpr, INTERPRETED: tl.constexpr):
    """The sum of each row [ROWS]."""
    if ON_CORES:
        sums = checked(sums, INTERPRETED)
        is_sum = on_diagonal(numbers_of_elements(sums.shape[0]))
        sums = tl.sum(tl.where(is_sum, sums, 0.0), 1)
    return sums


@triton.jit
def _squares(p_x, m_x, D, BLOCK_D: tl.constexpr):
    """Sums of squares of rows, however Triton loads them."""
    squares = _no_sums(p_x.shape[0], False)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x[:, None] + o_d[None, :], m_x[:, None] & (o_d < D)[None, :], 0.0)
        squares = _add_products(squares, b_x, b_x, False, False)
    return squares


@triton.jit
def _products(
    p_q,  # [BLOCK_N]: rows of query
    p_k,  # [BLOCK_M]: rows of key
    m_n,  # [BLOCK_N]
    m_c,  # [BLOCK_M]
    scale_q,  # [BLOCK_N]: powers of two, or zero, by which rows are multiplied first; or None
    scale_k,  # [BLOCK_M], or None
    D,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ON_CORES: tl.constexpr,
):
    """q k of each pair, [BLOCK_N, BLOCK_M]; and the sums of squares of queries and keys, or 0."""
    o_d = tl.arange(0, BLOCK_D)
    b_s = tl.zeros([p_q.shape[0], p_k.shape[0]], tl.float32)
    b_rest = tl.zeros([p_q.shape[0], p_k.shape[0]], tl.float32)
    squares_q = _no_sums(p_q.shape[0], ON_CORES and OF_QUERIES)
    squares_k = _no_sums(p_k.shape[0], ON_CORES and OF_KEYS)
    for d in range(0, D, BLOCK_D):
        m_d = (d + o_d < D)[None, :]
        b_q = tl.load(p_q[:, None] + (d + o_d)[None, :], m_n[:, None] & m_d, 0.0)
        b_k = tl.load(p_k[:, None] + (d + o_d)[None, :], m_c[:, None] & m_d, 0.0)
        if scale_q is not None:
            b_q = (b_q.to(tl.float32) * scale_q[:, None]).to(b_q.dtype)
            b_k = (b_k.to(tl.float32) * scale_k[:, None]).to(b_k.dtype)
        if PRECISION == "split":
            k_high, k_middle, k_low = pieces(tl.trans(b_k), INTERPRETED)
            b_s, b_rest = split_dot(b_q, k_high, k_middle, k_low, b_s, b_rest, INTERPRETED)
        else:
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION)
        if OF_QUERIES:
            squares_q = _add_products(squares_q, b_q, b_q, ON_CORES, INTERPRETED)
        if OF_KEYS:
            squares_k = _add_products(squares_k, b_k, b_k, ON_CORES, INTERPRETED)
    if PRECISION == "split":
        b_s = sum_of_split(b_s, b_rest, INTERPRETED)
    return (
        b_s,
        _sums(squares_q, ON_CORES and OF_QUERIES, INTERPRETED),
        _sums(squares_k, ON_CORES and OF_KEYS, INTERPRETED),
    )


@triton.jit
def _last_8_bits(b_bits):
    """The last 8 bits of b_bits [rows, n], four to a word: [n / 4 * rows].

    A word has those of 4 columns that one thread has of 16; threads of a warp have adjacent words.
    """
    rows: tl.constexpr = b_bits.shape[0]
    n: tl.constexpr = b_bits.shape[1]
    # Column 16 a + 8 b + 2 c + d is byte 2 b + d of word (a, c).
    b_x = tl.reshape(b_bits & 255, [rows, n // 16, 2, 4, 2])
    b_x = b_x << (16 * tl.arange(0, 2)[:, None, None] + 8 * tl.arange(0, 2)[None, None, :])
    b_word = tl.permute(tl.sum(tl.sum(b_x, 4), 2), [1, 0, 2])
    return tl.reshape(b_word, [n // 4 * rows])


@triton.jit
def _with_last_8_bits(b_code, b_words, BLOCK_M: tl.constexpr):
    """The float32 of entries b_code [rows, 16], which have the column in their last 8 bits."""
    rows: tl.constexpr = b_code.shape[0]
    b_column = 255 - (b_code & 255)
    b_of_tile = b_column % BLOCK_M
    b_place = ((b_of_tile // 16) * rows + tl.arange(0, rows)[:, None]) * 4 + b_of_tile // 2 % 4
    TILES: tl.constexpr = b_words.shape[0] // (rows * BLOCK_M // 4)
    b_place = TILES * b_place + b_column // BLOCK_M
    b_word = tl.gather(b_words, tl.reshape(b_place, [rows * 16]), 0)
    b_shift = (b_column // 8 % 2) * 16 + (b_column % 2) * 8
    b_bits = (tl.reshape(b_word, [rows, 16]) >> b_shift) & 255
    return ((b_code & _FIRST_24) | b_bits).to(tl.float32, bitcast=True)


@triton.jit
def _own_products(
    p_q,  # [BLOCK_N]: rows of query
    p_own,  # [BLOCK_N]: a row of key for each
    m_n,  # [BLOCK_N]
    scale_q,  # [BLOCK_N], as in `_products`
    scale_own,  # [BLOCK_N]
    D,
    BLOCK_D: tl.constexpr,
    ON_CORES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """q k of each query and its own row, and the sums of squares of these rows, in float32."""
    o_d = tl.arange(0, BLOCK_D)
    b_s = _no_sums(p_q.shape[0], ON_CORES)
    squares = _no_sums(p_q.shape[0], ON_CORES)
    for d in range(0, D, BLOCK_D):
        m = m_n[:, None] & (d + o_d < D)[None, :]
        b_q = tl.load(p_q[:, None] + (d + o_d)[None, :], m, 0.0)
        b_k = tl.load(p_own[:, None] + (d + o_d)[None, :], m, 0.0)
        if scale_q is not None:
            b_q = b_q.to(tl.float32) * scale_q[:, None]
            b_k = b_k.to(tl.float32) * scale_own[:, None]
        b_s = _add_products(b_s, b_q, b_k, ON_CORES, INTERPRETED)
        squares = _add_products(squares, b_k, b_k, ON_CORES, INTERPRETED)
    return _sums(b_s, ON_CORES, INTERPRETED), _sums(squares, ON_CORES, INTERPRETED)


@triton.jit
def _with_self_first(lists, has_self):
    """The token itself before the others, of which the last one is dropped."""
    b_before = tl.full(lists[0].shape, _SELF | 255, tl.int32).to(tl.float32, bitcast=True)
    with_self = ()
    for i in tl.static_range(len(lists)):
        b_x = tl.where(has_self[:, None], b_before, lists[i])
        with_self += (b_x,)  # type: ignore[assignment]
        b_before = lists[i]
    return with_self


@triton.jit
def _unfit(squares):
    """1 where a sum of squares is not to be relied on, or not a number."""
    return tl.where(squares < _LARGEST_SQUARES, 0, 1)


@triton.jit
def _best_of_tile(
    start: tl.constexpr,
    p_q,  # [BLOCK_N]: rows of query
    m_n,  # [BLOCK_N]
    self_row,  # [BLOCK_N] int64
    row_begin,  # [BLOCK_N] int32, or None: the ranges of the queries
    row_end,
    inverse_q,  # [BLOCK_N]: 1 / norm of the queries, if it is known
    p_k,  # key of the batch element
    p_columns,  # [R] int64, or None
    p_m,  # [M] bool, or None
    M,
    D,
    columns,
    stride_km,
    METRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SELF: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    INTERPRETED: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ON_CORES: tl.constexpr,
):
    """Of BLOCK_M columns: the LIST largest codes of a row, in four lists; the last 8 bits of all
    its similarities, that of the token itself, or 0, and 1 if not all of them can be relied on. And
    1 / norm of the queries.
    """
    p_rows, row, m_c = _columns(start, p_k, p_columns, p_m, M, columns, stride_km, BLOCK_M)
    OF_KEYS: tl.constexpr = METRIC == COSINE
    OF_QUERIES: tl.constexpr = OF_KEYS and start == 0
    b_s, squares_q, squares_k = _products(
        p_q,
        p_rows,
        m_n,
        m_c,
        None,
        None,
        D,
        PRECISION,
        INTERPRETED,
        OF_QUERIES,
        OF_KEYS,
        BLOCK_D,
        ON_CORES,
    )
    # Comparisons with NaN are false.
    if OF_KEYS:
        unfit_keys = tl.max(_unfit(squares_k), 0)
        if ON_CORES:
            if unfit_keys > 0:
                squares_k = _squares(p_rows, m_c, D, BLOCK_D)
                unfit_keys = tl.max(_unfit(squares_k), 0)
            if OF_QUERIES:
                unfit_queries = tl.max(_unfit(squares_q), 0)
                if unfit_queries > 0:
                    squares_q = _squares(p_q, m_n, D, BLOCK_D)
        unfit = _unfit(squares_q) | unfit_keys
    else:
        unfit = tl.where(tl.sum(tl.abs(b_s), 1) < _LARGEST_SUM, 0, 1)
    if OF_QUERIES:
        inverse_q = _inverse_root(squares_q)
    if OF_KEYS:
        inverse_k = _through_memory(_inverse_root(squares_k))
        b_s = b_s * _through_memory(inverse_q)[:, None] * inverse_k[None, :]
    b_s = b_s + 0.0  # -0 becomes 0, but for products below the range of float32
    b_s_self = tl.zeros(m_n.shape, tl.float32)
    if HAS_SELF:
        is_self = m_c[None, :] & (row[None, :] == self_row[:, None])
        if p_columns is None and not EXCLUDE_SELF:
            b_s_self = tl.sum(tl.where(is_self, b_s, 0.0), 1)
            b_s = tl.where(is_self, _SELF_AS_FLOAT, b_s)
        else:
            b_s = tl.where(is_self, _NONE_AS_FLOAT, b_s)
    if row_begin is not None:
        b_s = tl.where(row[None, :] < row_begin[:, None], _NONE_AS_FLOAT, b_s)
        b_s = tl.where(row[None, :] < row_end[:, None], b_s, _NONE_AS_FLOAT)

    b_bits = b_s.to(tl.int32, bitcast=True)
    b_words = _last_8_bits(b_bits)
    # Of a column that is none, the similarity is 0.
    b_last = 255 - (start + tl.arange(0, BLOCK_M))
    b_last = _through_memory(tl.where(m_c, b_last, b_last | _NONE))
    b_code = (b_bits & _FIRST_24) | b_last[None, :]
    lists = best_of_four(b_code.to(tl.float32, bitcast=True), LIST, INTERPRETED)
    return lists, b_words, b_s_self, unfit, inverse_q


@triton.jit
def _best_of_columns(
    p_q,  # [BLOCK_N]: rows of query
    m_n,  # [BLOCK_N]
    self_row,  # [BLOCK_N] int64
    row_begin,  # [BLOCK_N] int32, or None
    row_end,
    p_k,  # key of the batch element
    p_columns,  # [R] int64, or None
    p_m,  # [M] bool, or None
    M,
    D,
    columns,
    stride_km,
    METRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SELF: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    INTERPRETED: tl.constexpr,
    LIST: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ON_CORES: tl.constexpr,
):
    """As `_best_of_tile`, of all columns, which are in at most TILES tiles."""
    inverse_q = tl.full(m_n.shape, 1.0, tl.float32)
    lists, b_words, b_s_self, unfit, inverse_q = _best_of_tile(
        0,
        p_q,
        m_n,
        self_row,
        row_begin,
        row_end,
        inverse_q,
        p_k,
        p_columns,
        p_m,
        M,
        D,
        columns,
        stride_km,
        METRIC,
        PRECISION,
        HAS_SELF,
        EXCLUDE_SELF,
        INTERPRETED,
        LIST,
        BLOCK_M,
        BLOCK_D,
        ON_CORES,
    )
    # No code of the list leads to a tile that there is not.
    words = ()
    for _i in tl.static_range(TILES):
        words += (b_words,)  # type: ignore[assignment]
    for tile in tl.static_range(1, TILES):
        if columns > tile * BLOCK_M:
            more, b_more_words, b_more_self, more_unfit, _ = _best_of_tile(
                tile * BLOCK_M,
                p_q,
                m_n,
                self_row,
                row_begin,
                row_end,
                inverse_q,
                p_k,
                p_columns,
                p_m,
                M,
                D,
                columns,
                stride_km,
                METRIC,
                PRECISION,
                HAS_SELF,
                EXCLUDE_SELF,
                INTERPRETED,
                LIST,
                BLOCK_M,
                BLOCK_D,
                ON_CORES,
            )
            lists = merge(lists, more)
            words = words[:tile] + (b_more_words,) + words[tile + 1 :]  # noqa: RUF005
            b_s_self += b_more_self
            unfit = unfit | more_unfit
    return lists, _in_turn(words, TILES), b_s_self, unfit, inverse_q


@triton.jit
def _in_turn(words, TILES: tl.constexpr):
    """TILES blocks [n], 1, 2 or 4, as one [n * TILES], of each in turn."""
    b_words = words[0]
    if TILES == 2:
        b_words = tl.join(words[0], words[1])
    elif TILES == 4:
        b_words = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    return tl.reshape(b_words, [words[0].shape[0] * TILES])


@triton.jit
def _list_of_codes(
    lists,  # 12 or 16 blocks [BLOCK_N, 1]: codes, descending
    b_words,  # the last 8 bits of all similarities
    self_row,  # [BLOCK_N] int64
    p_columns,  # [R] int64, or None
    m_n,  # [BLOCK_N]
    k,
    BLOCK_M: tl.constexpr,
):
    """The list of each row (order.py), [BLOCK_N, 16], and which rows may lack a neighbor."""
    BLOCK_N: tl.constexpr = m_n.shape[0]
    ALL: tl.constexpr = BLOCK_N * 16
    LIST: tl.constexpr = len(lists)
    b_none = tl.full(lists[0].shape, _NONE | 255, tl.int32).to(tl.float32, bitcast=True)
    for _ in tl.static_range(16 - LIST):
        lists += (b_none,)
    # Four threads have the same lists.
    b_code = _through_memory(tl.reshape(join_16(*lists), [ALL])).to(tl.int32, bitcast=True)
    b_next = _through_memory(tl.reshape(join_16(*lists[1:], lists[15]), [ALL]))
    b_code = tl.reshape(b_code, [BLOCK_N, 16])
    b_first = b_code & _FIRST_24
    b_next = tl.reshape(b_next.to(tl.int32, bitcast=True) & _FIRST_24, [BLOCK_N, 16])
    is_column = b_first != _NONE
    o_l = tl.arange(0, 16)[None, :]
    # Two of k + 1 entries that are the same.
    m_tied = is_column & (o_l <= k) & (o_l < LIST - 1) & (b_first == b_next)
    last = tl.sum(tl.where(o_l == LIST - 1, b_first, 0), 1)[:, None]
    m_lacks = is_column & (o_l == k - 1) & (b_first == last)

    b_order = orderable(_with_last_8_bits(b_code, b_words, BLOCK_M))
    b_order = tl.where(b_first == _SELF, ORDER_OF_SELF, b_order)
    b_row = (255 - (b_code & 255)).to(tl.int64)
    if p_columns is not None:
        b_row = tl.load(p_columns + b_row, is_column & (b_first != _SELF), 0)
        b_row = tl.where(b_first == _SELF, self_row[:, None], b_row)
    b_list = tl.where(is_column, pack(b_order, b_row), NOTHING)
    tied = tl.max(tl.where(m_n, tl.sum(m_tied.to(tl.int32), 1), 0), 0)
    if tied > 0:
        b_list = exchange_adjacent(b_list)
    if tied > 1:
        b_list = largest(b_list, 4, 4, 0)
    return b_list, tl.max(m_lacks.to(tl.int32), 1) > 0


@triton.jit
def _one_by_one(
    p_q,  # [BLOCK_N]: rows of query
    m_n,  # [BLOCK_N]
    self_row,  # [BLOCK_N] int64; -1: none
    row_begin,  # [BLOCK_N] int32, or None
    row_end,
    p_k,  # key of the batch element
    p_columns,  # [R] int64, or None
    p_m,  # [M] bool, or None
    M,
    D,
    columns,
    k,
    stride_km,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SELF: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The lists of all rows, whatever they have, and the similarities of the tokens themselves."""
    BLOCK_N: tl.constexpr = m_n.shape[0]
    inverse_q = tl.full([BLOCK_N], 1.0, tl.float32)
    scale_q = None
    if METRIC == COSINE:
        norm_q, scale_q = norms_of_rows(p_q, None, m_n, m_n, D, RESCALE, BLOCK_N, BLOCK_D)
        inverse_q = _inverse(norm_q)
        # Products of a row that counts as zero are zero.
        scale_q = tl.where(norm_q == 0.0, 0.0, scale_q)
    b_s_self = tl.zeros([BLOCK_N], tl.float32)
    # Empty entries differ, so that each can be found as the lowest one.
    o_l = tl.arange(0, 16)[None, :]
    b_list = tl.full([BLOCK_N, 16], NOTHING, tl.int64) + o_l
    b_list = tl.where(o_l < k, b_list, FIXED)
    if HAS_SELF and p_columns is not None and not EXCLUDE_SELF:
        has_self = self_row >= 0
        p_own = p_k + tl.where(has_self, self_row, 0) * stride_km
        if METRIC == COSINE:
            norm, scale = norms_of_rows(p_own, None, has_self, m_n, D, RESCALE, BLOCK_N, BLOCK_D)
            scale = tl.where(norm == 0.0, 0.0, scale)
            b_s_self, _squares = _own_products(
                p_q, p_own, has_self, scale_q, scale, D, BLOCK_D, False, False
            )
            b_s_self = b_s_self * inverse_q * _inverse(norm)
        else:
            b_s_self, _squares = _own_products(
                p_q, p_own, has_self, None, None, D, BLOCK_D, False, False
            )
        b_self = pack(tl.full([BLOCK_N], ORDER_OF_SELF, tl.int32), self_row)[:, None]
        b_list = tl.where((o_l == 0) & has_self[:, None], b_self, b_list)
    b_lowest = tl.min(b_list, 1)
    for start in range(0, columns, BLOCK_M):
        p_rows, row, m_c = _columns(start, p_k, p_columns, p_m, M, columns, stride_km, BLOCK_M)
        scale_k = None
        if METRIC == COSINE:
            norm_k, scale_k = norms_of_rows(p_rows, None, m_c, m_c, D, RESCALE, BLOCK_M, BLOCK_D)
            scale_k = tl.where(norm_k == 0.0, 0.0, scale_k)
        b_s, _, _ = _products(
            p_q,
            p_rows,
            m_n,
            m_c,
            scale_q,
            scale_k,
            D,
            PRECISION,
            INTERPRETED,
            False,
            False,
            BLOCK_D,
            False,
        )
        if METRIC == COSINE:
            b_s = b_s * inverse_q[:, None] * _inverse(norm_k)[None, :]
        m = m_n[:, None] & m_c[None, :]
        if row_begin is not None:
            m = m & in_ranges(row, row_begin, row_end)
        b_order = tl.where(m, orderable(b_s), NO_ORDER)
        if HAS_SELF:
            is_self = m & (row[None, :] == self_row[:, None])
            if p_columns is None and not EXCLUDE_SELF:
                b_s_self += tl.sum(tl.where(is_self, b_s, 0.0), 1)
                b_order = tl.where(is_self, ORDER_OF_SELF, b_order)
            else:
                b_order = tl.where(is_self, NO_ORDER, b_order)
        b_list, b_lowest = insert(b_list, b_lowest, b_order, row.to(tl.int32))
    b_list = tl.where((o_l < k) & (b_list >= NOTHING + 16), b_list, NOTHING)
    return largest(b_list, 4, 4, 0), b_s_self


@triton.jit
def _convolve(
    p_v,  # a pointer, or [ROWS]: V of the batch element of a row
    p_rho,  # of the program's rows: [k, ROWS] float32
    p_rows,  # [k, ROWS] int32: rows of V; -1 if missing
    p_weight,  # [C, k] if AS_GIVEN, else [k, C]; or None
    p_bias,  # [C] contiguous, or None
    p_y,  # of the program's rows: [rows, C]
    left,  # how many rows there are
    C,
    k,
    bytes_vm,  # from row to row of V
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_C: tl.constexpr,
    MASKED: tl.constexpr,
    AS_GIVEN: tl.constexpr,
):
    """Stores the output of rows. MASKED: there may be missing neighbors."""
    BYTES: tl.constexpr = p_y.dtype.element_ty.primitive_bitwidth // 8
    o_r = tl.arange(0, ROWS)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_y = tl.zeros([ROWS, BLOCK_C], tl.float32)
        for j in range(0, k):
            b_rho = tl.load(p_rho + as_int64(j) * ROWS + o_r)
            b_row = tl.load(p_rows + as_int64(j) * ROWS + o_r)
            b_bytes = tl.multiple_of(wide(b_row) * wide(bytes_vm), ALIGN * BYTES)
            p = (p_v.to(tl.pointer_type(tl.int8)) + b_bytes).to(
                tl.pointer_type(p_y.dtype.element_ty)
            )
            p = p[:, None] + o_c[None, :]
            if MASKED:
                b_v = tl.load(p, (b_row >= 0)[:, None] & m_c[None, :], 0.0)
            elif WHOLE_C:
                b_v = tl.load(p)
            else:
                b_v = tl.load(p, m_c[None, :], 0.0)
            b_v = as_float32(b_v)
            if p_weight is not None:
                p_w = p_weight + as_int64(j) * C + o_c
                if AS_GIVEN:
                    p_w = p_weight + o_c.to(tl.int64) * k + j
                b_v *= as_float32(tl.load(p_w, m_c, 0.0))[None, :]
            b_y += b_rho[:, None] * b_v
        if p_bias is not None:
            b_y += tl.load(p_bias + o_c, m_c, 0.0).to(tl.float32)[None, :]
        p = p_y + o_r.to(tl.int64)[:, None] * C + o_c[None, :]
        tl.store(p, b_y.to(p_y.dtype.element_ty), (o_r < left)[:, None] & m_c[None, :])


@triton.jit
def _store_terms(b_s, b_index, m_r, p_rho, p_rows, k, scale, RHO: tl.constexpr):
    """rho and rows of V of all neighbors, for `_convolve`. 1 if one is missing: its similarity is
    -inf. Rows that there are not have rho 0 of row 0.

    b_s, b_index: as `store_list` returns them.
    """
    ROWS: tl.constexpr = b_s.shape[0]
    o_k = tl.arange(0, b_s.shape[1])[None, :]
    o, m = o_k * ROWS + tl.arange(0, ROWS)[:, None], (o_k < k) & m_r[:, None]
    m_found = m & (b_s != float("-inf"))
    b_row = tl.where(m_found, b_index.to(tl.int32), tl.where(m, -1, 0))
    tl.store(p_rho + o, rho_of_rows(b_s, m_found, scale, RHO), o_k < k)
    tl.store(p_rows + o, b_row, o_k < k)
    return tl.max(tl.max((m & (m_found == 0)).to(tl.int32), 1), 0)


@triton.jit
def _value_of(
    p_value,
    b,
    n,  # the first row
    N,
    N_value,
    B2_value,
    stride_vb1,
    stride_vb2,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Where V of the batch element of rows n, ... begins: a pointer, or [ROWS]."""
    b_value = b
    if FOLDED:
        # Rows beyond the last one are as the last one: V is read for all.
        o_n = tl.minimum(n + tl.arange(0, ROWS), N - 1)
        b_value = b * (N // N_value) + o_n // N_value
    return p_value + (b_value // B2_value) * stride_vb1 + (b_value % B2_value) * stride_vb2


@triton.jit
def _aggregate(
    b_s,  # [ROWS, 16]: as `store_list` returns it
    b_index,
    m_r,  # [ROWS]
    p_value,  # [B, M, C]
    p_weight,  # [C, 1, k] contiguous, or None
    p_bias,  # [C] contiguous, or None
    p_weight_rows,  # the weight as the convolution takes it, or None
    p_rho,  # of the program: [k, ROWS] float32
    p_output,  # [B, N, C] contiguous
    b,
    n,  # the first row
    N,
    C,
    k,
    scale,
    N_value,
    B2_value,
    stride_vb1,
    stride_vb2,
    bytes_vm,
    ALIGN: tl.constexpr,
    FOLDED: tl.constexpr,
    RHO: tl.constexpr,
    THREADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Stores the output of rows."""
    if p_weight is not None:
        if BLOCKS > 0:
            store_table(p_weight, p_weight_rows, C, k, BLOCKS, min(THREADS, 128), THREADS)
        else:
            # Each program stores all of it, and all the same, so that none waits for another.
            for start in range(0, C * k, 4 * THREADS):
                o_w = start + tl.arange(0, 4 * THREADS)
                b_w = tl.load(p_weight + (o_w % C).to(tl.int64) * k + o_w // C, o_w < C * k, 0.0)
                tl.store(p_weight_rows + o_w, b_w, o_w < C * k)
    p_rows = (p_rho + as_int64(k) * ROWS).to(tl.pointer_type(tl.int32))
    missing = _store_terms(b_s, b_index, m_r, p_rho, p_rows, k, scale, RHO)
    # Every thread may read what another one has stored.
    tl.debug_barrier()
    p_y = p_output + (b * N + n) * C
    of_value = (N, N_value, B2_value, stride_vb1, stride_vb2)
    test = missing.to(tl.float32)
    if BLOCKS > 0 and missing == 0:
        HALF: tl.constexpr = ROWS // 2
        test = convolve(
            _value_of(p_value, b, n, *of_value, FOLDED, HALF),
            _value_of(p_value, b, n + HALF, *of_value, FOLDED, HALF),
            p_rho,
            p_rows,
            p_weight_rows,
            p_bias,
            p_y,
            N - n,
            C,
            k,
            bytes_vm,
            ALIGN,
            ROWS,
            BLOCKS,
            WHOLE_C,
            INTERPRETED,
        )
        # Before others store the same rows.
        tl.debug_barrier()
    p_v = _value_of(p_value, b, n, *of_value, FOLDED, ROWS)
    if test != 0.0:
        _convolve(
            p_v,
            p_rho,
            p_rows,
            p_weight if BLOCKS > 0 else p_weight_rows,
            p_bias,
            p_y,
            N - n,
            C,
            k,
            bytes_vm,
            ALIGN,
            ROWS,
            BLOCK_C,
            WHOLE_C,
            True,
            BLOCKS > 0,
        )
    elif BLOCKS == 0:
        _convolve(
            p_v,
            p_rho,
            p_rows,
            p_weight_rows,
            p_bias,
            p_y,
            N - n,
            C,
            k,
            bytes_vm,
            ALIGN,
            ROWS,
            BLOCK_C,
            WHOLE_C,
            False,
            False,
        )


@Kernel
def select_network_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_columns,  # [R] or [B, R] int64, or None
    p_mask,  # [B, M] bool, or None
    p_self,  # [N] or [B, N] int64, or None
    p_range,  # [N, 2] or [B, N, 2] int64, or None
    p_value,  # [B, M, C], or None
    p_weight,  # [C, 1, k] contiguous, or None
    p_bias,  # [C] contiguous, or None
    p_weight_rows,  # [k, C]: the weight, or None
    p_terms,  # [programs, 2, k, BLOCK_N]: rho (float32) and rows of value (int32), or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_output,  # [B, N, C] contiguous, or None
    N,
    M,
    D,
    C,
    columns,
    k,
    scale,
    B2,
    N_value,  # the queries of a batch element of value, several of which may be one of query
    B2_value,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_mb1,
    stride_mb2,
    stride_columns,
    stride_self,
    stride_range,
    stride_vb1,
    stride_vb2,
    bytes_vm,  # from row to row of value
    ALIGN: tl.constexpr,
    ALIGN_VALUE: tl.constexpr,
    METRIC: tl.constexpr,
    BY_INDEX: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FOLDED: tl.constexpr,
    RHO: tl.constexpr,
    INTERPRETED: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AGAIN_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE_C: tl.constexpr,
):
    """All of `select` for BLOCK_N queries, and with AGGREGATE their output."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    HAS_SELF: tl.constexpr = p_self is not None
    INCLUDES_SELF: tl.constexpr = HAS_SELF and not EXCLUDE_SELF
    # Rows of 16 bits, as loads of 8 numbers leave them; few of them for each warp.
    OF_16_BITS: tl.constexpr = p_key.dtype.element_ty.primitive_bitwidth == 16
    ON_CORES: tl.constexpr = OF_16_BITS and ALIGN > 1 and BLOCK_D == 32 and BLOCK_M <= 2 * BLOCK_N
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(N, BLOCK_N)
    b = pid // row_blocks
    b1, b2 = b // B2, b % B2
    o_n = (pid % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    p_q = p_query + b1 * stride_qb1 + b2 * stride_qb2 + o_n * stride_qn
    p_k = p_key + b1 * stride_kb1 + b2 * stride_kb2
    p_m = p_mask
    if p_mask is not None:
        p_m = p_mask + b1 * stride_mb1 + b2 * stride_mb2
    p_c = p_columns
    if p_columns is not None:
        p_c = p_columns + b * stride_columns
    row_begin, row_end = None, None
    if p_range is not None:
        row_begin, row_end = load_ranges(p_range + (b * stride_range + o_n) * 2, m_n, M)
    self_row = tl.full([BLOCK_N], -1, tl.int64)
    if HAS_SELF:
        self_row = tl.load(p_self + b * stride_self + o_n, m_n, -1)
        has_self = (self_row >= 0) & (self_row < M)
        if p_mask is not None:
            has_self = has_self & (tl.load(p_m + self_row, has_self, 0) != 0)
        if p_range is not None:
            has_self = has_self & (self_row >= row_begin) & (self_row < row_end)
        self_row = tl.where(has_self, self_row, -1)

    lists, b_words, b_s_self, unfit, inverse_q = _best_of_columns(
        p_q,
        m_n,
        self_row,
        row_begin,
        row_end,
        p_k,
        p_c,
        p_m,
        M,
        D,
        columns,
        stride_km,
        METRIC,
        PRECISION,
        HAS_SELF,
        EXCLUDE_SELF,
        INTERPRETED,
        LIST,
        TILES,
        BLOCK_M,
        BLOCK_D,
        ON_CORES,
    )
    lists = merge_lists(lists, 1, INTERPRETED)
    if INCLUDES_SELF and p_c is not None:
        # It need not be among the candidates.
        has_self = self_row >= 0
        p_own = p_k + tl.where(has_self, self_row, 0) * stride_km
        b_s_self, squares = _own_products(
            p_q, p_own, has_self, None, None, D, BLOCK_D, ON_CORES, INTERPRETED
        )
        unfit_own = tl.max(_unfit(squares), 0)
        if ON_CORES and unfit_own > 0:
            b_s_self, squares = _own_products(
                p_q, p_own, has_self, None, None, D, BLOCK_D, False, False
            )
        if METRIC == COSINE:
            unfit = unfit | _unfit(squares)
            b_s_self = b_s_self * inverse_q * _inverse_root(squares)
        lists = _with_self_first(lists, has_self)
    b_list, m_lacks = _list_of_codes(lists, b_words, self_row, p_c, m_n, k, BLOCK_M)
    m_again = m_n & (m_lacks | (unfit > 0))
    again = tl.max(m_again.to(tl.int32), 0)
    if again > 0:
        # It is 1; the compiler, which does not know that, keeps no addresses until here.
        o_n = o_n + (again - 1)
        p_q = p_query + b1 * stride_qb1 + b2 * stride_qb2 + o_n * stride_qn
        m_n = o_n < N
        b_new, b_new_self = _one_by_one(
            p_q,
            m_n,
            self_row,
            row_begin,
            row_end,
            p_k,
            p_c,
            p_m,
            M,
            D,
            columns,
            k,
            stride_km,
            METRIC,
            RESCALE,
            PRECISION,
            HAS_SELF,
            EXCLUDE_SELF,
            INTERPRETED,
            AGAIN_M,
            BLOCK_D,
        )
        b_list = tl.where(m_again[:, None], b_new, b_list)
        b_s_self = tl.where(m_again, b_new_self, b_s_self)
    o_r = b * N + o_n
    p_s, p_i = p_similarities + o_r * k, p_indices + o_r * k
    b_s, b_index = store_list(b_list, b_s_self, p_s, p_i, m_n, k, 0, INCLUDES_SELF, BY_INDEX, 4)
    if AGGREGATE:
        _aggregate(
            b_s,
            b_index,
            m_n,
            p_value,
            p_weight,
            p_bias,
            p_weight_rows,
            p_terms + pid * (2 * BLOCK_N * k),
            p_output,
            b,
            (pid % row_blocks) * BLOCK_N,
            N,
            C,
            k,
            scale,
            N_value,
            B2_value,
            aligned(stride_vb1, ALIGN_VALUE),
            aligned(stride_vb2, ALIGN_VALUE),
            bytes_vm,
            ALIGN_VALUE,
            FOLDED,
            RHO,
            2 * BLOCK_N,
            BLOCK_N,
            BLOCK_C,
            BLOCKS,
            WHOLE_C,
            INTERPRETED,
        )


@cache_plans
def plan_select_network(search: Search, aggregation: Aggregation | None) -> Plan:
    """`select`; with an aggregation, depthwise or without a weight, all of `forward`."""
    Q, K = search.Q, search.K
    config = configs.select_network(search.arch, search.bits, Q.N, Q.D, search.columns, search.k)
    programs = Q.B * cdiv(Q.N, config["BLOCK_N"])
    names: dict[str, str | None] = {}
    buffers: dict[str, Buffer] = {}
    # Rows are read where they lie, not scaled.
    numbers = search.numbers() | Q.strides("q") | K.strides("k") | {"ALIGN": alignment(Q, K)}
    of_value = numbers_of_value(aggregation, Q.N)
    C = of_value["C"]
    if aggregation is None:
        config |= configs.aggregate_small(search.arch, search.bits, C, False)
        names |= dict.fromkeys(("p_value", "p_bias", "p_terms", "p_output"))
    else:
        is_aligned = of_value["ALIGN_VALUE"] > 1
        config |= configs.aggregate_small(search.arch, aggregation.bits, C, is_aligned)
        buffers["p_terms"] = (2 * programs * config["BLOCK_N"] * search.k, torch.float32)
    blocks = config["BLOCKS"]
    if aggregation is None or not aggregation.has_weight:
        names |= {"p_weight": None, "p_weight_rows": None}
    else:
        elements = elements_of_table(C, search.k, blocks) if blocks else C * search.k
        buffers["p_weight_rows"] = (elements, aggregation.dtype)
    launch = select_network_kernel.prepare(
        programs,
        config,
        names,
        **numbers | of_value,
        RESCALE=rescales(search.dtype),
        PRECISION=configs.screen_precision(search.bits, search.tf32, search.metric),
        INTERPRETED=hardware.interpreted(),
        WHOLE_C=C % (32 * blocks or config["BLOCK_C"]) == 0,
    )
    return Plan([launch], **buffers)


def select_network(
    search: Search, pointers: Pointers, aggregation: Aggregation | None = None
) -> None:
    """Select where there are few columns; see `plan_select_network`."""
    plan_select_network(search, aggregation)(pointers)
