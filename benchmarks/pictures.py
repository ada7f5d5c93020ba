# SPDX-License-Identifier: MIT
"""Time and memory against N, and the neighbors that a few pixels chose, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

from .peers import PEERS, TRAINING, run_pass
from .workloads import Inputs, Workload, photograph, photograph_tokens

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}

# Marker, line and gray value tell the lines apart without color, and smaller markers lie on larger
# ones where lines meet. Eager with candidates is left out: the tables have it.
_LINES: dict[str, dict[str, Any]] = {
    "convnn-all": {"color": "#000000", "marker": "o", "linestyle": "-", "markersize": 10},
    "convnn-random": {"color": "#3b7dd8", "marker": "s", "linestyle": "--", "markersize": 6},
    "convnn-spatial": {"color": "#0a2f6b", "marker": "+", "linestyle": ":", "markersize": 12},
    "eager": {"color": "#b04000", "marker": "^", "linestyle": "--"},
    "sdpa": {"color": "#707070", "marker": "v", "linestyle": "-."},
    "conv2d": {"color": "#909090", "marker": "x", "linestyle": ":"},
}

# Photographs, and points (x, y) on them as fractions of the side.
_NEIGHBORS_OF: dict[str, tuple[tuple[float, float], ...]] = {
    "rocket": ((0.20, 0.52), (0.48, 0.29), (0.62, 0.91)),
    "coffee": ((0.13, 0.32), (0.60, 0.80), (0.46, 0.42)),
}
_NEIGHBORS_WORKLOAD = Workload(1, 4096, 64, 9)
_NEIGHBORS_PEERS = ("convnn-all", "convnn-random", "convnn-spatial")
_POINT_STYLES = (("o", "#d62728"), ("s", "#1f4fd8"), ("^", "#108030"))


def _curves(rows: Sequence[dict[str, Any]]) -> tuple[Workload, list[dict[str, Any]]] | None:
    """The rows that differ in N only, from the shape measured at the most values of N."""
    families: dict[tuple[Any, ...], dict[int, Workload]] = {}
    for row in rows:
        w = Workload(**row["workload"])
        if row["peer"] in _LINES and row["group"].startswith(("against N", "shape")):
            families.setdefault((w.batch, w.channels, w.k, w.source), {})[w.tokens] = w
    family = max(families.values(), key=len, default={})
    if len(family) < 2:
        return None
    members = set(family.values())
    chosen = [
        row
        for row in rows
        if Workload(**row["workload"]) in members
        and row["group"].startswith(("against N", "shape"))
    ]
    return next(iter(members)), chosen


def _plot(
    rows: Sequence[dict[str, Any]],
    workload: Workload,
    quantity: Callable[[dict[str, Any]], float | None],
    unit: str,
    title: str,
    threads: int,
) -> Figure:
    figure, axes = plt.subplots(
        1, len(TRAINING), figsize=(9.5, 5), sharey=True, layout="constrained"
    )
    sizes = sorted({row["workload"]["tokens"] for row in rows})
    for axis, passes in zip(axes, TRAINING, strict=True):
        for peer, style in _LINES.items():
            points = sorted(
                (row["workload"]["tokens"], value)
                for row in rows
                if row["peer"] == peer
                and row["pass"] == passes
                and (value := quantity(row)) is not None
                and value > 0
            )
            if points:
                axis.plot(*zip(*points, strict=True), label=PEERS[peer].label, **style)
        axis.set(xscale="log", yscale="log", title=passes, xlabel="N, tokens")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.grid(True, color="#dddddd", linewidth=0.7)
    axes[0].set_ylabel(unit)
    figure.suptitle(
        f"{title}: B = {workload.batch}, C = {workload.channels}, k = {workload.k}, float32, "
        f"{threads} CPU threads",
        fontsize=13,
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _peak_megabytes(row: dict[str, Any]) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6


def _median_milliseconds(row: dict[str, Any]) -> float | None:
    return None if row["seconds"] is None else 1e3 * row["seconds"]["median"]


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    # A palette keeps a picture with photographs below 300 KB.
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)
    return path


def _draw_photograph(axis: Axes, name: str) -> None:
    gray = photograph(name).mean(axis=2)
    # Lightened, so that the marks stand out.
    axis.imshow(110 + gray * (145 / 255), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    axis.spines[:].set_visible(False)


def _neighbors(peer: str, name: str, workload: Workload) -> tuple[Tensor, Tensor | None]:
    """indices [N, k] that a peer returns for a photograph, and its candidates."""
    side = math.isqrt(workload.tokens)
    tokens = photograph_tokens(name, side, workload.channels)[None]
    weight = torch.zeros(workload.channels, 1, workload.k)
    inputs = Inputs(tokens, tokens, tokens, weight, weight, weight, tokens, tokens)
    call = PEERS[peer].build(workload, inputs)
    with torch.no_grad():
        return run_pass(call, "forward")[2][0], call.candidates


def neighbors_figure(workload: Workload = _NEIGHBORS_WORKLOAD) -> Figure:
    """For each photograph and kind of candidates: chosen pixels joined with their neighbors."""
    figure, axes = plt.subplots(
        len(_NEIGHBORS_OF), len(_NEIGHBORS_PEERS), figsize=(10.5, 7.6), layout="constrained"
    )
    side = math.isqrt(workload.tokens)

    def place(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (rows % side + 0.5) / side, (rows // side + 0.5) / side

    for line, (name, points) in zip(axes, _NEIGHBORS_OF.items(), strict=True):
        for axis, peer in zip(line, _NEIGHBORS_PEERS, strict=True):
            _draw_photograph(axis, name)
            indices, candidates = _neighbors(peer, name, workload)
            if candidates is not None:
                axis.scatter(*place(candidates.numpy()), s=9, color="#222222", linewidths=0)
            for (x, y), (marker, color) in zip(points, _POINT_STYLES, strict=True):
                row = int(y * side) * side + int(x * side)
                chosen = indices[row].numpy()
                (own_x, own_y), (to_x, to_y) = place(np.array(row)), place(chosen)
                for end in zip(to_x, to_y, strict=True):
                    axis.plot((own_x, end[0]), (own_y, end[1]), color=color, linewidth=0.8)
                others = chosen != row
                axis.scatter(
                    to_x[others],
                    to_y[others],
                    s=34,
                    marker=marker,
                    color="white",
                    edgecolors=color,
                    linewidths=1.4,
                    zorder=3,
                )
                axis.scatter(
                    own_x,
                    own_y,
                    s=110,
                    marker=marker,
                    color=color,
                    edgecolors="white",
                    linewidths=1.2,
                    zorder=4,
                )
    for axis, title in zip(
        axes[0],
        (
            "all candidates",
            f"{workload.candidates} random",
            f"{workload.candidates} spatial",
        ),
        strict=True,
    ):
        axis.set_title(title)
    figure.suptitle(
        f"Three pixels (filled) and the {workload.k} nearest neighbors of each (open), "
        f"the pixel itself included\n"
        f"{side} x {side} tokens; small dots: candidates",
        fontsize=13,
    )
    return figure


def draw_all(result: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Write <prefix>time.png, <prefix>memory.png (given two values of N or more) and
    <prefix>neighbors.png (if its peers passed their checks); return their paths.
    """
    paths = []
    with plt.rc_context(_STYLE):
        curves = _curves(result["rows"])
        if curves is not None:
            workload, rows = curves
            threads = result["stamp"]["threads"]
            for name, quantity, unit, title in (
                ("time", _median_milliseconds, "ms", "Time"),
                ("memory", _peak_megabytes, "MB above the inputs", "Peak memory"),
            ):
                figure = _plot(rows, workload, quantity, unit, title, threads)
                paths.append(_save(figure, folder / f"{prefix}{name}.png"))
        measured = {row["peer"] for row in result["rows"] if row["status"] == "measured"}
        if measured.issuperset(_NEIGHBORS_PEERS):
            paths.append(_save(neighbors_figure(), folder / f"{prefix}neighbors.png"))
    return paths
