# SPDX-License-Identifier: MIT
"""The models that can be trained: the rows of the paper's tables and the sweeps of its figures."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import vgg11, vit_tiny
from benchmarks.models.as_run import FlatRowCandidates, PaddedRandomCandidates
from benchmarks.models.vgg import CHANNELS
from convnn_kernels.nn import AllCandidates, RandomCandidates, SpatialCandidates

MODELS = {"vgg11": "VGG-11", "vit": "ViT-Tiny"}

# Small models, of which an epoch takes seconds on a CPU.
REDUCED: dict[str, dict[str, Any]] = {
    "vgg11": {
        "channels": tuple(c if isinstance(c, str) else c // 8 for c in CHANNELS),
        "hidden": 128,
    },
    "vit": {"image_size": 32, "patch_size": 4, "embed_dim": 48, "mlp_dim": 192, "depth": 4},
}


@dataclass(frozen=True)
class Paper:
    """The numbers in the paper; loss and accuracy (in %) by dataset."""

    loss: dict[str, float]
    accuracy: dict[str, float]
    gflops: float
    parameters: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One model, as the paper's text describes it.

    Attributes:
        name: "vgg11/..." or "vit/...".
        label: for tables and figures.
        options: passed to the factory of the model.
        paper: the numbers in the paper.
        changes: the options that the authors' run had otherwise; see docs/paper.md.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    paper: Paper | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    def as_run(self) -> Row:
        """The row as the authors ran it."""
        return replace(self, options={**self.options, **self.changes})

    def switches(self) -> list[str]:
        """`changes` as text, such as "metric='dot'"."""
        return [f"{name}={_described(value)}" for name, value in self.changes.items()]

    def build(self, num_classes: int, reduced: bool, **options: Any) -> nn.Module:
        """The model; `options` override those of the row."""
        options = {**(REDUCED[self.family] if reduced else {}), **self.options, **options}
        if self.family == "vgg11":
            return vgg11(num_classes, **options)
        return vit_tiny(num_classes, **options)

    def image_size(self, reduced: bool) -> int:
        return 32 if self.family == "vgg11" or reduced else 224

    def parameters(self, num_classes: int, reduced: bool) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(num_classes, reduced).parameters())

    def gflops(self, num_classes: int, reduced: bool) -> float:
        """Of one forward pass on one image. A multiply-add counts as two, as in the paper."""
        size = self.image_size(reduced)
        with torch.device("meta"):
            model = self.build(num_classes, reduced).eval()
            image = torch.empty(1, 3, size, size)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(image)
        return counter.get_total_flops() / 1e9


def _described(value: Any) -> str:
    if not isinstance(value, functools.partial):
        return repr(value)
    named = (f"{name}={each!r}" for name, each in value.keywords.items())
    return f"{value.func.__name__}({', '.join([*map(repr, value.args), *named])})"


def _paper(
    loss: tuple[float, float],
    accuracy: tuple[float, float],
    gflops: float,
    parameters: tuple[str, str],
) -> Paper:
    def by_dataset(values: tuple[Any, Any]) -> dict[str, Any]:
        return dict(zip(("cifar10", "cifar100"), values, strict=True))

    return Paper(by_dataset(loss), by_dataset(accuracy), gflops, by_dataset(parameters))


_VGG_PARAMETERS = ("130.015M", "130.384M")
_VIT_PARAMETERS = ("5.479M", "5.496M")
_CONVNN_PARAMETERS = ("5.500M", "5.517M")

# λ: loss and accuracy on CIFAR-10 and CIFAR-100. λ = 1 is the row "ConvNN".
_WITHOUT_POSITIONS = {
    0.125: ((1.393, 3.905), (81.10, 45.08)),
    0.25: ((1.467, 3.518), (81.21, 47.87)),
    0.375: ((1.422, 3.578), (80.95, 48.34)),
    0.5: ((1.424, 3.474), (81.26, 48.37)),
    0.625: ((1.403, 3.281), (80.79, 49.74)),
    0.75: ((1.479, 3.516), (79.58, 46.93)),
    0.875: ((1.332, 3.906), (78.18, 45.72)),
    1.0: ((2.694, 5.011), (54.00, 29.50)),
}
_WITH_POSITIONS = {
    0.125: ((1.420, 3.665), (80.97, 47.73)),
    0.25: ((1.447, 3.702), (80.91, 47.65)),
    0.375: ((1.386, 3.696), (82.08, 48.39)),
    0.5: ((1.213, 3.588), (81.77, 48.80)),
    0.625: ((1.341, 3.323), (80.81, 49.23)),
    0.75: ((1.283, 3.533), (80.26, 48.78)),
    0.875: ((1.225, 3.539), (78.70, 46.26)),
    1.0: ((2.388, 4.586), (57.15, 32.33)),
}


_SELF_FIRST = {"candidates": functools.partial(AllCandidates, include_self=True)}


def _hybrid(ratio: float, has_positions: bool) -> Row:
    loss, accuracy = (_WITH_POSITIONS if has_positions else _WITHOUT_POSITIONS)[ratio]
    gflops = 0.331 if has_positions else 0.325
    name, label = f"vgg11/hybrid-{ratio:g}", f"λ = {ratio:g}"
    options: dict[str, Any] = {"layer": "hybrid", "branch_ratio": ratio}
    changes: dict[str, Any] = dict(_SELF_FIRST)
    if has_positions:
        name, label = name + "-positions", label + ", positions"
        options["positional_encoding"] = "similarity"
        changes |= {"standardize": True, "coordinate_order": "xy"}
    return Row(name, label, options, _paper(loss, accuracy, gflops, _VGG_PARAMETERS), changes)


# A 1×1 fusion follows each convolution.
_WITHOUT_CONVNN = {"layer": "hybrid", "branch_ratio": 0.0}

_CONV2D = Row(
    "vgg11/conv2d",
    "Conv2D",
    {"layer": "conv2d"},
    _paper((1.529, 3.939), (80.65, 44.83), 0.293, _VGG_PARAMETERS),
    _WITHOUT_CONVNN,
)

TABLE_1 = (
    _CONV2D,
    *(_hybrid(ratio, False) for ratio in _WITHOUT_POSITIONS),
    *(_hybrid(ratio, True) for ratio in _WITH_POSITIONS),
)

# Of all rows of ViT.
_BLOCKS = {"residual_dropout": 0.1, "class_token_deviation": 1.0}
_AMONG_CANDIDATES = {"layer": "convnn-candidates", **_BLOCKS}
_TO_BOTH_ENDS = functools.partial(SpatialCandidates, spacing="ends")

TABLE_2 = (
    Row(
        "vit/attention",
        "Attention",
        {"layer": "attention"},
        _paper((1.558, 3.817), (77.41, 50.07), 2.507, _VIT_PARAMETERS),
        _BLOCKS,
    ),
    Row(
        "vit/local",
        "Local attention",
        {"layer": "local"},
        _paper((1.626, 3.688), (76.51, 49.73), 1.991, ("4.299M", "4.317M")),
        {"layer": "local-rotary", **_BLOCKS},
    ),
    Row(
        "vit/kvt-9",
        "KVT, k = 9",
        {"layer": "kvt", "k": 9},
        _paper((1.775, 3.883), (75.77, 48.21), 2.508, _VIT_PARAMETERS),
        {"layer": "kvt-weights", **_BLOCKS},
    ),
    Row(
        "vit/kvt-100",
        "KVT, k = 100",
        {"layer": "kvt", "k": 100},
        _paper((1.593, 3.738), (76.41, 50.34), 2.508, _VIT_PARAMETERS),
        {"layer": "kvt-weights", **_BLOCKS},
    ),
    Row(
        "vit/sparse",
        "Sparse attention",
        {"layer": "sparse"},
        _paper((2.026, 4.565), (72.50, 44.62), 2.509, _VIT_PARAMETERS),
        {"layer": "band", "window": 49, **_BLOCKS},
    ),
    Row(
        "vit/convnn-all",
        "ConvNN, all",
        {"layer": "convnn"},
        _paper((1.978, 3.983), (73.67, 48.67), 2.333, _CONVNN_PARAMETERS),
        {"metric": "dot", **_BLOCKS},
    ),
    Row(
        "vit/convnn-random-32",
        "ConvNN, random, r = 32",
        {"layer": "convnn", "candidates": functools.partial(RandomCandidates, 32)},
        _paper((0.779, 2.341), (79.82, 53.60), 2.037, _CONVNN_PARAMETERS),
        _AMONG_CANDIDATES,
    ),
    Row(
        "vit/convnn-spatial-32",
        "ConvNN, spatial, r = 32",
        {"layer": "convnn", "candidates": functools.partial(SpatialCandidates, 32)},
        _paper((2.737, 5.020), (63.01, 38.22), 2.037, _CONVNN_PARAMETERS),
        {**_AMONG_CANDIDATES, "candidates": functools.partial(_TO_BOTH_ENDS, 32)},
    ),
)


@dataclass(frozen=True)
class Sweep:
    """A curve of a figure: rows by the swept value; a single one at 0 is a horizontal line."""

    label: str
    rows: dict[int, Row]


@dataclass(frozen=True)
class Figure:
    """Loss curves of `rows`, or sweeps over `variable`, with the run time if `has_time`."""

    title: str
    rows: tuple[Row, ...] = ()
    variable: str = ""
    sweeps: tuple[Sweep, ...] = ()
    has_time: bool = False

    def all_rows(self) -> list[Row]:
        swept = (row for sweep in self.sweeps for row in sweep.rows.values())
        return list({row.name: row for row in (*self.rows, *swept)}.values())


_KINDS = {"random": RandomCandidates, "spatial": SpatialCandidates}


def _sparse(family: str, kind: str, r: int, **options: Any) -> Row:
    """ConvNN with r candidates of one kind; in VGG-11, the hybrid layer."""
    layer = {"vgg11": {"layer": "hybrid"}, "vit": {"layer": "convnn"}}[family]
    suffix = "".join(f"-{name}{value}" for name, value in options.items())
    name = {"vgg11": f"vgg11/hybrid-0.5-{kind}-{r}", "vit": f"vit/convnn-{kind}-{r}{suffix}"}
    candidates = functools.partial(_KINDS[kind], r)
    changes: dict[str, Any] = {} if family == "vgg11" else dict(_AMONG_CANDIDATES)
    if family == "vgg11" and kind == "random":
        changes["candidates"] = functools.partial(PaddedRandomCandidates, r)
    elif family == "vgg11":
        changes["candidates"] = functools.partial(FlatRowCandidates, math.isqrt(r))
    elif kind == "spatial":
        changes["candidates"] = functools.partial(_TO_BOTH_ENDS, r)
    label = f"ConvNN, {kind}, r = {r}" + "".join(f", {n} = {value}" for n, value in options.items())
    options = {**layer, "candidates": candidates, **options}
    return Row(name[family], label, options, changes=changes)


def _named(name: str) -> Row:
    return next(row for row in (*TABLE_1, *TABLE_2) if row.name == name)


def convolution(size: int) -> Row:
    """VGG-11 with size×size convolutions alone."""
    if size == 3:
        return _CONV2D
    options = {"layer": "conv2d", "kernel_size": size}
    label = f"Conv2D, {size}×{size}"
    return Row(f"vgg11/conv2d-kernel{size}", label, options, changes=_WITHOUT_CONVNN)


def hybrid(size: int, k: int) -> Row:
    """VGG-11 with λ = 0.5, size×size convolutions and k neighbors."""
    if (size, k) == (3, 9):
        return _named("vgg11/hybrid-0.5")
    options = {"layer": "hybrid", "kernel_size": size, "k": k}
    label = f"λ = 0.5, {size}×{size}, k = {k}"
    return Row(f"vgg11/hybrid-0.5-kernel{size}-k{k}", label, options, changes=_SELF_FIRST)


def vit_k(layer: str, k: int) -> Row:
    """ViT-Tiny with "convnn" or "kvt" over all tokens, and k neighbors."""
    if k == 9:
        return _named({"kvt": "vit/kvt-9", "convnn": "vit/convnn-all"}[layer])
    changes = {"kvt": {"layer": "kvt-weights"}, "convnn": {"metric": "dot"}}[layer]
    label = {"kvt": "KVT", "convnn": "ConvNN, all"}[layer] + f", k = {k}"
    options = {"layer": layer, "k": k}
    return Row(f"vit/{layer}-k{k}", label, options, changes={**changes, **_BLOCKS})


def vit_random_k(k: int) -> Row:
    """ViT-Tiny with k neighbors among 32 random candidates."""
    return _named("vit/convnn-random-32") if k == 9 else _sparse("vit", "random", 32, k=k)


def among(family: str, kind: str, r: int) -> Row:
    """The row with r "random" or "spatial" candidates."""
    is_named = (family, r) == ("vit", 32)
    return _named(f"vit/convnn-{kind}-32") if is_named else _sparse(family, kind, r)


# The swept values are those of the authors' runs; the paper's text has only k = 9 and 100, and
# r = 16 and 32. Their figures leave out k = 1 of ViT, r = 32² of VGG-11 and r = 32 of ViT.
_KERNELS = (1, 2, 3)
_K = tuple(range(1, 13))
_VGG_R = tuple(side**2 for side in range(4, 33, 2))
_VIT_R = tuple(range(16, 193, 16))

FIGURES = {
    3: Figure(
        "VGG-11",
        (_CONV2D, _named("vgg11/hybrid-1"), _named("vgg11/hybrid-0.5")),
    ),
    4: Figure(
        "VGG-11, λ = 0.5",
        variable="k",
        sweeps=(
            *(Sweep(f"hybrid, {n}×{n}", {k: hybrid(n, k) for k in _K}) for n in _KERNELS),
            *(Sweep(f"Conv2D, {n}×{n}", {0: convolution(n)}) for n in _KERNELS),
        ),
    ),
    5: Figure(
        "VGG-11, λ = 0.5",
        variable="r",
        sweeps=(
            *(
                Sweep(f"{kind} candidates", {r: among("vgg11", kind, r) for r in _VGG_R})
                for kind in _KINDS
            ),
            Sweep("all candidates", {0: _named("vgg11/hybrid-0.5")}),
            Sweep("Conv2D", {0: _CONV2D}),
        ),
        has_time=True,
    ),
    6: Figure("ViT-Tiny", (_named("vit/attention"), _named("vit/convnn-random-32"))),
    7: Figure(
        "ViT-Tiny",
        variable="k",
        sweeps=(
            Sweep("ConvNN, all", {k: vit_k("convnn", k) for k in _K}),
            Sweep("ConvNN, random, r = 32", {k: vit_random_k(k) for k in _K}),
            Sweep("KVT", {k: vit_k("kvt", k) for k in _K}),
            Sweep("KVT, k = 100", {0: _named("vit/kvt-100")}),
            Sweep("Attention", {0: _named("vit/attention")}),
        ),
    ),
    8: Figure(
        "ViT-Tiny",
        variable="r",
        sweeps=(
            *(
                Sweep(f"{kind} candidates", {r: among("vit", kind, r) for r in _VIT_R})
                for kind in _KINDS
            ),
            Sweep("all candidates", {0: _named("vit/convnn-all")}),
            Sweep("Attention", {0: _named("vit/attention")}),
        ),
        has_time=True,
    ),
}

TABLES = {1: TABLE_1, 2: TABLE_2}

# A variant of VGG-11 that no table of the paper has: ConvNN2d without fusion.
_CONVNN2D = Row("vgg11/convnn", "ConvNN2d alone", {"layer": "convnn"}, changes=_SELF_FIRST)

ROWS = {
    row.name: row
    for row in (
        *TABLE_1,
        _CONVNN2D,
        *TABLE_2,
        *(r for f in FIGURES.values() for r in f.all_rows()),
    )
}
