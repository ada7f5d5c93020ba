# SPDX-License-Identifier: MIT
"""The plots of a result as PNG files: time and memory against N, and the neighbors of some pixels.

Markers, line styles and gray values tell curves apart without color.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

from . import report
from .peers import PEERS, TRAINING, run_pass
from .ratios import Row
from .workloads import Inputs, Workload, photograph, photograph_tokens

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}

# Where lines meet, smaller markers are drawn over larger ones.
_LINES: dict[str, dict[str, Any]] = {
    "convnn-all": {"color": "#000000", "marker": "o", "linestyle": "-", "markersize": 9},
    "convnn-random": {"color": "#3b7dd8", "marker": "s", "linestyle": "--", "markersize": 6},
    "convnn-spatial": {"color": "#0a2f6b", "marker": "+", "linestyle": ":", "markersize": 12},
    "eager": {"color": "#b04000", "marker": "^", "linestyle": "--"},
    "sdpa": {"color": "#606060", "marker": "v", "linestyle": "-."},
    "conv2d": {"color": "#909090", "marker": "x", "linestyle": ":", "markersize": 8},
}

# Photographs, and points (x, y) on them as fractions of the side.
_NEIGHBORS_OF: dict[str, tuple[tuple[float, float], ...]] = {
    "rocket": ((0.20, 0.52), (0.48, 0.29), (0.62, 0.91)),
    "coffee": ((0.13, 0.32), (0.60, 0.80), (0.46, 0.42)),
}
_NEIGHBORS_WORKLOAD = Workload(1, 4096, 64, 9)
_NEIGHBORS_PEERS = ("convnn-all", "convnn-random", "convnn-spatial")
_POINT_STYLES = (("o", "#d62728"), ("s", "#1f4fd8"), ("^", "#108030"))


def _curves(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ only in N: of the shape that was measured at the most values of N."""
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["peer"] in _LINES and ("against N" in row["group"] or "shape" in row["group"]):
            w = row["workload"]
            key = tuple(w[name] for name in ("batch", "channels", "k", "source", "dtype"))
            families.setdefault(key, []).append(row)

    def sizes(family: Iterable[Row]) -> int:
        return len({row["workload"]["tokens"] for row in family})

    family = max(families.values(), key=sizes, default=[])
    return family if sizes(family) > 1 else []


def _logarithmic(axis: Axes, sizes: Sequence[int]) -> None:
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.grid(True, color="#dddddd", linewidth=0.7)


def _against_n(
    rows: Sequence[Row], quantity: Callable[[Row], float], title: str, unit: str, machine: str
) -> Figure | None:
    rows = [row for row in rows if quantity(row) > 0]
    passes = [each for each in TRAINING if any(row["pass"] == each for row in rows)]
    sizes = sorted({row["workload"]["tokens"] for row in rows})
    if len(sizes) < 2:
        return None
    figure, axes = plt.subplots(
        1, len(passes), figsize=(10, 5.6), sharey=True, layout="constrained", squeeze=False
    )
    legend: dict[str, Any] = {}
    for axis, each in zip(axes[0], passes, strict=True):
        for peer, style in _LINES.items():
            curve = [row for row in rows if row["peer"] == peer and row["pass"] == each]
            points = sorted((row["workload"]["tokens"], quantity(row)) for row in curve)
            if points:
                (line,) = axis.plot(*zip(*points, strict=True), **style)
                legend.setdefault(report.label(curve[0], curve[0]), line)
        _logarithmic(axis, sizes)
        axis.set(title=each, xlabel="N, tokens")
    axes[0][0].set_ylabel(unit)
    w = rows[0]["workload"]
    figure.suptitle(
        f"{title}: B = {w['batch']}, C = {w['channels']}, k = {w['k']}, {w['dtype']}, {machine}",
        fontsize=13,
    )
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    # A palette keeps plots with photographs below 300 KB.
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)
    return path


