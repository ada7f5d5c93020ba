# SPDX-License-Identifier: MIT
"""A plugin of pytest that reports which tests ran, and what it is that they tested.

It writes lines of JSON to the file CONVNN_SLIPS_REPORT: `started`, `passed` and `failed` with the
name of a test, and `tested` with the digest of what the process has loaded. CONVNN_SLIPS_SUBJECT
says what that is: `library:NAME`, a library of the package; `program:PATH`; or `module:PATH`, a
file of the package. CONVNN_SLIPS_TESTS is a file of JSON with the name of the `stage`, the names of
tests that must not run, `left_out`, and of those that run before all others, `first`.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from tools.slips.server import limit_time
from tools.slips.slip import file_digest

# Fixtures of tests that start other processes, each of which takes seconds.
_IN_PROCESSES = {"run_python", "ranks"}


def _tests() -> Any:
    return json.loads(Path(os.environ["CONVNN_SLIPS_TESTS"]).read_text())


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
    tests = _tests()
    left_out = set(tests["left_out"])

    def runs(item: Any) -> bool:
        alone = not _IN_PROCESSES & set(item.fixturenames)
        by_stage = {"first": alone, "quick": alone, "processes": not alone}
        wanted = by_stage.get(tests["stage"], True)
        return wanted and item.nodeid not in left_out

    kept = [item for item in items if runs(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    places = {name: place for place, name in enumerate(tests["first"])}
    items[:] = sorted(kept, key=lambda item: places.get(item.nodeid, len(places)))


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
    limit_time(scale=1 if _tests()["stage"] != "slow" else 8)
    _report(started=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _report(failed=report.nodeid)
    elif report.when == "call" and report.passed:
        _report(passed=report.nodeid)
