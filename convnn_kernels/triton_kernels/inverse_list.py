# SPDX-License-Identifier: MIT
"""The inverse neighbor list: for every key, the pairs (i, j) with I_ij = key.

A pair is the place of its neighbor in the flattened [B, N, k]. The list is all pairs, sorted by
key; `keys` has the key of each, b * M + m, or a number beyond all keys for a missing neighbor.

A key that many queries chose has a long run in it, which one program would walk for long. So the
list is cut, without regard to keys, into chunks of CHUNK pairs, and what a kernel sums over pairs
is first summed for each chunk that lies within one key, by a program of its own. The program of a
key then sums the pairs before its first chunk and after its last, and the sums of its chunks:
always the same terms in the same order.
"""

import triton
import triton.language as tl


@triton.jit
def run_of_chunk(
    p_keys,  # [pairs]
    o_c,  # [rows] int64: chunks
    chunks,
    keys,
    CHUNK: tl.constexpr,
):
    """The key of a chunk, and its pairs from `first` to `last`: none where there are two keys."""
    first = o_c * CHUNK
    m_c = o_c < chunks
    key = tl.load(p_keys + first, m_c, 0).to(tl.int64)
    m_c = m_c & (key == tl.load(p_keys + first + CHUNK - 1, m_c, 0).to(tl.int64)) & (key < keys)
    return tl.where(m_c, key, 0), first, tl.where(m_c, first + CHUNK, first)


@triton.jit
def run_of_key(
    p_offsets,  # [keys + 1] int64
    o_r,  # [rows] int64: keys
    m_r,  # [rows]
    CHUNK: tl.constexpr,
):
    """The pairs of a key from `first` to `last`, of which its chunks have `begin` to `end`."""
    first = tl.load(p_offsets + o_r, m_r, 0)
    last = tl.load(p_offsets + o_r + 1, m_r, 0)
    begin = (first + CHUNK - 1) // CHUNK * CHUNK
    end = last // CHUNK * CHUNK
    return first, last, tl.where(begin < end, begin, last), tl.where(begin < end, end, last)
