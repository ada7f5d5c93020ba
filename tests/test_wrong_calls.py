# SPDX-License-Identifier: MIT
"""Every wrong call of every operator: C++ and Python, on each kind of device, say the same."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_wrong_functions
import test_wrong_modules
import torch
import wrong_calls
from fake_cuda_device import FakeCudaDevice
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from wrong_calls import OPERATORS, Elsewhere, Wrong

from convnn_kernels import functional, schemas
from convnn_kernels.backends import selection

# What the dispatcher refuses, in words that the functions replace by their own.
OF_FUNCTIONS = ("type", "layout")
WAYS = (*OF_FUNCTIONS, "none", "dtype", "dims", "size", "device", "value")
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:.*nested", "ignore:.*quant")
FUNCTIONS = {
    "forward": functional.convnn,
    "select": functional.select_neighbors,
    "aggregate": functional.aggregate_neighbors,
}


def by_operator(op: str, args: dict[str, Any]) -> None:
    getattr(torch.ops.convnn, op)(**args)


def without_python(op: str, args: dict[str, Any]) -> None:
    with torch.inference_mode():
        getattr(torch.ops.convnn, op)(**args)


def by_function(op: str, args: dict[str, Any]) -> None:
    FUNCTIONS[op](**args)


def by_cuda_key(op: str, args: dict[str, Any]) -> None:
    """What Python checks of CUDA tensors, values with CONVNN_CHECK_INDICES=1."""
    name = f"convnn::{op}"
    arguments = schemas.arguments(name)(**args)
    selection._CHECKS[name](name, arguments)
    selection._check_values(name, arguments)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tensors of a call are, and who checks it."""

    name: str
    call: Callable[[str, dict[str, Any]], None]
    device: str = "cpu"
    other: str = "meta"
    mode: Any = None
    has_values: bool = True

    def put(self, value: Any) -> Any:
        """The argument, on its device."""
        if isinstance(value, Elsewhere):
            return self._move(value.tensor, self.other)
        return self._move(value, self.device) if isinstance(value, Tensor) else value

    def _move(self, tensor: Tensor, device: str) -> Tensor:
        if isinstance(self.mode, FakeTensorMode):
            with self.mode:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(self.mode, FakeCudaDevice):
            with self.mode:
                return tensor.to(device)
        return tensor.to(device)


FAKE = FakeTensorMode()
PLACES = {
    each.name: each
    for each in (
        Place("cpu", by_operator),
        Place("inference", without_python),
        Place("function", by_function),
        Place("meta", by_operator, "meta", "cpu", has_values=False),
        Place("fake cuda", by_operator, "cuda:0", "cuda:1", FAKE, False),
        Place("fake cpu", by_operator, "cpu", "cuda:0", FAKE, False),
        Place("cuda key", by_cuda_key, "cuda:0", "cpu", FakeCudaDevice()),
    )
}


# How many wrong calls of each operator there are in each of the ways, at all places together.
CALLS = {
    "forward_backward": (0, 0, 36, 1260, 198, 450, 54, 216),
    "select_backward": (0, 0, 30, 702, 120, 252, 30, 66),
    "aggregate_backward": (0, 0, 24, 696, 114, 252, 30, 174),
    "forward": (159, 19, 21, 1470, 203, 504, 63, 524),
    "select": (106, 10, 14, 987, 133, 357, 42, 349),
    "aggregate": (81, 13, 21, 812, 126, 252, 35, 207),
}


def error_of(place: Place, op: str, args: dict[str, Any]) -> Exception | None:
    with place.mode or contextlib.nullcontext():
        return wrong_calls.error_of(place.call, op, args)


def is_checked(place: Place, op: str, wrong: Wrong) -> bool:
    if place.name == "function" or wrong.way in OF_FUNCTIONS:
        return place.name == "function" and op in FUNCTIONS
    return place.has_values or not wrong.reads_values


def filled(text: str, place: Place) -> str:
    return text.replace("{device}", place.device).replace("{other}", place.other)


