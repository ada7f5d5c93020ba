# SPDX-License-Identifier: MIT
"""The study that a CPU can train: Tables 1 and 2 and the sweeps of Figures 4, 5, 7 and 8, reduced.

Every point is a row with a reduced model, trained with several seeds. Swept values are those that
reduced models have room for: VGG-11 has maps of 32x32 to 2x2 pixels, ViT-Tiny 65 tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.paper import rows
from benchmarks.paper.rows import ROWS, Figure, Row, Sweep
from benchmarks.paper.train import Recipe

SEEDS = (0, 1, 2)

_RECIPE = Recipe(
    epochs=4,
    batch_size=50,
    lr=1e-3,
    schedule="cosine",
    reduced=True,
    train_limit=1500,
    test_limit=1000,
)
# The same for all rows of a family, so none has the learning rate that suits it best.
RECIPES = {"vgg11": _RECIPE, "vit": dataclasses.replace(_RECIPE, lr=2e-3)}

# In so few steps, VGG-11 with an eighth of its channels learns nothing under a dropout of 0.5.
OPTIONS: dict[str, dict[str, Any]] = {"vgg11": {"dropout": 0.0}, "vit": {}}

# The 1x1 fusion of a hybrid layer after a convolution with all channels: what ConvNN adds to that.
_FUSED = Row("vgg11/hybrid-0", "λ = 0", {"layer": "hybrid", "branch_ratio": 0.0})

# What the other rows of the family are compared with.
BASELINES = {"vgg11": (ROWS["vgg11/conv2d"], _FUSED), "vit": (ROWS["vit/attention"],)}

TABLES = {
    1: (*BASELINES["vgg11"], *rows.TABLES[1][1:]),
    2: rows.TABLES[2],
}

_KERNELS = (1, 2, 3)
_VGG_K = (1, 4, 9, 12)
_VGG_R = tuple(n**2 for n in (4, 8, 12, 16, 24, 32))
_VIT_K = (4, 9, 16, 25, 36)
_VIT_R = (9, 16, 32, 48, 64)


def _sweeps_of_candidates(family: str, counts: tuple[int, ...], everything: str) -> list[Sweep]:
    """Random and spatial candidates, beside a row with all of them and the baseline."""
    baseline = BASELINES[family][0]
    return [
        *(
            Sweep(f"{kind} candidates", {r: rows.among(family, kind, r) for r in counts})
            for kind in ("random", "spatial")
        ),
        Sweep("all candidates", {0: ROWS[everything]}),
        Sweep(baseline.label, {0: baseline}),
    ]


FIGURES = {
    4: Figure(
        "VGG-11, λ = 0.5, by the size of the kernel",
        variable="k",
        sweeps=(
            *(
                Sweep(f"hybrid, {size}×{size}", {k: rows.hybrid(size, k) for k in _VGG_K})
                for size in _KERNELS
            ),
            *(Sweep(f"Conv2D, {size}×{size}", {0: rows.convolution(size)}) for size in _KERNELS),
        ),
    ),
    5: Figure(
        "VGG-11, λ = 0.5",
        variable="r",
        sweeps=tuple(_sweeps_of_candidates("vgg11", _VGG_R, "vgg11/hybrid-0.5")),
        has_time=True,
    ),
    7: Figure(
        "ViT-Tiny",
        variable="k",
        sweeps=(
            Sweep("ConvNN, all", {k: rows.vit_k("convnn", k) for k in _VIT_K}),
            Sweep(
                "ConvNN, random, r = 32",
                {k: rows.vit_random_k(k) for k in _VIT_K if k <= 32},
            ),
            Sweep("KVT", {k: rows.vit_k("kvt", k) for k in _VIT_K}),
            Sweep("Attention", {0: ROWS["vit/attention"]}),
        ),
    ),
    8: Figure(
        "ViT-Tiny",
        variable="r",
        sweeps=tuple(_sweeps_of_candidates("vit", _VIT_R, "vit/convnn-all")),
        has_time=True,
    ),
}


def _points() -> dict[str, Row]:
    found = [row for table in TABLES.values() for row in table]
    found += [row for figure in FIGURES.values() for row in figure.all_rows()]
    return {
        row.name: dataclasses.replace(row, options={**row.options, **OPTIONS[row.family]})
        for row in found
    }


# What is trained, by name: the rows of the tables, and then those that only figures have.
POINTS = _points()

# The points whose steps are timed.
TIMED = tuple(
    dict.fromkeys(
        row.name for figure in FIGURES.values() if figure.has_time for row in figure.all_rows()
    )
)
