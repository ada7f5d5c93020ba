# SPDX-License-Identifier: MIT
"""Hypothesis strategies of calls: a valid one, then up to three changes of its arguments.

What a strategy draws first is the simplest, to which Hypothesis reduces a call that fails.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from tools.fuzz.calls import FLOATS, KINDS, LAYOUTS, OBJECTS, Call

FLOATING = ["float32", "float64", "float16", "bfloat16"]
DTYPES = [
    *FLOATING,
    *("int64", "int32", "uint8", "bool", "uint16", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e8m0fnu", "complex32"),
]
FLOAT_FILLS = ["normal", "integers", "zeros", "large", "small", "nan", "inf", "-inf"]
INTEGER_FILLS = ["rows", "distinct", "ranges", "row too many", "row -1", "row 2**40", "row -2**63"]
SIZES = [0, 1, 2, 3, 7, 8, 16, 17, 2**31, 2**32 + 1, 2**40, 2**61, 2**62, 2**63 - 1]
NUMBERS: list[Any] = [
    *(1, 0, -1, 2, 17, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(None, True, 1.0, 2.5, -0.0, 1e-320, 1e308, "2", ""),
    *({"float": name} for name in FLOATS),
]
TEXTS: list[Any] = [
    *("cosine", "dot", "euclidean", "softmax", "ones", "similarity", "index", "auto"),
    *("", "Cosine", "cosine ", "dot\0", "é", "x" * 5000, None, 1, True, 0.5),
]

Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def calls(draw: Draw, only: Sequence[str] = ()) -> Call:
    """Calls of these operators and functions, or of all."""
    name = draw(st.sampled_from(only or sorted(_VALID)))
    call = {"call": name, "arguments": _VALID[name](draw)}
    changes = draw(st.sampled_from([0, 0, 1, 1, 1, 2, 3]))
    if not changes:
        call["valid"] = True
    for _ in range(changes):
        _change(draw, call["arguments"])
    return call


def _change(draw: Draw, arguments: dict[str, Any]) -> None:
    """Makes one argument another, which is mostly a wrong one."""
    name = draw(st.sampled_from(sorted(arguments) or ["query"]))
    value = arguments.get(name)
    how = draw(st.integers(0, 11))
    if how == 0:
        arguments.pop(name, None)
    elif how == 1:
        arguments[name] = {"object": draw(st.sampled_from(sorted(OBJECTS)))}
    elif how == 2:
        arguments[name] = draw(st.sampled_from([*NUMBERS, *TEXTS]))
    elif how == 3 and draw(st.booleans()):
        arguments["other"] = None
    elif isinstance(value, dict) and "tensor" in value:
        arguments[name] = copy.deepcopy(value)
        _change_tensor(draw, arguments[name]["tensor"])
    elif isinstance(value, str):
        arguments[name] = draw(st.sampled_from(TEXTS) | st.text(max_size=3))
    elif isinstance(value, bool):
        arguments[name] = not value
    elif value is None:
        tensors: list[Any] = [each for each in arguments.values() if isinstance(each, dict)]
        arguments[name] = copy.deepcopy(draw(st.sampled_from(tensors or [None])))
    else:
        arguments[name] = draw(st.sampled_from(NUMBERS) | st.integers() | st.floats(width=32))
        arguments[name] = _in_json(arguments[name])


def _in_json(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return {"float": "nan"}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"float": str(value)}
    return value


def _change_tensor(draw: Draw, tensor: dict[str, Any]) -> None:
    how = draw(st.sampled_from(["kind", "dtype", "fill", "layout", "size", "size", "dims", "grad"]))
    shape = tensor["shape"]
    if how == "kind":
        tensor["kind"] = draw(st.sampled_from(list(KINDS)))
    elif how == "dtype":
        tensor["dtype"] = draw(st.sampled_from(DTYPES))
    elif how == "fill":
        tensor["fill"] = draw(st.sampled_from([*FLOAT_FILLS, *INTEGER_FILLS]))
    elif how == "layout":
        tensor["layout"] = draw(st.sampled_from(list(LAYOUTS)))
    elif how == "grad":
        tensor["requires_grad"] = True
    elif how == "dims" or not shape:
        where = draw(st.integers(0, len(shape)))
        if shape and draw(st.booleans()):
            shape.pop(min(where, len(shape) - 1))
        else:
            shape.insert(where, draw(st.sampled_from([1, 2, 0])))
    else:
        where = draw(st.integers(0, len(shape) - 1))
        others = [shape[where] + 1, max(shape[where] - 1, 0), *SIZES]
        shape[where] = draw(st.sampled_from(others))


class _Sizes:
    """The sizes and dtypes of a valid call."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.lead = draw(st.sampled_from([[], [1], [2], [2, 3], [0], [1, 2]]))
        small = [1, 2, 3, 5, 8, 17, 0]
        self.N, self.M = draw(st.sampled_from(small)), draw(st.sampled_from([*small, 40]))
        self.D, self.C = draw(st.sampled_from(small)), draw(st.sampled_from(small))
        self.O = draw(st.sampled_from([1, 4, 9, 0]))
        self.k = draw(st.sampled_from([1, 2, 3, 5, 20]))
        self.dtype = draw(st.sampled_from(FLOATING))
        self.value_dtype = draw(st.sampled_from([self.dtype, *FLOATING]))
        # One fill and layout for all: what differs is left to the changes.
        self.fill = draw(st.sampled_from(["normal", *FLOAT_FILLS]))
        self.layout = draw(st.sampled_from(["plain", *LAYOUTS]))
        self.seed = 0

    def tensor(self, *shape: int, lead: bool = True, **options: Any) -> Any:
        self.seed += 1
        made = {"shape": [*(self.lead if lead else []), *shape], "layout": self.layout}
        return {"tensor": made | {"seed": self.seed} | options}

    def floats(self, *shape: int, dtype: str = "", lead: bool = True) -> Any:
        return self.tensor(*shape, dtype=dtype or self.dtype, fill=self.fill, lead=lead)

    def ints(self, *shape: int, fill: str = "rows", lead: bool = True) -> Any:
        # Where these repeat an element, so do these indices, which then are not distinct.
        layout = {} if self.layout in ("plain", "sliced", "offset") else {"layout": "plain"}
        options = {"dtype": "int64", "fill": fill, "rows": self.M, "lead": lead} | layout
        return self.tensor(*shape, **options)

    def sometimes(self, make: Callable[[], Any]) -> Any:
        return make() if self.draw(st.sampled_from([False, False, True])) else None

    def restrictions(self) -> dict[str, Any]:
        of_each = self.draw(st.booleans())
        R = min(self.M, 4)
        given = {
            "candidates": lambda: self.ints(R, fill="distinct", lead=of_each),
            "self_indices": lambda: self.ints(self.N, lead=of_each),
            "key_mask": lambda: self.tensor(self.M, dtype="bool", fill="bits"),
            "key_range": lambda: self.ints(self.N, 2, fill="ranges", lead=of_each),
        }
        if self.M == 0:
            del given["self_indices"]
        made = {name: self.sometimes(make) for name, make in given.items()}
        exclude = made.get("self_indices") is not None and self.draw(st.booleans())
        order = self.draw(st.sampled_from(["similarity", "index"]))
        return made | {"metric": self.metric(), "order": order, "exclude_self": exclude}

    def metric(self) -> str:
        return self.draw(st.sampled_from(["dot", "cosine", "euclidean"]))

    def convolution(self) -> dict[str, Any]:
        kind = self.draw(st.sampled_from(["none", "depthwise", "dense"]))
        weight, outputs = None, self.C
        if kind == "depthwise":
            weight = self.floats(self.C, 1, self.k, dtype=self.value_dtype, lead=False)
        elif kind == "dense":
            outputs = 1 if self.C == 1 else self.O
            weight = self.floats(outputs, self.C, self.k, dtype=self.value_dtype, lead=False)
        bias = self.sometimes(
            lambda: self.floats(outputs, dtype=self.value_dtype, lead=False),
        )
        rho = self.draw(st.sampled_from(["softmax", "ones", "similarity"]))
        scale = self.draw(st.sampled_from([1.0, 0.5, -2.0])) if rho == "softmax" else 1.0
        return {"weight": weight, "bias": bias, "rho": rho, "scale": scale}

    def value(self) -> Any:
        return self.floats(self.M, self.C, dtype=self.value_dtype)

    def similarities(self, dtype: str) -> Any:
        return self.floats(self.N, self.k, dtype="float64" if dtype == "float64" else "float32")

    def neighbors(self, dtype: str) -> dict[str, Any]:
        similarities = self.similarities(dtype)
        if self.M == 0:  # then all are missing
            similarities["tensor"] |= {"fill": "missing"}
        return {"similarities": similarities, "indices": self.ints(self.N, self.k)}

    def outputs(self, weight: Any) -> int:
        return self.C if weight is None else weight["tensor"]["shape"][0]

    def needs(self, *names: str) -> dict[str, bool]:
        return {f"need_{name}": self.draw(st.booleans()) for name in names}