def without_devices(error: Exception | None) -> str:
    return re.sub(r"\b(cpu|meta|cuda:\d)\b", "<device>", str(error))


PAIRS = [
    (op, way) for op in OPERATORS for way in WAYS if op in FUNCTIONS or way not in OF_FUNCTIONS
]


@pytest.mark.parametrize(("op", "way"), PAIRS)
def test_wrong_calls(op: str, way: str) -> None:
    faults, calls, arguments = [], 0, OPERATORS[op]
    bases = {
        place.name: {name: place.put(X) for name, X in wrong_calls.valid(arguments).items()}
        for place in PLACES.values()
    }
    for wrong in wrong_calls.wrong_calls(arguments, way):
        said = set()
        for place in (each for each in PLACES.values() if is_checked(each, op, wrong)):
            changes = {name: place.put(value) for name, value in wrong.changes.items()}
            args = bases[place.name] | changes
            error = error_of(place, op, args)
            calls += 1
            said.add(without_devices(error))
            owner = FUNCTIONS[op].__name__ if way in OF_FUNCTIONS else f"convnn::{op}"
            at = dataclasses.replace(
                wrong, expected=filled(wrong.expected, place), got=filled(wrong.got, place)
            )
            if found := wrong_calls.fault(at, error, (owner,), args):
                faults.append(f"{place.name}: {wrong}: {found}")
        if len(said) > 1:
            faults.append(f"{wrong}: not the same everywhere: {said}")
    assert calls == CALLS[op][WAYS.index(way)]
    assert not faults, wrong_calls.summary(faults, calls)


@pytest.mark.parametrize("op", OPERATORS)
def test_right_call(op: str) -> None:
    """The calls are right without their mistake, and the table has all arguments."""
    schema = schemas.OPERATORS[f"convnn::{op}"]._schema
    assert {each.name for each in OPERATORS[op]} == {each.name for each in schema.arguments}
    for place in PLACES.values():
        if place.name != "cuda key" and (place.name != "function" or op in FUNCTIONS):
            args = {name: place.put(X) for name, X in wrong_calls.valid(OPERATORS[op]).items()}
            assert error_of(place, op, args) is None, place.name


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ("convnn::select: key must be float32 as query is, got int32", None),
        ("convnn::forward: key must be float32 as query is, got int32", "it begins with convnn::f"),
        ("convnn::select: query must be float32 as query is, got int32", "it is about query"),
        ("convnn::select: key must be float64, got int32", "it does not say what was expected"),
        ("convnn::select: key must be float32 as query is, got int64", "it does not say what it g"),
        ("convnn::select: key is not float32 as query is: int32", "it is not of the form"),
        ("convnn::select: key must be float32 as query is, got int32 at 0x7f", "it shows"),
    ],
)
def test_a_message_that_breaks_a_rule(message: str, rule: str | None) -> None:
    wrong = Wrong("key", "dtype", {}, "^be float32 as query is$", "int32")
    measures = dataclasses.replace(wrong, argument="query", others=("value", "key"))
    for each in (wrong, measures):
        found = wrong_calls.fault(each, RuntimeError(message), ("convnn::select",), {})
        assert found is None if rule is None else str(found).startswith(rule)


def test_the_documentation_has_the_numbers_of_calls() -> None:
    of_operators = sum(map(sum, CALLS.values()))
    others = sum(test_wrong_functions.CALLS.values()) + sum(test_wrong_modules.SETTINGS.values())
    for _, inputs in test_wrong_modules.LAYERS.values():
        others += 2 * sum(test_wrong_modules.CALLS[len(inputs[0].shape), len(inputs)])
    root = Path(__file__).parent.parent
    page = " ".join((root / "docs" / "tested.md").read_text().split())
    assert f" make {of_operators:,} wrong calls of the operators" in page
    assert f" {others:,} are of layers and other functions" in page
    total = f" some {round(of_operators + others, -2):,} wrong calls"
    assert total in (root / "CHANGELOG.md").read_text()
