# SPDX-License-Identifier: MIT
"""Wrong calls of the layers and of their constructors: each argument, in each way."""

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import wrong_calls
from torch import Tensor, nn
from wrong_calls import FLOATING, SIZES, Argument, Wrong

import convnn_kernels.nn as cnn

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")
FLOATS = "be float64, float32, float16 or bfloat16$"
CHOICES = {
    "projections": ("identity", "learned", "value", "coordinates"),
    "projections of attention": ("identity", "learned", "value"),
    "rho": ("softmax", "ones", "similarity"),
    "metric": ("cosine", "dot", "euclidean"),
    "order": ("similarity", "index"),
    "aggregation": ("dense", "depthwise", "sum"),
    "positional_encoding": (None, "similarity", "aggregation", "both"),
    "coordinates": ("unit", "pixel"),
    "coordinate_order": ("yx", "xy"),
    "spacing": ("even", "ends"),
}
# What the parameters of constructors must be. A "?" says that None is allowed as well.
COMMON = {
    **{name: "choice" for name in CHOICES if name not in ("spacing", "projections of attention")},
    **{"scale": "number", "candidates": "candidates?", "bias": "flag"},
    **{"device": "device?", "dtype": "dtype?"},
}
MAP = COMMON | {
    **{"in_channels": "count", "out_channels": "count", "stride": "count"},
    **{"standardize": "flag"},
}
CONVNN = MAP | {
    **{"k": "count", "padding": "size", "key_channels": "count?", "value_channels": "count?"},
    **{"projection_bias": "flag", "causal": "flag"},
}
CANDIDATES = {"include_self": "flag", "exclude_self": "flag", "self_similarity": "number?"}
CONSTRUCTORS: dict[str, dict[str, str]] = {
    "ConvNN1d": CONVNN,
    "ConvNN2d": CONVNN,
    "HybridBranch2d": MAP
    | {"kernel_size": "count", "branch_ratio": "share", "k": "count?", "padding": "size?"},
    "ConvNNAttention": {name: kind for name, kind in COMMON.items() if name != "coordinate_order"}
    | {"embed_dim": "count", "num_heads": "count", "k": "count", "window": "count?"}
    | {"scale": "number?", "dropout": "share", "causal": "flag"}
    | {"projection_bias": "flag", "output_projection": "flag"}
    | {"query_norm": "norm?", "key_norm": "norm?"},
    "AllCandidates": CANDIDATES,
    "RandomCandidates": CANDIDATES | {"r": "count", "fixed_in_eval": "flag"},
    "SpatialCandidates": CANDIDATES | {"r": "count?", "stride": "none", "spacing": "choice"},
}
VALID: dict[str, dict[str, Any]] = {
    "ConvNN1d": {"in_channels": 4, "out_channels": 7, "k": 3},
    "ConvNN2d": {"in_channels": 4, "out_channels": 7, "k": 3},
    "HybridBranch2d": {"in_channels": 4, "out_channels": 7},
    "ConvNNAttention": {"embed_dim": 8, "num_heads": 2, "k": 3},
    "AllCandidates": {},
    "RandomCandidates": {"r": 4},
    "SpatialCandidates": {"r": 4},
}


