# SPDX-License-Identifier: MIT
"""A pytest plugin that writes each outcome to the file CONVNN_OUTCOMES as soon as a test ends, and
deselects the tests listed in the file CONVNN_DONE."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def pytest_collection_modifyitems(items: list[Any]) -> None:
    done = set(Path(os.environ["CONVNN_DONE"]).read_text().splitlines())
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: Any) -> None:
    # A worker of pytest-xdist sends its reports to the main process, which writes them.
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    record = {"status": report.outcome, "seconds": round(report.duration, 2)}
    if not report.passed:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        record["why"] = why.removeprefix("Skipped: ")[-1200:]
    with Path(os.environ["CONVNN_OUTCOMES"]).open("a") as file:
        file.write(json.dumps([report.nodeid, record | dict(report.user_properties)]) + "\n")
