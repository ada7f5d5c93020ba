# SPDX-License-Identifier: MIT
"""Memory after many calls is that after some: of results, of gradients and of errors."""

import ctypes
import gc
from pathlib import Path

import torch

from convnn_kernels import functional

ops = torch.ops.convnn

# Calls of a case, of which the first warm up, and what the process may grow by over the others.
CALLS = 10_000
WARM_UP = 1_000
MOST_GROWTH = {"in use": 2**17, "resident": 2**20}


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def in_use() -> int:
    """Bytes that were allocated and not freed; of another C library than glibc, 0."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def _calls(i: int) -> None:
    """One call of each kind, of sizes that change."""
    x = torch.randn(2, 5 + i % 40, 8, requires_grad=i % 2 == 0)
    weight = torch.randn(4, 8, 3, requires_grad=True)
    metrics: tuple[functional.Metric, ...] = ("cosine", "dot", "euclidean")
    metric = metrics[i % 3]
    candidates = torch.randperm(x.shape[1])[:4] if i % 5 == 0 else None
    match i % 4:
        case 0:
            functional.convnn(x, x, x, 3, weight, metric=metric).sum().backward()
        case 1:
            ops.forward(x, x, x, 3, weight, candidates=candidates, metric=metric)
        case 2:
            s, I = ops.select(x, x, 3, metric=metric)
            ops.aggregate(x, s, I, weight).sum().backward()
        case _:
            for wrong in ({"k": 0}, {"metric": "cos"}, {"candidates": torch.tensor([99])}):
                try:
                    ops.select(**{"query": x, "key": x, "k": 3} | wrong)
                except RuntimeError:
                    continue
                raise AssertionError(f"no error for {wrong}")


def leak(case: int) -> bool:
    """CALLS calls: memory after all of them is that after the first."""
    torch.set_num_threads(1 + case % 2)
    torch.manual_seed(case)
    before = {}
    for i in range(CALLS):
        if i == WARM_UP:
            before = _memory()
        _calls(i)
    for name, value in _memory().items():
        grown = value - before[name]
        if grown > MOST_GROWTH[name]:
            calls = CALLS - WARM_UP
            raise AssertionError(f"{name}: grew by {grown} bytes in {calls} calls")
    return True


def _memory() -> dict[str, int]:
    gc.collect()
    return {"in use": in_use(), "resident": resident()}