def shown(value: Any) -> str:
    """How a message shows a value of a wrong type."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of shape {list(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 10000:
        return f"a number of {value.bit_length()} bits"
    # An address, or what fills the screen.
    long = isinstance(value, Plain | nn.Sequential | wrong_calls.Odd)
    return type(value).__name__ if long else repr(value)


class Plain:
    """An object whose representation is its address."""


NEVER = [
    *(b"1", [1], {}, (1, 2), 1j, "x" * 50, object, Plain(), nn.Sequential(nn.ReLU())),
    *(torch.ones(2, 3), np.ones(3)),
]
HUGE = 10**5000  # Python refuses to print it
# Wrong values of each kind, and what was expected of it.
NUMBERS = [math.nan, math.inf, -math.inf, 10**400, HUGE, "1", True, torch.tensor(1.0)]
KINDS: dict[str, tuple[str, list[Any]]] = {
    "count": ("be a whole number of at least 1$", [0, -1, 2.5, 3.0, "3", True, np.float32(3)]),
    "size": ("be a whole number of at least 0$", [-1, 0.5, "same", True]),
    "flag": ("be True or False$", [1, 0, 1.0, "yes", "", HUGE]),
    "number": (r"be a (finite )?number\b", NUMBERS),
    "share": ("be between 0 and 1$", [-0.1, 1.5, math.nan, "0.5", True, HUGE]),
    "candidates": ("AllCandidates, RandomCandidates or SpatialCandidates$", [4, "all", nn.ReLU()]),
    "norm": ("be a module or None$", [3, "rms", 2.5]),
    "dtype": (FLOATS, ["float32", 3, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2]),
    "none": ("be None where r is given$", [0, 2.5, "3", True]),
    "device": ("be a device$", ["nowhere", "cpu:x", 2.5]),
}


def wrong_values(layer: str, name: str, kind: str) -> Iterator[Wrong]:
    is_optional, kind = kind.endswith("?"), kind.removesuffix("?")
    if kind == "choice":
        is_attention = layer == "ConvNNAttention" and name == "projections"
        choices = CHOICES[f"{name} of attention" if is_attention else name]
        *most, last = [repr(each) for each in choices]
        expected = f"be {', '.join(most)} or {last}$"
        values = ["", "unknown", "Dot", 3, True]
        is_optional = None in choices
    else:
        expected, values = KINDS[kind]
    never = [X for X in NEVER if kind != "norm" or not isinstance(X, nn.Module)]
    for value in [*values, *never, *([] if is_optional or kind == "none" else [None])]:
        yield Wrong(name, "value", {name: value}, expected, shown(value), error=ValueError)


# How many wrong settings there are of each.
SETTINGS = {
    **{"ConvNN1d": 400, "ConvNN2d": 400, "HybridBranch2d": 363, "ConvNNAttention": 373},
    **{"AllCandidates": 55, "RandomCandidates": 92, "SpatialCandidates": 105},
}


@pytest.mark.parametrize("layer", CONSTRUCTORS)
def test_wrong_settings(layer: str) -> None:
    make, parameters = getattr(cnn, layer), CONSTRUCTORS[layer]
    assert set(inspect.signature(make).parameters) == set(parameters)
    faults, calls = [], 0
    for name, kind in parameters.items():
        for wrong in wrong_values(layer, name, kind):
            error = wrong_calls.error_of(make, **VALID[layer] | wrong.changes)
            calls += 1
            if found := wrong_calls.fault(wrong, error, (layer,), wrong.changes):
                faults.append(f"{wrong}: {found}")
    assert calls == SETTINGS[layer]
    assert not faults, wrong_calls.summary(faults, calls)


# Settings that are wrong together: those of the second are named.
TOGETHER: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *(
        row
        for layer in ("ConvNN1d", "ConvNN2d")
        for row in (
            (layer, {"projections": "identity"}, {"key_channels": 3}, "None where nothing is"),
            (layer, {"projections": "value"}, {"key_channels": 3}, "None where nothing is"),
            (layer, {"projections": "identity"}, {"value_channels": 3}, "None where nothing is"),
            (layer, {"projections": "identity"}, {"projection_bias": True}, "False where nothing"),
            (layer, {"rho": "ones"}, {"projections": "learned"}, "other than learned with rho='on"),
            (layer, {"aggregation": "sum"}, {"out_channels": 5}, "the 4 channels of the values"),
            (layer, {"aggregation": "depthwise"}, {"out_channels": 3}, "the 4 channels"),
            (layer, {"projections": "coordinates"}, {"positional_encoding": None}, "'similarity'"),
            (layer, {"standardize": True}, {"positional_encoding": "aggregation"}, "'similarity'"),
            (
                layer,
                {"causal": True, "positional_encoding": "both"},
                {"standardize": True},
                "False with causal=True",
            ),
            (
                layer,
                {"projections": "coordinates", "positional_encoding": "both"},
                {"standardize": True},
                "False with projections='coordinates'",
            ),
            (layer, {"rho": "similarity"}, {"scale": 0.5}, "1.0 unless rho is 'softmax'"),
        )
    ),
    ("HybridBranch2d", {"stride": 2}, {"kernel_size": 4}, "odd with a stride"),
    ("HybridBranch2d", {"rho": "ones"}, {"scale": 2.0}, "1.0 unless rho is 'softmax'"),
    ("HybridBranch2d", {}, {"projections": "learned"}, "other than learned with rho='ones'"),
    ("ConvNNAttention", {}, {"num_heads": 3}, "a divisor of the width 8"),
    ("ConvNNAttention", {"rho": "ones"}, {"projections": "learned"}, "other than learned"),
    ("ConvNNAttention", {"rho": "similarity"}, {"scale": 0.5}, "1.0 unless rho is 'softmax'"),
    (
        "ConvNNAttention",
        {"projections": "identity", "positional_encoding": "aggregation", "num_heads": 1},
        {"output_projection": False},
        "True where values are 9 wide and not 8",
    ),
    ("AllCandidates", {"exclude_self": True}, {"include_self": True}, "False with exclude_self="),
    ("RandomCandidates", {"include_self": False}, {"self_similarity": 2.5}, "None with include_"),
    ("SpatialCandidates", {"r": None}, {"stride": 0}, "a whole number of at least 1"),
    ("SpatialCandidates", {"r": None}, {"stride": 2.5}, "a whole number of at least 1"),
    ("SpatialCandidates", {"r": None, "stride": 2}, {"spacing": "ends"}, "'even' with a stride"),
]


def test_settings_that_do_not_go_together() -> None:
    faults = []
    for layer, others, changes, expected in TOGETHER:
        ((name, value),) = changes.items()
        wrong = Wrong(name, "value", changes, re.escape(expected), shown(value), error=ValueError)
        error = wrong_calls.error_of(getattr(cnn, layer), **VALID[layer] | others | changes)
        if found := wrong_calls.fault(wrong, error, (layer,), changes):
            faults.append(f"{layer}, {others}, {wrong}: {found}")
    assert not faults, "\n".join(faults)


CONVOLUTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("groups", {"groups": 2}, "1, or 4 with the same number of output channels"),
    ("stride", {"stride": (1, 2)}, "the same along both axes"),
    ("dilation", {"dilation": 2, "padding": 2}, "1"),
    ("padding", {"padding": 0}, "1, half the kernel"),
    ("padding_mode", {"padding_mode": "reflect"}, "'zeros'"),
    ("kernel_size", {"kernel_size": 2}, "odd"),
    ("kernel_size", {"kernel_size": 7, "padding": 3}, "1x1, 3x3 or 5x5"),
]


def test_convolutions_that_are_no_layer() -> None:
    faults = []
    for dims, make in ((1, cnn.ConvNN1d.from_conv1d), (2, cnn.ConvNN2d.from_conv2d)):
        owner, kind = f"from_conv{dims}d", (nn.Conv1d, nn.Conv2d)[dims - 1]
        for name, changes, expected in CONVOLUTIONS:
            if dims == 1 and (name == "stride" or "7" in str(changes)):
                continue
            options = {"kernel_size": 3, "padding": 1} | changes
            conv = kind(4, 6, **options)
            got = repr(getattr(conv, name))
            # Of a map, even kernels are none of those listed.
            said = "1x1, 3x3 or 5x5" if dims == 2 and expected == "odd" else expected
            wrong = Wrong(name, "value", {name: got}, re.escape(said), got, error=ValueError)
            if found := wrong_calls.fault(wrong, wrong_calls.error_of(make, conv), (owner,), {}):
                faults.append(f"{owner}, {changes}: {found}")
        for conv in (nn.Linear(4, 6), nn.ConvTranspose1d(4, 6, 3), None, "conv", 3):
            expected = f"be an nn.Conv{dims}d and not of a subclass$"
            got = type(conv).__name__
            wrong = Wrong("conv", "type", {"conv": conv}, expected, got, error=ValueError)
            if found := wrong_calls.fault(wrong, wrong_calls.error_of(make, conv), (owner,), {}):
                faults.append(f"{owner}, {got}: {found}")
    assert not faults, "\n".join(faults)


def _input(name: str, shape: str, dtypes: Any = FLOATING, **options: Any) -> Argument:
    return Argument(name, "tensor", tuple(shape), dtypes, has_fixed_dims=True, **options)


SEQUENCE, MAP_INPUT = (_input("input", "BIL"),), (_input("input", "BIHW"),)
TOKENS = (
    *(_input("query", "BNE"), _input("key", "BME"), _input("value", "BME")),
    _input("key_mask", "BM", (torch.bool,)),
    _input("key_range", "BN2", (torch.int64,), is_shared=True),
)
I, E = SIZES["I"], SIZES["E"]
ATTENTION = {"embed_dim": E, "num_heads": 2, "k": 3}
LAYERS: dict[str, tuple[nn.Module, tuple[Argument, ...]]] = {
    "1d": (cnn.ConvNN1d(I, 7, k=3), SEQUENCE),
    "1d, no projections": (cnn.ConvNN1d(I, 7, k=3, projections="identity"), SEQUENCE),
    "2d": (cnn.ConvNN2d(I, 7, k=3, padding=1, positional_encoding="both"), MAP_INPUT),
    "2d, by position": (
        cnn.ConvNN2d(I, 7, projections="coordinates", positional_encoding="similarity"),
        MAP_INPUT,
    ),
    "hybrid": (cnn.HybridBranch2d(I, 6), MAP_INPUT),
    "hybrid, one branch": (cnn.HybridBranch2d(I, 6, branch_ratio=1.0), MAP_INPUT),
    "attention": (cnn.ConvNNAttention(**ATTENTION), TOKENS),
    "attention, causal": (
        cnn.ConvNNAttention(
            **ATTENTION, projections="value", positional_encoding="aggregation", causal=True
        ),
        TOKENS,
    ),
}


WAYS = ("none", "type", "dims", "size", "dtype", "other float", "device")
# How many wrong calls there are in each of them, by dimensions of the first input, and inputs.
CALLS = {
    (3, 1): (1, 14, 4, 3, 21, 3, 1),
    (4, 1): (1, 14, 5, 3, 21, 3, 1),
    (3, 5): (1, 70, 17, 48, 111, 9, 5),
}


def wrong_inputs(
    arguments: tuple[Argument, ...], way: str, device: str, other: str
) -> Iterator[Wrong]:
    if way in ("none", "dims", "size", "dtype"):
        for wrong in wrong_calls.wrong_calls(arguments, way):
            new = wrong.changes[wrong.argument]
            is_default = way == "none" and wrong.argument != arguments[0].name
            # Three dimensions, and four with heads, are right.
            is_other_size = way == "dims" and wrong.argument == "key_range" and new.dim() == 4
            if not (is_default or is_other_size):
                yield dataclasses.replace(wrong, error=ValueError)
        return
    tensors = wrong_calls.valid(arguments)
    for name, tensor in tensors.items():
        if way == "type":
            for _, value in wrong_calls.WRONG_TYPES["tensor"]:
                yield Wrong(
                    name, way, {name: value}, "be a tensor$", shown(value), error=ValueError
                )
        elif way == "device":
            expected = rf"^be on {device} as (the parameters are|query is)$"
            yield Wrong(name, way, {}, expected, other)
        elif tensor.is_floating_point():
            for dtype in set(FLOATING) - {torch.float32}:
                expected, got = (
                    "^be float32 as the parameters are$",
                    str(dtype).removeprefix("torch."),
                )
                yield Wrong(name, way, {name: tensor.to(dtype)}, expected, got)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_wrong_inputs(layer: str, way: str, one_thread: None) -> None:
    module, arguments = LAYERS[layer]
    owner = type(module).__name__
    owners = (owner, "convnn::forward") if way == "device" else (owner,)
    faults, calls = [], 0
    for device, other in (("cpu", "meta"), ("meta", "cpu")):
        placed = copy.deepcopy(module).to(device)
        for wrong in wrong_inputs(arguments, way, device, other):
            args = wrong_calls.valid(arguments) | wrong.changes
            for name, X in args.items():
                is_elsewhere = way == "device" and name == wrong.argument
                if isinstance(X, Tensor):
                    args[name] = X.to(other if is_elsewhere else device)
            calls += 1
            error = wrong_calls.error_of(placed, *args.values())
            if found := wrong_calls.fault(wrong, error, owners, args):
                faults.append(f"{device}: {wrong}: {found}")
    assert calls == 2 * CALLS[len(arguments[0].shape), len(arguments)][WAYS.index(way)]
    assert not faults, wrong_calls.summary(faults, calls)


def test_integers_of_a_quantized_layer_explain_no_error() -> None:
    layer = cnn.ConvNN1d(4, 7, k=3)
    packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    layer._parameters = {"packed": packed, **layer._parameters}

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    layer.query_projection.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        layer(torch.randn(2, 4, 9))
