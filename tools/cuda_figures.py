# SPDX-License-Identifier: MIT
"""``python -m tools.cuda_figures``: instructions of the Hopper kernels, counted in machine code.

With --compare also where the CUDA C++ forward is predicted to be faster than Triton's. Nothing is
measured; needs nvcc and g++, no GPU.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.workloads import Workload
from tools import cuda_code, predict, predict_cuda, sass
from tools.expected_cuda import EXPECTED

# Elements of a lane in a trip of the main and the sampled sweep: 32 rows of a warp, 128 or 64
# columns.
MAIN, SAMPLED = 128, 64


def issued(program: sass.Program, expected: Any, n: Any, more: str = "") -> float:
    """Warp instructions of a warp that has queries, without hits; one trip more of the loops whose
    lines begin with `more`."""
    table = {text: function(n) for text, function in expected.loops.items()}
    table |= {text: trips + 1 for text, trips in table.items() if more and text.startswith(more)}
    branches = {text: function(n) for text, function in expected.branches.items()}
    branches |= {"if (warpgroup == 0)": 0.0, "if (__any_sync(kAllLanes, slot_ >": 0.0}
    walk = sass.Walk(program, predict_cuda.text_of, table, branches, predict_cuda.unrolled)
    pairs = zip(walk.blocks, walk.executed, strict=True)
    return sum(times * len(block.instructions) for block, times in pairs)


def sweep_figures(d: int) -> dict[str, float]:
    """Per element of S, all in, but for hits."""
    for launch, n in predict_cuda.launches("forward", **_numbers(d)):
        if launch.kernel == "hopper_sweep_kernel":
            program = cuda_code.machine_code(launch.kernel, launch.instance)
            expected = EXPECTED[launch.kernel]
            base = issued(program, expected, n)
            items = n.items / n.blocks
            main, sampled = "while (left_ > end) @ look_at_tiles(", "for (int part = 0; part <"
            # How often each loop is entered.
            times = items * expected.loops["} while (kTogether && left_ > 0)"](n)
            of_tiles = items * expected.loops["for (; left_ > 0; left_ -= step)"](n)
            return {
                "main": (issued(program, expected, n, main) - base) / (MAIN * times),
                "sampled": (issued(program, expected, n, sampled) - base) / (SAMPLED * of_tiles),
            }
    raise ValueError("no sweep is launched")


def _numbers(d: int) -> dict[str, Any]:
    return {"batch": 64, "n": 4096, "m": 4096, "d": d, "c": d, "k": 9, "dtype": "bfloat16"}


def finish_figure() -> float:
    """Per row, k = 9 and 64 columns."""
    counted = predict_cuda.counts("forward", **_numbers(64))
    each = [c for c in counted if c.kernel == "hopper_finish_kernel"]
    return sum(c.cost.issued * c.blocks * c.warps for c in each) / (64 * 4096)


def figures() -> str:
    lines = ["| counted in machine code | instructions | goal |", "|---|--:|--:|"]
    for d, goal in ((64, 3.2), (128, 3.4)):
        of = sweep_figures(d)
        lines.append(f"| main sweep, D = {d}, per element | {of['main']:.2f} | ≤ {goal} |")
        lines.append(f"| sampled sweep, D = {d}, per element | {of['sampled']:.2f} | |")
    lines.append(f"| finish, k = 9, C = 64, per row | {finish_figure():.0f} | ≤ 400 |")
    return "\n".join(lines)


SIZES = (
    (64, 1024, 1024),
    (256, 1024, 1024),
    (8, 4096, 4096),
    (64, 4096, 4096),
    (1, 16384, 16384),
    (8, 16384, 16384),
    (1, 65536, 65536),
    (1, 256, 100_000),
    (1, 16384, 100_000),
)


def compare(passes: Callable[[str], None] = print) -> None:
    """A line for each case: µs at 65% of Triton, of CUDA C++, and which is less."""
    passes("| batch × queries × keys | D | k | Triton | CUDA C++ | ratio |")
    passes("|---|--:|--:|--:|--:|--:|")
    for k in (9, 16, 32, 64):
        for batch, n, m in SIZES:
            for d in (64, 128):
                w = Workload(batch, n, d, k, "random", keys=m, dtype="bfloat16")
                work = predict.Work("depthwise", w)
                us = []
                for backend in ("triton", "cuda"):
                    try:
                        row = predict.predict_work(replace(work, backend=backend))
                        us.append(float(row["good"]))
                    except (KeyError, ValueError) as error:
                        print(f"{backend} {w}: {error}", file=sys.stderr)
                        us.append(float("nan"))
                cells = (f"{batch} × {n:,} × {m:,}", d, k, f"{us[0]:,.1f}", f"{us[1]:,.1f}")
                passes(f"| {' | '.join(map(str, cells))} | {us[1] / us[0]:.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.cuda_figures", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--compare", action="store_true", help="with Triton's forward")
    options = parser.parse_args()
    try:
        print(figures(), flush=True)
        if options.compare:
            compare(lambda line: print(line, flush=True))
    except cuda_code.NotHere as missing:
        print(missing, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
