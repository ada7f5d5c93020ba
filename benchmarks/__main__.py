# SPDX-License-Identifier: MIT
"""Measure ConvNN beside eager PyTorch, attention and convolution on real photographs.

Every result is checked before it is timed. A run ends in tables, a JSON file with machine,
versions and commit, plots of time and memory against N, and a picture of chosen neighbors.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import report, runner
from .devices import DEVICES
from .peers import DEFAULT_PEERS, PEERS
from .stamp import RESULTS, make_stamp
from .workloads import SOURCES, Workload, default_workloads


def _shape(text: str) -> Workload:
    try:
        batch, tokens, channels, k = (int(number) for number in text.split(","))
        return Workload(batch, tokens, channels, k)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"B,N,C,k expected, got {text!r}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="peers: " + "; ".join(f"{name}: {peer.label}" for name, peer in PEERS.items()),
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two small shapes, few rounds: seconds")
    add("--shapes", nargs="+", type=_shape, metavar="B,N,C,k", help="N must be a square")
    add(
        "--sources",
        nargs="+",
        choices=SOURCES,
        default=["photographs"],
        help="tokens for --shapes (photographs)",
    )
    add(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        metavar="PEER",
        default=list(DEFAULT_PEERS),
        help="whom to measure (all but python-ref)",
    )
    add("--device", default="cpu", help="where to measure (cpu)")
    add("--threads", type=int, help="PyTorch's threads (all cores)")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="the JSON file (benchmarks/results/DEVICE-DATE-TIME.json); pictures go beside it",
    )
    add("--no-pictures", action="store_true", help="leave out plots and the neighbors picture")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all measured. 1: a result was refused or failed. 2: wrong use. 130: interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = DEVICES.get(options.device)
    if device is None:
        parser.error(f"--device: nothing runs on {options.device!r} yet, only {', '.join(DEVICES)}")
    if (reason := device.why_not()) is not None:
        parser.error(f"--device {options.device}: {reason}")
    threads = device.default_threads() if options.threads is None else options.threads
    if threads < 1:
        parser.error(f"--threads must be at least 1, got {threads}")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    output = options.output or RESULTS / f"{device.name}-{date}.json"
    if options.shapes:
        shapes = [replace(w, source=source) for source in options.sources for w in options.shapes]
    else:
        shapes = default_workloads(options.quick)
    peers = {name: PEERS[name] for name in PEERS if name in options.peers}

    result: report.Result = {
        "complete": False,
        "stamp": make_stamp(device.name, threads),
        "rows": [],
    }
    try:
        # Before the work, so that a folder that cannot be written is found out now.
        report.write(result, output)
        effort = runner.QUICK if options.quick else runner.Effort()
        for i, workload in enumerate(shapes, 1):
            title, start = f"[{i}/{len(shapes)}] {workload}", time.perf_counter()
            result["rows"] += runner.measure(workload, peers, device, threads, effort, title)
            report.write(result, output)
            print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        result["complete"] = True
        report.write(result, output)
        print(report.terminal(result), end="\n\n")
        print(f"results: {output}")
        if not options.no_pictures:
            from . import pictures

            for path in pictures.draw_all(result, output.parent, f"{output.stem}-"):
                print(f"picture: {path}")
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured so far is in {output}", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"python -m benchmarks: {output}: {error}", file=sys.stderr)
        return 2
    wrong = [row for row in result["rows"] if row["status"] in ("refused", "failed")]
    for row in wrong:
        print(
            f"{row['status']}: {Workload(**row['workload'])}, {row['label']}, {row['pass']}: "
            f"{row['reason']}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
