# SPDX-License-Identifier: MIT
"""``python -m benchmarks.gpu_profile``: the time of each kernel on a GPU, beside the prediction of
docs/performance.md and the bound, and, where the machine lets `ncu` read them, its counters.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .devices import Cuda
from .peers import run_pass
from .peers.convnn import forward_call, operators
from .stamp import REPOSITORY, make_stamp
from .workloads import GPU_FLOAT32, GPU_LAYERS, GPU_VIT, Workload, make_inputs

_LONG = replace(GPU_FLOAT32, source="random", dtype="bfloat16")
# The first two are the calls that the prediction is for.
CALLS: tuple[tuple[Workload, bool], ...] = (
    (_LONG, False),
    (_LONG, True),
    (GPU_LAYERS[0], False),
    (GPU_VIT, False),
    (replace(_LONG, dtype="float32"), False),
)
# To see that this program works.
_ON_CPU = ((Workload(1, 64, 16, 5, "random"), True),)
BACKENDS = ("triton", "cuda")
_RUNS = 5

# Microseconds at _LONG by counting instructions, for Triton.
PREDICTED = {
    "norms_kernel": 0.9,
    "sweep_kernel": 62.0,
    "nominate_kernel": 72.0,
    "refine_kernel": 119.0,
    "aggregate_dense_kernel": 5.9,
    "aggregate_depthwise_kernel": 6.9,
    "modulate_kernel": 0.4,
    "softmax_backward_kernel": 0.4,
    "rho_grad_dense_kernel": 1.2,
    "value_grad_dense_kernel": 7.9,
    "weight_grad_dense_kernel": 8.2,
    "rho_grad_depthwise_kernel": 5.2,
    "value_grad_depthwise_kernel": 7.3,
    "weight_grad_depthwise_kernel": 6.8,
    "query_grad_kernel": 9.2,
    "key_grad_kernel": 11.6,
}
# Of an H200, measured elsewhere: products of bfloat16 and bytes copied in a second.
_FLOPS, _BYTES = 790e12, 4.3e12

# Sections of ncu, and what of them is kept.
_SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "LaunchStats",
    "Occupancy",
)
_KEPT = re.compile(r"pct|time_duration|tensor|issue|registers|warps_active|dram__bytes\.sum$")

Row = dict[str, Any]


def bound_microseconds(kernel: str, w: Workload) -> float | None:
    """The least time at _LONG: products of similarities or of channels, or reading what is read."""
    gathered = w.batch * w.tokens * w.k * w.channels
    if kernel == "sweep_kernel":
        return 1e6 * 2 * w.batch * w.tokens * w.rows * w.channels / _FLOPS
    if kernel == "nominate_kernel":
        return 1e6 * 4 * w.batch * w.tokens * w.rows / 32 / _BYTES
    if "dense" in kernel:
        return 1e6 * 2 * gathered * w.channels / _FLOPS
    if kernel in ("aggregate_depthwise_kernel", "query_grad_kernel", "key_grad_kernel") or (
        kernel.endswith("_grad_depthwise_kernel")
    ):
        return 1e6 * w.torch_dtype.itemsize * gathered / _BYTES
    return None


def call(workload: Workload, dense: bool, device: str) -> Callable[[], Any]:
    inputs = make_inputs(workload, device, requires_grad=True)
    made = forward_call(operators().forward, workload, inputs, dense=dense)
    return lambda: run_pass(made, "forward+backward")


def short_name(name: str) -> str:
    """Without namespace, arguments and template arguments: sweep_kernel of both backends."""
    found = re.search(r"(\w+_kernel)\b", name)
    return found[1] if found else name[:80]


def times(events: Iterable[Any], device_type: Any) -> dict[str, list[float]]:
    """Microseconds of each kernel's launches, by its short name."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        if event.device_type == device_type:
            found[short_name(event.name)].append(event.time_range.elapsed_us())
    return dict(found)


