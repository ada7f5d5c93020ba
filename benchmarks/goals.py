# SPDX-License-Identifier: MIT
"""The goals on a CPU and on a GPU: ratios of times that were taken in turn, with their limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .workloads import (
    GPU_FLOAT32,
    GPU_LAYERS,
    GPU_SELECT,
    GPU_VGG11,
    GPU_VIT,
    REQUIRED,
    SEARCH,
    SEARCH_PHOTOGRAPHS,
    TINY,
    Workload,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """key: a name to quote it by. value: None where nothing was measured. note: why it is neither
    met nor missed."""

    key: str
    what: str
    value: float | None
    limit: float
    at_most: bool = True
    spread: tuple[float, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured, or where this machine has no such goal."""
        if self.value is None or self.note:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


class Rows:
    """Rows of a result, found by what they measure."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            self._rows.setdefault((row["group"], row["peer"], row["pass"]), []).append(row)

    def find(self, group: str, peer: str, passes: str, workload: Workload) -> Row | None:
        rows = self._rows.get((group, peer, passes), [])
        wanted = asdict(workload)
        return next((row for row in rows if row["workload"] == wanted), None)


def ratio(row: Row | None, other: Row | None, factor: float = 1.0) -> tuple[float, float, float]:
    """Time over time within each round, times the factor: median, p20, p80."""
    if row is None or other is None or row["seconds"] is None or other["seconds"] is None:
        return math.nan, math.nan, math.nan
    own, theirs = (np.array(each["seconds"]["samples"]) for each in (row, other))
    length = min(len(own), len(theirs))
    p20, median, p80 = np.percentile(factor * own[:length] / theirs[:length], [20, 50, 80])
    return float(median), float(p20), float(p80)


def share_of_rate(row: Row | None, rate: Row | None) -> tuple[float, float, float]:
    """Flops per second over those of `rate`."""
    if row is None or rate is None:
        return math.nan, math.nan, math.nan
    return ratio(rate, row, row["flops"] / rate["flops"])


def exponent(rows: Iterable[Row]) -> float:
    """The slope of log time against log N, by least squares."""
    points = [
        (row["workload"]["tokens"], row["seconds"]["median"]) for row in rows if row["seconds"]
    ]
    if len(points) < 3:
        return math.nan
    tokens, seconds = np.log(np.array(points)).T
    return float(np.polyfit(tokens, seconds, 1)[0])


def _goal(
    key: str,
    what: str,
    found: tuple[float, float, float],
    limit: float,
    at_most: bool = True,
    absent: str = "",
) -> Goal:
    median, p20, p80 = found
    if math.isnan(median):
        return Goal(key, what, None, limit, at_most, None, absent or "not measured")
    return Goal(key, what, median, limit, at_most, (p20, p80))


def _why(*rows: Row | None) -> str:
    for row in rows:
        if row is not None and row["seconds"] is None:
            return f"{row['label']}: {row['status']}: {row['reason']}"
    return "not measured"


def short(workload: Workload) -> str:
    """As in a key: B8-N1024-C64-k9."""
    return f"B{workload.batch}-N{workload.tokens}-C{workload.channels}-k{workload.k}"


# For each of REQUIRED: share of the sgemm rate, forward and forward+backward over SDPA's.
_LIMITS = (
    (0.30, 1.0, 0.8),
    (0.45, 0.75, 0.5),
    (0.60, 0.6, 0.4),
    (0.60, 0.6, 0.4),
    (0.55, 0.7, 0.5),
)


def quickest(rows: Iterable[Row | None]) -> Row | None:
    measured = [row for row in rows if row is not None and row["seconds"] is not None]
    return min(measured, key=lambda row: row["seconds"]["median"], default=None)


def _required(find: Callable[..., Row | None], groups: set[str]) -> Iterator[Goal]:
    for workload, (share, forward, backward) in zip(REQUIRED, _LIMITS, strict=True):
        group, name = f"required {workload.shape}", short(workload)
        if group not in groups:
            continue

        def at(peer: str, passes: str = "forward", w: Workload = workload) -> Row | None:
            return find(f"required {w.shape}", peer, passes, w)

        random = replace(workload, source="random")
        select, mm = at("select"), at("mm")
        what = f"{workload.shape}: "
        yield _goal(
            f"select-share/{name}",
            f"{what}select, share of the torch.mm rate",
            share_of_rate(select, mm),
            share,
            at_most=False,
        )
        for passes, limit in (("forward", forward), ("forward+backward", backward)):
            sdpa = quickest(at(peer, passes) for peer in _KERNELS)
            yield _goal(
                f"{passes}-over-sdpa/{name}",
                f"{what}{passes} ÷ {sdpa['label'] if sdpa else 'SDPA'}",
                ratio(at("convnn-all", passes), sdpa),
                limit,
            )
        faiss = at("faiss")
        yield _goal(
            f"select-over-faiss/{name}",
            f"{what}select ÷ FAISS",
            ratio(select, faiss),
            0.5,
            absent=_why(faiss),
        )
        for peer, passes in (("select", "forward"), ("convnn-all", "forward")):
            operator = "select" if peer == "select" else passes
            yield _goal(
                f"{operator}-photographs-over-random/{name}",
                f"{what}{operator}, photographs ÷ random features",
                ratio(at(peer, passes), find(group, peer, passes, random)),
                1.5,
            )
        for peer, other in (("select", "select-avx2"), ("convnn-all", "convnn-avx2")):
            operator = "select" if peer == "select" else "forward"
            if at(other) is None:
                continue
            yield _goal(
                f"{operator}-avx2-over-avx512/{name}",
                f"{what}{operator}, AVX2 ÷ AVX-512",
                ratio(at(other), at(peer)),
                2.2,
                absent=_why(at(other)),
            )


def _beside_convolution(find: Callable[..., Row | None], groups: set[str]) -> Iterator[Goal]:
    for workload in REQUIRED[1:3]:
        group, name = f"beside Conv2d {workload.shape}", short(workload)
        if group not in groups:
            continue
        for passes in ("forward", "forward+backward"):
            conv = find(group, "conv2d", passes, workload)
            yield _goal(
                f"aggregate-dense-{passes}-over-conv2d/{name}",
                f"{workload.shape}: dense aggregate, {passes} ÷ Conv2d 3×3",
                ratio(find(group, "aggregate-dense", passes, workload), conv),
                2.0,
            )
        for count in (32, 64) if workload.tokens == 4096 else ():
            conv, few = (
                find(group, "conv2d", "forward", workload),
                replace(workload, candidates=count),
            )
            yield _goal(
                f"random-{count}-over-conv2d/{name}",
                f"{workload.shape}: forward, {count} random candidates ÷ Conv2d 3×3",
                ratio(find(group, "convnn-random", "forward", few), conv),
                3.0,
            )


def _growth(rows: list[Row]) -> Iterator[Goal]:
    for peer, kind, limit in (("convnn-all", "all", 2.0), ("convnn-random", "64 random", 1.0)):
        found = exponent(
            row for row in rows if row["group"] == "growth with N" and row["peer"] == peer
        )
        # A tenth more is a third more time for each row at 32 times as many: what it costs that the
        # tokens no longer fit into a core's own cache, and noise.
        yield Goal(
            f"exponent/{peer}",
            f"exponent of N in the time of a forward, {kind} candidates",
            None if math.isnan(found) else found,
            limit + 0.1,
            note="not measured" if math.isnan(found) else "",
        )


def _overhead(find: Callable[..., Row | None]) -> Iterator[Goal]:
    for peer, name in (("convnn-all", "torch.ops.convnn.forward"), ("functional", "functional")):
        for passes, mode in (("forward", "no_grad"), ("inference", "inference_mode")):
            yield _goal(
                f"overhead-{peer}/{mode}",
                f"a small call of {name} under {mode} ÷ SDPA's",
                ratio(
                    find("host overhead", peer, passes, TINY),
                    find("host overhead", "sdpa", passes, TINY),
                ),
                2.0,
            )


def _bfloat16(
    find: Callable[..., Row | None], groups: set[str], features: list[str]
) -> Iterator[Goal]:
    for workload in REQUIRED[2:4]:
        if f"bfloat16 {workload.shape}" not in groups:
            continue
        half = replace(workload, dtype="bfloat16")
        select, mm = (
            find(f"bfloat16 {workload.shape}", peer, "forward", half) for peer in ("select", "mm")
        )
        goal = _goal(
            f"bfloat16-select-share/{short(workload)}",
            f"{workload.shape}: bfloat16 select, share of the bfloat16 torch.mm rate",
            share_of_rate(select, mm),
            0.30,
            at_most=False,
        )
        yield (
            goal
            if "amx_bf16" in features
            else replace(goal, note="a goal on machines with AMX, which this is not")
        )


_KERNELS = ("sdpa", "sdpa-flash", "sdpa-math", "sdpa-efficient", "sdpa-cudnn")
_PASSES = ("forward", "forward+backward")


def _teraflops(row: Row | None) -> tuple[float, float, float]:
    """Of the similarity matrix, in a second: median, p20, p80."""
    if row is None or row["seconds"] is None:
        return math.nan, math.nan, math.nan
    samples = 1e-12 * row["flops"] / np.array(row["seconds"]["samples"])
    p20, median, p80 = np.percentile(samples, [20, 50, 80])
    return float(median), float(p20), float(p80)


def _gpu_searches(find: Callable[..., Row | None], groups: set[str]) -> Iterator[Goal]:
    for w in GPU_SELECT:
        if (group := f"gpu select {w.shape}") not in groups:
            continue
        random = replace(w, source="random")
        select = find(group, "select", "forward", random)
        for peer, limit in (("matmul", 1.0), ("matmul-topk", 0.1)):
            other = find(group, peer, "forward", random)
            yield _goal(
                f"gpu-select-over-{peer}/{short(w)}",
                f"{w.shape}: select ÷ {other['label'] if other else peer}",
                ratio(select, other),
                limit,
                absent=_why(other),
            )
        yield _goal(
            f"gpu-select-photographs-over-random/{short(w)}",
            f"{w.shape}: select, photographs ÷ random features",
            ratio(find(group, "select", "forward", w), select),
            1.5,
        )
    for w, photographs in zip(SEARCH, SEARCH_PHOTOGRAPHS, strict=True):
        if (group := f"gpu search {w.shape}") not in groups:
            continue
        select, flashlib = (find(group, peer, "forward", w) for peer in ("select", "flashlib"))
        yield _goal(
            f"gpu-search-over-flashlib/k{w.k}",
            f"{w.shape}: select ÷ flashlib",
            ratio(select, flashlib),
            0.5 if w.k == 8 else 0.25,
            absent=_why(flashlib),
        )
        yield _goal(
            f"gpu-search-teraflops/k{w.k}",
            f"{w.shape}: select, TFLOP/s",
            _teraflops(select),
            250.0,
            at_most=False,
        )
        # 99,856 keys instead of 100,000.
        yield _goal(
            f"gpu-search-photographs-over-random/k{w.k}",
            f"{w.shape}: select, photographs ÷ random features",
            ratio(find(group, "select", "forward", photographs), select, w.rows / photographs.rows),
            1.5,
        )


def _over_sdpa(
    find: Callable[..., Row | None], group: str, peer: str, passes: str, w: Workload, limit: float
) -> Iterator[Goal]:
    """With photographs and with random features; attention does not depend on them. Of SDPA, the
    quickest kernel is quoted by its name, not PyTorch's choice among them."""
    chosen, *named = (find(group, kernel, passes, w) for kernel in _KERNELS)
    sdpa = quickest(named) or chosen
    for source in ("photographs", "random"):
        ours = find(group, peer, passes, replace(w, source=source))
        yield _goal(
            f"gpu-{peer}-{passes}-over-sdpa-{source}/{short(w)}",
            f"{w.shape}: {ours['label'] if ours else peer}, {passes}, {source} "
            f"÷ {sdpa['label'] if sdpa else 'SDPA'}",
            ratio(ours, sdpa),
            limit,
        )


