# SPDX-License-Identifier: MIT
"""``python -m benchmarks.gpu``, which is `make gpu`: the GPU tests, then the GPU benchmark, in less
than ten minutes and without a network. docs/gpu.md says what to run in which order.

A step whose packages are not installed is left out; the run says so, and fails. It takes the
libraries in ``convnn_kernels/lib`` if they load, or builds them with the compilers that are there.
Each step is a process of its own with a time limit. The most telling come first, and
``tests.json``, in ``benchmarks/results/gpu-<date>`` unless told otherwise, is written after each:
whatever stops a run, what it had found by then is there, with GPU, versions and commit.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import outcomes
from .stamp import REPOSITORY, RESULTS, make_stamp

TOTAL_SECONDS = 580.0
# Of what a step prints, that much is kept.
OUTPUT_CHARACTERS = 6000

Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """kind: what --only names it by. outcomes: the file of a step of tests.

    seconds: what it should take; of the time that is left it may take as much as that is of the
    sum over it and all later steps, and a little more.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    kind: str = ""
    outcomes: Path | None = None
    # Packages without which it cannot begin.
    needs: tuple[str, ...] = ()
    # It goes on where it stopped, so it may be begun again after a crash.
    resumes: bool = False

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


# What a run consists of by default, and what only --only names.
DEFAULT = ("runtime", "operators", "random", "large", "peak", "profile", "benchmark")
MORE = ("sanitizer", "epochs")


def why_not(device: str) -> str | None:
    """The reason why nothing can run here, or None."""
    if device == "cpu":
        return None
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no NVIDIA GPU (nvidia-smi says more)"
    return None


def describe(device: str) -> Record:
    """The GPU, and the versions that `make_stamp` does not have."""
    versions = {"triton": None, "pytest": None}
    for name in versions:
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.import_module(name).__version__
    record: Record = {"cuda": torch.version.cuda, **versions, "nvidia_smi": _nvidia_smi()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return record


def _nvidia_smi() -> str | None:
    """Driver and clocks, as they are: nothing is set."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# Prints for each backend why it cannot run here, null if it can.
_ASK = """
import json, torch, convnn_kernels
from convnn_kernels.backends import choose, cuda
reasons = choose.available()
if torch.cuda.is_available() and not reasons["cuda"]:
    reasons["cuda"] = cuda.refuses((torch.zeros(1, device="cuda"),))
print(json.dumps(reasons))
"""


def unusable_libraries(device: str) -> list[str]:
    """What has to be built: what does not load, or is not for this GPU. The CUDA library only where
    there are sources and a compiler for it."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK], cwd=REPOSITORY, capture_output=True, text=True
    )
    try:
        reasons = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        # The package does not even import.
        why = done.stderr or f"asking for it ended with {done.returncode}"
        reasons = {"cpu": why, "cuda": why}
    wanted = ["cpu"]
    if device == "cuda" and (REPOSITORY / "csrc" / "cuda").is_dir() and shutil.which("nvcc"):
        wanted.append("cuda")
    found = [name for name in wanted if reasons[name]]
    for name in found:
        print(f"{name} library: {reasons[name][-1000:]}", flush=True)
    return found


def steps(device: str, folder: Path, only: Sequence[str] = DEFAULT) -> list[Step]:
    """What is run, the most telling first."""
    found = []
    if missing := unusable_libraries(device):
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        name, tools = f"build of {' and '.join(missing)}", ("setuptools", "pybind11")
        found.append(Step(name, command, 160, needs=tools))
    found.append(Step("info", (sys.executable, "-m", "convnn_kernels.info"), 20))

    # Most of the time goes into compiling; several processes do that side by side. One that ends,
    # because a kernel has left its GPU context unusable or does not end, is replaced.
    def tests(name: str, seconds: float, processes: int) -> Step:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "benchmarks.outcomes"]
        command += [f"tests/gpu/test_{name}.py"]
        if device == "cuda" and importlib.util.find_spec("xdist"):
            command += ["-n", str(processes), "--max-worker-restart=60"]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout=150", "--timeout-method=thread"]
        path = folder / f"{name}.outcomes"
        return Step(f"tests: {name}", tuple(command), seconds, name, path, ("pytest",))

    def module(name: str, seconds: float) -> Step:
        path = str(folder / f"{name}.json")
        command = (sys.executable, "-m", f"benchmarks.gpu_{name}", "--output", path)
        return Step(name, command, seconds, name)

    benchmark = [sys.executable, "-m", "benchmarks", "--device", device, "--no-pictures"]
    benchmark += ["--resume", "--output", str(folder / "benchmark.json")]
    if device == "cpu":
        benchmark += ["--shapes", "1,64,16,3"]
    needs = ("numpy", "psutil", "skimage", "tqdm")
    processes = min(12, os.cpu_count() or 1)
    later = [
        tests("runtime", 110, 6),
        tests("operators", 100, processes),
        tests("random", 130, processes),
    ]
    if device == "cuda":
        later += [tests("large", 50, 1), tests("peak", 30, 1), module("profile", 40)]
    later.append(Step("benchmark", tuple(benchmark), 120, "benchmark", needs=needs, resumes=True))
    if device == "cuda":
        later += [module("sanitizer", 300), module("epochs", 400)]
    return found + [step for step in later if step.kind in only]


