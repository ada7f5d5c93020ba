# SPDX-License-Identifier: MIT
"""Fixed seeds and thread counts, new memory filled with NaN, and fixtures that run programs."""

import collections
import ctypes
import gc
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from building import build
from host_cuda_program import Choices, HostCuda, Sweep
from instruction_sets import INSTRUCTION_SETS, quick_last
from processes import environment
from quick_cases import quick_cases
from ranks import Ranks, started

ROOT = Path(__file__).parent.parent
THREADS = 2

_gpu_tests_not_run: collections.Counter[str] = collections.Counter()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        # Threads that wait would keep the cores from those of other workers.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _fill_new_memory()
    # Tests neither read nor write the user's cache.
    os.environ["CONVNN_CACHE"] = "0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        _speed_up_interpreter()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: each worker needs about a GB, and ten seconds to collect the tests."""
    return min(len(os.sched_getaffinity(0)), 4)


def _speed_up_interpreter() -> None:
    """Prepare Triton's language for a module once, not at every call of a function in a kernel."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    seen = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__globals__["__name__"]
        if module not in seen:
            seen.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _fill_new_memory() -> None:
    """Have glibc fill new memory with bytes of 0xff, so that an element never written is NaN or -1.

    This includes the outputs and workspaces of the C++ library, which PyTorch's
    `fill_uninitialized_memory` does not.
    """
    if platform.libc_ver()[0] == "glibc":
        # M_PERTURB is -6; its lowest byte is inverted for new memory.
        ctypes.CDLL(None).mallopt(-6, 0x100)


def pytest_collection() -> None:
    """The garbage collector never looks at the tests themselves, which are some ten thousand."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Mark as slow the cases that `quick_one_in(n)` leaves out, whichever cases are asked for."""
    made = yield
    cases = [each for each in made if isinstance(each, pytest.Function)] if made else []
    marker = cases[0].get_closest_marker("quick_one_in") if cases else None
    cases = [case for case in cases if not case.get_closest_marker("slow")]
    if marker and cases:
        quick = quick_cases(cases, *marker.args)
        for case in cases:
            if case not in quick:
                case.add_marker("slow")
                case.add_marker("left_out")
    return made


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            _gpu_tests_not_run[item.nodeid.partition("[")[0]] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu_tests_not_run"] = dict(_gpu_tests_not_run)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each worker of pytest-xdist deselects the same tests."""
    global _gpu_tests_not_run
    _gpu_tests_not_run |= getattr(node, "workeroutput", {}).get("gpu_tests_not_run", {})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the GPU tests that did not run, whether they were deselected or skipped."""
    for report in terminalreporter.stats.get("skipped", []):
        # The report of a skipped module has no keywords.
        if "gpu" in getattr(report, "keywords", ()) and "no NVIDIA GPU" in str(report.longrepr):
            _gpu_tests_not_run[report.nodeid.partition("[")[0]] += 1
    if _gpu_tests_not_run and not torch.cuda.is_available():
        total = sum(_gpu_tests_not_run.values())
        terminalreporter.write_sep("=", f"{total} GPU tests not run: no NVIDIA GPU here")
        for name, count in sorted(_gpu_tests_not_run.items()):
            terminalreporter.write_line(f"{count:4} {name}")


@pytest.fixture(autouse=True)
def _fixed_state() -> Iterator[None]:
    """Start each test with one seed and two threads, and restore global settings after it."""
    # For each kind of device that is missing, torch.manual_seed formats the stack.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)
    torch.set_num_threads(THREADS)
    yield
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)  # imports the compiler
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def two_threads(one_thread: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture(params=quick_last(INSTRUCTION_SETS))
def instruction_set(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run code in a new process and return what it prints; fail the test if it fails.

    The process can import the package, python_ref and the modules of the tests.
    """

    def run(code: str, timeout: float = 300.0, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return _printed(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def run_forked() -> Callable[..., str]:
    """As `run_python`, a second faster: the process is forked from one that has PyTorch.

    For code that depends neither on how Python and PyTorch start nor on how they end.
    """

    def run(code: str, timeout: float = 300.0, **variables: str) -> str:
        return _printed(*processes.run_forked(code, timeout, environment(**variables)))

    return run


def _printed(status: int, stdout: str, stderr: str) -> str:
    if status != 0:
        pytest.fail(f"exit status {status}\n{stdout}\n{stderr}")
    return stdout


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three processes for all tests of several."""
    with started(3, tmp_path_factory.mktemp("ranks")) as each:
        yield each


@pytest.fixture(scope="module")
def programs() -> Path:
    """Builds the programs of `tests/host_cuda` and returns their folder; or CONVNN_HOST_CUDA."""
    if "CONVNN_HOST_CUDA" in os.environ:
        return Path(os.environ["CONVNN_HOST_CUDA"]).resolve()
    folder = ROOT / "build" / "host_cuda"
    targets = ["host_cuda", "host_cuda_faults", "host_cuda_hopper_faults", "host_cuda_hopper_sweep"]
    build(folder, *targets)
    return folder / "tests" / "host_cuda"


@pytest.fixture(scope="module")
def shared_device(programs: Path) -> Iterator[list[HostCuda]]:
    devices: list[HostCuda] = []
    yield devices
    if devices and devices[0].alive():
        devices[0].close()


@pytest.fixture
def device(programs: Path, shared_device: list[HostCuda]) -> HostCuda:
    """One program for all tests, and a new one after a crash."""
    if not shared_device or not shared_device[-1].alive():
        shared_device[:] = [HostCuda(programs / "host_cuda")]
    shared_device[0].seed, shared_device[0].most_bytes = 0, 2**26
    shared_device[0].choices, shared_device[0].sweep = Choices(), Sweep.HOPPER
    return shared_device[0]
