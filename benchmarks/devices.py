# SPDX-License-Identifier: MIT
"""What differs between devices: whether a run is possible, when work is done, peak memory."""

from __future__ import annotations

import os
from typing import Protocol

import torch

from . import memory
from .workloads import Workload


class Device(Protocol):
    name: str

    def why_not(self) -> str | None:
        """The reason why nothing can be measured here, or None."""

    def default_threads(self) -> int: ...

    def set_threads(self, threads: int) -> None: ...

    def synchronize(self) -> None:
        """Return when all work that was handed to the device is done."""

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

    def synchronize(self) -> None:
        pass

    def peak_bytes(self, workload: Workload, peer: str, passes: str, threads: int) -> int:
        return memory.peak_bytes(workload, peer, passes, threads)


DEVICES: dict[str, Device] = {"cpu": Cpu()}
