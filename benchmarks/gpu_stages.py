# SPDX-License-Identifier: MIT
"""The stages of `python -m benchmarks.gpu` and their cases."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tools import gpu_kit

from . import runner, watched
from .devices import DEVICES
from .environment import REPOSITORY
from .gpu_runner import Context, Record, Skipped, Stage
from .suites import SUITES
from .workloads import Workload


def _load(case: str, context: Context) -> Record:
    """The card with its current settings, and a call of each library."""
    if case == "card":
        fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        said = watched.tool(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], 10)
        return {"nvidia-smi": said.strip(), "gpu": DEVICES[context.device].describe()}
    import convnn_kernels

    if case == "cuda" and context.device == "cpu":
        raise Skipped(convnn_kernels.native.load()["cuda"] or "it loads, but there is no GPU")
    with convnn_kernels.backend(case):
        X = torch.randn(2, 40, 16, device="cpu" if case == "cpu" else context.device)
        torch.ops.convnn.forward(X, X, X, 3)[0].sum().item()
    return {"kit": gpu_kit.check_triton()} if case == "triton" else {}


def _suite(name: str, device: str) -> list[runner.Group]:
    """On a CPU the groups of `time` stand in for those of `gpu`."""
    return SUITES["time" if device == "cpu" and name == "gpu" else name].groups(device)


def _names(suite: str) -> Callable[[str], Sequence[str]]:
    return lambda device: [group.name for group in _suite(suite, device)]


def _measure(suite: str) -> Callable[[str, Context], Record]:
    """A group of a suite, in which each result is checked against float64 before it is timed."""

    def run(case: str, context: Context) -> Record:
        group = next(g for g in _suite(suite, context.device) if g.name == case)
        rows: list[Record] = []
        why = []
        try:
            runner.measure(group, DEVICES[context.device], torch.get_num_threads(), rows)
        except runner.DeviceBroken as error:
            why = [f"the GPU context is broken: {error}"]
        wrong = [row for row in rows if row["status"] in ("refused", "failed")]
        why += [
            f"{Workload(**r['workload'])}, {r['label']}, {r['pass']}: {r['reason']}" for r in wrong
        ]
        return {"rows": rows} | ({"status": "failed", "why": "; ".join(why)} if why else {})

    return run


def _test(case: str, context: Context) -> Record:
    """One pytest process. Each test is a separate result; tests with a result are not repeated."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "benchmarks.outcomes"]
    needed = ("pytest", "xdist", "pytest_timeout")
    for name in needed if context.device == "cuda" else needed[:1]:
        if importlib.util.find_spec(name) is None:
            raise Skipped(f"{name} is not installed")
    if context.device == "cuda":
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--max-worker-restart=60"]
        command += ["--timeout=60", "--timeout-method=thread"]
    scratch, log = Path(tempfile.mkdtemp()), context.folder / "pytest.log"
    outcomes, done = scratch / "outcomes", scratch / "done"
    outcomes.write_text("")
    earlier = context.found("tests").items()
    done.write_text("\n".join(test for test, each in earlier if each["status"] != "skipped"))
    environment = os.environ | {"CONVNN_OUTCOMES": str(outcomes), "CONVNN_DONE": str(done)}
    environment |= {"OMP_NUM_THREADS": "2"}
    with log.open("w") as printed, outcomes.open() as lines:
        options: Record = {"cwd": REPOSITORY, "stdout": printed, "stderr": printed}
        process = subprocess.Popen([*command, "tests/gpu"], env=environment, **options)
        running = True
        while running:
            running = process.poll() is None
            for line in lines:
                context.emit(*json.loads(line))
            time.sleep(0.2)
    if process.returncode:
        raise AssertionError(f"pytest ended with {process.returncode}: {log.read_text()[-800:]}")
    return {}


def _seeds(device: str) -> list[str]:
    """Seeds for `make_case` in tests/cases.py."""
    last, backends = (23_000, ("triton", "cuda")) if device == "cuda" else (20_002, ("triton",))
    return [f"{seed} {backend}" for seed in range(20_000, last) for backend in backends]


def _random(case: str, context: Context) -> Record:
    """The case of a seed and its variants."""
    sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "gpu")]
    from variants import wrong_variants  # type: ignore[import-not-found]

    import convnn_kernels

    seed, backend = case.split()
    number = 1 if context.device == "cpu" else {"triton": 12, "cuda": 4}[backend]
    with convnn_kernels.backend(backend):
        if wrong := wrong_variants(int(seed), number, backend):
            raise AssertionError(f"{len(wrong)} of {number}: " + "\n".join(wrong))
    return {"cases": number}


_FAULTS = ("memcheck triton", "memcheck cuda", "racecheck cuda", "memcheck fault")
_ALL = float("inf")
# The last stage, without a limit, gets the remaining time.
STAGES = (
    Stage("load", 20, lambda device: ("card", "cpu", "cuda", "triton"), _load, case_seconds=15),
    Stage("right", 40, _names("right"), _measure("right"), workers=4, case_seconds=25),
    Stage("time", 90, _names("time"), _measure("time"), case_seconds=25),
    Stage("counters", 40, lambda device: ("triton", "cuda"), watched.count, case_seconds=_ALL),
    Stage("tests", 150, lambda device: ("pytest",), _test, case_seconds=_ALL),
    # An odd number of workers, so that each has cases of both backends.
    Stage("random", 120, _seeds, _random, workers=11),
    Stage("sanitizer", 80, lambda device: _FAULTS, watched.sanitize, workers=4, case_seconds=_ALL),
    Stage("ratios", 0, _names("gpu"), _measure("gpu"), case_seconds=60),
)
