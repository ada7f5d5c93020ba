# SPDX-License-Identifier: MIT
"""``python -m tools.training_step``: what a training step of the paper's models launches, and what
our operators take of it on the host, counted and measured without a GPU.

A step is forward, loss and backward, without the optimizer. Parameters and images are bfloat16,
without autocast, as in the benchmark; dropout is the paper's. Tensors are in the memory of the CPU
and no kernel runs, as in host_time.py. Counted are:

- kernels: launches of our Triton kernels;
- PyTorch's operations: calls of its operators below autograd, without views, allocations and those
  whose result has no elements. On a GPU each launches at least one kernel; some launch several,
  such as the gradients of a convolution.

Host time is that of our operators, from the dispatcher to Triton's launcher: the calls of a step
one after the other, forward, and all of their gradients in one run of the autograd engine. What
PyTorch computes within them is not computed: a function in Python allocates the result.
"""

import argparse
import ctypes
import json
import os
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.environment import REPOSITORY, RESULTS, make_stamp
from benchmarks.models import vgg11, vit_tiny
from convnn_kernels import schemas
from convnn_kernels.backends import selection
from convnn_kernels.triton.launch import Plan
from tools import host_time

DOCUMENT = REPOSITORY / "docs" / "performance.md"
FILES = {"before": RESULTS / "training-step-before.json", "now": RESULTS / "training-step.json"}
BATCH, CLASSES = 256, 10

# The models, and the height and width of their images.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "VGG-11, hybrid, λ = 0.5": (lambda: vgg11(CLASSES, "hybrid", 0.5), 32),
    "ViT-Tiny, ConvNN": (lambda: vit_tiny(CLASSES, "convnn"), 224),
}

# Those that have no alias annotation but launch nothing.
_LAUNCH_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_LAUNCH_NOTHING |= {"_unsafe_view"}


def launches(op: torch._ops.OpOverload) -> bool:
    """Whether an operation of PyTorch launches a kernel on a GPU."""
    return not op.is_view and op.overloadpacket.__name__ not in _LAUNCH_NOTHING


