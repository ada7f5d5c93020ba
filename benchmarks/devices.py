# SPDX-License-Identifier: MIT
"""What differs between devices: how to measure times and peak memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import memory
from .peers import PEERS, gradient_mode, run_pass
from .workloads import Workload, make_inputs

Run = Callable[[], object]

# Threads of the previous peer may still be spinning for work on all cores.
_SETTLE_SECONDS = 0.005


def _profiled(run: Run, device: str) -> dict[str, dict[str, float]]:
    """Launches and total microseconds of each kernel, in the second of two runs."""
    run()
    with profile(activities=[getattr(ProfilerActivity, device)]) as measured:
        run()
        if device == "CUDA":
            torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in measured.events():
        if event.device_type == getattr(DeviceType, device):
            row = found.setdefault(short_name(event.name), {"launches": 0, "us": 0.0})
            row["launches"] += 1
            row["us"] = round(row["us"] + event.time_range.elapsed_us(), 2)
    return found


def short_name(kernel: str) -> str:
    """Without namespace, arguments and template arguments: the same for both backends."""
    found = re.search(r"(\w+_kernel)\b", kernel)
    return found[1] if found else kernel[:60]


class Cpu:
    name = "cpu"
    # PyTorch's name of the device.
    where = "cpu"

    def why_not(self) -> str | None:
        """Why nothing can be measured here, or None."""
        return None

    def describe(self) -> dict[str, Any] | None:
        """A description of the GPU, for the stamp."""
        return None

    def default_threads(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

    def prepare(self, threads: int) -> None:
        """Applies the settings that all peers share."""
        torch.set_num_threads(threads)

    def memory_bytes(self) -> float:
        """How much memory a peer may take."""
        import psutil

        # Larger calls would take minutes.
        return min(10e9, 0.6 * psutil.virtual_memory().available)

    def seconds(self, run: Run, repeats: int) -> float:
        """The time until a run has finished, averaged over `repeats` of them."""
        time.sleep(_SETTLE_SECONDS)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    def cold_seconds(self, run: Run) -> float | None:
        """The time of a run with a cold cache; None where that is not measured."""
        return None

    def kernels(self, run: Run) -> dict[str, dict[str, float]]:
        """Launches and total microseconds of each kernel in one run."""
        return _profiled(run, "CPU")

    def peak_bytes(self, workload: Workload, peer: str, passes: str, threads: int) -> int:
        """Peak memory above the inputs. Raises memory.MemoryNotMeasured."""
        return memory.peak_bytes(workload, peer, passes, threads)

    def broken(self) -> str | None:
        """After a failure: why this process can no longer use the device, or None."""
        return None


class Cuda(Cpu):
    """Measures GPU time between two events.

    A sleep kernel keeps the GPU busy while the host launches the runs, so that the time of launches
    is not included. Its length grows until the host finishes first. If even the longest one is too
    short, or the driver blocks the host because its queue of about a thousand launches is full, a
    sample has fewer runs. A warm run finds in the L2 cache what the previous one left there; before
    a cold one, a buffer larger than the cache is written.
    """

    name = "cuda"
    _CYCLES_PER_SECOND = 2e9
    _LONGEST_SLEEP = 0.05
    _MOST_REPEATS = 20

    def __init__(self, where: str = "cuda") -> None:
        self.where = where
        self._flushed: torch.Tensor | None = None
        self._sleep_seconds = 1e-3

    def why_not(self) -> str | None:
        if torch.version.cuda is None:
            return f"PyTorch {torch.__version__} was built without CUDA"
        return None if torch.cuda.is_available() else "PyTorch finds no NVIDIA GPU"

    def describe(self) -> dict[str, Any] | None:
        properties = torch.cuda.get_device_properties(self.where)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": "off",
            "times": "GPU time between events; the seconds are with a warm L2 cache",
        }

    def prepare(self, threads: int) -> None:
        torch.set_num_threads(threads)
        # No peer uses TF32, and cuDNN tries all its algorithms.
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = True

    def memory_bytes(self) -> float:
        return 0.7 * torch.cuda.mem_get_info(self.where)[0]

    def _between_events(self, run: Run, repeats: int, before: Run = bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            before()
            torch.cuda._sleep(int(self._sleep_seconds * self._CYCLES_PER_SECOND))
            began = time.perf_counter()
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            launching = time.perf_counter() - began
            torch.cuda.synchronize(self.where)
            if launching < 0.9 * self._sleep_seconds:
                break
            if self._sleep_seconds < self._LONGEST_SLEEP:
                longer = max(2 * self._sleep_seconds, 1.5 * launching)
                self._sleep_seconds = min(longer, self._LONGEST_SLEEP)
            elif repeats > 1:
                repeats //= 2
            else:  # a run that itself waits for the GPU
                break
        seconds = 1e-3 * start.elapsed_time(end) / repeats
        if self._sleep_seconds >= self._LONGEST_SLEEP:
            self._sleep_seconds = 1e-3
        return seconds

    def seconds(self, run: Run, repeats: int) -> float:
        return self._between_events(run, min(repeats, self._MOST_REPEATS))

    def cold_seconds(self, run: Run) -> float | None:
        if self._flushed is None:
            size = 4 * torch.cuda.get_device_properties(self.where).L2_cache_size
            self._flushed = torch.empty(size, dtype=torch.uint8, device=self.where)
        return self._between_events(run, 1, self._flushed.zero_)

    def kernels(self, run: Run) -> dict[str, dict[str, float]]:
        return _profiled(run, "CUDA")

    def peak_bytes(self, workload: Workload, peer: str, passes: str, threads: int) -> int:
        try:
            inputs = make_inputs(workload, self.where, passes == "forward+backward")
            with gradient_mode(passes):
                call = PEERS[peer].build(workload, inputs)
                # The first pass allocates what a library keeps for good.
                run_pass(call, passes)
                torch.cuda.synchronize(self.where)
                torch.cuda.reset_peak_memory_stats(self.where)
                before = torch.cuda.memory_allocated(self.where)
                results = run_pass(call, passes)
                torch.cuda.synchronize(self.where)
        except torch.OutOfMemoryError as error:
            raise memory.MemoryNotMeasured(str(error)) from error
        del results
        return torch.cuda.max_memory_allocated(self.where) - before

    def broken(self) -> str | None:
        try:
            torch.cuda.synchronize(self.where)
        except RuntimeError as error:
            return " ".join(str(error).split())[:300]
        # The next case needs the memory of the failed one.
        torch.cuda.empty_cache()
        return None


DEVICES: dict[str, Cpu] = {"cpu": Cpu(), "cuda": Cuda()}
