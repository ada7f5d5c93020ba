# SPDX-License-Identifier: MIT
"""``python -m tools.predict``: how long the work of the goals should take on an H100 or H200,
counted from machine code. Nothing here is measured, and no GPU is needed.

The operators run on meta tensors with their launches recorded. Each launch is compiled for sm_90 as
the host would launch it, and walked through (sass.py). The trips of its loops follow from the
numbers of the launch by the table of expected.py, which has every kernel. So it is done with the
CUDA C++ kernels (predict_cuda.py), which need nvcc and g++. What all warps do is divided by the
rates of a whole chip:

- issue: warp instructions, one a clock on each of the four quarters of a multiprocessor;
- pipes: the clocks of the busiest pipe; integer, logic, compares and selects take two, conversions
  and exponentials eight;
- tensor: the products of tensor cores;
- L2: bytes of loads and stores, each element of a tensor once; what a program has just read, or
  expected.py says that others have, comes from L1 and costs nothing;
- shared: bytes of shared memory, without bank conflicts, and shuffles.

No kernel is faster than the largest of them; one that takes it divided by 0.65 does well. Launches
without work for every multiprocessor take as long as the busiest one. What PyTorch does between
launches, and the launches themselves, are not counted.
"""

import argparse
import functools
import json
import linecache
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.workloads import (
    GPU_FLOAT32,
    GPU_LAYERS,
    GPU_SELECT,
    GPU_VGG11,
    GPU_VIT,
    SEARCH,
    Workload,
)
from convnn_kernels.triton import hardware
from convnn_kernels.triton.launch import OPTIONS, Launch, Plan, Pointers, forget_plans
from tools import aot, cuda_code, predict_cuda, sass
from tools.expected import EXPECTED, cdiv

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
RESULT = ROOT / "benchmarks" / "results" / "predicted.json"

ARCH = 90
# Of an H100 SXM or H200: multiprocessors, clock; 16-bit products on real data and bytes a second
# that others have measured.
MULTIPROCESSORS, CLOCK = 132, 1.755e9
PRODUCTS, L2_BYTES, MEMORY_BYTES = 790e12, 5.5e12, 4.3e12
GOOD = 0.65


@dataclass
class Prediction:
    """Microseconds of a launch on a whole chip."""

    kernel: str
    issue: float
    pipes: float
    tensor: float
    l2: float
    shared: float

    @property
    def least(self) -> float:
        return max(self.issue, self.pipes, self.tensor, self.l2, self.shared)


def text_of(line: sass.Line) -> str:
    """The text of a line. The file may have been compiled in another place."""
    here = ROOT / "convnn_kernels" / "triton" / Path(line[0]).name
    return linecache.getline(str(here), line[1]).strip()


