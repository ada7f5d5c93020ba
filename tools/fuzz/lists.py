# SPDX-License-Identifier: MIT
"""References of the functions that are no operators: loops over numbers, after the docstrings."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Pairs of a query and a key or a neighbor; more take too long.
MOST_PAIRS = 2**15


def assert_edges(
    result: Tensor, indices: Tensor, similarities: Tensor, num_keys: int | None = None
) -> bool:
    *lead, N, k = indices.shape
    if indices.numel() > MOST_PAIRS:
        return False
    batch = math.prod(lead)
    keys = N if num_keys is None else num_keys
    is_limited = num_keys is not None or batch > 1
    pairs = zip(
        indices.reshape(batch * N, k).tolist(),
        similarities.reshape(batch * N, k).tolist(),
        strict=True,
    )
    edges = []
    for query, (neighbors, values) in enumerate(pairs):
        for key, similarity in zip(neighbors, values, strict=True):
            if similarity != -math.inf:
                assert key >= 0, f"an edge from key {key}"
                assert key < keys or not is_limited, f"an edge from key {key} of {keys}"
                edges.append([query // N * keys + key, query])
    assert result.dtype is torch.int64, f"edges are {result.dtype}"
    assert tuple(result.shape) == (2, len(edges)), f"edges have the shape {list(result.shape)}"
    assert result.T.tolist() == edges, "other edges than one by one"
    return True


def assert_window(
    result: Tensor,
    N: int,
    M: int | None = None,
    window: int | None = None,
    causal: bool = False,
) -> bool:
    M = N if M is None else M
    if N * M > MOST_PAIRS or max(N, M) > MOST_PAIRS:
        return False
    _assert_ranges(result, [_seen(i + M - N, M, window, causal) for i in range(N)], M)
    return True


def assert_segments(
    result: Tensor,
    lengths: Any,
    key_lengths: Any = None,
    window: int | None = None,
    causal: bool = False,
) -> bool:
    queries = _numbers(lengths)
    keys = queries if key_lengths is None else _numbers(key_lengths)
    if max(sum(queries), 1) * max(sum(keys), 1) > MOST_PAIRS:
        return False
    expected, start = [], 0
    for N, M in zip(queries, keys, strict=True):
        for i in range(N):
            expected.append([start + j for j in _seen(i + M - N, M, window, causal)])
        start += M
    _assert_ranges(result, expected, start)
    return True


def within(similarities: Tensor, indices: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """What a radius leaves of the neighbors of `select`, the missing ones last."""
    radius = float(radius)
    least = float(torch.tensor(-(radius * radius), dtype=similarities.dtype))
    k = similarities.shape[-1]
    rows = []
    pairs = zip(similarities.view(-1, k).tolist(), indices.view(-1, k).tolist(), strict=True)
    for values, neighbors in pairs:
        kept = [each for each in zip(values, neighbors, strict=True) if not each[0] < least]
        rows.append(kept + [(-math.inf, 0)] * (k - len(kept)))
    S = similarities.new_tensor([[value for value, _ in row] for row in rows])
    I = indices.new_tensor([[neighbor for _, neighbor in row] for row in rows])
    return S.view(similarities.shape), I.view(indices.shape)


def _seen(p: int, M: int, window: int | None, causal: bool) -> list[int]:
    """Of M rows, those that a query at position p sees: the nearest, of two the lower."""
    rows = [j for j in range(M) if not (causal and j > p)]
    if window is None:
        return rows
    # How many of all positions, also of those without a row, are nearer.
    return [j for j in rows if (p - j if causal else 2 * abs(j - p) - (j < p)) < window]


def _assert_ranges(result: Tensor, expected: list[list[int]], rows: int) -> None:
    assert result.dtype is torch.int64, f"ranges are {result.dtype}"
    assert tuple(result.shape) == (len(expected), 2), f"ranges have shape {list(result.shape)}"
    for i, ((begin, end), seen) in enumerate(zip(result.tolist(), expected, strict=True)):
        is_right = 0 <= begin <= end <= rows and list(range(begin, end)) == seen
        assert is_right, f"query {i} sees {begin} to {end} of {rows} rows, others than one by one"


def _numbers(lengths: Any) -> list[int]:
    return lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)


ASSERTIONS: dict[str, Callable[..., bool]] = {
    "functional.edge_index": assert_edges,
    "functional.window_ranges": assert_window,
    "functional.segment_ranges": assert_segments,
}
"""Each raises AssertionError if the result is wrong, and returns whether it was compared."""
