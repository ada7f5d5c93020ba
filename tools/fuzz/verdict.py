# SPDX-License-Identifier: MIT
"""Makes a call and judges its outcome.

It is right if the results are those of the reference, or if a RuntimeError, TypeError or ValueError
names an argument, unless the call is known to be valid. Meta tensors must give the same shapes and
dtypes, or the same message, unless the error is about values, which they do not have.
"""

import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnn_kernels import functional, schemas
from python_ref import aggregate, assert_forward, assert_select, assert_values
from tools.fuzz import lists
from tools.fuzz.calls import FOREIGN, Call, build, is_tensor

OPERATORS: dict[str, Callable[..., Any]] = {
    name.removeprefix("convnn::"): op for name, op in schemas.OPERATORS.items()
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"functional.{function.__name__}": function
    for function in (
        functional.convnn,
        functional.select_neighbors,
        functional.aggregate_neighbors,
        functional.edge_index,
        functional.window_ranges,
        functional.segment_ranges,
    )
}
# The operator whose results a function returns, and how many of them.
SAME: dict[str, tuple[str, int]] = {
    "functional.convnn": ("forward", 1),
    "functional.select_neighbors": ("select", 2),
    "functional.aggregate_neighbors": ("aggregate", 1),
}

# Errors about values or about memory, which meta tensors do not have.
OF_VALUES = re.compile(
    r"must be in \[0, |must be distinct|0 <= begin <= end|without rows of value|\d bytes|"
    r"storage|memory"
)
# PyTorch refuses a call of an operator before we see it: a layout that has no kernel, or too many
# arguments.
BY_PYTORCH = re.compile(
    r"^Could not run 'convnn::\w+' with arguments from the '\w+' backend|expected at most \d+ arg"
)
# And functions that are made of PyTorch's own operators say what these say about storages.
OF_STORAGE = re.compile(r"^(Storage size|Stride) calculation overflowed")
# A message of our own begins with what was called and the argument.
OURS = re.compile(r"((?:convnn::)?\w+): (\w*)")
# Arguments of operators that are numbers.
NUMBERS = {"k", "scale"}
# More pairs than these take too long, fewer than the others could be had.
MOST_PAIRS, IMPOSSIBLE_PAIRS = 2**24, 2**58
MOST_COMPARED = 2**15


class Verdict(NamedTuple):
    outcome: str
    """"result", "error" or "skipped"."""
    complaint: str = ""
    """What is wrong with it; nothing if it is right."""
    compared: bool = False
    """Whether the reference confirmed the result."""


class Outcome(NamedTuple):
    results: tuple[Any, ...] | None
    error: Exception | None

    @property
    def message(self) -> str:
        return str(self.error).splitlines()[0] if self.error and str(self.error) else ""


