# SPDX-License-Identifier: MIT
"""Ranges of keys: which rows of key each query may see, as the functions take them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import arguments

# Sums of three such numbers fit into 64 bits.
_MOST = 2**60

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def window_ranges(
    N: int,
    M: int | None = None,
    window: int | None = None,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Ranges for queries and keys that follow one another in one sequence.

    The queries are the last N of the M rows of key: query i has the position p = i + M - N. So the
    M - N first keys may be a cache, which every query sees, and the same ranges are right for the
    whole sequence and for its last tokens. Where N > M, the first queries lie before all keys.

    ========  ===========  =====================================
    window    causal       rows of key that query i may see
    ========  ===========  =====================================
    None      False        all
    None      True         up to p
    w         False        p - w // 2 to p - w // 2 + w - 1
    w         True         p - w + 1 to p
    ========  ===========  =====================================

    These are the w rows nearest to p by position, itself included; of two equally near, the lower.
    At the ends of the sequence, the rows that do not exist are left out and nothing takes their
    place.

    Args:
        N: the number of queries.
        M: the number of keys; N if None.
        window: w, at least 1; None for no window.
        causal: whether a query sees no row behind its own.
        device: device of the result.

    Returns:
        [N, 2] int64, the ``key_range`` of :func:`convnn` and :func:`select_neighbors`: query i may
        see the rows begin <= j < end.

    Raises:
        TypeError: if an argument has a wrong type.
        RuntimeError: if a number is too small, or too large for any machine.

    Example:
        >>> from convnn_kernels.functional import window_ranges
        >>> window_ranges(4, causal=True).tolist()
        [[0, 1], [0, 2], [0, 3], [0, 4]]
        >>> window_ranges(4, window=3).tolist()
        [[0, 2], [0, 3], [1, 4], [2, 4]]
        >>> window_ranges(2, 10, window=4, causal=True).tolist()  # two queries after eight keys
        [[5, 9], [6, 10]]
    """
    function = "window_ranges"
    N = _count(function, "N", N)
    M = N if M is None else _count(function, "M", M)
    window, causal = _check_window(function, window, causal)
    positions = torch.arange(N, device=device) + (M - N)
    begin = torch.zeros_like(positions)
    return _narrowed(begin, begin + M, positions, window, causal)