def allocate(op: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
    """What an operation returns, with nothing computed."""
    if _returns_argument(op):
        return kwargs.get("out", args[0])
    with _disable_current_modes():
        args, kwargs = tree_map(_on_meta, (args, kwargs))
        return tree_map(_on_cpu, op(*args, **kwargs))


def _returns_argument(op: torch._ops.OpOverload) -> bool:
    """Whether it writes one of its arguments and returns it."""
    return any(each.alias_info for each in op._schema.returns)


def _on_meta(X: Any) -> Any:
    if isinstance(X, torch.device):
        return torch.device("meta")
    if not isinstance(X, Tensor):
        return X
    return torch.empty_strided(X.shape, X.stride(), dtype=X.dtype, device="meta")


def _on_cpu(X: Any) -> Any:
    return torch.empty_strided(X.shape, X.stride(), dtype=X.dtype) if isinstance(X, Tensor) else X


@dataclass
class Counts:
    """Of a step: launches by kernel, PyTorch's operations by name, and the calls of our operators,
    with their arguments."""

    kernels: Counter[str] = field(default_factory=Counter)
    within: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = field(default_factory=list)
    # Those of `within`.
    operations: set[torch._ops.OpOverload] = field(default_factory=set)


class _Counting(TorchDispatchMode):
    """Counts, and has nothing computed. Our operators run as on CUDA tensors."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts, self.is_within = counts, False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.name() in schemas.OPERATORS:
            return self._ours(op, args)
        # Below autograd, those that consist of others come here as well.
        with self:
            result = op.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if not launches(op):
            return op(*args, **kwargs)
        result = allocate(op, args, kwargs)
        if any(isinstance(X, Tensor) and X.numel() for X in tree_leaves(result)):
            (self.counts.within if self.is_within else self.counts.others)[op.name()] += 1
            if self.is_within:
                self.counts.operations.add(op)
        return result

    def _ours(self, op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
        self.counts.calls.append((op, args))
        self.is_within = True
        try:
            with self:  # for what PyTorch does within
                return selection.cuda_kernel(op)(*args)
        finally:
            self.is_within = False


def count(step: Callable[[], Any]) -> Counts:
    """What a function launches, on tensors of the CPU that stand for those of CUDA."""
    counts = Counts()

    def launch(plan: Plan, _: Any) -> None:
        counts.kernels.update(each.kernel.name for each in plan.launches)

    # As of tensors on CUDA: one operation.
    def dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0]

    with (
        mock.patch.object(Plan, "launch", launch),
        mock.patch.object(F, "dropout", dropout),
        # On a GPU, index values are not read.
        mock.patch.object(selection, "_check_values", return_value=None),
        _Counting(counts),
    ):
        step()
    return counts


def step_of(make: Callable[[], nn.Module], size: int, batch: int = BATCH) -> Callable[[], Any]:
    """A step of a model, whose parameters and images are memory that nobody reads."""
    with torch.device("meta"):
        model = make().bfloat16().train()
    model.to_empty(device="cpu")
    images = torch.empty(batch, 3, size, size, dtype=torch.bfloat16)
    labels = torch.empty(batch, dtype=torch.int64)
    return lambda: F.cross_entropy(model(images), labels).backward()


@contextmanager
def nothing_computed(operations: set[torch._ops.OpOverload]) -> Iterator[None]:
    """Has these operations allocate their results on the CPU, at little cost."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for op in operations:
            library.impl(op, _allocator(op), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _allocator(op: torch._ops.OpOverload) -> Callable[..., Any]:
    if _returns_argument(op):
        return lambda *args, **kwargs: kwargs.get("out", args[0])
    # By sizes, strides and options.
    found: dict[Any, Any] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        key = (*map(_kind, args), *kwargs.items())
        results = found.get(key)
        if results is None:
            results = found[key] = tree_map(_on_meta, allocate(op, args, kwargs))
        return _on_cpu(results) if isinstance(results, Tensor) else tree_map(_on_cpu, results)

    return run


def _kind(X: Any) -> Any:
    if isinstance(X, Tensor):
        return X.shape, X.stride(), X.dtype
    return tuple(X) if isinstance(X, list) else X


def calls(counts: Counts) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """All forward calls of our operators in a step, and all backward ones."""
    found: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []
    grads: list[Tensor] = []
    for op, args in counts.calls:
        if op.name().endswith("_backward"):
            grads.insert(0, args[0])  # that of the last call comes first
        else:
            found.append((op, tree_map(_leaf, args)))
    inputs = [X for _, args in found for X in args if isinstance(X, Tensor) and X.requires_grad]

    def forward() -> list[Tensor]:
        results = [op(*args) for op, args in found]
        return [each if isinstance(each, Tensor) else each[0] for each in results]

    outputs = forward()
    assert [X.shape for X in outputs] == [X.shape for X in grads]

    def backward() -> Any:
        return torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)

    return forward, backward


def _leaf(X: Any) -> Any:
    return X.detach().requires_grad_(X.requires_grad) if isinstance(X, Tensor) else X


def keep_memory() -> None:
    """Has glibc keep memory that is freed, as PyTorch's CUDA allocator does."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_max, 0)


Row = dict[str, Any]


def row_of(model: str, rounds: int, driver: ctypes.CDLL) -> Row:
    """What is counted and measured of a model."""
    make, size = MODELS[model]
    counts = count(step_of(make, size))
    row: Row = {"model": model, "batch": BATCH, "image_size": size, "dtype": "bfloat16"}
    row["calls"] = dict(Counter(op.name() for op, _ in counts.calls))
    for name in ("kernels", "within", "others"):
        row[name] = dict(getattr(counts, name).most_common())
    with nothing_computed(counts.operations):
        forward, backward = calls(counts)
        backward()
        before = driver.convnn_launches()
        forward()
        backward()
        launched = driver.convnn_launches() - before
        # What was counted is what reaches the driver.
        assert launched == counts.kernels.total(), (launched, counts.kernels)
        for name, call in zip(_PASSES, (forward, backward), strict=True):
            least, median = host_time.measure(call, rounds, 1)
            row[f"{name}_us"] = {"least": round(least), "median": round(median)}
    return row


_PASSES = ("forward", "backward")
_QUANTITIES: dict[str, Callable[[Row], int]] = {
    "our kernels": lambda row: sum(row["kernels"].values()),
    "PyTorch's operations in our operators": lambda row: sum(row["within"].values()),
    "the two together": lambda row: sum(row["kernels"].values()) + sum(row["within"].values()),
    "PyTorch's other operations": lambda row: sum(row["others"].values()),
    "host time of our operators, forward, µs": lambda row: row["forward_us"]["least"],
    "backward, µs": lambda row: row["backward_us"]["least"],
    "forward and backward, µs": lambda row: sum(row[f"{of}_us"]["least"] for of in _PASSES),
}

Result = dict[str, Any]


def table(results: list[Result]) -> str:
    """In Markdown; of two results, with the ratio of the second to the first."""
    commits = [(result["stamp"]["commit"] or "unknown")[:7] for result in results]
    header = ["a step of", "", *commits, *["ratio"] * (len(results) - 1)]
    lines = [header, ["---", "---", *["--:"] * (len(header) - 2)]]
    for rows in zip(*(result["rows"] for result in results), strict=True):
        for place, (name, quantity) in enumerate(_QUANTITIES.items()):
            found = [quantity(row) for row in rows]
            ratios = [f"{each / found[0]:.2f}" if found[0] else "" for each in found[1:]]
            cells = ["" if place else rows[0]["model"], name, *(f"{each:,}" for each in found)]
            lines.append([*cells, *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BEGIN = "<!-- by hand: counted and measured by python -m tools.training_step -->\n"
END = "<!-- end -->"


def section(results: list[Result]) -> str:
    """What the document has between BEGIN and END."""
    lines = [f"\n{table(results)}\n\n"]
    for row in results[-1]["rows"]:
        kernels = ", ".join(f"{n} `{name}`" for name, n in row["kernels"].items())
        lines.append(f"- {row['model']}: {kernels}.\n")
    stamps = [result["stamp"] for result in results]
    where = " and ".join(dict.fromkeys(f"{stamp['cpu']['model']}" for stamp in stamps))
    return "".join(lines) + f"\nOn {where}, the least of many rounds.\n\n"


def stored() -> list[Result]:
    """What has been written so far: before, and now."""
    return [json.loads(path.read_text()) for path in FILES.values() if path.exists()]


def write(path: Path, rows: list[Row]) -> None:
    result = {"stamp": make_stamp("cpu", 1), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest[rest.index(END) :]
    DOCUMENT.write_text(f"{before}{BEGIN}{section(stored())}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.training_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="a part of the name of a model")
    parser.add_argument("--rounds", type=int, default=200, help="of each measurement")
    parser.add_argument("--write", choices=FILES, help="to docs and benchmarks/results")
    options = parser.parse_args()
    models = [model for model in MODELS if options.only in model]
    if options.write and models != [*MODELS]:
        parser.error("--write is of all models")
    os.environ.setdefault("TRITON_CACHE_DIR", host_time.CACHE)
    driver = host_time.install_null_driver()
    host_time.take_cpu_tensors()
    keep_memory()
    torch.set_num_threads(1)
    rows = [row_of(model, options.rounds, driver) for model in models]
    result = {"stamp": make_stamp("cpu", 1), "rows": rows}
    print(json.dumps(rows, indent=1), table([result]), sep="\n\n")
    if options.write:
        write(FILES[options.write], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