def _select(draw: Draw) -> dict[str, Any]:
    sizes = _Sizes(draw)
    query, key = sizes.floats(sizes.N, sizes.D), sizes.floats(sizes.M, sizes.D)
    return {"query": query, "key": key, "k": sizes.k, **sizes.restrictions()}


def _select_neighbors(draw: Draw) -> dict[str, Any]:
    arguments = _select(draw)
    if arguments["metric"] == "euclidean":
        arguments["within"] = draw(st.sampled_from([None, 1.5, 0.0, 10**30]))
    return arguments


def _forward(draw: Draw) -> dict[str, Any]:
    sizes = _Sizes(draw)
    query, key = sizes.floats(sizes.N, sizes.D), sizes.floats(sizes.M, sizes.D)
    arguments = {"query": query, "key": key, "value": sizes.value(), "k": sizes.k}
    return arguments | sizes.restrictions() | sizes.convolution()


def _aggregate(draw: Draw) -> dict[str, Any]:
    sizes = _Sizes(draw)
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return {"value": sizes.value(), **sizes.neighbors(dtype), **sizes.convolution()}


def _select_backward(draw: Draw) -> dict[str, Any]:
    sizes = _Sizes(draw)
    return {
        "grad_similarities": sizes.similarities(sizes.dtype),
        "query": sizes.floats(sizes.N, sizes.D),
        "key": sizes.floats(sizes.M, sizes.D),
        **sizes.neighbors(sizes.dtype),
        "metric": sizes.metric(),
        **sizes.needs("query", "key"),
    }


