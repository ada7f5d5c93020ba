# SPDX-License-Identifier: MIT
"""Measures the cases of a group: checks the results, then takes times, then peak memory.

All cases of a group are timed round after round, one sample each per round, so that other load on
the machine affects all of them alike. A ratio is the median of the ratios within each round.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from . import bounds, result_check
from .devices import Cpu
from .memory import MemoryNotMeasured
from .peers import PEERS, Call, Peer, Unavailable, around, run_pass
from .workloads import Workload, make_inputs

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long to time a group: about `seconds`, within the limits on rounds.

    sample_seconds: a shorter pass is repeated until the sample takes this long.
    """

    seconds: float = 10.0
    fewest_rounds: int = 3
    most_rounds: int = 40
    sample_seconds: float = 0.01


@dataclass(frozen=True)
class Case:
    """One peer and pass on one workload."""

    workload: Workload
    peer: str
    passes: str = "forward"


@dataclass(frozen=True)
class Group:
    """Cases that are timed in the same rounds, and may therefore be divided by one another.

    memory: the peers whose peak memory is measured, on the first workload. backend: if given, our
    operators run on that backend, and the time of each of their kernels is measured as well.
    """

    name: str
    cases: tuple[Case, ...]
    effort: Effort = Effort()
    memory: tuple[str, ...] = ()
    backend: str = ""


class DeviceBroken(RuntimeError):
    """Nothing more can be measured in this process; the message says why."""


@dataclass
class Ready:
    """A case whose result is correct, ready to be timed."""

    row: Row
    call: Call
    passes: str
    repeats: int = 1
    estimate: float = 0.0

    def sample(self, device: Cpu) -> float:
        """Seconds of one pass, averaged over `repeats`."""
        if self.call.sample is not None:
            return self.call.sample()
        with around(self.call, self.passes):
            return device.seconds(lambda: run_pass(self.call, self.passes), self.repeats)

    def cold_sample(self, device: Cpu) -> float | None:
        if self.call.sample is not None:
            return None
        with around(self.call, self.passes):
            return device.cold_seconds(lambda: run_pass(self.call, self.passes))


def new_row(group: str, case: Case, peer: Peer) -> Row:
    return {
        "group": group,
        "workload": asdict(case.workload),
        "peer": case.peer,
        "label": peer.label,
        "pass": case.passes,
        "status": "measured",
        "reason": None,
        "checked": None,
        "flops": bounds.flops(case.peer, peer, case.workload, case.passes),
        "bytes": bounds.moved_bytes(case.peer, peer, case.workload, case.passes),
        "seconds": None,
        "cold_seconds": None,
        "peak_bytes": None,
        "peak_reason": None,
        "kernels": None,
    }


