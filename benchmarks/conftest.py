# SPDX-License-Identifier: MIT
"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("convnn benchmarks")
    group.addoption("--suite", default="quick", help="a suite of python -m benchmarks (quick)")
    group.addoption("--device", default="cpu", help="where to measure (cpu)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    from benchmarks.suites import SUITES

    suite, device = (metafunc.config.getoption(name) for name in ("--suite", "--device"))
    if suite not in SUITES:
        raise pytest.UsageError(f"--suite: one of {', '.join(SUITES)}, got {suite!r}")
    cases = [
        pytest.param((group, case), id=f"{group.name}-{case.peer}-{case.passes}-{i}")
        for group in SUITES[suite].groups(device)
        for i, case in enumerate(group.cases)
    ]
    metafunc.parametrize("case", cases)
