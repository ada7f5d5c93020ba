# SPDX-License-Identifier: MIT
"""Seeds, thread count, and processes of their own for tests that need one."""

import collections
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, quick_last

ROOT = Path(__file__).parent.parent
THREADS = 2


_gpu_tests_left_out: collections.Counter[str] = collections.Counter()


def _count_gpu_tests(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            _gpu_tests_left_out[item.nodeid.partition("[")[0]] += 1


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    _count_gpu_tests(items)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """GPU tests that did not run are counted and named, however they were left out."""
    for report in terminalreporter.stats.get("skipped", []):
        # A whole module left out has no keywords.
        if "gpu" in getattr(report, "keywords", ()) and "no NVIDIA GPU" in str(report.longrepr):
            _gpu_tests_left_out[report.nodeid.partition("[")[0]] += 1
    if _gpu_tests_left_out and not torch.cuda.is_available():
        total = sum(_gpu_tests_left_out.values())
        terminalreporter.write_sep("=", f"{total} GPU tests not run: no NVIDIA GPU here")
        for name, count in sorted(_gpu_tests_left_out.items()):
            terminalreporter.write_line(f"{count:4} {name}")


@pytest.fixture(autouse=True)
def _fixed_state() -> Iterator[None]:
    """Every test starts from one seed and two threads, and leaves the switches as they were."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(THREADS)


@pytest.fixture(params=quick_last(INSTRUCTION_SETS))
def instruction_set(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run code in a process of its own and return what it prints; fail if it fails.

    The process imports what this one does: the tests' modules, python_ref and the package.
    """

    def run(code: str, timeout: float = 300.0, **environment: str) -> str:
        paths = [path for path in sys.path if path] + [str(Path(__file__).parent), str(ROOT)]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run
