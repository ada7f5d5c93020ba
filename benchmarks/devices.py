# SPDX-License-Identifier: MIT
"""What differs between devices: whether a run is possible, how to take time, peak memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import memory
from .peers import PEERS, gradient_mode, run_pass
from .workloads import Workload, make_inputs

# Before a sample: see Cpu.seconds.
_SETTLE_SECONDS = 0.005


class Device(Protocol):
    name: str

    @property
    def where(self) -> str:
        """What PyTorch calls it."""

    def why_not(self) -> str | None:
        """The reason why nothing can be measured here, or None."""

    def describe(self) -> dict[str, Any] | None:
        """For the stamp: what is not the CPU's."""

    def default_threads(self) -> int: ...

    def prepare(self, threads: int) -> None:
        """Settings that hold for all peers."""

    def memory_bytes(self) -> float:
        """How much of its memory a peer may take."""

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """The time of one run, averaged over `repeats`, when all its work is done."""

    def cold_seconds(self, run: Callable[[], object]) -> float | None:
        """The same with nothing in the caches, where that is told apart."""

    def kernels(self, run: Callable[[], object]) -> dict[str, dict[str, float]]:
        """Of each kernel in one run, by its name: launches, and microseconds of all of them."""

    def peak_bytes(self, workload: Workload, peer: str, passes: str, threads: int) -> int:
        """Peak memory above the inputs, or memory.MemoryNotMeasured."""

    def broken(self) -> str | None:
        """After a failure: why this process cannot use the device any more, or None."""


def _profiled(run: Callable[[], object], device: str) -> dict[str, dict[str, float]]:
    """What PyTorch's profiler sees on the device in the second of two runs."""
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
    where = "cpu"

    def why_not(self) -> str | None:
        return None

    def describe(self) -> dict[str, Any] | None:
        return None

    def default_threads(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

    def prepare(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def memory_bytes(self) -> float:
        # What is larger would be timed for minutes.
        return min(10e9, 0.6 * psutil.virtual_memory().available)

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        # The threads of the peer before, of this process or of a library, may still be waiting for
        # work on all cores.
        time.sleep(_SETTLE_SECONDS)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    def cold_seconds(self, run: Callable[[], object]) -> float | None:
        return None

    def kernels(self, run: Callable[[], object]) -> dict[str, dict[str, float]]:
        return _profiled(run, "CPU")

    def peak_bytes(self, workload: Workload, peer: str, passes: str, threads: int) -> int:
        return memory.peak_bytes(workload, peer, passes, threads)

    def broken(self) -> str | None:
        return None


@dataclass
class Cuda:
    """Times are those of the GPU, between two events: the host runs ahead behind a wait of the GPU,
    so that launches are not measured. The wait grows until the host has launched everything before
    it ends. Where even the longest one is too short, or the driver, which queues about a thousand
    launches, makes the host wait, a sample has fewer runs. Warm: the L2 cache holds what the run
    before left there. Cold: a buffer larger than the cache was written before.
    """

    name: str = "cuda"
    where: str = "cuda"
    _flushed: torch.Tensor | None = field(default=None, init=False)
    # Of the wait, in seconds.
    _ahead: float = field(default=1e-3, init=False)

    _CYCLES_PER_SECOND = 2e9
    _LONGEST_WAIT = 0.05
    _MOST_REPEATS = 20

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

    def default_threads(self) -> int:
        return Cpu().default_threads()

    def prepare(self, threads: int) -> None:
        torch.set_num_threads(threads)
        # float32 is float32 for everyone, and convolutions try all their algorithms.
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = True

    def memory_bytes(self) -> float:
        return 0.7 * torch.cuda.mem_get_info(self.where)[0]

    def _between_events(
        self, run: Callable[[], object], repeats: int, before: Callable[[], object] = bool
    ) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            before()
            torch.cuda._sleep(int(self._ahead * self._CYCLES_PER_SECOND))
            began = time.perf_counter()
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            taken = time.perf_counter() - began
            torch.cuda.synchronize(self.where)
            if taken < 0.9 * self._ahead:
                break
            if self._ahead < self._LONGEST_WAIT:
                self._ahead = min(max(2 * self._ahead, 1.5 * taken), self._LONGEST_WAIT)
            elif repeats > 1:
                repeats //= 2
            else:  # a run that waits for the GPU itself is never ahead of it
                break
        seconds = 1e-3 * start.elapsed_time(end) / repeats
        if self._ahead >= self._LONGEST_WAIT:
            self._ahead = 1e-3
        return seconds

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        return self._between_events(run, min(repeats, self._MOST_REPEATS))

    def cold_seconds(self, run: Callable[[], object]) -> float | None:
        if self._flushed is None:
            size = 4 * torch.cuda.get_device_properties(self.where).L2_cache_size
            self._flushed = torch.empty(size, dtype=torch.uint8, device=self.where)
        return self._between_events(run, 1, self._flushed.zero_)

    def kernels(self, run: Callable[[], object]) -> dict[str, dict[str, float]]:
        return _profiled(run, "CUDA")

    def peak_bytes(self, workload: Workload, peer: str, passes: str, threads: int) -> int:
        try:
            inputs = make_inputs(workload, self.where, passes == "forward+backward")
            with gradient_mode(passes):
                call = PEERS[peer].build(workload, inputs)
                # Once before, so that what a library keeps for good is not counted.
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
        # What a failed call held is for the next one.
        torch.cuda.empty_cache()
        return None


DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}
