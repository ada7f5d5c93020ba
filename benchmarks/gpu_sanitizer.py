# SPDX-License-Identifier: MIT
"""``python -m benchmarks.gpu_sanitizer``: a short list of calls under compute-sanitizer's memcheck,
racecheck and synccheck, for both backends of CUDA tensors; and a write out of bounds, planted, that
memcheck must find.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .stamp import REPOSITORY, make_stamp

BACKENDS = ("triton", "cuda")
TOOLS = ("memcheck", "racecheck", "synccheck")
# What is printed about the first errors is kept up to that.
_CHARACTERS = 4000

Record = dict[str, Any]

# (B, N, M, D, C, O, k): few columns, groups with tails everywhere, a long list.
_SHAPES = ((2, 67, 197, 64, 64, 40, 9), (1, 130, 1300, 40, 24, 24, 12), (1, 33, 400, 20, 8, 8, 100))


def calls(device: torch.device) -> int:
    """Runs the short list, forward and backward. Returns how many calls it has."""
    import convnn_kernels  # noqa: F401  defines the operators

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    done = 0
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for shape, dtype, restricted in itertools.product(_SHAPES, dtypes, (False, True)):
        B, N, M, D, C, O, k = shape
        metric = "euclidean" if restricted else "cosine"
        X = [normal(*s).to(device, dtype) for s in ((B, N, D), (B, M, D), (B, M, C))]
        weight = normal(*((C, 1, k) if restricted else (O, C, k))).to(device, dtype)
        leaves = [each.requires_grad_() for each in (*X, weight)]
        options: list[Any] = [None, None, None, None, metric]
        if restricted:
            mask = (torch.rand(B, M, generator=generator) < 0.7).to(device)
            rows = torch.randperm(M, generator=generator)[: M - 3].to(device)
            own = torch.randint(M, (N,), generator=generator).to(device)
            options = [None, rows, own, mask, metric]
        Y, s, _ = torch.ops.convnn.forward(*leaves[:3], k, weight, *options)
        torch.autograd.grad([Y, s], leaves, [torch.ones_like(Y), torch.ones_like(s)])
        done += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return done


def plant() -> None:
    """Writes behind the end of a tensor, from a kernel."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(p, N: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(p + 4096 + tl.arange(0, N), 1.0)

    kernel[(1,)](torch.zeros(4, device="cuda"), 32)
    torch.cuda.synchronize()


def command(tool: str | None, *arguments: str) -> list[str]:
    run = [sys.executable, "-m", "benchmarks.gpu_sanitizer", *arguments]
    if tool is None:
        return run
    options = ["--error-exitcode", "86", "--target-processes", "application-only"]
    return ["compute-sanitizer", "--tool", tool, *options, "--print-limit", "10", *run]


def verdict(status: int | None, printed: str) -> tuple[str, int | None]:
    """How a run under a tool ended, and how many errors it reports, None if it does not say."""
    if status is None:
        return "stopped", None
    summary = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", printed)
    if not summary:
        return "refused", None
    errors = sum(int(a or b) for a, b in summary)
    ran = re.search(r"^\d+ calls$", printed, re.MULTILINE) is not None
    return "clean" if errors == 0 and status == 0 and ran else "errors", errors


def run(tool: str | None, *arguments: str, seconds: float) -> Record:
    began = time.monotonic()
    # Each tensor then is an allocation of its own, whose end memcheck knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command(tool, *arguments),
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
        status, printed = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        # Bytes, whatever was asked for.
        status, printed = None, (error.stdout or b"").decode(errors="replace")
    record: Record = {
        "tool": tool,
        "what": " ".join(arguments),
        "seconds": round(time.monotonic() - began, 1),
        "exit_status": status,
        "printed": printed[:_CHARACTERS],
    }
    if tool is not None:
        record["verdict"], record["errors"] = verdict(status, printed)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """0: no tool found an error, and the planted one was found. 1: else, or a tool did not run."""
    import convnn_kernels

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_sanitizer", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=400, help="for all")
    parser.add_argument("--calls", metavar="BACKEND", help="run the short list, as under a tool")
    parser.add_argument("--plant", action="store_true", help="write out of bounds")
    options = parser.parse_args(arguments)
    if options.plant:
        plant()
        print("1 calls")
        return 0
    if options.calls:
        with convnn_kernels.backend(options.calls):
            done = calls(torch.device("cpu" if options.calls == "cpu" else "cuda"))
        print(f"{done} calls", flush=True)
        return 0

    began = time.monotonic()
    result: Record = {"stamp": make_stamp("cuda", torch.get_num_threads()), "runs": []}
    result["stamp"]["gpu"] = {"name": torch.cuda.get_device_name(0)}
    lock = threading.Lock()

    def left() -> float:
        return max(5.0, options.seconds - (time.monotonic() - began))

    def note(tool: str | None, *what: str) -> Record:
        record = run(tool, *what, seconds=left())
        with lock:
            result["runs"].append(record)
            if options.output:
                options.output.write_text(json.dumps(result, indent=1) + "\n")
            print(
                f"{tool or 'no tool'}, {record['what']}: "
                f"{record.get('verdict', record['exit_status'])} in {record['seconds']} s",
                flush=True,
            )
        return record

    # Without a tool first: what Triton compiles is then on the disk.
    usable = [name for name in BACKENDS if note(None, "--calls", name)["exit_status"] == 0]
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not there")
        return 1
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        runs = [pool.submit(note, t, "--calls", name) for name in usable for t in TOOLS]
        planted = pool.submit(note, "memcheck", "--plant").result()
    fine = all(each.result()["verdict"] == "clean" for each in runs)
    found = bool(planted["errors"])
    return 0 if fine and found and usable == list(BACKENDS) else 1


if __name__ == "__main__":
    sys.exit(main())
