# SPDX-License-Identifier: MIT
"""What differs between devices: whether a run is possible, how to take time, peak memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

import psutil
import torch

from . import memory
from .workloads import Workload

# Before a sample: see Cpu.seconds.
_SETTLE_SECONDS = 0.005


class Device(Protocol):
    name: str

    def why_not(self) -> str | None:
        """The reason why nothing can be measured here, or None."""

    def default_threads(self) -> int: ...

    def set_threads(self, threads: int) -> None: ...

    def memory_bytes(self) -> float:
        """How much of its memory a peer may take."""

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """The time of one run, averaged over `repeats`, when all its work is done."""

    def peak_bytes(self, workload: Workload, peer: str, passes: str, threads: int) -> int:
        """Peak memory above the inputs, or memory.MemoryNotMeasured."""


class Cpu:
    name = "cpu"

    def why_not(self) -> str | None:
        return None

    def default_threads(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def memory_bytes(self) -> float:
        return 0.6 * psutil.virtual_memory().available

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        # The threads of the peer before, of this process or of a library, may still be waiting for
        # work on all cores.
        time.sleep(_SETTLE_SECONDS)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    def peak_bytes(self, workload: Workload, peer: str, passes: str, threads: int) -> int:
        return memory.peak_bytes(workload, peer, passes, threads)


DEVICES: dict[str, Device] = {"cpu": Cpu()}
