# SPDX-License-Identifier: MIT
"""Wrong calls of the functions that are no operators, and unknown arguments of all."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import wrong_calls
from wrong_calls import FLOATING, SIZES, Argument, Wrong

import convnn_kernels
import convnn_kernels.nn as cnn
from convnn_kernels import functional

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:.*nested", "ignore:.*quant")
N, M = SIZES["N"], SIZES["M"]
WHOLE, FLAG = "be a whole number$", "be True or False$"
LENGTHS = "be a tensor or a sequence$"
QUERY = torch.randn(N, 4)
NEIGHBORS = (
    Argument("indices", "tensor", ("B", "N", "k"), (torch.int64,)),
    Argument("similarities", "tensor", ("B", "N", "k"), FLOATING, like="indices"),
)


def types(name: str, kind: str, expected: str, skip: tuple[Any, ...] = ()) -> Iterator[Wrong]:
    for got, value in wrong_calls.WRONG_TYPES[kind]:
        if not any(value is each for each in skip):
            yield Wrong(name, "type", {name: value}, expected, got, error=TypeError)


def values(name: str, expected: str, *wrong: Any, **others: Any) -> Iterator[Wrong]:
    for value in wrong:
        changes = {name: value, **others}
        yield Wrong(name, "value", changes, expected, f"{value:g}" if value else str(value))


def window_ranges() -> Iterator[Wrong]:
    for name, least, skip in (("N", 0, ()), ("M", 0, (None,)), ("window", 1, (None,))):
        yield from types(name, "whole", WHOLE, skip)
        yield from values(name, f"be at least {least}$", least - 1, -100)
    yield from types("causal", "flag", FLAG)


def segment_ranges() -> Iterator[Wrong]:
    for name in ("lengths", "key_lengths"):
        for got, value in (("3", 3), ("'abc'", "abc"), ("dict", {}), ("float", 2.5)):
            got = "2.5" if got == "float" else got
            yield Wrong(name, "type", {name: value}, LENGTHS, got, error=TypeError)
        for got, value in (("2.5", 2.5), ("None", None), ("True", True), ("'3'", "3")):
            changes = {name: [2, value]}
            yield Wrong(f"{name}[1]", "type", changes, WHOLE, got, error=TypeError)
        for dtype in (*FLOATING, torch.bool, torch.complex64):
            got = str(dtype).removeprefix("torch.")
            changes = {name: torch.ones(2, dtype=dtype)}
            yield Wrong(name, "dtype", changes, "have an integer dtype$", got)
        for shape in ((), (2, 1), (0, 2)):
            changes = {name: torch.ones(shape, dtype=torch.int64)}
            yield Wrong(name, "dims", changes, r"have shape \[S\]$", f"shape {list(shape)}")
        changes = {name: torch.tensor([1, -2])}
        yield Wrong(name, "value", changes, "be at least 0$", "-2")
    changes = {"key_lengths": [1, 2, 3]}
    yield Wrong("key_lengths", "size", changes, "have the 2 elements of lengths$", "3")
    yield from types("causal", "flag", FLAG)
    yield from types("window", "whole", WHOLE, (None,))
    yield from values("window", "be at least 1$", 0, -1)


def edge_index() -> Iterator[Wrong]:
    for way in ("none", "type", "layout", "dtype", "dims", "size"):
        for wrong in wrong_calls.wrong_calls(NEIGHBORS, way):
            yield dataclasses.replace(wrong, error=TypeError) if way == "none" else wrong
    for wrong in wrong_calls.wrong_calls(NEIGHBORS, "device"):
        changes = {name: X.tensor.to("meta") for name, X in wrong.changes.items()}
        expected = wrong.expected.format(device="cpu", other="meta")
        got = wrong.got.format(device="cpu", other="meta")
        yield dataclasses.replace(wrong, changes=changes, expected=expected, got=got)
    yield from types("num_keys", "whole", WHOLE, (None,))
    yield from values("num_keys", "be at least 0$", -1)
    for value in (-1, N, 2**62):
        new = torch.zeros(2, N, 3, dtype=torch.int64)
        new[1, 2, 0] = value
        got = (
            f"{value}; num_keys, the number of keys of each batch element, is by default the "
            f"number of queries, {N}"
        )
        changes = {"indices": new, "similarities": torch.ones(2, N, 3), "num_keys": None}
        yield Wrong("indices", "value", changes, rf"^be in \[0, {N}\)$", got)


def within() -> Iterator[Wrong]:
    yield from types("within", "real", "be a number$", (None,))
    yield from values("within", "be finite and at least 0$", -1.0, -math.inf, math.inf, math.nan)
    for metric in ("dot", "cosine"):
        changes = {"within": 0.5, "metric": metric}
        got = f"0.5 with metric '{metric}'"
        yield Wrong("within", "value", changes, "^be None unless metric is 'euclidean'$", got)


def backend() -> Iterator[Wrong]:
    for value in ("", "CPU", "gpu", "cuda:0", 3, None, True, ("cpu",)):
        changes = {"name": value}
        yield Wrong("name", "value", changes, "^be 'triton', 'cuda' or 'cpu'$", repr(value))


FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[], Iterator[Wrong]]]] = {
    "window_ranges": (functional.window_ranges, {"N": N}, window_ranges),
    "segment_ranges": (
        functional.segment_ranges,
        {"lengths": [2, 3], "key_lengths": [3, 3]},
        segment_ranges,
    ),
    "edge_index": (
        functional.edge_index,
        wrong_calls.valid(NEIGHBORS) | {"num_keys": M},
        edge_index,
    ),
    "select_neighbors": (
        functional.select_neighbors,
        {"query": QUERY, "key": QUERY, "k": 3, "metric": "euclidean"},
        within,
    ),
    "backend": (convnn_kernels.backend, {}, backend),
}


CALLS = {
    "window_ranges": 38,
    "segment_ranges": 52,
    "edge_index": 120,
    "select_neighbors": 12,
    "backend": 8,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_calls(name: str) -> None:
    function, valid, make = FUNCTIONS[name]
    faults, calls = [], 0
    for wrong in make():
        args = valid | wrong.changes
        error = wrong_calls.error_of(function, **args)
        calls += 1
        if found := wrong_calls.fault(wrong, error, (name,), args):
            faults.append(f"{wrong}: {found}")
    assert calls == CALLS[name]
    assert not faults, wrong_calls.summary(faults, calls)


UNKNOWN = [
    *(functional.convnn, functional.select_neighbors, functional.aggregate_neighbors),
    *(functional.edge_index, functional.window_ranges, functional.segment_ranges),
    *(convnn_kernels.backend, convnn_kernels.warmup, cnn.replace),
    *(cnn.ConvNN1d, cnn.ConvNN2d, cnn.HybridBranch2d, cnn.ConvNNAttention),
    *(cnn.AllCandidates, cnn.RandomCandidates, cnn.SpatialCandidates),
]


@pytest.mark.parametrize("unknown", UNKNOWN, ids=lambda each: each.__name__)
def test_unknown_argument(unknown: Callable[..., Any]) -> None:
    """Python refuses it, and names what was called and the argument."""
    name = "convnn" if unknown is convnn_kernels.warmup else unknown.__name__
    for argument in ("kernels", "q", "Metric"):
        error = wrong_calls.error_of(unknown, **{argument: 3})
        assert type(error) is TypeError
        assert str(error).startswith((f"{name}() ", f"{name}.__init__() ")), error
        assert f"unexpected keyword argument '{argument}'" in str(error)
