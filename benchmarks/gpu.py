# SPDX-License-Identifier: MIT
"""``python -m benchmarks.gpu``, which is `make gpu`: the GPU tests, then the GPU benchmark, in less
than ten minutes and without a network.

A step whose packages are not installed is left out; the run says so, and fails. It takes the
libraries in ``convnn_kernels/lib``, or builds them with the compilers that are there. Each step is
a process of its own with a time limit. The most telling come first, and ``tests.json``, in
``benchmarks/results/gpu-<date>`` unless told otherwise, is written after each: whatever stops a
run, what it had found by then is there, with GPU, versions and commit.
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
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .stamp import REPOSITORY, RESULTS, make_stamp

TOTAL_SECONDS = 580.0
LIBRARIES = REPOSITORY / "convnn_kernels" / "lib"
# Of what a step prints, that much is kept.
OUTPUT_CHARACTERS = 6000

Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    # The most it may take, and what it must leave to the steps after it.
    seconds: float
    leave: float = 0.0
    junit: Path | None = None
    # Packages without which it cannot begin.
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


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
    record: Record = {"cuda": torch.version.cuda, **versions}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return record


def missing_libraries(device: str) -> list[str]:
    """What has to be built: the CUDA library only where there are sources and a compiler for it."""
    wanted = ["cpu"]
    if device == "cuda" and (REPOSITORY / "csrc" / "cuda").is_dir() and shutil.which("nvcc"):
        wanted.append("cuda")
    return [name for name in wanted if not list(LIBRARIES.glob(f"libconvnn_{name}*.so"))]


def steps(device: str, folder: Path) -> list[Step]:
    """What is run, the most telling first."""
    found = []
    if missing := missing_libraries(device):
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        name, tools = f"build of {' and '.join(missing)}", ("setuptools", "pybind11")
        found.append(Step(name, command, 240, leave=240, needs=tools))
    found.append(Step("info", (sys.executable, "-m", "convnn_kernels.info"), 60))

    def tests(name: str, seconds: float, leave: float, *options: str) -> Step:
        junit = folder / f"{name}.xml"
        file = f"tests/gpu/test_{name}.py"
        command = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", file, f"--junitxml={junit}")
        return Step(f"tests: {name}", (*command, *options), seconds, leave, junit, ("pytest",))

    # Most of the time goes into compiling; several processes do that side by side.
    workers = ("-n", "8") if device == "cuda" and importlib.util.find_spec("xdist") else ()
    found += [tests("runtime", 120, 300), tests("operators", 200, 180, *workers)]
    if device == "cuda":
        found.append(tests("large", 60, 150))
    benchmark = [sys.executable, "-m", "benchmarks", "--device", device, "--no-pictures"]
    benchmark += ["--output", str(folder / "benchmark.json")]
    if device == "cpu":
        benchmark += ["--shapes", "1,64,16,3"]
    needs = ("numpy", "psutil", "skimage", "tqdm")
    found.append(Step("benchmark", tuple(benchmark), TOTAL_SECONDS, needs=needs))
    return found


def seconds_for(step: Step, left: float) -> float:
    """Its limit, out of what is left: some of that is for the steps after it."""
    return min(step.seconds, left - min(step.leave, 0.6 * left))


def run_step(step: Step, seconds: float, environment: dict[str, str]) -> Record:
    """Run a step for at most `seconds`, and say how it ended."""
    began = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timed_out = False
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
        # The benchmark writes what it has when it is interrupted.
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    record: Record = {
        "step": step.name,
        "status": "passed" if process.returncode == 0 else "failed",
        "exit_status": process.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "output": output[-OUTPUT_CHARACTERS:],
    }
    if timed_out:
        record["status"] = f"stopped after {seconds:.0f} s"
    if step.junit is not None:
        record |= read_junit(step.junit)
        if record["status"] == "passed" and not record["tests"]["passed"]:
            record["status"] = "failed"
    return record


def read_junit(path: Path) -> Record:
    """Counts of tests, and the names of those that failed; `path` is taken away."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed: list[str] = []
    slowest: list[tuple[float, str]] = []
    if path.exists():
        try:
            cases = list(ElementTree.parse(path).iter("testcase"))
        except ElementTree.ParseError:  # the tests were killed while they wrote it
            cases = []
        for case in cases:
            name = f"{case.get('classname')}::{case.get('name')}"
            slowest.append((float(case.get("time") or 0), name))
            if case.find("skipped") is not None:
                counts["skipped"] += 1
            elif case.find("failure") is not None or case.find("error") is not None:
                counts["failed"] += 1
                failed.append(name)
            else:
                counts["passed"] += 1
        path.unlink()
    return {"tests": counts, "failed": failed, "slowest": sorted(slowest, reverse=True)[:5]}


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
    options = parser.parse_args(arguments)
    if (reason := why_not(options.device)) is not None:
        print(f"make gpu: nothing was run: {reason}", file=sys.stderr)
        return 2
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = (options.output or RESULTS / f"gpu-{date}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if options.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CONVNN_GPU_TESTS": "cpu"}

    result: Record = {
        "complete": False,
        "stamp": make_stamp(options.device, torch.get_num_threads()),
        "gpu": describe(options.device),
        "steps": [],
    }

    def write() -> None:
        (folder / "tests.json").write_text(json.dumps(result, indent=1) + "\n")

    began = time.monotonic()
    for step in steps(options.device, folder):
        left = options.seconds - (time.monotonic() - began)
        seconds = seconds_for(step, left)
        print(f"{step.name}, for at most {seconds:.0f} s", flush=True)
        write()
        if missing := step.missing():
            status = f"left out: {sys.executable} has no {', '.join(missing)}"
            record: Record = {"step": step.name, "status": status}
        elif seconds < 5:
            record = {"step": step.name, "status": "left out: no time"}
        else:
            record = run_step(step, seconds, environment)
        result["steps"].append(record)
        facts = [f"{n} {what}" for what, n in record.get("tests", {}).items() if n]
        took = f" in {record['seconds']} s" if "seconds" in record else ""
        print(f"  {record['status']}{took} {', '.join(facts)}", flush=True)
        for name in record.get("failed", []):
            print(f"  FAILED {name}")
        if record["status"] != "passed" and "tests" not in record:
            print(record.get("output", "")[-1500:])
    result["complete"] = True
    write()
    print(f"results: {folder}")
    return 0 if all(record["status"] == "passed" for record in result["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