def seconds_for(step: Step, after: Sequence[Step], left: float) -> float:
    """Its limit, out of what is left, of which some is for the steps after it: if it hangs, too."""
    if not after:
        return left
    share = step.seconds / sum(each.seconds for each in (step, *after))
    return min(min(1.4 * share, 0.9) * left, 4 * step.seconds)


def run_step(step: Step, seconds: float, environment: dict[str, str]) -> Record:
    """Run a step for at most `seconds`, and say how it ended."""
    began = time.monotonic()
    if step.outcomes is not None:
        environment = {**environment, outcomes.VARIABLE: str(step.outcomes)}
    printed = ""
    while True:
        status, output = _run(step.command, seconds - (time.monotonic() - began), environment)
        printed += output
        # A process that was killed, or whose GPU context broke: the rest is for another one.
        crashed = status is not None and (status < 0 or status == CRASHED)
        if not (step.resumes and crashed and seconds - (time.monotonic() - began) > 20):
            break
        printed += f"\nended with {status}, begun again\n"
    record: Record = {
        "step": step.name,
        "status": "passed" if status == 0 else "failed",
        "exit_status": status,
        "seconds": round(time.monotonic() - began, 1),
        "output": printed[-OUTPUT_CHARACTERS:],
    }
    if status is None:
        record["status"] = f"stopped after {seconds:.0f} s"
    if step.outcomes is not None:
        record |= outcomes.read(step.outcomes)
        step.outcomes.unlink(missing_ok=True)
        if record["status"] == "passed" and not record["tests"]["passed"]:
            record["status"] = "failed"
    return record


# The exit status of a process whose GPU context cannot be used any more.
CRASHED = 70


def _run(
    command: Sequence[str], seconds: float, environment: dict[str, str]
) -> tuple[int | None, str]:
    """Exit status, None if it had to be stopped, and what it printed."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        # The benchmark writes what it has when it is interrupted.
        os.killpg(process.pid, signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return None, output


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all passed. 1: something failed or was stopped. 2: nothing can run here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--device",
        default="cuda",
        choices=["cuda", "cpu"],
        help="cpu: a few of the tests and a short benchmark, to see that this program works",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the JSON files")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all steps")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*DEFAULT, *MORE],
        default=DEFAULT,
        metavar="STEP",
        help=f"of {', '.join(DEFAULT)} (all of these) and {', '.join(MORE)}",
    )
    options = parser.parse_args(arguments)
    if (reason := why_not(options.device)) is not None:
        print(f"make gpu: nothing was run: {reason}", file=sys.stderr)
        return 2
    began = time.monotonic()
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = (options.output or RESULTS / f"gpu-{date}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # Without it deterministic algorithms refuse the matrix products of the reference.
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if options.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CONVNN_GPU_TESTS": "cpu"}
    elif "TORCH_CUDA_ARCH_LIST" not in environment:
        # What is built here is for the GPU that is here.
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(0))

    result: Record = {
        "complete": False,
        "stamp": make_stamp(options.device, torch.get_num_threads()),
        "gpu": describe(options.device),
        "steps": [],
    }

    def write() -> None:
        (folder / "tests.json").write_text(json.dumps(result, indent=1) + "\n")

    write()
    todo = steps(options.device, folder, options.only)
    for i, step in enumerate(todo, 1):
        left = options.seconds - (time.monotonic() - began)
        seconds = seconds_for(step, todo[i:], left)
        print(f"{step.name}, for at most {seconds:.0f} s", flush=True)
        if missing := step.missing():
            status = f"left out: {sys.executable} has no {', '.join(missing)}"
            record: Record = {"step": step.name, "status": status}
        elif seconds < 5:
            record = {"step": step.name, "status": "left out: no time"}
        else:
            record = run_step(step, seconds, environment)
        result["steps"].append(record)
        write()
        _print(record)
    result["complete"] = True
    write()
    print(f"results: {folder}")
    return 0 if all(record["status"] == "passed" for record in result["steps"]) else 1


def _print(record: Record) -> None:
    facts = [f"{n} {what}" for what, n in record.get("tests", {}).items() if n]
    facts += [f"{n} {what}" for what, n in record.get("sums", {}).items()]
    took = f" in {record['seconds']} s" if "seconds" in record else ""
    print(f"  {record['status']}{took} {', '.join(facts)}")
    for name, why in list(record.get("failed", {}).items())[:12]:
        # The last line that begins with "E" is what was wrong.
        said = [line for line in why.splitlines() if line.startswith("E ")] or [why]
        print(f"  FAILED {name}\n    {said[-1][:300]}")
    for why, count in record.get("skipped", {}).items():
        print(f"  {count} skipped: {why[:200]}")
    nothing_ran = "tests" in record and not sum(record["tests"].values())
    if record["status"] != "passed" and ("tests" not in record or nothing_ran):
        print(record.get("output", "")[-1500:])
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