def judge(call: Call) -> Verdict:
    """Makes the call, and others with the same arguments."""
    try:
        arguments = build(call)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return Verdict("skipped")  # there is no such tensor
    if _takes_long(arguments):
        return Verdict("skipped")
    try:
        outcome = _run(call["call"], arguments)
    except Exception as error:
        return Verdict("error", f"raises {type(error).__name__}: {error}")
    kind = "error" if outcome.error else "result"
    if outcome.error and call.get("valid"):
        return Verdict(kind, f"refuses a right call: {outcome.message}")
    try:
        if complaint := _about_meta(call, outcome):
            return Verdict(kind, complaint)
        if outcome.error:
            return Verdict(kind, _about_error(call, outcome))
        devices = {X.device.type for X in arguments.values() if isinstance(X, Tensor)}
        if devices == {"cpu", "meta"}:
            return Verdict(kind, "a result for tensors on cpu and on meta")
        if devices == {"meta"}:
            return Verdict(kind)
        return Verdict(kind, compared=_compare(call["call"], arguments, outcome.results or ()))
    except AssertionError as error:
        return Verdict(kind, f"result: {error}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(kind, f"cannot judge: {type(error).__name__}: {error} ({where.name})")


def _run(name: str, arguments: dict[str, Any]) -> Outcome:
    function = OPERATORS.get(name) or FUNCTIONS[name]
    try:
        results = function(**arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return Outcome(None, error)
    return Outcome(results if isinstance(results, tuple) else (results,), None)


def _takes_long(arguments: dict[str, Any]) -> bool:
    """Whether the call is valid, perhaps, but of a size that takes seconds or more."""
    rows = [
        math.prod(max(size, 1) for size in arguments[name].shape)
        for name in ("query", "key", "value", "similarities")
        if isinstance(arguments.get(name), Tensor) and not arguments[name].is_nested
    ]
    k = arguments.get("k")
    rows.append(k if type(k) is int and k > 0 else 1)
    sizes = [arguments[name] for name in ("N", "M") if type(arguments.get(name)) is int]
    return any(MOST_PAIRS < each < IMPOSSIBLE_PAIRS for each in (math.prod(rows), *sizes))


def _about_error(call: Call, outcome: Outcome) -> str:
    message, error = outcome.message, outcome.error
    name = call["call"]
    if name in OPERATORS and BY_PYTORCH.search(message):
        return ""
    if re.search(r"\d bytes", str(error)):
        return ""
    if name not in SAME and OF_STORAGE.search(str(error)):
        return ""
    words = message.split("Declaration:")[0].split("Schema:")[0]
    parameters = _parameters(name)
    if name.endswith("_backward"):
        parameters.append("k")  # the columns of similarities
    if ours := OURS.match(words):
        is_named = ours[1] in _callers(name) and ours[2] in parameters
    else:
        # Python and the dispatcher quote it.
        is_named = any(f"'{each}'" in words for each in (*parameters, *call["arguments"]))
    return "" if is_named else f"names no argument: {type(error).__name__}: {words[:200]}"


def _callers(name: str) -> list[str]:
    """What messages about a call begin with."""
    function = name.removeprefix("functional.")
    operator = SAME[name][0] if name in SAME else function
    return [function, f"convnn::{operator}"]


def _parameters(name: str) -> list[str]:
    if name in OPERATORS:
        return list(schemas.arguments(f"convnn::{name}")._fields)
    return list(inspect.signature(FUNCTIONS[name]).parameters)


def _about_meta(call: Call, outcome: Outcome) -> str:
    """What is wrong with the outcome of the same call of meta tensors."""
    foreign = [each for each in _tensors(call) if each.get("kind") in FOREIGN]
    if call["call"] not in OPERATORS or foreign:
        return ""
    # The dispatcher reads a tensor of one element that stands for a number, but no meta tensor.
    given = {name for name, value in call["arguments"].items() if is_tensor(value)}
    if {"object": "number in a tensor"} in call["arguments"].values() or given & NUMBERS:
        return ""
    if outcome.error and (OF_VALUES.search(outcome.message) or BY_PYTORCH.search(outcome.message)):
        return ""
    arguments = {
        name: _as_meta(X) if is_tensor(call["arguments"][name]) else X
        for name, X in build(call).items()
    }
    meta = _run(call["call"], arguments)
    if outcome.error or meta.error:
        # The text of a C++ exception ends at a character 0.
        expected = outcome.message.replace("on cpu", "on meta").partition("\0")[0]
        got = meta.message.partition("\0")[0]
        return "" if got == expected else f"says {expected!r}, with meta tensors {got!r}"
    for i, (found, other) in enumerate(zip(outcome.results or (), meta.results or (), strict=True)):
        for what in ("shape", "dtype", "layout"):
            if getattr(found, what) != getattr(other, what):
                return (
                    f"result {i} has {what} {getattr(found, what)}, with meta tensors "
                    f"{getattr(other, what)}"
                )
    return ""


def _as_meta(X: Tensor) -> Tensor:
    return torch.empty_strided(X.shape, X.stride(), dtype=X.dtype, device="meta")


def _tensors(call: Call) -> Iterator[dict[str, Any]]:
    return (value["tensor"] for value in call["arguments"].values() if is_tensor(value))


def _compare(name: str, arguments: dict[str, Any], results: tuple[Any, ...]) -> bool:
    """Raises AssertionError if the results are wrong; returns whether they were compared."""
    plain = {each: _plain(X) for each, X in arguments.items()}
    if plain.get("k", 1) > MOST_COMPARED:
        return False  # there are no queries: PyTorch cannot make views of such results
    if name in lists.ASSERTIONS:
        # Bytes are whole numbers there.
        others = {each: X for each, X in arguments.items() if isinstance(X, bytes)}
        return lists.ASSERTIONS[name](*results, **plain | others)
    if name in SAME:
        name, count = SAME[name]
        radius = plain.pop("within", None)
        same = _run(name, plain)
        assert same.error is None, f"the operator says {same.message!r}"
        expected = same.results or ()
        if radius is not None:
            if expected[0].numel() > MOST_COMPARED:
                return False
            expected = lists.within(expected[0], expected[1], radius)
        _assert_same(results, expected[:count], "the operator")
        results = same.results or ()
    tensors = {each: X for each, X in plain.items() if isinstance(X, Tensor)}
    if any(X.numel() > MOST_COMPARED for X in tensors.values()):
        return False
    floats = [X for X in tensors.values() if X.is_floating_point()]
    is_finite = all(bool(X.isfinite().all()) for X in floats)
    # Where sums overflow, they depend on their order; and 0 * NaN is what a missing neighbor adds.
    if any(float(_largest(X)) > 1e15 for X in floats) or not (is_finite or name == "select"):
        return False
    if isinstance(plain.get("scale"), int):
        plain["scale"] = float(plain["scale"])
    if abs(plain.get("scale", 1.0)) > 1e15:
        return False  # the reference subtracts products that overflow
    if name in _OTHERS:
        _OTHERS[name](plain, results)
        return True
    if name not in _ASSERTIONS:
        return False
    found = _ASSERTIONS[name](OPERATORS[name], **plain, backward=is_finite)
    _assert_same(results, found, "a second call")
    return True


_ASSERTIONS: dict[str, Callable[..., Any]] = {
    "forward": assert_forward,
    "select": assert_select,
}


def _plain(X: Any) -> Any:
    """The argument as the reference takes it."""
    if isinstance(X, Tensor):
        if X._is_zerotensor():  # which has no memory to read
            return torch.zeros(X.shape, dtype=X.dtype)
        return (X.clone() if X.is_inference() else X).detach().as_subclass(Tensor)
    if isinstance(X, bytes):
        return X.decode()
    return X


def _largest(X: Tensor) -> float:
    finite = X.detach()[X.isfinite()].double()
    return float(finite.abs().max()) if finite.numel() else 0.0


def _aggregate(arguments: dict[str, Any], results: tuple[Any, ...]) -> None:
    """Indices are as they come, often one row for all: sums may cancel, so terms set the scale."""
    double = _in(torch.float64, arguments)
    size: dict[str, Any] = {
        name: X.abs() if isinstance(X, Tensor) else X for name, X in double.items()
    }
    size |= {"similarities": double["similarities"], "indices": arguments["indices"]}
    if arguments.get("rho") == "similarity":
        size["similarities"] = double["similarities"].abs()
    result = results[0]
    exact = aggregate(**double)
    terms = aggregate(**size)
    assert_values("output", result, exact, aggregate(**arguments), torch.float32, terms)


def _aggregate_backward(arguments: dict[str, Any], results: tuple[Any, ...]) -> None:
    """Compared at the scale of the largest terms, of which a gradient may be the difference."""
    names = ("value", "similarities", "weight")
    double = _in(torch.float64, arguments)
    leaves = {
        name: double[name].detach().requires_grad_()
        for name in names
        if double.get(name) is not None
    }
    given = {name: double[name] for name in ("indices", "rho", "scale") if name in double}
    grad_output = double["grad_output"]
    bias = grad_output.new_zeros(grad_output.shape[-1], requires_grad=True)
    output = aggregate(**leaves, **given, bias=bias)
    if arguments["has_bias"]:
        leaves["bias"] = bias
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output, materialize_grads=True)
    exact = dict(zip(leaves, grads, strict=True))
    pairs = arguments["similarities"].numel() + 1
    largest = [1 + _largest(X) for X in (grad_output, *leaves.values())]
    scale = math.prod(largest) * abs(arguments.get("scale", 1.0) or 1.0)
    for name, result in zip((*names, "bias"), results, strict=True):
        if name in exact and arguments[f"need_{name}"]:
            precision = torch.finfo(result.dtype).eps if result.dtype.itemsize < 4 else 1e-6
            bound = 4 * precision * scale * pairs * (exact[name].shape[-1] + 1)
            error = _largest(result.double() - exact[name])
            assert result.shape == exact[name].shape, f"gradient of {name}: {result.shape}"
            assert error <= bound, f"gradient of {name}: off by {error:g}, at most {bound:g}"
        else:
            assert result.numel() == 0, f"gradient of {name}: not needed, got {result.shape}"


_OTHERS: dict[str, Callable[[dict[str, Any], tuple[Any, ...]], None]] = {
    "aggregate": _aggregate,
    "aggregate_backward": _aggregate_backward,
}


def _in(dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: X.to(dtype) if isinstance(X, Tensor) and X.is_floating_point() else X
        for name, X in arguments.items()
    }


def _assert_same(found: tuple[Any, ...], expected: tuple[Any, ...], what: str) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            one.detach(),
            other.detach(),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=f"result {i} differs from that of {what}",
        )