def _aggregate_backward(draw: Draw) -> dict[str, Any]:
    sizes = _Sizes(draw)
    convolution = sizes.convolution()
    has_bias = convolution.pop("bias") is not None
    outputs = sizes.outputs(convolution["weight"])
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return {
        "grad_output": sizes.floats(sizes.N, outputs, dtype=sizes.value_dtype),
        "value": sizes.value(),
        **sizes.neighbors(dtype),
        **convolution,
        "has_bias": has_bias,
        **sizes.needs("value", "similarities", "weight", "bias"),
    }


def _forward_backward(draw: Draw) -> dict[str, Any]:
    sizes = _Sizes(draw)
    convolution = sizes.convolution()
    has_bias = convolution.pop("bias") is not None
    outputs = sizes.outputs(convolution["weight"])
    return {
        "grad_output": sizes.floats(sizes.N, outputs, dtype=sizes.value_dtype),
        "grad_similarities": sizes.sometimes(lambda: sizes.similarities(sizes.dtype)),
        "query": sizes.floats(sizes.N, sizes.D),
        "key": sizes.floats(sizes.M, sizes.D),
        "value": sizes.value(),
        **sizes.neighbors(sizes.dtype),
        **convolution,
        "has_bias": has_bias,
        "metric": sizes.metric(),
        **sizes.needs("query", "key", "value", "weight", "bias"),
        "candidates": None,
    }


def _edge_index(draw: Draw) -> dict[str, Any]:
    sizes = _Sizes(draw)
    # By default there are as many keys as queries.
    num_keys = draw(st.sampled_from([sizes.M, None] if sizes.M <= sizes.N else [sizes.M]))
    return {**sizes.neighbors("float32"), "num_keys": num_keys}


def _window_ranges(draw: Draw) -> dict[str, Any]:
    rows = st.sampled_from([3, 0, 17])
    return {
        "N": draw(rows),
        "M": draw(rows),
        "window": draw(st.sampled_from([None, 2, 1])),
        "causal": draw(st.booleans()),
    }


def _segment_ranges(draw: Draw) -> dict[str, Any]:
    sizes = _Sizes(draw)
    lengths = {"tensor": {"shape": [sizes.N], "dtype": "int64", "fill": "rows", "rows": 5}}
    each = draw(st.sampled_from([lengths, {"object": "list"}]))
    return {
        "lengths": each,
        "key_lengths": draw(st.sampled_from([None, each])),
        "window": draw(st.sampled_from([None, 2, 1])),
        "causal": draw(st.booleans()),
    }


_VALID: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "forward": _forward,
    "select": _select,
    "aggregate": _aggregate,
    "forward_backward": _forward_backward,
    "select_backward": _select_backward,
    "aggregate_backward": _aggregate_backward,
    "functional.convnn": _forward,
    "functional.select_neighbors": _select_neighbors,
    "functional.aggregate_neighbors": _aggregate,
    "functional.edge_index": _edge_index,
    "functional.window_ranges": _window_ranges,
    "functional.segment_ranges": _segment_ranges,
}
