# SPDX-License-Identifier: MIT
"""What the CPU kernels are meant to reach, and whether a run reached it.

A ratio is the same as in the tables of the run: the median of the ratios within each round, to the
fastest kernel of SDPA. A goal whose row was not measured is neither met nor missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import ratios
from .peers import PEERS, TRAINING
from .ratios import Row
from .workloads import CPU_FEW, CPU_LAYERS, CPU_RANGES, DECODING

_FORWARD, _BOTH = TRAINING


@dataclass(frozen=True)
class Goal:
    """The time of `peer` divided by that of `other`, in this pass and group, on its first workload;
    for "mm" the share of its rate instead. comparison: "≤" or "≥".
    """

    group: str
    peer: str
    passes: str
    other: str
    comparison: str
    bound: float

    @property
    def what(self) -> str:
        by = "÷ AVX-512" if self.peer.endswith("-avx2") else _SHORT[self.other]
        return f"{PEERS[self.peer].label}, {self.passes}, {by}"

    def met(self, value: float) -> bool:
        return value <= self.bound if self.comparison == "≤" else value >= self.bound


_SHORT = {
    "mm": "share of torch.mm",
    "sdpa": "÷ SDPA",
    "faiss": "÷ FAISS",
    "conv2d": "÷ Conv2d",
    "eager-dot": "÷ eager",
    "select": "÷ all keys",
    "select-alone": "÷ one by one",
}

# Of a layer (B, N, C, k): the share of torch.mm that select reaches, and ConvNN ÷ SDPA in a forward
# pass and in forward+backward.
_LAYERS = {
    "(8, 197, 192, 9)": (0.45, 0.95, 0.70),
    "(8, 1024, 64, 9)": (0.75, 0.65, 0.30),
    "(1, 4096, 64, 9)": (1.00, 0.40, 0.15),
    "(1, 16384, 64, 16)": (1.00, 0.40, 0.12),
    "(1, 16384, 128, 64)": (1.00, 0.45, 0.18),
}
_FAISS, _AVX2, _EAGER, _DECODING, _DENSE = 0.35, 2.2, 1.2, 1.0, 1.8
# In bfloat16, from 1024 tokens.
_BFLOAT16 = {_FORWARD: 1.0, _BOTH: 0.5}
# With key ranges: what it is divided by, and the bound.
_RANGES = {
    "select-causal": ("select", 0.6),
    "select-window": ("select", 0.1),
    "select-packed": ("select-alone", 1.3),
}


def _on_avx2(group: str, *cases: tuple[str, str]) -> Iterator[Goal]:
    for peer, passes in cases:
        yield Goal(group, f"{peer}-avx2", passes, peer, "≤", _AVX2)


def _all() -> Iterator[Goal]:
    convnn = (("convnn-all", _FORWARD), ("convnn-all", _BOTH))
    for shape, (share, forward, both) in _LAYERS.items():
        group = f"layer {shape}"
        yield Goal(group, "select", _FORWARD, "mm", "≥", share)
        yield Goal(group, "convnn-all", _FORWARD, "sdpa", "≤", forward)
        yield Goal(group, "convnn-all", _BOTH, "sdpa", "≤", both)
        yield Goal(group, "select", _FORWARD, "faiss", "≤", _FAISS)
        yield from _on_avx2(group, ("select", _FORWARD), *convnn)
    for w in CPU_LAYERS[1:]:
        group = f"bfloat16 {w.shape}"
        for passes, bound in _BFLOAT16.items():
            yield Goal(group, "convnn-all", passes, "sdpa", "≤", bound)
        yield from _on_avx2(group, *convnn)
    for w in CPU_FEW:
        group = f"few queries {w.shape}"
        yield Goal(group, "select-dot", _FORWARD, "eager-dot", "≤", _EAGER)
        yield from _on_avx2(group, ("select-dot", _FORWARD))
    group = f"decoding {DECODING.shape}"
    yield Goal(group, "convnn-dot", _FORWARD, "sdpa", "≤", _DECODING)
    yield from _on_avx2(group, ("convnn-dot", _FORWARD))
    for w in CPU_RANGES:
        for peer, (other, bound) in _RANGES.items():
            group = f"key ranges {w.dtype} {w.shape}"
            yield Goal(group, peer, _FORWARD, other, "≤", bound)
    for w in CPU_LAYERS[1:3]:
        group = f"beside Conv2d {w.shape}"
        yield Goal(group, "aggregate-dense", _BOTH, "conv2d", "≤", _DENSE)
        yield from _on_avx2(group, ("aggregate-dense", _BOTH))


GOALS = tuple(_all())

# A goal with what came of it: "measured", a number or None, "result" and "reason".
Outcome = dict[str, Any]


def _find(rows: Sequence[Row], peer: str, passes: str) -> tuple[Row | None, str | None]:
    """The row of the peer, or why there are no times of it."""
    found = [row for row in rows if row["peer"] == peer and row["pass"] == passes]
    if not found:
        return None, "not in this run"
    row = found[0]
    if row["seconds"]:
        return row, None
    return None, f"{row['label']}, {passes}: {row['reason'] or 'not timed'}"


def _value(goal: Goal, rows: Sequence[Row]) -> tuple[float | None, str | None]:
    """What was measured, or why nothing was."""
    row, reason = _find(rows, goal.peer, goal.passes)
    if row is None:
        return None, reason
    other = ratios.on_avx512(row, rows) if goal.peer.endswith("-avx2") else None
    if other is None:
        other, reason = _find(rows, goal.other, goal.passes)
    if other is None:
        return None, reason
    if goal.other == "mm":
        return ratios.share_of_rate(row, other), None
    if goal.other == "sdpa":
        kernels = [each["peer"] for each in rows if each["peer"].startswith("sdpa")]
        same = ("batch", "tokens", "channels", "keys", "dtype")
        other = ratios.fastest(row, rows, kernels, *same)
    found = ratios.ratio(row, other)
    return (found and found[0]), None


def evaluate(rows: Sequence[Row]) -> list[Outcome]:
    """Every goal, if these rows are from a group with goals; otherwise nothing."""
    groups = ratios.groups(rows)
    if not any(goal.group in groups for goal in GOALS):
        return []
    found = []
    for goal in GOALS:
        value, reason = _value(goal, groups.get(goal.group, []))
        result = "not measured" if value is None else "met" if goal.met(value) else "not met"
        found.append(
            asdict(goal)
            | {"what": goal.what, "measured": value, "result": result, "reason": reason}
        )
    return found


def summary(outcomes: Sequence[Outcome]) -> str:
    def count(result: str) -> int:
        return sum(each["result"] == result for each in outcomes)

    return (
        f"{count('met')} of {len(outcomes)} goals met, {count('not met')} not met, "
        f"{count('not measured')} not measured"
    )


def table(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    lines = []
    for each in outcomes:
        measured = "" if each["measured"] is None else f"{each['measured']:.3g}"
        goal = f"{each['comparison']} {each['bound']:.2f}"
        lines.append([each["group"], each["what"], goal, measured, each["result"]])
    return ["row", "measured quantity", "goal", "measured", "result"], lines


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Why goals were not measured."""
    return list(dict.fromkeys(each["reason"] for each in outcomes if each["reason"]))
