# SPDX-License-Identifier: MIT
"""Peak memory of one training step, with our operators and with the eager reference.

Each step runs in a separate process. The figure is the peak memory of one forward and backward
above the model: activations, gradients and everything temporary. The eager reference builds the N×M
similarity matrix of every layer, so it also shows that the measurement detects such a matrix.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import python_ref
from benchmarks import memory
from benchmarks.paper.rows import MODELS, ROWS
from convnn_kernels import functional
from convnn_kernels.nn import ConvNN2d, ConvNNAttention


@dataclass(frozen=True)
class Step:
    """One step of a row. `image_size` is that of the paper or larger; N grows with its square."""

    row: str
    image_size: int
    batch: int
    reduced: bool = False

    def build(self) -> nn.Module:
        sized = {} if self.row.startswith("vgg11/") else {"image_size": self.image_size}
        return ROWS[self.row].build(10, self.reduced, **sized)


STEPS = (
    Step("vgg11/hybrid-0.5", 32, 32),
    Step("vit/convnn-all", 224, 32),
    # A single matrix exceeds everything our step allocates.
    Step("vgg11/hybrid-0.5", 64, 2, reduced=True),
    Step("vit/convnn-all", 384, 1, reduced=True),
)


def _eager(*args: Any, **options: Any) -> torch.Tensor:
    return python_ref.forward(*args, **options)[0]


def _peak(step: Step, is_eager: bool, device: str, threads: int) -> int:
    """Bytes above the model."""
    torch.set_num_threads(threads)
    if is_eager:
        functional.convnn = _eager
    model = step.build().to(device)

    def run(batch: int) -> None:
        images = torch.randn(batch, 3, step.image_size, step.image_size, device=device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        F.cross_entropy(model(images), labels).backward()

    # A small step first, so that libraries have allocated their workspaces.
    run(1)
    model.zero_grad(set_to_none=True)
    if device == "cpu":
        return memory.rise(lambda: run(step.batch))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(step.batch)
    return torch.cuda.max_memory_allocated(device) - before


def largest_matrix(step: Step) -> int:
    """Bytes of the largest float32 [batch, N, M] that materialized similarities would need."""
    found = 0

    def see(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal found
        shape = inputs[0].shape
        if isinstance(layer, ConvNN2d):
            N = shape[2] * shape[3]
            M = (shape[2] + 2 * layer.padding) * (shape[3] + 2 * layer.padding)
        else:
            N = M = shape[1]
        found = max(found, 4 * step.batch * N * M)

    with torch.device("meta"):
        model = step.build()
        for module in model.modules():
            if isinstance(module, ConvNN2d | ConvNNAttention):
                module.register_forward_pre_hook(see)
        model(torch.empty(step.batch, 3, step.image_size, step.image_size))
    return found


def gradients(step: Step) -> int:
    """Bytes of the gradients of all parameters."""
    with torch.device("meta"):
        return sum(p.numel() * p.element_size() for p in step.build().parameters())


def measure(device: str, steps: tuple[Step, ...] = STEPS) -> list[dict[str, Any]]:
    """The settings of each step, and "ours", "eager", "gradients" and "matrix" in bytes.

    Raises:
        MemoryNotMeasured: if a process failed, or memory cannot be read on this system.
    """
    threads = torch.get_num_threads()
    return [
        {
            **asdict(step),
            "device": device,
            **{
                kind: memory.in_own_process([__name__], _peak, step, is_eager, device, threads)
                for kind, is_eager in (("ours", False), ("eager", True))
            },
            "gradients": gradients(step),
            "matrix": largest_matrix(step),
        }
        for step in steps
    ]


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table in MB (10⁶ bytes)."""
    text = [
        "| one step of | image | batch | ours, MB | eager reference, MB "
        "| of both, gradients | one N×M matrix |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        row = ROWS[line["row"]]
        scale = ", reduced" if line["reduced"] else ""
        cells = [
            f"{MODELS[row.family]}, {row.label}{scale}",
            f"{line['image_size']}²",
            str(line["batch"]),
        ]
        cells += [f"{line[kind] / 1e6:,.0f}" for kind in ("ours", "eager", "gradients", "matrix")]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)
