# SPDX-License-Identifier: MIT
"""Runs tests in the copy of the checkout, and says which one noticed a slip."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tools.slips.server import Server

# Seconds that a run may take: so many times those without a slip, and these on top.
_SLOWER, _GRACE = 5, 60


@dataclass(frozen=True)
class Stage:
    """Some tests that run in one process."""

    name: str  # quick or slow
    files: tuple[str, ...]
    marks: str
    only: str = ""  # as of -k
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        return json.dumps([self.files, self.marks, self.only, self.environment])


@dataclass
class Ran:
    """What a process of tests reported."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    running: str = ""  # when the process ended
    tested: str = ""  # the digest of what was loaded
    seconds: float = 0.0
    took: dict[str, float] = field(default_factory=dict)  # by test
    timed_out: bool = False
    status: int = 0
    output: str = ""


def run(
    server: Server,
    tree: Path,
    stage: Stage,
    subject: str,
    *,
    left_out: Iterable[str] = (),
    first_failure: bool = True,
    seconds: float | None = None,
) -> Ran:
    """Run the tests of a stage, until the first failure unless told otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        report, names, output = (Path(folder, name) for name in ("report", "left-out", "output"))
        for file in (report, output):
            file.touch()
        names.write_text("\n".join(left_out))
        arguments = ["-q", "-p", "tools.slips.witness", "-p", "no:cacheprovider", "--tb=line"]
        arguments += ["-m", stage.marks]
        arguments += ["-x"] if first_failure else []
        arguments += ["-k", stage.only] if stage.only else []
        environment = {
            "PYTHONPATH": str(tree),
            "CONVNN_SLIPS_REPORT": str(report),
            "CONVNN_SLIPS_LEFT_OUT": str(names),
            "CONVNN_SLIPS_SUBJECT": subject,
            **dict(stage.environment),
        }
        start = time.monotonic()
        status = server.run([*arguments, *stage.files], tree, environment, output, seconds)
        ran = read_report(report.read_text())
        ran.output = output.read_text(errors="replace")[-3000:]
    ran.seconds = time.monotonic() - start
    ran.timed_out, ran.status = status is None, status or 0
    return ran


def read_report(text: str) -> Ran:
    ran = Ran()
    for line in text.splitlines():
        for kind, value in json.loads(line).items():
            if kind == "started":
                ran.running = value
            elif kind == "tested":
                ran.tested = value
            elif kind == "failed":
                ran.failed.append(value)
            elif kind == "took":
                ran.took[value[0]] = ran.took.get(value[0], 0.0) + value[1]
            else:
                ran.passed.append(value)
    return ran


@dataclass(frozen=True)
class Baseline:
    """A stage without a slip."""

    passed: frozenset[str]
    left_out: frozenset[str]  # what failed
    seconds: float

    @property
    def limit(self) -> float:
        return _GRACE + _SLOWER * self.seconds


class StaleBuild(Exception):
    """The tests did not load what was built."""


def killer(ran: Ran, baseline: Baseline, expected: str) -> str | None:
    """The test that noticed a slip: `expected` is the digest of what has it.

    A crash or a run that does not end counts for the test that was running.

    Raises:
        StaleBuild: if the process loaded anything else, whatever failed.
    """
    if ran.tested != expected:
        loaded = ran.tested or "nothing"
        raise StaleBuild(f"the tests loaded {loaded}, not {expected}: {ran.output}")
    for name in ran.failed:
        if name in baseline.passed or "::" not in name:
            return name
    if ran.failed:
        return None
    if ran.timed_out or ran.status not in (0, 5):
        return ran.running or "collection"
    return None