def _gpu_layers(find: Callable[..., Row | None], groups: set[str]) -> Iterator[Goal]:
    for w in GPU_LAYERS:
        if (group := f"gpu layer {w.shape}") not in groups:
            continue
        limits = {_PASSES[1]: 0.7} if w.tokens == 1024 else {_PASSES[0]: 0.8, _PASSES[1]: 0.5}
        for passes, limit in limits.items():
            yield from _over_sdpa(find, group, "convnn-all", passes, w, limit)
        for passes in _PASSES:
            yield _goal(
                f"gpu-{passes}-photographs-over-random/{short(w)}",
                f"{w.shape}: {passes}, photographs ÷ random features",
                ratio(
                    find(group, "convnn-all", passes, w),
                    find(group, "convnn-all", passes, replace(w, source="random")),
                ),
                1.5,
            )
    if (group := f"gpu ViT-Tiny {GPU_VIT.shape}") in groups:
        for peer, limit in (("convnn-all", 0.8), ("convnn-random", 0.5)):
            yield from _over_sdpa(find, group, peer, _PASSES[1], GPU_VIT, limit)


def _gpu_vgg(find: Callable[..., Row | None], groups: set[str]) -> Iterator[Goal]:
    """The sum over all layers of the median times, which were taken in groups of their own."""
    names = [f"gpu VGG-11 layer {i} {w.shape}" for i, w in enumerate(GPU_VGG11, 1)]
    if not groups & set(names):
        return
    for peer, limit in (("convnn-dense", 2.0), ("convnn-dense-random", 1.5)):
        for source in ("photographs", "random"):
            total = {"ours": 0.0, "conv2d": 0.0}
            for name, w in zip(names, GPU_VGG11, strict=True):
                ours = find(name, peer, _PASSES[1], replace(w, source=source))
                conv = find(name, "conv2d", _PASSES[1], w)
                for key, row in (("ours", ours), ("conv2d", conv)):
                    seconds = None if row is None else row["seconds"]
                    total[key] += math.nan if seconds is None else seconds["median"]
            value = total["ours"] / total["conv2d"]
            yield Goal(
                f"gpu-vgg11-{peer}-{source}",
                f"eight layers of VGG-11, {peer}, {_PASSES[1]}, {source} ÷ Conv2d 3×3",
                None if math.isnan(value) else value,
                limit,
                note="not all layers were measured" if math.isnan(value) else "",
            )


