# SPDX-License-Identifier: MIT
"""The goals of the CPU kernels: ratios of times that were taken in turn, each beside its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .workloads import REQUIRED, Workload

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
            kernels = ("sdpa", "sdpa-flash", "sdpa-math", "sdpa-efficient", "sdpa-cudnn")
            sdpa = quickest(at(peer, passes) for peer in kernels)
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
        # Half a tenth more is what timing noise over 15 bits of N leaves undecided.
        yield Goal(
            f"exponent/{peer}",
            f"exponent of N in the time of a forward, {kind} candidates",
            None if math.isnan(found) else found,
            limit + 0.05,
            note="not measured" if math.isnan(found) else "",
        )


def _overhead(find: Callable[..., Row | None]) -> Iterator[Goal]:
    tiny = Workload(1, 8, 8, 2, "random")
    for peer, name in (("convnn-all", "torch.ops.convnn.forward"), ("functional", "functional")):
        for passes, mode in (("forward", "no_grad"), ("inference", "inference_mode")):
            yield _goal(
                f"overhead-{peer}/{mode}",
                f"a small call of {name} under {mode} ÷ SDPA's",
                ratio(
                    find("host overhead", peer, passes, tiny),
                    find("host overhead", "sdpa", passes, tiny),
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


def goals(result: dict[str, Any]) -> list[Goal]:
    """Those whose group was measured."""
    rows = [row for row in result["rows"] if "group" in row]
    find, groups = Rows(rows).find, {row["group"] for row in rows}
    found = [*_required(find, groups), *_beside_convolution(find, groups)]
    if "growth with N" in groups:
        found += _growth(rows)
    if "host overhead" in groups:
        found += _overhead(find)
    return [*found, *_bfloat16(find, groups, result["stamp"]["cpu"]["features"])]


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