def profiled(workload: Workload, dense: bool, device: str, backend: str) -> list[Row]:
    run = call(workload, dense, device)
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for _ in range(3):
        run()
    with profile(activities=activities) as measured:
        for _ in range(_RUNS):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for kernel, each in times(
        measured.events(), DeviceType.CUDA if on_gpu else DeviceType.CPU
    ).items():
        microseconds = sum(each) / _RUNS
        bound = bound_microseconds(kernel, workload)
        is_predicted = workload == _LONG and backend == "triton"
        rows.append(
            {
                "kernel": kernel,
                "launches": len(each) / _RUNS,
                "microseconds": round(microseconds, 2),
                "predicted": PREDICTED.get(kernel) if is_predicted else None,
                "bound": None if bound is None else round(bound, 2),
            }
        )
    return sorted(rows, key=lambda row: -row["microseconds"])


def counters(backend: str, call_number: int, seconds: float) -> Row:
    """What `ncu` reads of each kernel of one call, or why it does not."""
    if shutil.which("ncu") is None:
        return {"reason": "there is no ncu"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--clock-control", "none", "--target-processes", "application-only"]
        command += ["--csv", "--page", "raw", "--log-file", str(log), "--launch-count", "40"]
        command += ["--kernel-name", f"regex:^({'|'.join(PREDICTED)})"]
        for section in _SECTIONS:
            command += ["--section", section]
        command += [sys.executable, "-m", "benchmarks.gpu_profile", "--once", backend]
        command.append(str(call_number))
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"no answer in {seconds:.0f} s"}
        text = log.read_text() if log.exists() else ""
    rows = read_counters(text)
    if rows:
        return {"kernels": rows}
    return {"reason": (text + done.stdout + done.stderr)[-1500:]}


def read_counters(text: str) -> list[dict[str, str]]:
    """Rows of ncu's CSV: a line of names, one of units, one for each launch."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if start is None:
        return []
    found = list(csv.DictReader(lines[start:]))
    return [
        {"kernel": short_name(row["Kernel Name"])}
        | {name: value for name, value in row.items() if name and value and _KEPT.search(name)}
        for row in found[1:]
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'kernel':<40}{'launches':>9}{'µs':>10}{'predicted':>10}{'bound':>8}"]
    for row in rows:
        predicted, bound = ("" if row[n] is None else row[n] for n in ("predicted", "bound"))
        lines.append(
            f"{row['kernel'][:39]:<40}{row['launches']:>9.1f}{row['microseconds']:>10.1f}"
            f"{predicted:>10}{bound:>8}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all profiled. 1: something failed; the file says what."""
    import convnn_kernels

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_profile", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--once", nargs=2, metavar=("BACKEND", "CALL"), help="for ncu: run it once")
    options = parser.parse_args(arguments)
    if options.once:
        backend, number = options.once
        with convnn_kernels.backend(backend):
            call(*CALLS[int(number)], options.device)()
        torch.cuda.synchronize()
        return 0

    on_gpu = options.device == "cuda"
    gpu = Cuda().describe() if on_gpu else None
    result: Row = {"stamp": make_stamp(options.device, torch.get_num_threads(), gpu), "calls": []}

    def write() -> None:
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    failed = False
    backends, made = (BACKENDS, CALLS) if on_gpu else (("cpu",), _ON_CPU)
    for backend in backends:
        for workload, dense in made:
            name = f"{backend}, {workload}, {'dense' if dense else 'depthwise'}"
            entry: Row = {"backend": backend, "workload": asdict(workload), "dense": dense}
            try:
                with convnn_kernels.backend(backend):
                    entry["kernels"] = profiled(workload, dense, options.device, backend)
                entry["kernels"] = entry["kernels"] or None
                print(f"{name}\n{table(entry['kernels'] or [])}\n", flush=True)
            except Exception as error:
                entry["reason"] = f"{type(error).__name__}: {error}"[:1000]
                print(f"{name}: {entry['reason']}", flush=True)
            failed |= not entry.get("kernels")
            result["calls"].append(entry)
            write()
    # A broken context does not matter to these: they have processes of their own.
    result["counters"] = {}
    for backend in BACKENDS if on_gpu else ():
        for number in (0, 1):
            found = counters(backend, number, 60)
            result["counters"][f"{backend}, call {number}"] = found
            print(f"counters, {backend}, call {number}: {found.get('reason', 'read')}", flush=True)
            write()
    write()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
