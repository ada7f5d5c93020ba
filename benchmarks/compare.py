# SPDX-License-Identifier: MIT
"""What changed between two runs: python -m benchmarks compare BEFORE.json AFTER.json

Times are taken relative to the peers of the group that are not this project's (torch.mm, SDPA,
Conv2d, FAISS, ...). They were timed in the same rounds, so what slows down the whole machine
cancels. A case has changed if its median and its 20th percentile both differ by more than 15% and
by more than three times the scatter of the rounds. Only this project's cases are judged.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import report
from .ratios import Row, groups, is_ours
from .workloads import Workload

# Two runs of the same commit differ by up to this factor.
LEAST = 1.15
_SCATTERS = 3.0


@dataclass(frozen=True)
class Change:
    """factor: time after ÷ time before, relative to the other peers. Up to a factor of `noise` it
    may be chance."""

    name: str
    factor: float
    noise: float

    @property
    def moved(self) -> bool:
        return abs(math.log(self.factor)) > math.log(self.noise)


def _samples(row: Row) -> np.ndarray:
    return np.log(np.array(row["seconds"]["samples"]))


def _name(row: Row) -> str:
    workload = Workload(**row["workload"])
    return f"{row['group']}: {report.label(row, row)}, {workload}, {row['pass']}"


def _relative(row: Row, references: Sequence[str], rows: Iterable[Row]) -> np.ndarray:
    """Log of the time in each round minus the mean log of the references' times."""
    samples = _samples(row)
    others = [_samples(other) for other in rows if other["seconds"] and _name(other) in references]
    if not others:
        return samples
    length = min(len(samples), *(len(other) for other in others))
    return samples[:length] - np.mean([other[:length] for other in others], axis=0)


def _scatter(samples: np.ndarray) -> float:
    """The standard error of the median, from the quartiles of the rounds."""
    q25, q75 = np.percentile(samples, [25, 75])
    return float(1.2533 * (q75 - q25) / 1.349 / math.sqrt(len(samples)))


def compare(before: report.Result, after: report.Result) -> tuple[list[Change], list[str]]:
    """Changes of this project's cases in both results, and the names of those in one only."""
    changes, only = [], []
    old_groups, new_groups = (groups(result["rows"]) for result in (before, after))
    for group in dict.fromkeys([*old_groups, *new_groups]):
        old = {_name(row): row for row in old_groups.get(group, []) if row["seconds"]}
        new = {_name(row): row for row in new_groups.get(group, []) if row["seconds"]}
        only += [name for name in dict.fromkeys([*old, *new]) if (name in old) != (name in new)]
        common = [name for name in old if name in new]
        references = [name for name in common if not is_ours(old[name])]
        for name in common:
            if not is_ours(old[name]):
                continue
            a = _relative(old[name], references, old.values())
            b = _relative(new[name], references, new.values())
            by_median = float(np.median(b) - np.median(a))
            by_p20 = float(np.percentile(b, 20) - np.percentile(a, 20))
            # The smaller of the two, if they have the same direction.
            agree = by_median * by_p20 > 0
            factor = min(by_median, by_p20, key=abs) if agree else 0.0
            noise = max(math.log(LEAST), _SCATTERS * math.hypot(_scatter(a), _scatter(b)))
            changes.append(Change(name, math.exp(factor), math.exp(noise)))
    return changes, only


def describe(changes: Sequence[Change], only: Sequence[str]) -> str:
    lines = []
    for change in sorted(changes, key=lambda change: -change.factor):
        if change.moved:
            verb = "slower" if change.factor > 1 else "faster"
            lines.append(f"{change.factor:.2f}× the time, {verb}: {change.name}")
    if not lines:
        lines.append("nothing changed beyond noise")
    uncertain = [change for change in changes if change.noise > 1.3]
    lines.append(
        f"{len(changes)} cases compared, {sum(change.moved for change in changes)} changed, "
        f"{len(uncertain)} too noisy to detect a factor of 1.3"
    )
    lines += [f"only in one of the results: {name}" for name in only]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing is slower. 1: something is. 2: wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    options = parser.parse_args(arguments)
    try:
        before, after = report.read(options.before), report.read(options.after)
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks compare: {error}", file=sys.stderr)
        return 2
    for name, result in (("before", before), ("after", after)):
        print(f"{name}: {report.describe(result)}")
    changes, only = compare(before, after)
    if not changes:
        print("python -m benchmarks compare: the results have no case in common", file=sys.stderr)
        return 2
    print(describe(changes, only))
    return int(any(change.moved and change.factor > 1 for change in changes))
