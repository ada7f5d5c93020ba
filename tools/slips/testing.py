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

# In this order: the tests that notice most; other quick ones; of both, those that start other
# processes, each of which takes seconds; slow ones.
STAGES = ["first", "quick", "processes", "slow"]


@dataclass(frozen=True)
class Stage:
    """Some tests that run in one process."""

    name: str  # one of STAGES
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
    first: Iterable[str] = (),
    collect_only: bool = False,
) -> Ran:
    """Run the tests of a stage, until the first failure."""
    with tempfile.TemporaryDirectory() as folder:
        report, tests, output = (Path(folder, name) for name in ("report", "tests", "output"))
        for file in (report, output):
            file.touch()
        tests.write_text(
            json.dumps({"stage": stage.name, "left_out": list(left_out), "first": list(first)})
        )
        arguments = ["-q", "-p", "tools.slips.witness", "-p", "no:cacheprovider", "--tb=line"]
        arguments += ["-m", stage.marks]
        arguments += ["--collect-only"] if collect_only else ["-x"]
        arguments += ["-k", stage.only] if stage.only else []
        environment = {
            "PYTHONPATH": str(tree),
            "CONVNN_SLIPS_REPORT": str(report),
            "CONVNN_SLIPS_TESTS": str(tests),
            "CONVNN_SLIPS_SUBJECT": subject,
            **dict(stage.environment),
        }
        start = time.monotonic()
        status = server.run([*arguments, *stage.files], tree, environment, output)
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
            else:
                ran.passed.append(value)
    return ran


class StaleBuild(Exception):
    """The tests did not load what was built."""


def killer(ran: Ran, expected: str) -> str | None:
    """The test that noticed a slip, if one did; `expected` is the digest of what has it.

    A crash or a run that does not end counts for the test that was running.

    Raises:
        StaleBuild: if the process loaded anything else, whatever failed.
    """
    if ran.tested != expected:
        loaded = ran.tested or "nothing"
        raise StaleBuild(f"the tests loaded {loaded}, not {expected}: {ran.output}")
    if ran.failed:
        return ran.failed[0]
    if ran.timed_out or ran.status not in (0, 5):
        return ran.running or "collection"
    return None
