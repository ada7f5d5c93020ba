# SPDX-License-Identifier: MIT
"""The stages of `python -m benchmarks.gpu`, case by case."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from tools import gpu_kit

from . import runner
from .devices import DEVICES
from .gpu_runner import Context, Record, Skipped, Stage
from .stamp import REPOSITORY
from .suites import SUITES


def tool(command: Sequence[str], seconds: float, **environment: str) -> str:
    """All that a program printed; Skipped where there is no such program."""
    if shutil.which(command[0]) is None:
        raise Skipped(f"{command[0]} is not installed")
    options: Record = {"cwd": REPOSITORY, "env": os.environ | environment, "errors": "replace"}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, timeout=max(5.0, seconds), **options).stdout


def _load(case: str, context: Context) -> Record:
    """The card as it is, nothing is set; a call of each library."""
    if case == "card":
        fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        return {"found": tool(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], 10)}
    import convnn_kernels

    if case == "cuda" and context.device == "cpu":
        raise Skipped(convnn_kernels.native.load()["cuda"] or "it loads, and there is no GPU")
    with convnn_kernels.backend(case):
        X = torch.randn(2, 40, 16, device="cpu" if case == "cpu" else context.device)
        torch.ops.convnn.forward(X, X, X, 3)[0].sum().item()
    return {"kit": gpu_kit.check_triton()} if case == "triton" else {}


def _suite(name: str, device: str) -> list[runner.Group]:
    """On a CPU the goals are rehearsed with the groups of `time`."""
    return SUITES["time" if device == "cpu" and name == "gpu" else name].groups(device)


def _names(suite: str) -> Callable[[str], Sequence[str]]:
    return lambda device: [group.name for group in _suite(suite, device)]


def _measure(suite: str) -> Callable[[str, Context], Record]:
    """A group of the benchmark: each result is checked against float64 before it is timed."""

    def run(case: str, context: Context) -> Record:
        group = next(g for g in _suite(suite, context.device) if g.name == case)
        rows: list[Record] = []
        runner.measure(group, DEVICES[context.device], torch.get_num_threads(), rows)
        wrong = [row for row in rows if row["status"] in ("refused", "failed")]
        why = "; ".join(f"{r['label']}, {r['pass']}: {r['reason']}" for r in wrong)
        return {"rows": rows} | ({"status": "failed", "why": why} if wrong else {})

    return run


_WATCHED = (sys.executable, "-m", "benchmarks.watched")


def _count(backend: str, context: Context) -> Record:
    """What ncu counts of the three heaviest kernels of the first group of `time`."""
    timed = [r for r in context.found("time").values() if r["case"].endswith(backend)]
    rows = [row for record in timed[:1] for row in record.get("rows", ())]
    found = [each["kernel"] for row in rows for each in row["kernels"] or ()]
    names = [*dict.fromkeys(name for name in found if name.endswith("_kernel"))][:3]
    log = context.folder / f"ncu-{backend}.csv"
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--log-file", str(log)]
    for section in ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables"):
        command += ["--section", section]
    command += ["--kernel-name", f"regex:^({'|'.join(names or ['refine_kernel'])})"]
    command += ["--launch-count", "4", *_WATCHED, "time", backend, context.device]
    said = tool(command, context.seconds)
    if not (counted := counters(log.read_text() if log.exists() else "")):
        raise Skipped(f"ncu counted nothing: {said[-800:]}")
    return {"kernels": counted}


# Time, tensor pipe, issue, wavefronts of shared memory, L2.
_KEPT = r"Name|duration|pipe_tensor.*pct|issued.*pct|wavefronts_mem_shared|lts__throughput.*pct"


def counters(text: str) -> list[dict[str, str]]:
    """Rows of ncu's CSV: a line of names, one of units, one for each launch."""
    _, found, rest = text.partition('"ID",')
    rows = [*csv.DictReader((found + rest).splitlines())][1:]
    return [{name: row[name] for name in row if re.search(_KEPT, name or "")} for row in rows]


def _sanitize(case: str, context: Context) -> Record:
    name, backend = case.split()
    command = [*_WATCHED, "right", backend, context.device]
    if context.device == "cpu":
        said = tool(command, context.seconds) if case == "memcheck triton" else ""
        raise Skipped("there is no GPU" + ", but " * bool(said) + "".join(said.splitlines()[-1:]))
    # Without PyTorch's cache each tensor is an allocation, of which the tool knows the end.
    options = ("--tool", name, "--target-processes", "application-only", "--print-limit", "10")
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = tool(["compute-sanitizer", *options, *command], context.seconds, **alone)
    summary = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", said)
    if not summary:
        raise Skipped(f"it refused: {said[-800:]}")
    errors = sum(int(a or b) for a, b in summary)
    right = errors > 0 if backend == "fault" else not errors and "it ran to its end" in said
    if not right:
        raise AssertionError(f"{errors} errors: {said[:1200]}")
    return {"errors": errors}


def _test(case: str, context: Context) -> Record:
    """One pytest process; each test is a result of its own, and not run again if there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "benchmarks.outcomes"]
    if context.device == "cuda":
        for name in ("xdist", "pytest_timeout"):
            if importlib.util.find_spec(name) is None:
                raise Skipped(f"{name} is not installed")
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--max-worker-restart=60"]
        command += ["--timeout=60", "--timeout-method=thread"]
    outcomes, done, log = (context.folder / f"pytest.{name}" for name in ("now", "done", "log"))
    outcomes.write_text("")
    done.write_text("\n".join(context.found("tests")))
    environment = os.environ | {"CONVNN_OUTCOMES": str(outcomes), "CONVNN_DONE": str(done)}
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
    """Of `make_case` in tests/cases.py."""
    last, backends = (23_000, ("triton", "cuda")) if device == "cuda" else (20_002, ("triton",))
    return [f"{seed} {backend}" for seed in range(20_000, last) for backend in backends]


def _random(case: str, context: Context) -> Record:
    """The case of a seed and its relatives."""
    sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "gpu")]
    from relatives import wrong_ones  # type: ignore[import-not-found]

    import convnn_kernels

    seed, backend = case.split()
    number = 1 if context.device == "cpu" else {"triton": 12, "cuda": 4}[backend]
    with convnn_kernels.backend(backend):
        if wrong := wrong_ones(int(seed), number, backend):
            raise AssertionError(f"{len(wrong)} of {number}: " + "\n".join(wrong))
    return {"cases": number}


_FAULTS = ("memcheck triton", "memcheck cuda", "racecheck cuda", "memcheck fault")
# Of the goals, seconds is what is left.
STAGES = (
    Stage("load", 20, lambda device: ("card", "cpu", "cuda", "triton"), _load, case_seconds=15),
    Stage("right", 40, _names("right"), _measure("right"), workers=4, case_seconds=25),
    Stage("time", 90, _names("time"), _measure("time"), case_seconds=25),
    Stage("counters", 40, lambda device: ("triton", "cuda"), _count, workers=2, case_seconds=38),
    Stage("tests", 150, lambda device: ("pytest",), _test, case_seconds=148),
    Stage("random", 120, _seeds, _random, workers=12),
    Stage("sanitizer", 80, lambda device: _FAULTS, _sanitize, workers=4, case_seconds=78),
    Stage("goals", 0, _names("gpu"), _measure("gpu"), case_seconds=60),
)
