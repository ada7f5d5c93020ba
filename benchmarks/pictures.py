# SPDX-License-Identifier: MIT
"""The pictures of a result, as PNG files: time and memory against N, ratios, a roofline, growth,
and the neighbors that a few pixels chose.

Markers, lines, gray values and hatches tell things apart; color only helps.
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
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from PIL import Image

from . import goals, report
from .peers import PEERS, TRAINING, run_pass
from .workloads import Inputs, Workload, photograph, photograph_tokens

Row = dict[str, Any]

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
    "hatch.linewidth": 0.8,
}

# Smaller markers lie on larger ones where lines meet.
_LINES: dict[str, dict[str, Any]] = {
    "convnn-all": {"color": "#000000", "marker": "o", "linestyle": "-", "markersize": 9},
    "convnn-random": {"color": "#3b7dd8", "marker": "s", "linestyle": "--", "markersize": 6},
    "convnn-spatial": {"color": "#0a2f6b", "marker": "+", "linestyle": ":", "markersize": 12},
    "eager": {"color": "#b04000", "marker": "^", "linestyle": "--"},
    "sdpa": {"color": "#606060", "marker": "v", "linestyle": "-."},
    "conv2d": {"color": "#909090", "marker": "x", "linestyle": ":", "markersize": 8},
    "flex-local": {"color": "#9a3fb5", "marker": "D", "linestyle": "--", "markersize": 5},
    "local": {"color": "#c58fd4", "marker": "d", "linestyle": "-", "markersize": 7},
    "kvt": {"color": "#2e8b57", "marker": "*", "linestyle": "-.", "markersize": 9},
    "faiss": {"color": "#d4a017", "marker": "P", "linestyle": ":", "markersize": 7},
    "flashlib": {"color": "#8b6508", "marker": "p", "linestyle": "--", "markersize": 7},
    "keops": {"color": "#5f9ea0", "marker": "h", "linestyle": "-.", "markersize": 7},
    "compiled": {"color": "#e07b39", "marker": "<", "linestyle": ":", "markersize": 6},
    "matmul-topk": {"color": "#7a7a00", "marker": ">", "linestyle": "--", "markersize": 6},
}
# Where N varies and nothing else does.
_AGAINST_N = ("against N", "memory", "shape")

# Photographs, and points (x, y) on them as fractions of the side.
_NEIGHBORS_OF: dict[str, tuple[tuple[float, float], ...]] = {
    "rocket": ((0.20, 0.52), (0.48, 0.29), (0.62, 0.91)),
    "coffee": ((0.13, 0.32), (0.60, 0.80), (0.46, 0.42)),
}
_NEIGHBORS_WORKLOAD = Workload(1, 4096, 64, 9)
_NEIGHBORS_PEERS = ("convnn-all", "convnn-random", "convnn-spatial")
_POINT_STYLES = (("o", "#d62728"), ("s", "#1f4fd8"), ("^", "#108030"))


def _legend(row: Row) -> str:
    return report.label(row, row)


def _curves(rows: Sequence[Row]) -> list[Row]:
    """The rows that differ in N only, from the shape measured at the most values of N."""
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["peer"] in _LINES and row["group"].startswith(_AGAINST_N):
            w = row["workload"]
            key = tuple(w[name] for name in ("batch", "channels", "k", "source", "dtype"))
            families.setdefault(key, []).append(row)

    def sizes(family: Iterable[Row]) -> int:
        return len({row["workload"]["tokens"] for row in family})

    family = max(families.values(), key=sizes, default=[])
    return family if sizes(family) > 1 else []


def _plain_numbers(axis: Axes, sizes: Sequence[int]) -> None:
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.grid(True, color="#dddddd", linewidth=0.7)


def _against_n(
    rows: Sequence[Row],
    quantity: Callable[[Row], float | None],
    unit: str,
    title: str,
    machine: str,
) -> Figure | None:
    rows = [row for row in rows if (quantity(row) or 0) > 0]
    passes = [each for each in TRAINING if any(row["pass"] == each for row in rows)]
    sizes = sorted({row["workload"]["tokens"] for row in rows})
    if len(sizes) < 2:
        return None
    figure, axes = plt.subplots(
        1, len(passes), figsize=(10, 5.6), sharey=True, layout="constrained", squeeze=False
    )
    named: dict[str, Any] = {}
    for axis, each in zip(axes[0], passes, strict=True):
        for peer, style in _LINES.items():
            own = [row for row in rows if row["peer"] == peer and row["pass"] == each]
            points = sorted((row["workload"]["tokens"], quantity(row)) for row in own)
            if points:
                (line,) = axis.plot(*zip(*points, strict=True), **style)
                named.setdefault(_legend(own[0]), line)
        _plain_numbers(axis, sizes)
        axis.set(title=each, xlabel="N, tokens")
    axes[0][0].set_ylabel(unit)
    w = rows[0]["workload"]
    figure.suptitle(
        f"{title}: B = {w['batch']}, C = {w['channels']}, k = {w['k']}, {w['dtype']}, {machine}",
        fontsize=13,
    )
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _peak_megabytes(row: Row) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6


def _median_milliseconds(row: Row) -> float | None:
    return None if row["seconds"] is None else 1e3 * row["seconds"]["median"]


def _draw_bars(axis: Axes, bars: dict[str, dict[str, float]]) -> None:
    """From 1: to the left where ours takes less time, to the right, hatched, where it takes more.
    Forward above in a dark tone, forward+backward below in a light one.
    """
    for i, passes in enumerate(bars.values()):
        for each, value in passes.items():
            loses, place = value > 1, 0.0
            if len(passes) > 1:
                place = -0.2 if each == "forward" else 0.2
            dark, light = ("#d98e4a", "#f6dcc4") if loses else ("#2f4d73", "#b9c7d9")
            axis.barh(
                i + place,
                math.log2(value),
                height=0.4 if len(passes) > 1 else 0.6,
                color=dark if each == "forward" else light,
                edgecolor="black",
                linewidth=0.6,
                hatch="////" if loses else None,
            )
            axis.annotate(
                report.two_digits(value),
                (math.log2(value), i + place),
                xytext=(4 if loses else -4, 0),
                textcoords="offset points",
                ha="left" if loses else "right",
                va="center",
                fontsize=8,
            )
    axis.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.axvline(0, color="black", linewidth=1)
    axis.tick_params(left=False)
    axis.spines["left"].set_visible(False)


def _ratios(rows: Sequence[Row], machine: str) -> Figure | None:
    panels = report.ratios(rows)
    if not panels:
        return None
    heights = [len(bars) + 1.2 for bars in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(10, 1.6 + 0.34 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, (against, bars) in zip(axes[:, 0], panels.items(), strict=True):
        _draw_bars(axis, bars)
        axis.set_title(f"against {report.THEIRS[against]}", loc="left")
        axis.grid(True, axis="x", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    values = [v for bars in panels.values() for passes in bars.values() for v in passes.values()]
    low, high = math.log2(min(0.5, *values)), math.log2(max(2.0, *values))
    step = max(1, math.ceil((high - low) / 9))
    exponents = range(step * math.floor(low / step), step * math.ceil(high / step) + 1, step)
    axis = axes[-1][0]
    axis.set_xlim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    ticks = [e for e in exponents if axis.get_xlim()[0] <= e <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{2**e}" if e >= 0 else f"1/{2**-e}" for e in ticks])
    axis.set_xlabel("time ÷ theirs")
    figure.suptitle(
        f"Time of ConvNN divided by theirs, {machine}: hatched where ConvNN takes longer\n"
        "(B, N, C, k); dark: forward, light: forward+backward",
        fontsize=13,
    )
    return figure


_ROOFLINE = {
    "select": ("o", "#000000", 8),
    "convnn-all": ("s", "#0a2f6b", 7),
    "convnn-random": ("+", "#3b7dd8", 10),
    "aggregate-dense": ("D", "#3b7dd8", 6),
    "sdpa": ("v", "#606060", 7),
    "conv2d": ("x", "#909090", 8),
    "faiss": ("P", "#d4a017", 7),
    "eager": ("^", "#b04000", 7),
}


def _roofline(rows: Sequence[Row], machine: str) -> Figure | None:
    """Forward passes in float32 under the rates of torch.mm and of a copy."""
    dtype = rows[0]["workload"]["dtype"] if rows else ""
    forward = [
        row
        for row in rows
        if row["pass"] == "forward"
        and row["seconds"]
        and row["flops"] is not None
        and row["workload"]["dtype"] == dtype
        and row["group"] != "host overhead"
    ]

    def rate(peer: str, quantity: str) -> float:
        own = [row for row in forward if row["peer"] == peer]
        return float(np.median([row[quantity] / row["seconds"]["median"] for row in own] or [0.0]))

    flops, bandwidth = rate("mm", "flops"), rate("copy", "bytes")
    if not flops or not bandwidth:
        return None
    figure, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    intensities = []
    for peer, (marker, color, size) in _ROOFLINE.items():
        points = [
            (row["flops"] / row["bytes"], row["flops"] / row["seconds"]["median"] / 1e9)
            for row in forward
            if row["peer"] == peer
        ]
        if points:
            intensities += [x for x, _ in points]
            label = PEERS[peer].label
            axis.plot(
                *zip(*points, strict=True),
                linestyle="",
                marker=marker,
                color=color,
                markersize=size,
                label=label,
                markerfacecolor="none",
                markeredgewidth=1.6,
            )
    if not intensities:
        return None
    x = np.geomspace(0.5 * min(intensities), 2 * max(intensities), 200)
    axis.plot(
        x,
        np.minimum(flops, x * bandwidth) / 1e9,
        color="black",
        linewidth=1.5,
        label=f"torch.mm {flops / 1e9:,.0f} GFLOP/s, copy {bandwidth / 1e9:,.0f} GB/s",
    )
    axis.set(
        xscale="log", yscale="log", xlabel="flops per byte of inputs and outputs", ylabel="GFLOP/s"
    )
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, color="#dddddd", linewidth=0.7)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axis.set_title(
        f"Roofline of the forward passes, {dtype}, {machine}\n"
        "above the line: select screens in 16 bits and keeps its product in the cache"
    )
    return figure


# What varies in the groups of that name, and how it is called.
_VARIED = {
    "against k": ("k", "k, neighbors"),
    "against D": ("channels", "D = C, channels"),
    "against R": ("candidates", "R, candidates"),
}


def _scaling(rows: Sequence[Row], machine: str) -> Figure | None:
    """Forward passes against k, D and R."""
    panels = {
        start: own
        for start in _VARIED
        if (own := [r for r in rows if r["group"].startswith(start) and r["seconds"]])
    }
    if not panels:
        return None
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(4.2 * len(panels), 5),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    named: dict[str, Any] = {}
    for axis, (start, own) in zip(axes[0], panels.items(), strict=True):
        name, title = _VARIED[start]
        for peer, style in _LINES.items():
            points = sorted(
                (row["workload"][name], 1e3 * row["seconds"]["median"])
                for row in own
                if row["peer"] == peer and row["pass"] == "forward"
            )
            if points:
                (line,) = axis.plot(*zip(*points, strict=True), **style)
                named.setdefault(PEERS[peer].label, line)
        _plain_numbers(axis, sorted({row["workload"][name] for row in own}))
        axis.tick_params(axis="x", labelsize=9)
        axis.set_xlabel(title)
    axes[0][0].set_ylabel("ms, forward")
    w = rows[0]["workload"]
    figure.suptitle(f"Time against one size at a time, {w['dtype']}, {machine}", fontsize=13)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _growth(rows: Sequence[Row], machine: str) -> Figure | None:
    rows = [row for row in rows if row["group"] == "growth with N" and row["seconds"]]
    sizes = sorted({row["workload"]["tokens"] for row in rows})
    if len(sizes) < 3:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for peer in ("convnn-all", "convnn-random"):
        own = [row for row in rows if row["peer"] == peer]
        if not own:
            continue
        points = sorted((r["workload"]["tokens"], 1e3 * r["seconds"]["median"]) for r in own)
        style = _LINES[peer] | {"linestyle": ""}
        slope = goals.exponent(own)
        tokens, times = (np.array(each) for each in zip(*points, strict=True))
        axis.plot(tokens, times, label=f"{_legend(own[0])}: N^{slope:.2f}", **style)
        middle = np.exp(np.log(times).mean() + slope * (np.log(tokens) - np.log(tokens).mean()))
        axis.plot(tokens, middle, color=style["color"], linewidth=1)
    _plain_numbers(axis, sizes)
    axis.set(xlabel="N, tokens", ylabel="ms, forward")
    w = rows[0]["workload"]
    axis.set_title(f"Growth with N, fitted: C = {w['channels']}, k = {w['k']}, {machine}")
    axis.legend(frameon=False)
    return figure


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


def draw_all(result: dict[str, Any], folder: Path, prefix: str = "") -> list[tuple[str, Path]]:
    """Write <prefix><name>.png for each picture that the rows are enough for; return titles and
    paths.
    """
    rows, stamp = result["rows"], result["stamp"]
    gpu = stamp.get("gpu")
    machine = gpu["name"] if gpu else f"{stamp['threads']} CPU threads"
    paths = []
    with plt.rc_context(_STYLE):
        curves = _curves(rows)
        figures = {
            "ratios": ("What ConvNN costs", lambda: _ratios(rows, machine)),
            "time": (
                "Time against the number of tokens",
                lambda: _against_n(curves, _median_milliseconds, "ms", "Time", machine),
            ),
            "memory": (
                "Memory against the number of tokens",
                lambda: _against_n(
                    curves, _peak_megabytes, "MB above the inputs", "Peak memory", machine
                ),
            ),
            "roofline": ("Roofline", lambda: _roofline(rows, machine)),
            "scaling": ("Time against k, D and R", lambda: _scaling(rows, machine)),
            "growth": ("Growth with the number of tokens", lambda: _growth(rows, machine)),
        }
        for name, (title, draw) in figures.items():
            if (figure := draw()) is not None:
                paths.append((title, _save(figure, folder / f"{prefix}{name}.png")))
        measured = {row["peer"] for row in rows if row["status"] == "measured"}
        if measured.issuperset(_NEIGHBORS_PEERS) and gpu is None:
            path = folder / f"{prefix}neighbors.png"
            paths.append(("Neighbors that pixels chose", _save(neighbors_figure(), path)))
    return paths
