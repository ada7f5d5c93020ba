# SPDX-License-Identifier: MIT
"""Ranges of keys for windows and packed sequences, against their definition."""

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from inputs import one_thread
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import python_ref
from convnn_kernels import functional
from convnn_kernels.functional import segment_ranges, window_ranges

pytestmark = one_thread


def rows_of(ranges: Tensor) -> list[list[int]]:
    """The rows that each query may see."""
    assert ranges.dtype == torch.int64
    assert bool((ranges[:, 0] <= ranges[:, 1]).all())
    return [list(range(*each)) for each in ranges.tolist()]


def seen(p: int, M: int, window: int | None, causal: bool) -> list[int]:
    """Of M rows, those that the query at position p may see: the nearest, ties to the lower."""
    count = M if window is None else window
    around = range(p - 2 * M - count, p + 1 if causal else p + 2 * M + count + 1)
    nearest = sorted(around, key=lambda row: (abs(row - p), row))
    nearest = nearest if window is None else nearest[:window]
    return sorted(row for row in nearest if 0 <= row < M)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 9, 100])
@pytest.mark.parametrize(("N", "M"), [(6, 6), (2, 7), (5, 3), (1, 1), (4, 0), (0, 4)])
def test_window_ranges(N: int, M: int, window: int | None, causal: bool) -> None:
    ranges = window_ranges(N, M, window, causal)
    expected = [seen(i + M - N, M, window, causal) for i in range(N)]
    assert rows_of(ranges) == expected
    assert ranges.shape == (N, 2)
    assert ranges.numel() == 0 or (int(ranges.min()) >= 0 and int(ranges.max()) <= M)
    if N == M:
        assert torch.equal(window_ranges(N, window=window, causal=causal), ranges)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2, 3])
@pytest.mark.parametrize(
    ("lengths", "key_lengths"),
    [
        ([3], None),
        ([2, 0, 3, 1], None),
        ([0, 0], None),
        ([], None),
        ([1, 1, 1], [4, 0, 2]),
        ([3, 0, 2], [1, 5, 2]),
    ],
)
def test_segment_ranges(
    lengths: list[int], key_lengths: list[int] | None, window: int | None, causal: bool
) -> None:
    keys = lengths if key_lengths is None else key_lengths
    starts = [0, *accumulate(keys)]
    expected = []
    for start, N, M in zip(starts, lengths, keys, strict=False):
        own = rows_of(window_ranges(N, M, window, causal))
        expected += [[start + row for row in rows] for rows in own]
    options: dict[str, Any] = {"window": window, "causal": causal}
    ranges = segment_ranges(lengths, key_lengths, **options)
    assert rows_of(ranges) == expected
    assert ranges.shape == (sum(lengths), 2)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        tensors = [None if n is None else torch.tensor(n, dtype=dtype) for n in (lengths, keys)]
        assert torch.equal(segment_ranges(*tensors, **options), ranges)
    assert torch.equal(segment_ranges(tuple(np.array(lengths, int)), keys, **options), ranges)


def test_packed_sequences_equal_each_alone() -> None:
    """Bit for bit, with outputs of convnn and neighbors of select_neighbors."""
    lengths = [5, 0, 9, 1, 30]
    tokens = torch.randn(2, sum(lengths), 4)
    weight = torch.randn(6, 4, 3)
    for options in ({}, {"causal": True}, {"causal": True, "window": 4}, {"window": 5}):
        ranges = segment_ranges(lengths, **options)
        packed = functional.convnn(tokens, tokens, tokens, 3, weight, key_range=ranges)
        s, I = functional.select_neighbors(tokens, tokens, 3, key_range=ranges)
        starts = [0, *accumulate(lengths)]
        for start, n in zip(starts, lengths, strict=False):
            own, at = tokens[:, start : start + n], slice(start, start + n)
            alone = window_ranges(n, **options)
            y = functional.convnn(own, own, own, 3, weight, key_range=alone)
            assert torch.equal(packed[:, at], y)
            s_own, I_own = functional.select_neighbors(own, own, 3, key_range=alone)
            assert torch.equal(s[:, at], s_own)
            assert torch.equal(I[:, at], torch.where(s_own == -torch.inf, 0, I_own + start))


def test_causal_equals_masking_by_hand() -> None:
    x = torch.randint(-4, 5, (2, 12, 3)).float()
    ranges = window_ranges(12, window=5, causal=True)
    s, I = functional.select_neighbors(x, x, 4, metric="dot", key_range=ranges)
    S = python_ref.similarity(x, x, "dot")
    hidden = ~(torch.ones(12, 12).tril() * torch.ones(12, 12).triu(-4)).bool()
    values, order = S.masked_fill(hidden, -torch.inf).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(s, values[..., :4])
    assert torch.equal(I, torch.where(s == -torch.inf, 0, order[..., :4]))


