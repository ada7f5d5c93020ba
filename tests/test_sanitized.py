# SPDX-License-Identifier: MIT
"""Random calls of the CPU library under AddressSanitizer, UBSan and ThreadSanitizer.

`tests/sanitized` runs calls made from seeds with every instruction set that the machine has. Each
tensor is an allocation of its own, and there are gaps between the arrays in scratch memory
(`csrc/cpu/guard.h`). The calls run twice, with new memory filled in two ways and with tasks divided
into other ranges, and results must be equal: nothing reads what nobody wrote. Under ThreadSanitizer
variables are filled in another way, too. Calls through PyTorch reach the argument checks.

The same programs with planted faults (`tests/sanitized/plant.py`) show that each of these checks
can fail. This builds and runs all of it:

    python -m pytest -m sanitized
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from building import ROOT, build

from convnn_kernels import native

pytestmark = [pytest.mark.sanitized, pytest.mark.slow]

CALLS, CALLS_IN_THREADS, CALLS_THROUGH_PYTORCH = 3000, 150, 500
COMPILER = os.environ.get("CXX", "c++")
REQUIRED = os.environ.get("CONVNN_SANITIZERS") == "1"
# The runs of one comparison: the byte that new memory is filled with, and ranges of tasks.
WAYS = ((255, "one-range"), (0, "reversed"))


def same_addresses() -> list[str]:
    """What starts a program at addresses that are not random: some sanitizers need that."""
    command = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*command, "true"]).returncode == 0:
        return command
    return []


def options(byte: int = 255, **more: str) -> dict[str, str]:
    """The environment of a program under sanitizers, with new memory filled with this byte."""
    # The stack that outlives functions is not aligned for vectors of 64 bytes (GCC 12).
    address = "max_malloc_fill_size=1073741824:detect_stack_use_after_return=0:abort_on_error=1"
    return {
        **os.environ,
        "ASAN_OPTIONS": f"{address}:malloc_fill_byte={byte}",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        # Without abort: the handler of its signal would wait for what the report holds.
        "TSAN_OPTIONS": "halt_on_error=1:abort_on_error=0",
        **more,
    }


class Run:
    """A program that has been started."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        # No pipe: when that is full, the program waits until the output of another is read.
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by result()
        self.process = subprocess.Popen(
            [*same_addresses(), *command],
            env=environment,
            cwd=folder,
            stdout=self.output,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> tuple[int, list[str], str]:
        """Exit status, lines of output, and what the sanitizers say."""
        _, errors = self.process.communicate(timeout=600)
        with self.output:
            self.output.seek(0)
            return self.process.returncode, self.output.read().splitlines(), errors

    def lines(self) -> list[str]:
        status, lines, errors = self.result()
        if status != 0:
            pytest.fail(f"exit status {status}\n{errors[:6000]}")
        return lines


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the programs and returns their folder. CONVNN_SANITIZERS=1 requires a compiler."""
    probe = tmp_path_factory.mktemp("probe") / "probe.cpp"
    probe.write_text("int main() {}\n")
    for kind in ("address,undefined", "thread"):
        flags = [f"-fsanitize={kind}", "-ftrivial-auto-var-init=zero"]
        done = subprocess.run(
            [COMPILER, *flags, str(probe), "-o", str(probe.with_suffix(""))],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0 or not Path(preloaded()[0]).is_file():
            reason = f"needs GCC 12 with sanitizers, {COMPILER} says: {done.stderr.strip()}"
            pytest.fail(reason) if REQUIRED else pytest.skip(reason)
    build(ROOT / "build" / "sanitized", "sanitized")
    return ROOT / "build" / "sanitized" / "tests" / "sanitized"


def preloaded() -> list[str]:
    """The libraries that Python must load first."""
    return [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan", "libubsan", "libstdc++")
    ]


@pytest.fixture(scope="module")
def instruction_sets(programs: Path) -> list[str]:
    """Those of the programs; the package may have been built with fewer."""
    command = [programs / "address_calls", "sets"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(found) >= set(native.usable_cpu_instruction_sets())
    return found


@contextlib.contextmanager
def calls(program: Path, count: int, way: str, byte: int = 255, **more: str) -> Iterator[Run]:
    run = Run([str(program), "0", str(count), way], options(byte, **more), program.parent)
    try:
        yield run
    finally:
        run.process.kill()


@pytest.fixture(scope="module")
def results(programs: Path) -> list[str]:
    """The results of CALLS calls with each instruction set, which two ways must agree on."""
    (first, one_range), (second, backwards) = WAYS
    program = programs / "address_calls"
    with (
        calls(program, CALLS, one_range, first) as a,
        calls(program, CALLS, backwards, second) as b,
    ):
        lines = a.lines()
        assert_equal(b.lines(), lines)
    return lines


def assert_equal(got: list[str], expected: list[str]) -> None:
    different = [pair for pair in zip(got, expected, strict=True) if pair[0] != pair[1]]
    assert not different, f"{len(different)} results differ, first:\n" + "\n".join(different[0])


def test_random_calls(results: list[str], instruction_sets: list[str]) -> None:
    assert len(results) == CALLS * len(instruction_sets)


def test_threads(
    programs: Path, instruction_sets: list[str], results: list[str], tmp_path: Path
) -> None:
    """Callers at once, each with threads, beginning with the choice of an instruction set."""
    program = programs / "thread_calls"
    with calls(program, CALLS_IN_THREADS, "threads", CONVNN_CACHE=str(tmp_path)) as run:
        lines = run.lines()
    assert len(lines) == CALLS_IN_THREADS * len(instruction_sets)
    expected = {tuple(line.split(" ", 2)[:2]): line for line in results}
    assert_equal(lines, [expected[tuple(line.split(" ", 2)[:2])] for line in lines])


def test_threads_with_a_remembered_choice(
    programs: Path, instruction_sets: list[str], tmp_path: Path
) -> None:
    found = []
    for _ in range(2):
        with calls(programs / "thread_calls", 4, "threads", CONVNN_CACHE=str(tmp_path)) as run:
            found.append(run.lines())
        assert len(list(tmp_path.iterdir())) == (len(instruction_sets) > 2)
    assert_equal(*found)


class Package:
    """A copy of the package with a library of the sanitized ones."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.folder = folder
        without = shutil.ignore_patterns("lib", "__pycache__", "*.so")
        shutil.copytree(ROOT / "convnn_kernels", folder / "convnn_kernels", ignore=without)
        (folder / "convnn_kernels" / "lib").mkdir()
        (folder / "convnn_kernels" / "lib" / library.name).symlink_to(library)

    def start(self, count: int, byte: int, **more: str) -> Run:
        """Starts sanitized_program.py."""
        paths = [self.folder, ROOT / "tests", ROOT]
        environment = options(
            byte,
            LD_PRELOAD=" ".join(preloaded()),
            PYTHONPATH=os.pathsep.join(map(str, paths)),
            **more,
        )
        environment["ASAN_OPTIONS"] += ":detect_leaks=0"  # Python has many
        program = str(ROOT / "tests" / "sanitized_program.py")
        return Run([sys.executable, program, "0", str(count)], environment, self.folder)


def test_random_cases_through_pytorch(programs: Path, tmp_path: Path) -> None:
    package = Package(programs / "sanitized_library" / "libconvnn_cpu.so", tmp_path)
    runs = [package.start(CALLS_THROUGH_PYTORCH, byte) for byte, _ in WAYS]
    first, second = (run.lines() for run in runs)
    assert len(first) == CALLS_THROUGH_PYTORCH
    assert_equal(second, first)


FOUND_BY_ADDRESS = {
    "scratch": "AddressSanitizer: use-after-poison",
    "input": "AddressSanitizer: heap-buffer-overflow",
    "overflow": "runtime error: signed integer overflow",
}


@pytest.mark.parametrize("fault", FOUND_BY_ADDRESS)
def test_a_planted_fault_is_found(fault: str, programs: Path) -> None:
    program = programs / "faulty_address_calls"
    with calls(program, 20, "one-range", CONVNN_PLANTED=fault) as run:
        status, _, errors = run.result()
    assert status != 0
    assert FOUND_BY_ADDRESS[fault] in errors
    assert "sanitized: in call 0: batch" in errors


def test_a_planted_fault_is_found_through_pytorch(programs: Path, tmp_path: Path) -> None:
    package = Package(programs / "faulty_library" / "libconvnn_cpu.so", tmp_path)
    status, _, errors = package.start(20, 255, CONVNN_PLANTED="indices").result()
    assert status != 0
    # The first call that reads too far may have no elements, in place of which C++ has a byte.
    assert re.search("AddressSanitizer: (heap|global)-buffer-overflow", errors)


@pytest.mark.parametrize("fault", ["memory", "ranges", "variable"])
def test_a_planted_fault_changes_results(fault: str, programs: Path) -> None:
    """In one of the runs that are compared; nothing else finds it."""
    ways = [("address", byte, way) for byte, way in WAYS]
    if fault == "variable":
        ways[1] = ("thread", 255, "threads")
    if fault == "ranges":
        ways[1] = ("address", ways[0][1], ways[1][2])
    found = []
    for kind, byte, way in ways:
        program = programs / f"faulty_{kind}_calls"
        with calls(program, 60, way, byte, CONVNN_PLANTED=fault) as run:
            found.append(run.lines())
    with pytest.raises(AssertionError, match="results differ"):
        assert_equal(*found)


def test_a_planted_fault_of_one_instruction_set_is_found(
    programs: Path, instruction_sets: list[str]
) -> None:
    if "avx512" not in instruction_sets:
        pytest.skip("needs two instruction sets to compare")
    program = programs / "faulty_address_calls"
    with calls(program, 20, "one-range", CONVNN_PLANTED="set") as run:
        status, _, errors = run.result()
    assert status == 1
    assert "sanitized: avx512 gives other output in call 0" in errors


def test_a_planted_race_is_found(programs: Path) -> None:
    with calls(programs / "faulty_thread_calls", 20, "threads", CONVNN_PLANTED="race") as run:
        status, _, errors = run.result()
    assert status != 0
    assert "ThreadSanitizer: data race" in errors