@functools.cache
def _machine_code(variant: str) -> tuple[sass.Program, dict[sass.Line, float]]:
    """The program, and how many bytes a program's loads and stores of a line of source have."""
    launch = json.loads(variant)
    compiled = triton.compile(
        aot._compiler_input(launch),
        target=GPUTarget("cuda", ARCH, 32),
        options={name: launch[name] for name in OPTIONS if name in launch},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-g", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sass.parse(text), tensor_bytes(compiled.asm["ttgir"])


def tensor_bytes(text: str) -> dict[sass.Line, float]:
    """By file name and line: the bytes that Triton's representation loads or stores there.

    Where a function is called in several places, the fewest: those are the calls inside of loops.
    """
    places = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", text, re.MULTILINE))

    def place(name: str) -> tuple[sass.Line, str, str] | None:
        """The line, its column, and from where it is called."""
        where = places.get(name, "")
        if found := re.match(r'"([^"]+)":(\d+):(\d+)', where):
            return (Path(found[1]).name, int(found[2])), found[3], ""
        inner = re.search(r"#loc\w*", where)
        found_inside = place(inner[0]) if inner else None
        if found_inside and where.startswith("callsite"):
            return (*found_inside[:2], found_inside[2] + where)
        return found_inside

    # By line, by call, by column.
    sizes: dict[sass.Line, dict[str, dict[str, float]]] = {}
    for each in text.splitlines():
        found = re.search(r"(tt\.(load|store|atomic)|async_copy_global).* loc\((#\w+)\)", each)
        pointer = re.search(r"(?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]+(\d+)", each)
        where = place(found[3]) if found else None
        if pointer and where:
            elements = math.prod(map(int, re.findall(r"\d+", pointer[1] or "")))
            columns = sizes.setdefault(where[0], {}).setdefault(where[2], {})
            columns[where[1]] = elements * max(8, int(pointer[2])) / 8
    return {line: min(sum(each.values()) for each in of.values()) for line, of in sizes.items()}


def predict(launch: Launch, variant: aot.Variant, explain: bool = False) -> Prediction:
    """What a launch takes. A kernel or a loop that the table does not know is an error."""
    name = launch.kernel.name
    if name not in EXPECTED:
        raise KeyError(f"tools/predict.py does not know what to expect of {name}")
    names = launch.kernel.names[len(launch.kernel.pointers) :]
    n = SimpleNamespace(**dict(zip(names, launch.values, strict=True)), programs=launch.programs)
    n.has = lambda pointer: variant["signature"][pointer] != "constexpr"
    program, of_tensors = _machine_code(json.dumps(variant, sort_keys=True))
    sizes = of_tensors.copy()
    expected = EXPECTED[name]
    loops, branches = (
        {text: function(n) for text, function in table.items()}
        for table in (expected.loops, expected.branches)
    )
    masks = {text: function(n) for text, function in expected.masks.items()}
    for line, size in sizes.items():
        shares = (share for text, share in masks.items() if text_of(line).startswith(text))
        sizes[line] = size * next(shares, 1.0)
    walk = sass.Walk(program, text_of, loops, branches)
    cost = sass.cost(program, walk, variant["num_warps"], sizes)
    if cost.unknown:
        print(f"{name}: counted as issue only: {', '.join(sorted(cost.unknown))}", file=sys.stderr)
    if explain:
        print(f"{name}: {launch.programs} programs of {variant['num_warps']} warps; {cost}")
        print("".join(f"    {note}\n" for note in walk.notes), end="")
    return prediction(name, cost, launch.programs, variant["num_warps"])


def prediction(
    kernel: str, cost: sass.Cost, programs: int, warps_each: int, busiest: float = 1.0
) -> Prediction:
    """Of the cost of the mean warp. busiest: of the program that has most, over the mean."""
    warps = programs * warps_each
    # The busiest multiprocessor has so much of all warps, times their number.
    share = cdiv(programs, MULTIPROCESSORS) / programs * busiest
    clocks = 1e6 * warps * share / CLOCK
    return Prediction(
        kernel,
        issue=clocks * cost.issued / 4,
        pipes=clocks * cost.busiest_pipe() / 4,
        tensor=clocks * cost.products / (PRODUCTS / MULTIPROCESSORS / CLOCK),
        l2=1e6 * warps * cost.moved / L2_BYTES,
        shared=clocks * cost.shared / 128,
    )


@dataclass
class Work:
    """A row of the goals, and what it is compared with."""

    name: str
    workload: Workload
    operator: str = "forward"  # or "select"
    weight: str = "depthwise"
    backward: bool = False
    candidates: bool = False
    rho: str = "softmax"
    of_value: bool = True  # whether value needs a gradient
    beside: str = ""
    beside_us: float | None = None
    goal: float | None = None  # at most so many times that
    most_us: float | None = None  # or at most so many microseconds
    backend: str = "triton"  # or "cuda"

    @property
    def title(self) -> str:
        w = self.workload
        keys = f" × {w.rows:,}" if w.keys else ""
        passes = "" if self.operator == "select" else ", forward" + "+backward" * self.backward
        outputs = f" to {w.outputs}" if w.outputs else ""
        size = f"{w.batch} × {w.tokens:,}{keys}, D = {w.channels}{outputs}, k = {w.k}"
        backend = ", CUDA C++" * (self.backend == "cuda")
        return f"{self.name}{backend}{passes}, {size}" + f", {w.dtype}" * (w.dtype != "bfloat16")


def launches(work: Work) -> list[tuple[Launch, aot.Variant]]:
    """What the host would launch."""
    found: list[tuple[Launch, aot.Variant]] = []

    def take(plan: Plan, pointers: Pointers) -> None:
        found.extend((launch, aot._variant(launch, pointers)) for launch in plan.launches)

    aot.kernels()
    forget_plans()
    with (
        mock.patch.object(Plan, "launch", take),
        mock.patch.object(hardware, "architecture", return_value=ARCH),
        torch.device("meta"),
    ):
        _call(work)
    return found


def _call(work: Work) -> None:
    w = work.workload
    dtype, outputs = w.torch_dtype, w.outputs or w.channels
    query = torch.empty(w.batch, w.tokens, w.channels, dtype=dtype)
    key, value = (torch.empty(w.batch, w.rows, w.channels, dtype=dtype) for _ in "kv")
    given: tuple[Any, ...] = (None, None, None)
    if work.candidates:
        indices = (torch.empty(count, dtype=torch.int64) for count in (w.candidates, w.tokens))
        given = (*indices, None)
    if work.operator == "select":
        aot.operator("select")(query, key, w.k, *given, "cosine", "similarity")
        return
    shape = (outputs, w.channels, w.k) if work.weight == "dense" else (w.channels, 1, w.k)
    weight = torch.empty(shape, dtype=dtype)
    options = ("cosine", work.rho, 1.0)
    of_search = work.rho != "ones"
    Y, s, I = aot.operator("forward")(
        query, key, value, w.k, weight, None, *given, *options, "similarity"
    )
    if work.backward:
        needs = (of_search, of_search, work.of_value, True, False)
        aot.operator("forward_backward")(
            Y, None, query, key, value, weight, s, I, False, *options, *needs, given[0]
        )


# Flops a second of FlashAttention-3 on an H100 by its authors (arXiv 2407.08608, figures 5 and 6),
# forward and backward, by tokens and D. PyTorch's own attention is not faster.
_ATTENTION = {
    (4096, 64): (476e12, 453e12),
    (16384, 64): (497e12, 474e12),
    (4096, 128): (638e12, 542e12),
    (16384, 128): (648e12, 561e12),
}
_VGG = "VGG-11 layer, dense"
# Microseconds of flashlib for SEARCH on an H100, by its authors.
_FLASHLIB = {8: 2580.0, 16: 3940.0, 32: 4900.0}


def _of_cuda(work: Work, explain: bool) -> list[Prediction]:
    """What the CUDA C++ kernels take."""
    w = work.workload
    numbers: dict[str, Any] = {"batch": w.batch, "n": w.tokens, "m": w.rows, "d": w.channels}
    numbers |= {"c": w.outputs or w.channels, "k": w.k, "dtype": w.dtype}
    operators = [work.operator, *["forward_backward"] * work.backward]
    return [
        prediction(*each)
        for operator in operators
        for each in predict_cuda.counts(operator, explain, **numbers)
    ]


def _attention(w: Workload, backward: bool) -> float:
    product = 2e6 * w.batch * w.tokens * w.rows * w.channels
    rates = _ATTENTION[w.tokens, w.channels]
    return 2 * product / rates[0] + (5 * product / rates[1] if backward else 0)


def _in_cuda(work: Work) -> Work:
    """The same by the CUDA C++ kernels."""
    of = replace(work, backend="cuda")
    if work.operator == "forward" and work.workload == GPU_LAYERS[0]:
        of.most_us = 950.0 if work.backward else 480.0
    return of


def goals() -> list[Work]:
    """The rows of the table of goals that are about time on the GPU."""
    found = []
    for w in GPU_SELECT:
        written = 1e6 * w.torch_dtype.itemsize * w.batch * w.tokens * w.rows / MEMORY_BYTES
        found.append(Work("select", w, "select", beside="S written", beside_us=written, goal=1.0))
    for w in SEARCH:
        goal = 0.5 if w.k == 8 else 0.25
        us = _FLASHLIB.get(w.k)
        found.append(Work("select", w, "select", beside="flashlib", beside_us=us, goal=goal))
    for w in GPU_LAYERS[:4]:
        for backward, goal in ((False, 0.8), (True, 0.5)):
            us = _attention(w, backward)
            attention: dict[str, Any] = {"beside": "attention", "beside_us": us, "goal": goal}
            found.append(Work("depthwise", w, backward=backward, **attention))
    found += [_in_cuda(each) for each in found if each.workload.channels in (64, 128)]
    found.append(Work("ViT-Tiny", GPU_VIT, backward=True))
    found.append(Work("ViT-Tiny, random candidates", GPU_VIT, backward=True, candidates=True))
    for layer, w in enumerate(GPU_VGG11):
        # As in the paper: neighbors enter as they are, and the images need no gradient.
        of: dict[str, Any] = {"rho": "ones", "of_value": layer > 0}
        found.append(Work(_VGG, w, weight="dense", backward=True, **of))
    found.append(Work("select", replace(GPU_FLOAT32, dtype="bfloat16"), "select"))
    found.append(Work("select", GPU_FLOAT32, "select", beside="bfloat16", goal=2.5))
    return found


Row = dict[str, Any]
TIMES = ("issue", "pipes", "tensor", "l2", "shared")


def predict_work(work: Work, explain: bool = False) -> Row:
    """A row of the result: microseconds by kernel, of all of its launches."""
    kernels: dict[str, Row] = {}
    if work.backend == "cuda":
        found = _of_cuda(work, explain)
    else:
        found = [predict(*each, explain) for each in launches(work)]
    for each in found:
        row = kernels.setdefault(each.kernel, {"kernel": each.kernel, "launches": 0})
        row["launches"] += 1
        for name in (*TIMES, "least"):
            row[name] = row.get(name, 0.0) + getattr(each, name)
    least = sum(row["least"] for row in kernels.values())
    for row in kernels.values():
        row.update({name: round(row[name], 2) for name in (*TIMES, "least")})
    return {
        "work": work.title,
        "pass": "forward+backward" if work.backward else "forward",
        "workload": asdict(work.workload),
        "least": round(least, 1),
        "good": round(least / GOOD, 1),
        "beside": work.beside,
        "beside_us": work.beside_us and round(work.beside_us, 1),
        "goal": work.goal,
        "most_us": work.most_us,
        "kernels": [*kernels.values()],
    }


def finish(rows: list[Row]) -> None:
    """Adds what follows from other rows."""
    bfloat16 = {row["work"]: row for row in rows}
    for row in rows:
        other = bfloat16.get(row["work"].removesuffix(", float32"))
        if row["beside"] == "bfloat16" and other:
            row["beside_us"] = other["good"]


def summary(rows: Iterable[Row]) -> str:
    """In Markdown: a row for each work, the layers of VGG-11 together."""
    lines = ["| work | launches | µs at the full rate | µs at 65% | beside, µs | ratio | goal |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    layers = [row for row in rows if row["work"].startswith(_VGG)]
    if layers:
        total = {name: sum(row[name] for row in layers) for name in ("least", "good")}
        kernels = [kernel for row in layers for kernel in row["kernels"]]
        all_layers = layers[0] | total | {"work": f"{_VGG}, all, forward+backward"}
        rows = [*rows, all_layers | {"kernels": kernels}]
    for row in rows:
        us, goal = row["beside_us"], row["goal"]
        beside = f"{row['beside']} {us:,.0f}" if us else row["beside"]
        cells = [row["work"], f"{sum(kernel['launches'] for kernel in row['kernels'])}"]
        cells += [f"{row['least']:,.0f}", f"{row['good']:,.0f}", beside]
        limits = [(f"{goal:g}", goal * us)] if us and goal else []
        if most := row.get("most_us"):
            limits.append((f"{most:g} µs", most))
        cells += [f"{row['good'] / us:.3g}" if us else ""]
        cells += ["; ".join(f"≤ {t}{', missed' * (row['good'] > most)}" for t, most in limits)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(rows: Iterable[Row]) -> str:
    """In Markdown: a row for each kernel of each work."""
    lines = ["| work | kernel | issue | pipes | tensor | L2 | shared | largest ÷ 0.65 |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        for place, each in enumerate(row["kernels"]):
            times = f" × {each['launches']}" if each["launches"] > 1 else ""
            cells = ["" if place else row["work"], f"`{each['kernel']}`{times}"]
            cells += [f"{each[name]:.1f}" for name in TIMES] + [f"{each['least'] / GOOD:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    stamp = {"what": "predicted, not measured: microseconds", "gpu": "H100 SXM or H200"}
    stamp |= {"triton": triton.__version__}
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULT.write_text(f'{json.dumps(stamp)[:-1]}, "rows": [\n{lines}\n]}}\n')
    begin, end = "<!-- by hand: predicted by python -m tools.predict -->\n", "<!-- end -->"
    before, rest = DOCUMENT.read_text().split(begin)
    found = f"\n{summary(rows)}\n\n<details>\n<summary>Each kernel</summary>\n\n{details(rows)}\n"
    after = rest[rest.index(end) :]
    DOCUMENT.write_text(f"{before}{begin}{found}\n</details>\n\n{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.predict", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="a part of the name of the work")
    parser.add_argument("--explain", action="store_true", help="what is assumed of each loop")
    parser.add_argument("--write", action="store_true", help="to docs and benchmarks/results")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write is of all the work")
    rows = []
    for work in goals():
        if options.only in work.title:
            try:
                rows.append(predict_work(work, options.explain))
            except cuda_code.NotHere as missing:
                print(f"{work.title}: left out, because {missing}", file=sys.stderr)
                continue
            print(f"{work.title}: predicted {rows[-1]['least']:,.0f} µs, not measured", flush=True)
    if not rows:
        parser.error(f"--only: no work has {options.only!r} in its name")
    finish(rows)
    print(f"{summary(rows)}\n\n{details(rows)}")
    if options.write:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
