# SPDX-License-Identifier: MIT
"""The default of every argument of the public functions and modules, written out.

A default is part of what saved code means: it must not change by accident.
"""

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

import convnn_kernels
from convnn_kernels import distributed, functional, nn, schemas

CONVOLUTION = {"weight": None, "bias": None, "rho": "softmax", "scale": 1.0}
SELECTION = {
    "candidates": None,
    "self_indices": None,
    "key_mask": None,
    "metric": "cosine",
    "order": "similarity",
    "key_range": None,
    "exclude_self": False,
}
LAYER = {
    "k": 9,
    "padding": 0,
    "stride": 1,
    "projections": "learned",
    "key_channels": None,
    "value_channels": None,
    "projection_bias": False,
    "rho": "softmax",
    "metric": "cosine",
    "scale": 1.0,
    "order": "similarity",
    "aggregation": "dense",
    "bias": True,
    "positional_encoding": None,
    "coordinates": "unit",
    "coordinate_order": "yx",
    "standardize": False,
    "candidates": None,
    "causal": False,
    "device": None,
    "dtype": None,
}
SELF = {"self_similarity": None, "exclude_self": False}
RANGES = {"window": None, "causal": False, "device": None}

DEFAULTS: dict[ModuleType, dict[str, dict[str, Any]]] = {
    convnn_kernels: {"backend": {}, "warmup": {}},
    functional: {
        "convnn": CONVOLUTION | SELECTION,
        "select_neighbors": SELECTION | {"within": None},
        "aggregate_neighbors": CONVOLUTION,
        "edge_index": {"num_keys": None},
        "segment_ranges": {"key_lengths": None} | RANGES,
        "window_ranges": {"M": None} | RANGES,
        "warmup": {},
    },
    distributed: {
        "convnn": CONVOLUTION | SELECTION | {"group": None},
        "select_neighbors": SELECTION | {"group": None},
        "aggregate_neighbors": CONVOLUTION | {"group": None},
        "register_sharding": {},
    },
    nn: {
        "ConvNN1d": LAYER,
        "ConvNN2d": LAYER,
        "ConvNNAttention": {
            "num_heads": 1,
            "k": 9,
            "dropout": 0.0,
            "projections": "learned",
            "projection_bias": False,
            "output_projection": True,
            "query_norm": None,
            "key_norm": None,
            "rho": "softmax",
            "metric": "cosine",
            "scale": None,
            "order": "similarity",
            "aggregation": "depthwise",
            "bias": False,
            "positional_encoding": None,
            "coordinates": "unit",
            "candidates": None,
            "window": None,
            "causal": False,
            "device": None,
            "dtype": None,
        },
        "HybridBranch2d": {
            "kernel_size": 3,
            "branch_ratio": 0.5,
            "k": None,
            "padding": None,
            "stride": 1,
            "bias": True,
            "projections": "identity",
            "rho": "ones",
            "metric": "cosine",
            "scale": 1.0,
            "order": "similarity",
            "aggregation": "dense",
            "positional_encoding": None,
            "coordinates": "unit",
            "coordinate_order": "yx",
            "standardize": False,
            "candidates": None,
            "device": None,
            "dtype": None,
        },
        "Candidates": SELF,
        "AllCandidates": {"include_self": False} | SELF,
        "RandomCandidates": {"include_self": True, "fixed_in_eval": False} | SELF,
        "SpatialCandidates": {"r": None, "stride": None, "include_self": True, "spacing": "even"}
        | SELF,
        "replace": {
            "conv2d": None,
            "attention": None,
            "k": None,
            "branch_ratio": 0.5,
            "candidates": None,
        },
    },
}
WITHOUT_DEFAULTS = {"Metric", "Order", "Rho", "Replaced", "__version__", "functional", "nn"}


def same(default: Any, expected: Any) -> bool:
    """Also of the same type: True is not 1, nor 1 the same as 1.0."""
    return type(default) is type(expected) and default == expected


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, each in DEFAULTS.items() for name in each],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_defaults(module: ModuleType, name: str) -> None:
    parameters = inspect.signature(getattr(module, name)).parameters
    defaults = {
        key: each.default
        for key, each in parameters.items()
        if each.default is not inspect.Parameter.empty
    }
    expected = DEFAULTS[module][name]
    assert defaults.keys() == expected.keys()
    assert {key for key in expected if not same(defaults[key], expected[key])} == set()


@pytest.mark.parametrize("module", DEFAULTS, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_table(module: ModuleType) -> None:
    assert set(module.__all__) - WITHOUT_DEFAULTS == set(DEFAULTS[module])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("forward", CONVOLUTION | SELECTION), ("select", SELECTION), ("aggregate", CONVOLUTION)],
)
def test_defaults_of_the_operators(name: str, expected: dict[str, Any]) -> None:
    defaults = schemas.arguments(f"convnn::{name}")._field_defaults
    assert defaults.keys() == expected.keys()
    assert {key for key in expected if not same(defaults[key], expected[key])} == set()


def test_defaults_of_modules_pickled_before_a_setting_existed() -> None:
    assert nn.Candidates.self_similarity is None
    assert nn.Candidates.exclude_self is False
    assert nn.SpatialCandidates.spacing == "even"


def test_what_the_layers_do_by_default() -> None:
    """Layers without candidates choose among all tokens, and not the token itself in any case."""
    for layer in (nn.ConvNN1d(2, 2), nn.ConvNN2d(2, 2), nn.ConvNNAttention(2)):
        candidates = layer.candidates
        assert isinstance(candidates, nn.AllCandidates)
        assert candidates.include_self is False
        assert candidates((4,), 0, torch.device("cpu")) is None