def segment_ranges(
    lengths: Tensor | Sequence[int],
    key_lengths: Tensor | Sequence[int] | None = None,
    window: int | None = None,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Ranges for sequences that are packed into one tensor, one after the other.

    Every query may see the keys of its own sequence. Such a batch needs no padding, and its
    results are those of each sequence alone.

    Args:
        lengths: the number of queries of each of the S sequences, [S] of any integer dtype or a
            sequence of numbers. A length may be 0.
        key_lengths: the number of keys of each, such as caches and the new tokens; lengths if None.
        window: as in :func:`window_ranges`, within each sequence, whose queries are the last of its
            keys.
        causal: as in :func:`window_ranges`, within each sequence.
        device: device of the result; that of lengths if None.

    Returns:
        [N, 2] int64, where N is the sum of lengths: for each query, begin and end of the rows of
        key that it may see, among as many as the sum of key_lengths.

    Raises:
        TypeError: if an argument has a wrong type.
        RuntimeError: if an argument has a wrong shape, dtype or value. The values of tensors are
            read, which waits for the GPU. In ``torch.compile(fullgraph=True)``, make the ranges
            outside of what is compiled: the size of the result depends on values.

    Example:
        >>> from convnn_kernels.functional import segment_ranges
        >>> segment_ranges([2, 0, 3]).tolist()
        [[0, 2], [0, 2], [2, 5], [2, 5], [2, 5]]
        >>> segment_ranges([2, 0, 3], causal=True).tolist()
        [[0, 1], [0, 2], [2, 3], [2, 4], [2, 5]]
        >>> segment_ranges([1, 1], [4, 2], causal=True).tolist()  # one new token for each
        [[0, 4], [4, 6]]
    """
    function = "segment_ranges"
    counts = _lengths("lengths", lengths, device)
    keys = counts
    if key_lengths is not None:
        keys = _lengths("key_lengths", key_lengths, counts.device)
        if keys.shape != counts.shape:
            raise RuntimeError(
                f"{function}: key_lengths must have the {counts.shape[0]} elements of lengths, "
                f"got {keys.shape[0]}"
            )
    window, causal = _check_window(function, window, causal)
    ends = keys.cumsum(0)  # [S]
    # The row of a sequence's last query is that of its last key.
    shifts = ends - counts.cumsum(0)
    columns = torch.stack([ends - keys, ends, shifts], -1).repeat_interleave(counts, 0)  # [N, 3]
    begin, end, shift = columns.unbind(-1)
    positions = torch.arange(shift.shape[0], device=shift.device) + shift
    return _narrowed(begin, end, positions, window, causal)


def _narrowed(
    begin: Tensor, end: Tensor, positions: Tensor, window: int | None, causal: bool
) -> Tensor:
    """[N, 2]: what the window around each position leaves of begin to end, [N] each."""
    if window is not None:
        before = window - 1 if causal else window // 2
        begin = torch.maximum(begin, positions - before)
        end = torch.minimum(end, positions + (window - before))
    elif causal:
        end = torch.minimum(end, positions + 1)
    return torch.stack([begin, torch.maximum(begin, end)], -1)


def _check_window(function: str, window: Any, causal: Any) -> tuple[int | None, bool]:
    if window is not None:
        # A window of twice as many rows as there may be is no window.
        window = min(_at_least(function, "window", window, 1), 2 * _MOST)
    return window, arguments.flag(function, "causal", causal)


def _at_least(function: str, name: str, value: Any, least: int) -> Any:
    value = arguments.whole(function, name, value)
    if value < least:
        raise RuntimeError(
            f"{function}: {name} must be at least {least}, got {arguments.described(value)}"
        )
    return value


def _count(function: str, name: str, value: Any) -> Any:
    return _at_most(function, name, _at_least(function, name, value, 0))


def _at_most(function: str, name: str, value: Any) -> Any:
    # A symbolic number would get a guard, which is a bound that an exported program must state.
    if type(value) is int and value > _MOST:
        raise RuntimeError(
            f"{function}: {name} must be at most 2**60, got {arguments.described(value)}"
        )
    return value


def _lengths(name: str, lengths: Any, device: torch.device | str | None) -> Tensor:
    """[S] int64, checked."""
    function = "segment_ranges"
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, Sequence) or isinstance(lengths, str):
            got = arguments.described(lengths)
            raise TypeError(f"{function}: {name} must be a tensor or a sequence, got {got}")
        each = [_count(function, f"{name}[{i}]", n) for i, n in enumerate(lengths)]
        lengths = torch.tensor(each, dtype=torch.int64)
    arguments.require_tensor(function, name, lengths)
    if lengths.dtype not in _INTEGERS:
        dtype = str(lengths.dtype).removeprefix("torch.")
        raise RuntimeError(f"{function}: {name} must have an integer dtype, got {dtype}")
    if lengths.dim() != 1:
        raise RuntimeError(
            f"{function}: {name} must have shape [S], got shape {list(lengths.shape)}"
        )
    if not torch.compiler.is_compiling() and (lengths.numel() or lengths.is_meta):
        _check_lengths(function, name, lengths)
    return lengths.to(device, torch.int64)


def _check_lengths(function: str, name: str, lengths: Tensor) -> None:
    arguments.require_storage(function, name, lengths)
    try:
        least, most = (int(each) for each in lengths.aminmax())
    except RuntimeError as error:
        raise RuntimeError(
            f"{function}: {name} must have values that can be read, got: {error}"
        ) from None
    _at_least(function, name, least, 0)
    _count(function, name, most)
