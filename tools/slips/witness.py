# SPDX-License-Identifier: MIT
"""A plugin of pytest that reports which tests ran, and what it is that they tested.

It writes lines of JSON to the file CONVNN_SLIPS_REPORT: `started`, `passed` and `failed` with the
name of a test, `took` with the seconds of one, and `tested` with the digest of what the process has
loaded. CONVNN_SLIPS_SUBJECT
says what that is: `library:NAME`, a library of the package; `program:PATH`; or `module:PATH`, a
file of the package. CONVNN_SLIPS_LEFT_OUT is a file with the names of tests that must not run, one
in a line.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from tools.slips.slip import file_digest


def _package() -> Path:
    found = importlib.util.find_spec("convnn_kernels")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _loaded(subject: str) -> Path:
    kind, _, name = subject.partition(":")
    if kind == "program":
        return Path(name)
    if kind == "module":
        return _package() / name
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if path.endswith("/" + name):
            return Path(path)
    return _package() / "lib" / name  # not loaded, perhaps because it cannot be


def _report(**event: Any) -> None:
    with open(os.environ["CONVNN_SLIPS_REPORT"], "a") as file:
        file.write(json.dumps(event) + "\n")


def pytest_configure() -> None:
    _report_tested()  # in case that loading it ends the process


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    left_out = set(Path(os.environ["CONVNN_SLIPS_LEFT_OUT"]).read_text().splitlines())
    dropped = [item for item in items if item.nodeid in left_out]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item.nodeid not in left_out]


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _report(failed=report.nodeid or "collection")


def pytest_collection_finish() -> None:
    _report_tested()


def pytest_sessionfinish() -> None:
    _report_tested()


def _report_tested() -> None:
    _report(tested=file_digest(_loaded(os.environ["CONVNN_SLIPS_SUBJECT"])))


def pytest_runtest_logstart(nodeid: str) -> None:
    _report(started=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    _report(took=[report.nodeid, round(report.duration, 3)])
    if report.failed:
        _report(failed=report.nodeid)
    elif report.when == "call" and report.passed:
        _report(passed=report.nodeid)