def _gpu_others(find: Callable[..., Row | None], groups: set[str]) -> Iterator[Goal]:
    w = GPU_FLOAT32
    if (group := f"gpu float32 {w.shape}") in groups:
        for peer in ("select", "convnn-all"):
            for passes in _PASSES[: 1 if peer == "select" else 2]:
                single, half = (
                    find(group, peer, passes, replace(w, dtype=dtype))
                    for dtype in ("float32", "bfloat16")
                )
                yield _goal(
                    f"gpu-float32-{peer}-{passes}",
                    f"{w.shape}: {peer}, {passes}, float32 ÷ bfloat16",
                    ratio(single, half),
                    2.5,
                )
    if "gpu host" in groups:
        for kind, what, limit in (
            ("host", "time of the host for a call", 3.0),
            ("graph", "replay of a graph", 3.0),
        ):
            for backend in ("cuda", "triton"):
                ours, sdpa = (
                    find("gpu host", f"{kind}-{peer}", "forward", TINY)
                    for peer in (backend, "sdpa")
                )
                goal = _goal(
                    f"gpu-{kind}-{backend}",
                    f"smallest shape, {what}: {backend} ÷ SDPA",
                    ratio(ours, sdpa),
                    limit,
                    absent=_why(ours, sdpa),
                )
                note = "" if (kind, backend) == ("host", "cuda") else "no goal, for comparison"
                yield replace(goal, note=goal.note or note)