def test_the_number_of_tokens_may_change_under_compile() -> None:
    def ranges(x: Tensor, cache: Tensor) -> Tensor:
        return window_ranges(x.shape[0], x.shape[0] + cache.shape[0], 3, True, x.device)

    counter = CompileCounter()
    compiled = torch.compile(ranges, fullgraph=True, dynamic=True, backend=counter)
    for N, more in ((5, 3), (7, 2), (9, 4)):
        x, cache = torch.zeros(N), torch.zeros(more)
        assert torch.equal(compiled(x, cache), window_ranges(N, N + more, 3, True))
    assert counter.frame_count == 1


def test_no_lengths_on_meta() -> None:
    with pytest.raises(RuntimeError, match="segment_ranges: lengths must have values that can be"):
        segment_ranges(torch.zeros(0, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("window", [2**60, 2**62, 2**63 - 1, 2**64])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_beyond_64_bits_is_no_window(window: int, causal: bool) -> None:
    for N, M in ((4, 4), (2, 7), (7, 2)):
        expected = window_ranges(N, M, causal=causal)
        assert torch.equal(window_ranges(N, M, window, causal), expected)
    expected = segment_ranges([2, 3], causal=causal)
    assert torch.equal(segment_ranges([2, 3], window=window, causal=causal), expected)


@pytest.mark.parametrize("window", [2**61, 2**64])
def test_a_window_as_wide_as_the_most_rows_is_no_window(window: int) -> None:
    assert torch.equal(window_ranges(1, 2**60, window), window_ranges(1, 2**60))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: window_ranges(-1), RuntimeError, "N must be at least 0, got -1"),
        (lambda: window_ranges(2, -3), RuntimeError, "M must be at least 0, got -3"),
        (lambda: window_ranges(2**62), RuntimeError, f"N must be at most 2**60, got {2**62}"),
        (lambda: window_ranges(2, 2**64), RuntimeError, f"M must be at most 2**60, got {2**64}"),
        (lambda: window_ranges(2, window=0), RuntimeError, "window must be at least 1, got 0"),
        (lambda: window_ranges(2.0), TypeError, "N must be a whole number, got 2.0"),
        (lambda: window_ranges(2, window=1.5), TypeError, "window must be a whole number, got 1.5"),
        (lambda: window_ranges(2, causal=1), TypeError, "causal must be True or False, got 1"),
        (lambda: segment_ranges(5), TypeError, "lengths must be a tensor or a sequence, got 5"),
        (lambda: segment_ranges("5"), TypeError, "lengths must be a tensor or a sequence, got '5'"),
        (
            lambda: segment_ranges([2, 1.5]),
            TypeError,
            "lengths[1] must be a whole number, got 1.5",
        ),
        (lambda: segment_ranges([2, -1]), RuntimeError, "lengths[1] must be at least 0, got -1"),
        (
            lambda: segment_ranges([1, 2**64]),
            RuntimeError,
            f"lengths[1] must be at most 2**60, got {2**64}",
        ),
        (
            lambda: segment_ranges(torch.tensor([1, 2**62])),
            RuntimeError,
            f"lengths must be at most 2**60, got {2**62}",
        ),
        (
            lambda: segment_ranges([2], torch.tensor([2], device="meta")),
            RuntimeError,
            "key_lengths must have values that can be read, got: Tensor.item() cannot be called on "
            "meta tensors",
        ),
        (
            lambda: segment_ranges(torch.tensor([2]).to_sparse()),
            TypeError,
            "lengths must be a dense tensor, got one of layout sparse_coo (to_dense() converts it)",
        ),
        (
            lambda: segment_ranges([2], torch.tensor([-7])),
            RuntimeError,
            "key_lengths must be at least 0, got -7",
        ),
        (
            lambda: segment_ranges(torch.ones(2)),
            RuntimeError,
            "lengths must have an integer dtype, got float32",
        ),
        (
            lambda: segment_ranges(torch.tensor(3)),
            RuntimeError,
            "lengths must have shape [S], got shape []",
        ),
        (
            lambda: segment_ranges([2, 3], [4]),
            RuntimeError,
            "key_lengths must have the 2 elements of lengths, got 1",
        ),
        (lambda: segment_ranges([2], window=-1), RuntimeError, "window must be at least 1, got -1"),
    ],
)
def test_wrong_arguments(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).split(": ", 1)[1] == message
    assert str(error.value).split(": ", 1)[0] in ("window_ranges", "segment_ranges")


def test_export_without_a_bound_of_the_rows() -> None:
    """A check of a symbolic number would be a bound that the exported program must state."""

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return window_ranges(x.shape[0], window=3, causal=True)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Model(), (torch.randn(20, 4),), dynamic_shapes=({0: rows},))
    expected = window_ranges(33, window=3, causal=True)
    assert torch.equal(program.module()(torch.randn(33, 4)), expected)


def test_the_largest_numbers_of_rows() -> None:
    assert window_ranges(1, 2**60).tolist() == [[0, 2**60]]
    with pytest.raises(RuntimeError, match=r"M must be at most 2\*\*60, got 1152921504606846977"):
        window_ranges(1, 2**60 + 1)
