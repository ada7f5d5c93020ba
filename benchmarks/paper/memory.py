# SPDX-License-Identifier: MIT
"""Peak memory of one training step, with our operators and with the eager reference."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import python_ref
from benchmarks.paper.rows import ROWS
from convnn_kernels import functional

STEPS = ("vgg11/hybrid-0.5", "vit/convnn-all")


def _eager(*args: Any, **options: Any) -> torch.Tensor:
    return python_ref.forward(*args, **options)[0]


def _step(name: str, eager: bool, batch: int, device: str, reduced: bool) -> int:
    """Bytes above what a step with one image needs, of which nearly all are the gradients."""
    if eager:
        functional.convnn = _eager
    row = ROWS[name]
    model = row.build(10, reduced).to(device)
    size = row.image_size(reduced)

    def run(count: int) -> None:
        images = torch.randn(count, 3, size, size, device=device)
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        F.cross_entropy(model(images), labels).backward()

    # One small step first, so that what is measured is not the gradients, nor libraries loaded.
    run(1)
    model.zero_grad(set_to_none=True)
    if device != "cpu":
        before = torch.cuda.max_memory_allocated()
        run(batch)
        return torch.cuda.max_memory_allocated() - before
    before = _peak_resident()
    run(batch)
    return _peak_resident() - before


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage() of a child begins with what the parent held when it forked.
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _child(answer: Connection, threads: int, *args: Any) -> None:
    torch.set_num_threads(threads)
    answer.send(_step(*args))


def measure(batch: int, device: str, reduced: bool) -> list[dict[str, Any]]:
    """Each step in a process of its own, so that no peak hides another."""
    context = multiprocessing.get_context("spawn")
    lines = []
    for name in STEPS:
        peaks = {}
        for kind, eager in (("ours", False), ("eager", True)):
            receiver, sender = context.Pipe(duplex=False)
            args = (sender, torch.get_num_threads(), name, eager, batch, device, reduced)
            process = context.Process(target=_child, args=args)
            process.start()
            sender.close()
            try:
                peaks[kind] = receiver.recv()
            except EOFError:
                process.join()
                raise RuntimeError(
                    f"the step of {name} ({kind}) ended with status {process.exitcode}"
                ) from None
            process.join()
        lines.append({"row": name, "batch": batch, "device": device, **peaks})
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    text = ["| one step of | batch | ours (MB) | eager reference (MB) |", "| - | - | - | - |"]
    for line in lines:
        ours, eager = (f"{line[kind] / 1e6:,.0f}" for kind in ("ours", "eager"))
        text.append(f"| {line['row']} | {line['batch']} | {ours} | {eager} |")
    return "\n".join(text)
