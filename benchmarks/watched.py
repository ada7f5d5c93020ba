# SPDX-License-Identifier: MIT
"""Runs our calls under nvidia-smi, ncu and compute-sanitizer.

``python -m benchmarks.watched SUITE BACKEND DEVICE [NAME]`` makes the calls that the tools watch:
those of our peers in the groups whose name begins with NAME, or in the first group of the suite
`time`. The backend `fault` instead writes past the end of a tensor, which a sanitizer must report.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from .environment import REPOSITORY
from .gpu_runner import Context, Record, Skipped
from .peers import PEERS, gradient_mode, run_pass
from .suites import SUITES
from .workloads import make_inputs

_WATCHED = (sys.executable, "-m", "benchmarks.watched")
# For both tools: do not follow the assembler that Triton starts.
_ALONE = ("--target-processes", "application-only")


def tool(command: Sequence[str], seconds: float, **environment: str) -> str:
    """The output of a program within that time. Raises Skipped if it is not installed."""
    if shutil.which(command[0]) is None:
        raise Skipped(f"{command[0]} is not installed")
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        options: Record = {"cwd": REPOSITORY, "env": os.environ | environment}
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, **options)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        printed.seek(0)
        return printed.read()


def count(backend: str, context: Context) -> Record:
    """ncu's counters of the three slowest kernels in the first group of `time`."""
    timed = [r for r in context.found("time").values() if r["case"].endswith(backend)]
    rows = [row for record in timed[:1] for row in record.get("rows", ())]
    found = sorted((-each["us"], each["kernel"]) for row in rows for each in row["kernels"] or ())
    names = [*dict.fromkeys(name for _, name in found if name.endswith("_kernel"))][:3]
    log = context.folder / f"ncu-{backend}.csv"
    log.unlink(missing_ok=True)
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--log-file", str(log)]
    for section in ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables"):
        command += ["--section", section]
    command += _ALONE
    command += ["--kernel-name", f"regex:^({'|'.join(names or ['exact_topk_kernel'])})"]
    command += ["--launch-count", "40", *_WATCHED, "time", backend, context.device]
    said = tool(command, context.seconds / 2 - 1)
    counted = {row["Kernel Name"]: row for row in counters(log.read_text() if log.exists() else "")}
    if not counted:
        raise AssertionError(f"ncu counted nothing: {said[-800:]}")
    return {"kernels": [*counted.values()]}


# Time, tensor pipe, instruction issue, shared-memory wavefronts, L2.
_KEPT = r"Name|duration|pipe_tensor.*pct|issued.*pct|wavefronts_mem_shared|lts__throughput.*pct"


def counters(text: str) -> list[dict[str, str]]:
    """Rows of ncu's CSV, which has a line of names, a line of units and a line per launch."""
    _, found, rest = text.partition('"ID",')
    rows = [*csv.DictReader((found + rest).splitlines())][1:]
    return [{name: row[name] for name in row if re.search(_KEPT, name or "")} for row in rows]


def sanitize(case: str, context: Context) -> Record:
    name, backend = case.split()
    command = [*_WATCHED, "right", backend, context.device]
    if name == "racecheck" or context.device == "cpu":
        command += ["small"]  # the others take too long
    if context.device == "cpu":
        said = tool(command, context.seconds) if case == "memcheck triton" else ""
        raise Skipped("there is no GPU" + ", but " * bool(said) + "".join(said.splitlines()[-1:]))
    # Without PyTorch's caching allocator every tensor is an allocation whose end the tool knows.
    options = ["--tool", name, "--report-api-errors", "no", "--print-limit", "10", *_ALONE]
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = tool(["compute-sanitizer", *options, *command], context.seconds - 5, **alone)
    summary = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", said)
    if not summary:
        raise AssertionError(f"it refused, or did not finish: {said[-800:]}")
    errors = sum(int(a or b) for a, b in summary)
    right = errors > 0 if backend == "fault" else not errors and "all calls ran" in said
    if not right:
        raise AssertionError(f"{errors} errors: {said[:1200]}")
    return {"errors": errors}


def run(suite: str, backend: str, device: str, name: str = "") -> None:
    groups = [group for group in SUITES[suite].groups(device) if group.backend == backend]
    groups = [group for group in groups if group.name.startswith(name)]
    import convnn_kernels

    for group in groups[:1] if suite == "time" else groups:
        with convnn_kernels.backend(backend):
            for case in (each for each in group.cases if PEERS[each.peer].exacting):
                with gradient_mode(case.passes):
                    inputs = make_inputs(case.workload, device, case.passes != "forward")
                    run_pass(PEERS[case.peer].build(case.workload, inputs), case.passes)


def write_past_the_end() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(p, N: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(p + 4096 + tl.arange(0, N), 1.0)

    kernel[(1,)](torch.zeros(4, device="cuda"), 32)


if __name__ == "__main__":
    if sys.argv[2] == "fault":
        write_past_the_end()
    else:
        run(*sys.argv[1:])
    if sys.argv[3] == "cuda":
        torch.cuda.synchronize()
    print("all calls ran", flush=True)
