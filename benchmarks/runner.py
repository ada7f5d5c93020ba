# SPDX-License-Identifier: MIT
"""Measure the cases of a group: the gate, then the clock, then memory.

All cases of a group are timed in turn, round after round, so that whatever else the machine does
meets all of them alike; a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from . import bounds, gate
from .devices import Device
from .memory import MemoryNotMeasured
from .peers import PEERS, Call, Peer, Unavailable, gradient_mode, run_pass
from .workloads import Workload, make_inputs

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long to time a group: about `seconds`, within the bounds on rounds.

    sample_seconds: a pass that is quicker is repeated within one sample until it lasts this long.
    """

    seconds: float = 10.0
    fewest_rounds: int = 3
    most_rounds: int = 40
    sample_seconds: float = 0.01


QUICK = Effort(seconds=2.0, fewest_rounds=3, most_rounds=10)


@dataclass(frozen=True)
class Case:
    """One peer and pass on one workload."""

    workload: Workload
    peer: str
    passes: str = "forward"


@dataclass(frozen=True)
class Group:
    """What is timed in turn, and so may be divided by one another.

    memory: the peers whose peak memory is measured too, on the first workload. backend: forces one
    on our operators, and the time of each of their kernels is taken, too.
    """

    name: str
    cases: tuple[Case, ...]
    effort: Effort = Effort()
    memory: tuple[str, ...] = ()
    backend: str = ""


class DeviceBroken(RuntimeError):
    """Nothing can be measured in this process any more; the message says why."""


@dataclass
class Ready:
    """A case that was checked and can be timed."""

    row: Row
    call: Call
    passes: str
    repeats: int = 1
    estimate: float = 0.0

    def sample(self, device: Device) -> float:
        """Seconds of one pass, averaged over `repeats`."""
        if self.call.sample is not None:
            return self.call.sample(self.repeats)
        with gradient_mode(self.passes):
            return device.seconds(lambda: run_pass(self.call, self.passes), self.repeats)

    def cold_sample(self, device: Device) -> float | None:
        if self.call.sample is not None:
            return None
        with gradient_mode(self.passes):
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


def _skipped(row: Row, reason: str) -> Row:
    return row | {"status": "skipped", "reason": " ".join(reason.split())}


def prepare(group: str, case: Case, device: Device) -> Ready | Row:
    """A case that passed the gate, or a row that says why there is none."""
    peer, workload, passes = PEERS[case.peer], case.workload, case.passes
    row = new_row(group, case, peer)
    if passes not in peer.passes:
        return _skipped(row, f"has no {passes} pass")
    backward = passes == "forward+backward"
    needed = peer.bytes_needed(workload, backward)
    limit = device.memory_bytes()
    if needed > limit:
        return _skipped(
            row, f"needs about {needed / 1e9:.0f} GB, the limit is {limit / 1e9:.0f} GB"
        )
    try:
        call = peer.build(workload, make_inputs(workload, device.where, requires_grad=backward))
        row["checked"] = gate.check(peer, workload, call, passes)
    except Unavailable as error:
        return _skipped(row, str(error))
    except AssertionError as error:
        return row | {"status": "refused", "reason": " ".join(str(error).split())}
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return row | {"status": "failed", "reason": reason[:500]}
    return Ready(row, call, passes)


def _prepare_all(
    group: Group, device: Device, rows: list[Row], advance: Callable[[str], None]
) -> list[Ready]:
    cases: list[Ready] = []
    for case in group.cases:
        advance(f"checking {case.peer}")
        prepared = prepare(group.name, case, device)
        if isinstance(prepared, Ready):
            cases.append(prepared)
            rows.append(prepared.row)
            continue
        rows.append(prepared)
        if prepared["status"] == "failed" and (broken := device.broken()) is not None:
            raise DeviceBroken(broken)
    return cases