def goals(result: dict[str, Any]) -> list[Goal]:
    """Those whose group was measured."""
    rows = [row for row in result["rows"] if "group" in row]
    find, groups = Rows(rows).find, {row["group"] for row in rows}
    found = [*_required(find, groups), *_beside_convolution(find, groups)]
    if "growth with N" in groups:
        found += _growth(rows)
    if "host overhead" in groups:
        found += _overhead(find)
    found += _bfloat16(find, groups, result["stamp"]["cpu"]["features"])
    for of_a_gpu in (_gpu_searches, _gpu_layers, _gpu_vgg, _gpu_others):
        found += of_a_gpu(find, groups)
    return found


def cells(goal: Goal) -> tuple[str, str, str, str, str]:
    """What, value, spread, limit and verdict, as text."""
    verdict = {True: "met", False: "NOT MET", None: "open"}[goal.met]
    if goal.note:
        verdict = goal.note if goal.value is None else f"({goal.note})"
    return (
        goal.what,
        "—" if goal.value is None else f"{goal.value:.2f}",
        "" if goal.spread is None else f"({goal.spread[0]:.2f}-{goal.spread[1]:.2f})",
        f"{'≤' if goal.at_most else '≥'} {goal.limit:.2f}",
        verdict,
    )


def table(found: Iterable[Goal]) -> str:
    """For a terminal."""
    lines = [cells(goal) for goal in found]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(4)]
    return "\n".join(
        f"{what:<{widths[0]}}  {value:>{widths[1]}}  {spread:<{widths[2]}}  "
        f"{limit:>{widths[3]}}  {verdict}"
        for what, value, spread, limit, verdict in lines
    )
