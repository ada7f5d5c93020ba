# SPDX-License-Identifier: MIT
"""A plugin of pytest that writes down each test as it ends, and what reads that again.

`python -m pytest -p benchmarks.outcomes` with CONVNN_OUTCOMES naming a file. Whatever stops the
tests, those that had ended are there, which is not so of pytest's own reports.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "CONVNN_OUTCOMES"
# Of what a test says when it fails, and of such tests, that much is kept.
_CHARACTERS = 1200
_FAILURES = 60


def pytest_runtest_logreport(report: Any) -> None:
    # A worker of pytest-xdist hands its reports to the process that has started it.
    if "PYTEST_XDIST_WORKER" in os.environ or VARIABLE not in os.environ:
        return
    if report.when != "call" and report.outcome == "passed":
        return
    why = report.longrepr
    if report.outcome == "skipped" and isinstance(why, tuple):
        why = why[2].removeprefix("Skipped: ")
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "properties": dict(report.user_properties) if report.when == "call" else {},
        "why": str(why)[-_CHARACTERS:] if report.outcome != "passed" else "",
    }
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Counts of tests, sums of what they counted, those that failed, and the slowest."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    sums: dict[str, int] = {}
    failed: dict[str, str] = {}
    skipped: dict[str, int] = {}
    slowest: list[tuple[float, str]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # the last one, cut off
            continue
        name = line["test"].rpartition("/")[2]
        if line["outcome"] == "failed":
            # A test whose process ends is reported twice.
            counts["failed"] += name not in failed
            failed.setdefault(name, line["why"])
        else:
            counts[line["outcome"]] += 1
        if line["outcome"] == "skipped":
            skipped[line["why"]] = skipped.get(line["why"], 0) + 1
        for key, value in line["properties"].items():
            sums[key] = sums.get(key, 0) + value
        slowest.append((line["seconds"], name))
    return {
        "tests": counts,
        "sums": sums,
        "failed": dict(list(failed.items())[:_FAILURES]),
        "skipped": skipped,
        "slowest": sorted(slowest, reverse=True)[:5],
    }
