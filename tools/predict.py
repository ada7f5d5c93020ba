# SPDX-License-Identifier: MIT
"""``python -m tools.predict``: how long the work of the goals should take on an H100 or H200,
counted from machine code. Nothing here is measured, and no GPU is needed.

The operators run on meta tensors with their launches recorded. Each launch is compiled for sm_90 as
the host would launch it, and walked through (sass.py): the trips of its loops come from the numbers
of the launch by the table `EXPECTED`, which knows every kernel. What the warps do in all is divided
by the rates of a whole chip:

- issue: warp instructions, one a clock on each of the four quarters of a multiprocessor;
- pipes: the clocks of the busiest pipe; integer, logic, compares and selects take two, conversions
  and exponentials eight;
- tensor: the products of tensor cores;
- L2: bytes of loads and stores, each element of a tensor once;
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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
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
from tools import aot, sass

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
RESULT = ROOT / "benchmarks" / "results" / "predicted.json"

ARCH = 90
# Of an H100 SXM or H200: multiprocessors, clock; 16-bit products on real data and bytes a second
# that others have measured.
MULTIPROCESSORS, CLOCK = 132, 1.755e9
PRODUCTS, L2_BYTES, MEMORY_BYTES = 790e12, 5.5e12, 4.3e12
GOOD = 0.65

Numbers = Any  # the numbers and constants of a launch, by parameter


@dataclass
class Expected:
    """Functions of the numbers of a launch, by how the text of the line of source begins.

    loops: the trips of a loop, each time that it is reached.
    branches: how probable it is that what an `if` might skip is executed; 1 if not named.
    A line with several of them, of inline PTX, has a list in the order of the machine code.
    """

    loops: dict[str, Callable[[Numbers], sass.Expected]] = field(default_factory=dict)
    branches: dict[str, Callable[[Numbers], sass.Expected]] = field(default_factory=dict)


def cdiv(a: float, b: int) -> int:
    return math.ceil(a / b)


def mean(of: Callable[[int], float], count: int) -> float:
    """Over 1, ..., count."""
    return sum(map(of, range(1, count + 1))) / count


def largest(expected: float, lanes: int) -> float:
    """The expected largest of `lanes` counts, each Poisson with that mean."""
    below, term, total = 0.0, math.exp(-expected), 0.0
    for i in range(int(expected + 12 * math.sqrt(expected)) + 20):
        below += term
        total += 1 - min(1.0, below) ** lanes
        term *= expected / (i + 1)
    return total


def _merges(n: Numbers, columns: int) -> float:
    """The share of tiles with a column that belongs in the list of one of ROWS rows so far."""
    tiles = cdiv(columns, 1 << n.LOG_TILE)
    return mean(lambda tile: 1 - math.exp(-n.ROWS * (1 << n.LOG_LIST) / tile), tiles)


def _of_key(n: Numbers) -> float:
    """Steps of PAIRS over the pairs of a key, or over those of a chunk within one key: few are."""
    if n.OF_CHUNKS:
        return 0
    pairs = n.pairs / n.keys
    return sum(math.exp(i * math.log(pairs) - pairs - math.lgamma(i + 1)) * cdiv(i, n.PAIRS)
               for i in range(1, 200))


_OVER_D = {"for d in range(0, D, BLOCK_D)": lambda n: cdiv(n.D, n.BLOCK_D)}
_OVER_K = {"for j in range(0, k, BLOCK_K)": lambda n: cdiv(n.k, n.BLOCK_K)}
_OVER_C = {"for c0 in range(0, C, BLOCK_C)": lambda n: cdiv(n.C, n.BLOCK_C)}
_OVER_O = {"for o0 in range(0, O, BLOCK_O)": lambda n: cdiv(n.O, n.BLOCK_O)}
_NEIGHBORS = {
    "for start in range(0, k, BLOCK_K)": lambda n: cdiv(n.k, n.BLOCK_K),
    "for j in range(start, tl.minimum(start + BLOCK_K, k))": lambda n: (
        n.k / cdiv(n.k, n.BLOCK_K)
    ),
}
_PAIRS_OF_TILE = {
    "for start in range(first, last, PAIRS)": lambda n: cdiv(n.N * n.k / n.tiles, n.PAIRS)
}
_PAIRS_OF_KEY = {
    "for start in range(0, tl.max(last - first - (end - begin), 0), PAIRS)": _of_key,
    "for start in range(0, tl.max(end - begin, 0) // CHUNK, PAIRS)": lambda n: 0,
}
_QUERIES = {"for start in range(0, rows_each, BLOCK_N)": lambda n: cdiv(n.rows_each, n.BLOCK_N)}

# Of every kernel. Counts that depend on data are those of random features.
EXPECTED: dict[str, Expected] = {
    "norms_kernel": Expected(_OVER_D),
    "group_flags_kernel": Expected(),
    "group_maxima_kernel": Expected(
        {
            "for tile in range(first, last)": lambda n: n.tiles_each,
            **_OVER_D,
        }
    ),
    "top_groups_kernel": Expected(
        {"for g in range(0, G, 1 << LOG_TILE)": lambda n: cdiv(n.G, 1 << n.LOG_TILE)},
        {"if tl.max(tl.max((b_x > b_lowest)": lambda n: _merges(n, n.G)},
    ),
    "exact_topk_kernel": Expected(
        {
            "for tile in range(0, tiles + HAS_SELF)": lambda n: (
                cdiv(_members(n), 1 << n.LOG_TILE) + n.has("p_self")
            ),
            **_OVER_D,
        },
        {"if tl.max(tl.max((b_x > b_lowest)": lambda n: _merges(n, _members(n))},
    ),
    "select_small_kernel": Expected(
        {
            "for start in range(0, columns, BLOCK_M)": lambda n: cdiv(n.columns, n.BLOCK_M),
            **_OVER_D,
            "while tl.max(m_enter.to(tl.int32), 0) > 0": lambda n: mean(
                lambda tile: min(n.k, n.columns, largest(n.k / tile, n.BLOCK_N)),
                cdiv(n.columns, n.BLOCK_M),
            ),
        }
    ),
    "aggregate_dense_kernel": Expected(
        {
            **_OVER_K,
            "for step in range(0, k * channel_blocks)": lambda n: n.k * cdiv(n.C, n.BLOCK_C),
        }
    ),
    "aggregate_depthwise_kernel": Expected({**_OVER_K, **_NEIGHBORS}),
    "modulate_kernel": Expected(_OVER_K),
    "softmax_backward_kernel": Expected(_OVER_K),
    "rho_grad_dense_kernel": Expected({**_OVER_C, **_OVER_O}),
    "rho_grad_depthwise_kernel": Expected(_OVER_C),
    "value_grad_dense_kernel": Expected(
        {
            "for step in range(0, k)": lambda n: n.k,
            **_OVER_O,
            # All keys advance together: as far as the one with most pairs of this j.
            "while tl.max(m.to(tl.int32), 0) > 0": lambda n: largest(1.0, n.BLOCK_M),
        }
    ),
    "value_grad_depthwise_kernel": Expected(_PAIRS_OF_KEY),
    "weight_grad_dense_kernel": Expected(_QUERIES),
    "weight_grad_depthwise_kernel": Expected(_QUERIES),
    "count_pairs_kernel": Expected(_PAIRS_OF_TILE),
    "store_pairs_kernel": Expected(_PAIRS_OF_TILE),
    "query_grad_kernel": Expected(_NEIGHBORS),
    "key_grad_kernel": Expected(_PAIRS_OF_KEY),
}


def _members(n: Numbers) -> int:
    return n.k * n.GROUP if n.has("p_groups") else n.columns


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
def _machine_code(variant: str) -> tuple[sass.Program, dict[sass.Line, int]]:
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
        command = [tool, "-g", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sass.parse(text), tensor_bytes(compiled.asm["ttgir"])


def tensor_bytes(text: str) -> dict[sass.Line, int]:
    """By file name and line: the bytes that Triton's representation loads or stores there."""
    places = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", text, re.MULTILINE))

    def place(name: str) -> tuple[str, int, int] | None:
        where = places.get(name, "")
        if found := re.match(r'"([^"]+)":(\d+):(\d+)', where):
            return Path(found[1]).name, int(found[2]), int(found[3])
        # A name for a place, or a place in a function and then where that is called.
        inner = re.search(r"#loc\w*", where)
        return place(inner[0]) if inner else None

    # Calls of one function at several places are the same load.
    sizes: dict[tuple[str, int, int], int] = {}
    for each in text.splitlines():
        found = re.search(r"(tt\.load|tt\.store|async_copy_global|atomic_rmw).* loc\((#\w+)\)", each)
        pointer = re.search(r"(?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]+(\d+)", each)
        where = place(found[2]) if found else None
        if pointer and where:
            elements = math.prod(map(int, re.findall(r"\d+", pointer[1] or "")))
            bits = elements * int(pointer[2])
            sizes[where] = max(sizes.get(where, 0), -(-bits // 8))
    lines: dict[sass.Line, int] = {}
    for (file, number, _), size in sizes.items():
        lines[file, number] = lines.get((file, number), 0) + size
    return lines


def predict(launch: Launch, variant: aot.Variant, explain: bool = False) -> Prediction:
    """What a launch takes. A kernel or a loop that the table does not know is an error."""
    name = launch.kernel.name
    if name not in EXPECTED:
        raise KeyError(f"tools/predict.py does not know what to expect of {name}")
    names = launch.kernel.names[len(launch.kernel.pointers) :]
    n = SimpleNamespace(**dict(zip(names, launch.values, strict=True)))
    n.has = lambda pointer: variant["signature"][pointer] != "constexpr"
    program, sizes = _machine_code(json.dumps(variant, sort_keys=True))
    expected = EXPECTED[name]
    loops, branches = (
        {text: function(n) for text, function in table.items()}
        for table in (expected.loops, expected.branches)
    )
    walk = sass.Walk(program, text_of, loops, branches)
    cost = sass.cost(program, walk, variant["num_warps"], sizes)
    if cost.unknown:
        print(f"{name}: counted as issue only: {', '.join(sorted(cost.unknown))}", file=sys.stderr)
    if explain:
        print(f"{name}: {launch.programs} programs of {variant['num_warps']} warps; {cost}")
        print("".join(f"    {note}\n" for note in walk.notes), end="")
    warps = launch.programs * variant["num_warps"]
    # The busiest multiprocessor has so much of all warps, times their number.
    share = cdiv(launch.programs, MULTIPROCESSORS) / launch.programs
    clocks = 1e6 * warps * share / CLOCK
    return Prediction(
        name,
        issue=clocks * cost.issued / 4,
        pipes=clocks * cost.busiest_pipe() / 4,
        tensor=clocks * cost.products / (PRODUCTS / MULTIPROCESSORS / CLOCK),
        l2=1e6 * warps * cost.moved / L2_BYTES,
        shared=clocks * cost.shared / 128,
    )


@dataclass
class Work:
    """A row of the goals, and what stands beside it: microseconds, and where they are from."""

    name: str
    workloads: tuple[Workload, ...]
    operator: str = "forward"  # or "select"
    weight: str = "depthwise"
    backward: bool = False
    candidates: bool = False
    beside: str = ""
    beside_us: float | None = None


def launches(work: Work, workload: Workload) -> list[tuple[Launch, aot.Variant]]:
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
        _call(work, workload)
    return found


def _call(work: Work, w: Workload) -> None:
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
    options = ("cosine", "softmax", 1.0)
    Y, s, I = aot.operator("forward")(
        query, key, value, w.k, weight, None, *given, *options, "similarity"
    )
    if work.backward:
        aot.operator("forward_backward")(
            Y, None, query, key, value, weight, s, I, False, *options, *[True] * 4, False
        )


# Flops a second of FlashAttention-3 on an H100 by its authors (arXiv 2407.08608, figures 5 and 6),
# forward and backward, by tokens and D. PyTorch's own attention is not faster.
_ATTENTION = {
    (4096, 64): (476e12, 453e12),
    (16384, 64): (497e12, 474e12),
    (4096, 128): (638e12, 542e12),
    (16384, 128): (648e12, 561e12),
}
# Microseconds of flashlib for SEARCH on an H100, by its authors.
_FLASHLIB = {8: 2580.0, 16: 3940.0, 32: 4900.0}


def _attention(w: Workload, backward: bool) -> float:
    product = 2e6 * w.batch * w.tokens * w.rows * w.channels
    rates = _ATTENTION[w.tokens, w.channels]
    return 2 * product / rates[0] + (5 * product / rates[1] if backward else 0)


def goals() -> list[Work]:
    """The rows of the table of goals that are about time on the GPU."""
    found = []
    for w in GPU_SELECT:
        written = 1e6 * w.torch_dtype.itemsize * w.batch * w.tokens * w.rows / MEMORY_BYTES
        found.append(Work("select", (w,), "select", beside="bmm, S written", beside_us=written))
    for w in SEARCH:
        peer = {"beside": "flashlib", "beside_us": _FLASHLIB.get(w.k)}
        found.append(Work("search", (w,), "select", **peer))
    for w in GPU_LAYERS[:4]:
        for backward in (False, True):
            time = _attention(w, backward)
            peer = {"beside": "SDPA as FlashAttention-3", "beside_us": time}
            found.append(Work("depthwise", (w,), backward=backward, **peer))
    vit = replace(GPU_VIT, source="random")
    # Bounds of an attention this small are in the notes of nobody else: it is not compared.
    found.append(Work("ViT-Tiny", (vit,), backward=True))
    found.append(Work("ViT-Tiny, 32 random candidates", (vit,), backward=True, candidates=True))
    found.append(Work("eight VGG-11 layers, dense", GPU_VGG11, weight="dense", backward=True))
    for dtype in ("float32", "bfloat16"):
        found.append(Work("select", (replace(GPU_FLOAT32, dtype=dtype),), "select"))
    return found


def shape(w: Workload) -> str:
    keys = f" × {w.rows:,}" if w.keys else ""
    return f"{w.batch} × {w.tokens:,}{keys}, D = {w.channels}, k = {w.k}"


def title(work: Work) -> str:
    w = work.workloads[0]
    passes = "" if work.operator == "select" else ", forward" + "+backward" * work.backward
    where = "" if len(work.workloads) > 1 else f", {shape(w)}"
    return f"{work.name}{passes}{where}, {w.dtype}"


def run(works: Iterable[Work], explain: bool) -> list[dict[str, Any]]:
    """Rows of the result, each with its launches."""
    rows = []
    for work in works:
        print(title(work), flush=True)
        found = []
        for w in work.workloads:
            for launch, variant in launches(work, w):
                each = predict(launch, variant, explain)
                times = {name: round(us, 2) for name, us in asdict(each).items() if name != "kernel"}
                found.append({"kernel": each.kernel, **times, "least": round(each.least, 2)})
                print("   ", *(f"{key} {value}" for key, value in found[-1].items()), flush=True)
        rows.append({"work": title(work), "workloads": [asdict(w) for w in work.workloads],
             "pass": "forward" + "+backward" * work.backward,
             "beside": work.beside, "beside_us": work.beside_us,
             "least": round(sum(each["least"] for each in found), 2),
             "launches": found})
        print("    least", rows[-1]["least"], "good", rows[-1]["least"] / GOOD)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.predict", description=__doc__)
    parser.add_argument("--only", default="", help="a part of the name of the work")
    parser.add_argument("--explain", action="store_true")
    options = parser.parse_args()
    works = [work for work in goals() if options.only in title(work)]
    run(works, options.explain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