def _draw_photograph(axis: Axes, name: str) -> None:
    gray = photograph(name).mean(axis=2)
    # Lightened, so that the markers stand out.
    axis.imshow(110 + gray * (145 / 255), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    axis.spines[:].set_visible(False)


def _neighbors(peer: str, name: str, workload: Workload) -> tuple[Tensor, Tensor | None]:
    """The indices [N, k] that a peer returns for a photograph, and its candidates."""
    side = math.isqrt(workload.tokens)
    tokens = photograph_tokens(name, side, workload.channels)[None]
    weight = torch.zeros(workload.channels, 1, workload.k)
    inputs = Inputs(tokens, tokens, tokens, weight, weight, weight, tokens, tokens)
    call = PEERS[peer].build(workload, inputs)
    with torch.no_grad():
        return run_pass(call, "forward")[2][0], call.candidates


def _draw_neighbors(
    axis: Axes, pixel: tuple[Any, Any], others: tuple[Any, Any], marker: str, color: str
) -> None:
    for end in zip(*others, strict=True):
        axis.plot((pixel[0], end[0]), (pixel[1], end[1]), color=color, linewidth=0.8)
    style: dict[str, Any] = {"marker": marker, "zorder": 3}
    axis.scatter(*others, s=34, color="white", edgecolors=color, linewidths=1.4, **style)
    style["zorder"] = 4
    axis.scatter(*pixel, s=110, color=color, edgecolors="white", linewidths=1.2, **style)


def neighbors_figure(workload: Workload = _NEIGHBORS_WORKLOAD) -> Figure:
    """For each photograph and kind of candidates: a few pixels joined with their neighbors."""
    figure, axes = plt.subplots(
        len(_NEIGHBORS_OF), len(_NEIGHBORS_PEERS), figsize=(10.5, 7.6), layout="constrained"
    )
    side = math.isqrt(workload.tokens)

    def position(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (rows % side + 0.5) / side, (rows // side + 0.5) / side

    for line, (name, points) in zip(axes, _NEIGHBORS_OF.items(), strict=True):
        for axis, peer in zip(line, _NEIGHBORS_PEERS, strict=True):
            _draw_photograph(axis, name)
            indices, candidates = _neighbors(peer, name, workload)
            if candidates is not None:
                axis.scatter(*position(candidates.numpy()), s=9, color="#222222", linewidths=0)
            for (x, y), style in zip(points, _POINT_STYLES, strict=True):
                row = int(y * side) * side + int(x * side)
                chosen = indices[row].numpy()
                others = position(chosen[chosen != row])
                _draw_neighbors(axis, position(np.array(row)), others, *style)
    count = workload.candidates
    titles = ("all candidates", f"{count} random", f"{count} spatial")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    figure.suptitle(
        f"Three pixels (filled) and the {workload.k} nearest neighbors of each (open), "
        f"the pixel itself included\n{side} x {side} tokens; small dots: candidates",
        fontsize=13,
    )
    return figure


def _milliseconds(row: Row) -> float:
    return 1e3 * row["seconds"]["median"] if row["seconds"] else 0.0


def _megabytes(row: Row) -> float:
    return (row["peak_bytes"] or 0) / 1e6


def draw_all(result: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Writes <prefix><name>.png for each plot that the rows suffice for."""
    rows, stamp = result["rows"], result["stamp"]
    gpu = stamp.get("gpu")
    machine = gpu["name"] if gpu else f"{stamp['threads']} CPU threads"
    measured = {row["peer"] for row in rows if row["status"] == "measured"}
    paths = []
    with plt.rc_context(_STYLE):
        curves, memory = _curves(rows), "MB above the inputs"
        figures = {
            "time": _against_n(curves, _milliseconds, "Time", "ms", machine),
            "memory": _against_n(curves, _megabytes, "Peak memory", memory, machine),
            "neighbors": neighbors_figure()
            if measured.issuperset(_NEIGHBORS_PEERS) and gpu is None
            else None,
        }
        for name, figure in figures.items():
            if figure is not None:
                paths.append(_save(figure, folder / f"{prefix}{name}.png"))
    return paths
