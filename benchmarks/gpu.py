# SPDX-License-Identifier: MIT
"""``python -m benchmarks.gpu``, which `make gpu` runs: checks and times the kernels on a GPU.

It takes minutes and no network; docs/gpu.md describes the calls.

Stages run one after the other, each with a time limit. Every result is written to results.jsonl as
soon as there is one; a later run of the same commit skips what is already there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tools import gpu_kit

from . import report
from .environment import RESULTS, make_stamp
from .gpu_runner import Context, Record, Stage, finds_a_gpu, run_stage
from .gpu_stages import STAGES

# Limits of the summary: the log of a run may keep only its end.
LINES, CHARACTERS = 150, 11_500


class Results(list[Record]):
    """All results so far, also on disk if that can be written."""

    def __init__(self, folder: Path, stamp: Record) -> None:
        self.path, self.unwritten = folder / "results.jsonl", ""
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            with contextlib.suppress(ValueError):  # a truncated line
                self.append(json.loads(line))
        commits = {each["stamp"]["commit"] for each in self if "stamp" in each}
        if commits - {stamp["commit"]}:
            old = self.path.with_name(f"results-{commits.pop()}.jsonl")
            print(f"renamed {self.path.name} of another commit to {old.name}", flush=True)
            self.path.rename(old)
            self.clear()
        self.add({"stamp": stamp})

    def add(self, record: Record) -> None:
        self.append(record)
        with self.noting_errors(), self.path.open("a") as file:
            file.write("\n" + json.dumps(record))

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.unwritten = f"cannot write to {self.path.parent}: {error.strerror}"


def limit(stage: Stage, names: Sequence[str], seconds: float, left: float) -> float:
    """The seconds of a stage: its limit, less if the stages `names` share less than their sum, or
    what is left if it has no limit.
    """
    total = sum(each.seconds for each in STAGES if each.name in names)
    return min(left, stage.seconds * min(1.0, seconds / total)) if stage.seconds else left


def summary(results: Results, ran: dict[str, Record]) -> str:
    """Times and ratios, as many as fit, then the outcome of each stage and its failures."""
    timed = list[str]()
    for r in (r for r in results if r.get("stage") == "time" and "rows" in r):
        timed += [f"{r['case']}: {report.times_line(r['rows'])} ms"]
        timed += report.kernel_lines(r["rows"], 8 if len(timed) < 30 else 0)
    stamp = next(r["stamp"] for r in results if "stamp" in r)
    cards = [r["gpu"] for r in results if "gpu" in r]
    stamp["gpu"] = cards[-1] if cards else None
    rows = [row for r in results if r.get("stage") == "ratios" for row in r.get("rows", ())]
    suite = {"complete": False, "stamp": stamp, "rows": rows}
    with results.noting_errors():
        report.write(suite, results.path.with_name("benchmark.json"))
    ratios = report.ratio_lines(rows)
    lines = ["stage, seconds, results"]
    for name, record in ran.items():
        counts = ", ".join(f"{count} {status}" for status, count in record["counts"].items())
        lines.append(f"{name:<10}{record['seconds']:>6.0f} of {record['limit']:.0f} s: {counts}")
        last = {r["case"]: r for r in results if r.get("stage") == name}
        wrong = [r for r in last.values() if r["status"] != "passed"]
        first = {(r["status"], r["why"][:100]): r for r in reversed(wrong)}
        for r in [*reversed(first.values())][:4]:
            lines.append(f"  {r['status']}: {r['case']}: {' '.join(r['why'].split())[:200]}")
    lines += [results.unwritten] * bool(results.unwritten)
    above = timed + ratios
    while above and (len(above + lines) >= LINES or len("\n".join(above + lines)) > CHARACTERS):
        above.pop(len(timed) - 1)
        timed = timed[:-1]
    return "\n".join(above + lines)


def main(arguments: list[str] | None = None) -> int:
    """0: all passed. 1: something did not. 2: nothing was run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add, names = parser.add_argument, [stage.name for stage in STAGES]
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: rehearse all stages")
    add("--output", type=Path, default=RESULTS / "gpu", metavar="FOLDER")
    add("--seconds", type=float, default=560, help="limit of all stages together")
    add("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    add("--kit", type=Path, default=gpu_kit.FOLDER, help="made by make gpu-kit")
    options, began = parser.parse_args(arguments), time.monotonic()
    if options.device == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", "CONVNN_GPU_TESTS": "cpu"}
    # Without it, deterministic algorithms refuse the matrix products of the reference.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if options.device == "cuda" and not finds_a_gpu():
            why = f"PyTorch {torch.__version__} finds no CUDA device: --device cpu is a rehearsal"
            raise gpu_kit.Refused(why)
        kit = gpu_kit.install(options.kit) if options.device == "cuda" else None
    except gpu_kit.Refused as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    with contextlib.suppress(ImportError):  # the cases report it
        import convnn_kernels  # noqa: F401  once, before the processes are forked

    options.output.mkdir(parents=True, exist_ok=True)
    stamp = make_stamp(options.device, torch.get_num_threads()) | {"kit": kit}
    results, ran = Results(options.output, stamp), {}
    context = Context(options.device, options.output, results=results)
    context.compiled = gpu_kit.compilations()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for stage in (each for each in STAGES if each.name in options.only):
            left = options.seconds - (time.monotonic() - began)
            context.seconds = limit(stage, options.only, options.seconds, left)
            print(f"{stage.name}: at most {context.seconds:.0f} s", flush=True)
            ran[stage.name] = run_stage(stage, context, results.add) | {"limit": context.seconds}
    text = summary(results, ran)
    with results.noting_errors():
        (options.output / "report.txt").write_text(text + "\n")
    print(text, flush=True)
    passed = all(
        context.found(each.name).get(case, {}).get("status") == "passed"
        for each in STAGES
        if each.name in options.only
        for case in each.cases(options.device)
    )
    return 0 if passed and not results.unwritten else 1


if __name__ == "__main__":
    sys.exit(main())
