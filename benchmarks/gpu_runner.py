# SPDX-License-Identifier: MIT
"""Runs the cases of a stage within time limits, so that a crash or a hang costs only that case.

Cases run in processes forked from this one, which has imported PyTorch but never uses a GPU. They
send each result through a pipe at once. If a process crashes, hangs or breaks its GPU context,
another one takes over its remaining cases. None outlives this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
Note = Callable[[str, Record], None]


class Skipped(Exception):
    """A case cannot run here; the message says why."""


@dataclass
class Context:
    """The environment of a case.

    folder: for files. seconds: limit of the stage. results: of all cases so far. emit: reports part
    of the case as a separate result. compiled: names of the kernels that Triton has compiled.
    """

    device: str
    folder: Path
    seconds: float = 0.0
    results: list[Record] = field(default_factory=list)
    emit: Note = lambda case, record: None
    compiled: list[str] = field(default_factory=list)

    def found(self, stage: str) -> dict[str, Record]:
        """The last result of each case."""
        return {each["case"]: each for each in self.results if each.get("stage") == stage}


@dataclass(frozen=True)
class Stage:
    """cases: returns their names for a device. run: returns the results of a case, or raises.

    seconds, case_seconds: limits of the stage and of each case. workers: processes that share the
    cases; one if anything is timed.
    """

    name: str
    seconds: float
    cases: Callable[[str], Sequence[str]]
    run: Callable[[str, Context], Record]
    workers: int = 1
    case_seconds: float = 30.0


def finds_a_gpu() -> bool:
    """Asks in another process, because this one must not use a GPU."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if torch.cuda.is_available() else 1)
    )
    process.start()
    process.join()
    return process.exitcode == 0


def _work(stage: Stage, cases: Sequence[str], context: Context, pipe: Connection) -> None:
    """The body of a process. Sends (case, {}) when a case begins, and its record when it ends."""
    os.setpgid(0, 0)  # so that a case is killed together with what it has started
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    faulthandler.register(signal.SIGUSR1, 2)  # standard error
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // stage.workers))
    context.emit = lambda case, record: pipe.send((case, record))
    for case in cases:
        pipe.send((case, {}))
        began, compiled = time.monotonic(), len(context.compiled)
        try:
            record: Record = {"status": "passed"} | stage.run(case, context)
        except Skipped as reason:
            record = {"status": "skipped", "why": str(reason)}
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error}"[:1500]
            record = {"status": "failed", "why": f"{why} [{frame.filename}:{frame.lineno}]"}
        record["compiled"] = len(context.compiled) - compiled
        pipe.send((case, record | {"seconds": round(time.monotonic() - began, 2)}))
        if context.device == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises, and ends this process, if its context is broken


class _Worker:
    """A process, its unfinished cases, and the one that is running."""

    def __init__(self, stage: Stage, cases: Sequence[str], context: Context) -> None:
        self.cases, self.case, self.began = list(cases), cases[0], time.monotonic()
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe(duplex=False)
        self.process = fork.Process(target=_work, args=(stage, cases, context, theirs))
        self.process.start()
        self.pid = self.process.pid or os.getpid()
        with contextlib.suppress(OSError):  # the process may have done it already
            os.setpgid(self.pid, self.pid)
        theirs.close()

    def read(self, note: Note) -> bool:
        """Passes on the results that have arrived. False if the process has ended."""
        try:
            while self.pipe.poll():
                case, record = self.pipe.recv()
                if not record:
                    self.case, self.began = case, time.monotonic()
                    continue
                note(case, record)
                self.cases = [each for each in self.cases if each != case]
        except (EOFError, OSError):
            self.process.join(3)
            return False
        return True

    def kill(self, print_stack: bool = False) -> None:
        for number in (signal.SIGUSR1, signal.SIGKILL) if print_stack else (signal.SIGKILL,):
            with contextlib.suppress(OSError):
                os.killpg(self.pid, number)
            self.process.join(0.3 if number == signal.SIGUSR1 else 3)


def run_stage(stage: Stage, context: Context, add: Callable[[Record], None]) -> Record:
    """Runs the cases that context.results lacks, or has as stopped or skipped, for at most
    context.seconds, and passes each result to `add`.

    Returns the seconds it took, and the counts of results by status, of earlier results, and of
    compiled kernels.
    """
    began, counts = time.monotonic(), Counter[str]()
    end = began + context.seconds

    def note(case: str, record: Record) -> None:
        counts[record["status"]] += 1
        counts["kernels compiled"] += record.get("compiled", 0)
        add({"stage": stage.name, "case": case} | record)

    earlier = context.found(stage.name).items()
    done = {case for case, each in earlier if each["status"] not in ("stopped", "skipped")}
    todo = [case for case in stage.cases(context.device) if case not in done]
    counts["done earlier"] = len(done)
    if context.seconds <= 0:
        counts["not started"], todo = len(todo), []
    parts = (todo[i :: stage.workers] for i in range(stage.workers))
    workers = [_Worker(stage, part, context) for part in parts if part]
    try:
        while workers:
            limit = min(end, *(each.began + stage.case_seconds for each in workers))
            wait([each.pipe for each in workers], max(0.0, limit - time.monotonic()))
            for worker in tuple(workers):
                alive, now = worker.read(note), time.monotonic()
                if alive and now < min(end, worker.began + stage.case_seconds):
                    continue
                status = "crashed" if not alive else "stopped" if now >= end else "hung"
                workers.remove(worker)
                worker.kill(print_stack=status == "hung")
                if worker.case in worker.cases:
                    worker.cases.remove(worker.case)
                    why = f"after {now - worker.began:.1f} s, exit status {worker.process.exitcode}"
                    note(worker.case, {"status": status, "why": why})
                if worker.cases and now < end:
                    workers.append(_Worker(stage, worker.cases, context))
                else:
                    counts["not started"] += len(worker.cases)
    finally:
        for worker in workers:
            worker.kill()
    return {"seconds": round(time.monotonic() - began, 1), "counts": dict(+counts)}