def _fail(row: Row, error: Exception, device: Device) -> None:
    """The case is left out from here on; DeviceBroken if no other one can be measured either."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    row.update(status="failed", reason=reason[:500])
    if (broken := device.broken()) is not None:
        raise DeviceBroken(broken) from error


def _warm_up(cases: Sequence[Ready], device: Device, effort: Effort) -> list[Ready]:
    """Run each case until its caches are filled, and fix how often a sample repeats it. Returns
    those that could be run."""
    warm = []
    for case in cases:
        try:
            quickest = case.sample(device)
            # A pass of seconds ran once already, in the gate.
            if quickest < 1.0:
                quickest = case.sample(device)
            for _ in range(4 if quickest < 0.1 else 0):
                quickest = min(quickest, case.sample(device))
        except Exception as error:
            _fail(case.row, error, device)
            continue
        case.estimate = quickest
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


def _time(cases: Sequence[Ready], rounds: int, device: Device, advance: Callable[[], None]) -> None:
    """Fill in the times of the rows."""
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
            order.reverse()  # no case always runs after the same other one
            advance()
    finally:
        # An interruption keeps the rounds that are whole.
        whole = min((len(samples[i]) for i in order), default=0)
        for i in order:
            row = cases[i].row
            if whole:
                row["seconds"] = _summary(samples[i][:whole]) | {"repeats": cases[i].repeats}
            if cold[i]:
                row["cold_seconds"] = _summary(cold[i])


@contextmanager
def _progress(title: str | None) -> Iterator[tqdm]:
    """A bar on a terminal; nothing in a log, or without a title."""
    bar_format = "{desc:<72}{bar:20} {n_fmt}/{total_fmt} [{elapsed}]"
    disable = True if title is None else None
    with tqdm(total=0, bar_format=bar_format, disable=disable, leave=False) as bar:
        yield bar


def _forced(backend: str) -> AbstractContextManager[None]:
    import convnn_kernels

    return convnn_kernels.backend(backend) if backend else nullcontext()


def _time_kernels(cases: Sequence[Ready], backend: str, device: Device) -> None:
    """Fill in what each kernel takes in a pass of a peer of ours, the heaviest first."""
    for case in cases:
        if not PEERS[case.row["peer"]].exacting or case.row["status"] != "measured":
            continue
        try:
            with gradient_mode(case.passes):
                found = device.kernels(partial(run_pass, case.call, case.passes))
        except Exception as error:
            _fail(case.row, error, device)
            continue
        workload = Workload(**case.row["workload"])
        rows = [
            {
                "kernel": name,
                **each,
                "predicted": bounds.predicted_microseconds(name, workload, backend),
                "bound": bounds.kernel_microseconds(name, workload),
            }
            for name, each in found.items()
        ]
        case.row["kernels"] = sorted(rows, key=lambda row: -row["us"])


def measure(
    group: Group, device: Device, threads: int, rows: list[Row], title: str | None = None
) -> None:
    """Append one row for each case, also for those that were skipped, refused or failed.

    A row is there as soon as its case is checked, so that an interruption keeps what is known.

    Raises:
        DeviceBroken: where a case has left the device so that no other one can be measured.
    """
    device.prepare(threads)
    with _progress(title) as bar, _forced(group.backend):
        bar.total = len(group.cases)

        def advance(what: str) -> None:
            bar.set_description_str(f"{title}: {what}")
            bar.update()

        cases = _prepare_all(group, device, rows, advance)
        if not group.effort.most_rounds:
            return
        gc.collect()
        bar.set_description_str(f"{title}: warming up")
        cases = _warm_up(cases, device, group.effort)
        one_round = sum(max(case.estimate, group.effort.sample_seconds) for case in cases)
        rounds = int(group.effort.seconds / one_round) if cases else 0
        rounds = min(max(rounds, group.effort.fewest_rounds), group.effort.most_rounds)
        bar.reset(total=rounds)
        bar.set_description_str(f"{title}: timing, rounds")
        _time(cases, rounds, device, bar.update)
        if group.backend:
            _time_kernels(cases, group.backend, device)

        first = asdict(group.cases[0].workload)
        measured = [
            ready
            for ready in cases
            if ready.row["peer"] in group.memory
            and ready.row["workload"] == first
            and ready.row["status"] == "measured"
        ]
        bar.reset(total=len(measured))
        for ready in measured:
            row = ready.row
            bar.set_description_str(f"{title}: memory of {row['peer']}")
            workload = Workload(**row["workload"])
            try:
                row["peak_bytes"] = device.peak_bytes(workload, row["peer"], ready.passes, threads)
            except (MemoryNotMeasured, OSError) as error:
                row["peak_reason"] = str(error)
            except RuntimeError as error:
                row["peak_reason"] = " ".join(str(error).split())[:500]
                if (broken := device.broken()) is not None:
                    raise DeviceBroken(broken) from error
            bar.update()
