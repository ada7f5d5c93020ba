# SPDX-License-Identifier: MIT
"""New processes that have PyTorch already: forked from one that has imported it, and no more.

Importing it takes most of the time of a short program, and of what is left, its counter of
operations, which imports Triton, takes two thirds.
"""

import multiprocessing
import os
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.utils.flop_counter"])


def environment(**changes: str) -> dict[str, str]:
    """Of a process that can import the package, python_ref and the modules of the tests."""
    paths = [path for path in sys.path if path] + [str(Path(__file__).parent), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}


def outside_workers() -> dict[str, str]:
    """The environment without that of a worker of pytest-xdist, for a pytest of its own."""
    return {name: value for name, value in os.environ.items() if "XDIST" not in name}


def run_forked(code: str, timeout: float, variables: Mapping[str, str]) -> tuple[int, str, str]:
    """Runs code in such a process and returns its exit status and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_run, args=(textwrap.dedent(code), variables, files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"the program did not end within {timeout} s")
        stdout, stderr = (file.read_text() if file.exists() else "" for file in files)
        return process.exitcode, stdout, stderr


def _run(code: str, variables: Mapping[str, str], files: list[Path]) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    if "convnn_kernels" in sys.modules:
        # The process that forks is the first one to be asked for, which may have been that of
        # benchmarks.memory: it has the package, without these variables.
        os.execve(sys.executable, [sys.executable, "-c", code], dict(variables))
    os.environ.clear()
    os.environ.update(variables)
    exec(code, {"__name__": "__main__"})