def _message(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _skipped(row: Row, reason: str) -> Row:
    return row | {"status": "skipped", "reason": " ".join(reason.split())}


def prepare(group: str, case: Case, device: Cpu) -> Ready | Row:
    """The case ready to be timed, or a row that says why it is not timed."""
    peer, workload, passes = PEERS[case.peer], case.workload, case.passes
    row = new_row(group, case, peer)
    if passes not in peer.passes:
        return _skipped(row, f"has no {passes} pass")
    backward = passes == "forward+backward"
    needed, limit = peer.bytes_needed(workload, backward), device.memory_bytes()
    if needed > limit:
        return _skipped(
            row, f"needs about {needed / 1e9:.0f} GB, the limit is {limit / 1e9:.0f} GB"
        )
    try:
        call = peer.build(workload, make_inputs(workload, device.where, requires_grad=backward))
        row["checked"] = result_check.check(peer, workload, call, passes)
    except Unavailable as error:
        return _skipped(row, str(error))
    except AssertionError as error:
        return row | {"status": "refused", "reason": " ".join(str(error).split())}
    except Exception as error:
        return row | {"status": "failed", "reason": _message(error)}
    return Ready(row, call, passes)


def _prepare_all(group: Group, device: Cpu, rows: list[Row]) -> list[Ready]:
    cases: list[Ready] = []
    for case in group.cases:
        prepared = prepare(group.name, case, device)
        if isinstance(prepared, Ready):
            cases.append(prepared)
            rows.append(prepared.row)
            continue
        rows.append(prepared)
        if prepared["status"] == "failed" and (broken := device.broken()) is not None:
            raise DeviceBroken(broken)
    return cases


def _fail(row: Row, error: Exception, device: Cpu) -> None:
    """Marks a case as failed. Raises DeviceBroken if no other one can be measured either."""
    row.update(status="failed", reason=_message(error))
    if (broken := device.broken()) is not None:
        raise DeviceBroken(broken) from error


def _warm_up(cases: Sequence[Ready], device: Cpu, effort: Effort) -> list[Ready]:
    """Runs each case until its caches are warm, and sets the repeats of its samples. Returns those
    that did not fail.
    """
    warm = []
    for case in cases:
        try:
            fastest = case.sample(device)
            # A pass that takes seconds has already run once, in the check.
            if fastest < 1.0:
                fastest = case.sample(device)
            for _ in range(4 if fastest < 0.1 else 0):
                fastest = min(fastest, case.sample(device))
        except Exception as error:
            _fail(case.row, error, device)
            continue
        case.estimate = fastest
        case.repeats = max(1, round(effort.sample_seconds / case.estimate))
        warm.append(case)
    return warm


def _summary(samples: Sequence[float]) -> dict[str, Any]:
    p20, median, p80 = np.percentile(samples, [20, 50, 80])
    return {
        "median": float(median),
        "p20": float(p20),
        "p80": float(p80),
        "samples": [float(f"{each:.5g}") for each in samples],
    }


def _time(cases: Sequence[Ready], effort: Effort, device: Cpu) -> None:
    """Sets the times of the rows."""
    one_round = sum(max(case.estimate, effort.sample_seconds) for case in cases)
    rounds = int(effort.seconds / one_round) if cases else 0
    rounds = min(max(rounds, effort.fewest_rounds), effort.most_rounds)
    samples: list[list[float]] = [[] for _ in cases]
    cold: list[list[float]] = [[] for _ in cases]
    order = list(range(len(cases)))
    try:
        for _ in range(rounds):
            for i in tuple(order):
                try:
                    samples[i].append(cases[i].sample(device))
                    if (seconds := cases[i].cold_sample(device)) is not None:
                        cold[i].append(seconds)
                except Exception as error:
                    order.remove(i)
                    _fail(cases[i].row, error, device)
            order.reverse()  # no case always follows the same other one
    finally:
        # After an interruption only complete rounds count.
        complete = min((len(samples[i]) for i in order), default=0)
        for i in order:
            row = cases[i].row
            if complete:
                row["seconds"] = _summary(samples[i][:complete]) | {"repeats": cases[i].repeats}
            if cold[i]:
                row["cold_seconds"] = _summary(cold[i])


def _time_kernels(cases: Sequence[Ready], backend: str, device: Cpu) -> None:
    """Sets the times of the kernels of our peers, slowest first."""
    for case in cases:
        if not PEERS[case.row["peer"]].exacting or case.row["status"] != "measured":
            continue
        try:
            with around(case.call, case.passes):
                found = device.kernels(partial(run_pass, case.call, case.passes))
        except Exception as error:
            _fail(case.row, error, device)
            continue
        workload = Workload(**case.row["workload"])
        rows = [
            {
                "kernel": name,
                **each,
                "predicted": bounds.predicted_microseconds(name, workload, case.passes, backend),
                "bound": bounds.kernel_microseconds(name, workload),
            }
            for name, each in found.items()
        ]
        case.row["kernels"] = sorted(rows, key=lambda row: -row["us"])


def _measure_memory(group: Group, cases: Sequence[Ready], device: Cpu, threads: int) -> None:
    """Sets the peak memory of the rows that the group asks for."""
    workload = group.cases[0].workload
    for case in cases:
        row = case.row
        wanted = row["peer"] in group.memory and row["workload"] == asdict(workload)
        if not wanted or row["status"] != "measured":
            continue
        try:
            row["peak_bytes"] = device.peak_bytes(workload, row["peer"], case.passes, threads)
        except (MemoryNotMeasured, OSError) as error:
            row["peak_reason"] = str(error)
        except RuntimeError as error:
            row["peak_reason"] = _message(error)
            if (broken := device.broken()) is not None:
                raise DeviceBroken(broken) from error


def _on_backend(backend: str) -> AbstractContextManager[None]:
    import convnn_kernels

    return convnn_kernels.backend(backend) if backend else nullcontext()


def measure(group: Group, device: Cpu, threads: int, rows: list[Row]) -> None:
    """Appends one row per case, including those that were skipped, refused or failed.

    Each row is appended once its result is checked, so that an interruption loses nothing.

    Raises:
        DeviceBroken: if a case left the device unusable.
    """
    device.prepare(threads)
    with _on_backend(group.backend):
        cases = _prepare_all(group, device, rows)
        if not group.effort.most_rounds:
            return
        gc.collect()
        cases = _warm_up(cases, device, group.effort)
        _time(cases, group.effort, device)
        if group.backend:
            _time_kernels(cases, group.backend, device)
        _measure_memory(group, cases, device, threads)
