# SPDX-License-Identifier: MIT
"""Measure peers on workloads: the gate, then the clock, then memory.

All peers of a workload are timed in turn, round after round, so that whatever else the machine
does meets all of them alike; a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from . import gate
from .devices import Device
from .memory import MemoryNotMeasured
from .peers import PASSES, Call, Peer, run_pass
from .workloads import Workload, make_inputs

# A peer that would need more than this is left out, by name.
LARGEST_BYTES = 10e9

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure: for each workload about `seconds`, within the bounds on rounds.

    sample_seconds: a pass that is quicker is repeated within one sample until it lasts this long.
    """

    seconds: float = 10.0
    fewest_rounds: int = 3
    most_rounds: int = 40
    sample_seconds: float = 0.01


QUICK = Effort(seconds=2.0, fewest_rounds=3, most_rounds=10)


@dataclass
class _Case:
    """One peer and pass on one workload, checked and ready to be timed."""

    row: Row
    peer: Peer
    call: Call
    passes: str
    repeats: int = 1
    estimate: float = 0.0

    def sample(self, device: Device) -> float:
        """Seconds of one pass, averaged over `repeats`."""
        device.synchronize()
        start = time.perf_counter()
        for _ in range(self.repeats):
            run_pass(self.call, self.passes)
        device.synchronize()
        return (time.perf_counter() - start) / self.repeats


def _summary(samples: Sequence[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(samples, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def _row(workload: Workload, name: str, peer: Peer, passes: str) -> Row:
    return {
        "workload": asdict(workload),
        "peer": name,
        "label": peer.label,
        "pass": passes,
        "status": "measured",
        "reason": None,
        "checked": None,
        "seconds": None,
        "ratios": {},
        "peak_bytes": None,
        "peak_reason": None,
    }


def _prepare(workload: Workload, name: str, peer: Peer, passes: str, device: Device) -> _Case | Row:
    """A case that passed the gate, or a row that says why there is none."""
    row = _row(workload, name, peer, passes)
    backward = passes != "forward"
    needed = peer.bytes_needed(workload, backward)
    if needed > LARGEST_BYTES:
        reason = f"needs about {needed / 1e9:.0f} GB, the limit is {LARGEST_BYTES / 1e9:.0f} GB"
        return row | {"status": "skipped", "reason": reason}
    try:
        call = peer.build(workload, make_inputs(workload, device.name, requires_grad=backward))
        row["checked"] = gate.check(peer, workload, call, passes)
    except AssertionError as error:
        return row | {"status": "refused", "reason": " ".join(str(error).split())}
    except Exception as error:
        return row | {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return _Case(row, peer, call, passes)


def _warm_up(cases: Sequence[_Case], device: Device, effort: Effort) -> None:
    """Run each case until its caches are filled, and fix how often a sample repeats it."""
    for case in cases:
        quickest = case.sample(device)
        # A pass of seconds ran once already, in the gate.
        if quickest < 1.0:
            quickest = case.sample(device)
        for _ in range(4 if quickest < 0.1 else 0):
            quickest = min(quickest, case.sample(device))
        case.estimate = quickest
        case.repeats = max(1, round(effort.sample_seconds / case.estimate))


def _time(cases: Sequence[_Case], rounds: int, device: Device, advance: Callable[[], None]) -> None:
    """Fill in the times and ratios of the rows."""
    samples: list[list[float]] = [[] for _ in cases]
    order = list(range(len(cases)))
    for _ in range(rounds):
        for i in order:
            samples[i].append(cases[i].sample(device))
        order.reverse()  # no case always runs after the same other one
        advance()
    seconds = {
        (case.row["peer"], case.passes): np.array(s) for case, s in zip(cases, samples, strict=True)
    }
    for case, own in zip(cases, samples, strict=True):
        case.row["seconds"] = {**_summary(own), "rounds": rounds, "repeats": case.repeats}
        for against, peer in (("eager", case.peer.baseline), ("sdpa", "sdpa")):
            other = seconds.get((peer, case.passes))
            if other is not None:
                case.row["ratios"][against] = {"peer": peer, **_summary(other / np.array(own))}


@contextmanager
def _progress(title: str | None) -> Iterator[tqdm]:
    """A bar on a terminal; nothing in a log, or without a title."""
    bar_format = "{desc:<64}{bar:20} {n_fmt}/{total_fmt} [{elapsed}]"
    disable = True if title is None else None
    with tqdm(total=0, bar_format=bar_format, disable=disable, leave=False) as bar:
        yield bar


def measure(
    workload: Workload,
    peers: dict[str, Peer],
    device: Device,
    threads: int,
    effort: Effort,
    title: str | None = None,
) -> list[Row]:
    """One row for each peer and pass, also for those that were skipped, refused or failed."""
    device.set_threads(threads)
    rows: list[Row] = []
    cases: list[_Case] = []
    combinations = [(name, peer, passes) for name, peer in peers.items() for passes in PASSES]
    with _progress(title) as bar:
        bar.total = len(combinations)
        for name, peer, passes in combinations:
            bar.set_description_str(f"{title}: checking {name}")
            prepared = _prepare(workload, name, peer, passes, device)
            if isinstance(prepared, _Case):
                cases.append(prepared)
                rows.append(prepared.row)
            else:
                rows.append(prepared)
            bar.update()

        bar.set_description_str(f"{title}: warming up")
        _warm_up(cases, device, effort)
        one_round = sum(max(case.estimate, effort.sample_seconds) for case in cases)
        rounds = int(effort.seconds / one_round) if cases else 0
        rounds = min(max(rounds, effort.fewest_rounds), effort.most_rounds)
        bar.reset(total=rounds)
        bar.set_description_str(f"{title}: timing, rounds")
        _time(cases, rounds, device, bar.update)

        bar.reset(total=len(cases))
        for case in cases:
            row = case.row
            bar.set_description_str(f"{title}: memory of {row['peer']}")
            try:
                row["peak_bytes"] = device.peak_bytes(workload, row["peer"], case.passes, threads)
            except (MemoryNotMeasured, OSError) as error:
                row["peak_reason"] = str(error)
            bar.update()
    return rows
