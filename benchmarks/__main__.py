# SPDX-License-Identifier: MIT
"""Measure ConvNN beside eager PyTorch, attention, convolution and exact search.

Every result is checked before it is timed. A run ends in tables, a JSON file with machine,
versions and commit, an HTML page and pictures. `python -m benchmarks compare BEFORE.json
AFTER.json` says what moved between two runs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import compare, report, runner
from .devices import DEVICES, Device
from .peers import PEERS
from .runner import Case, Effort, Group
from .stamp import RESULTS, make_stamp
from .suites import DEFAULT, SUITES
from .workloads import SOURCES, Workload

DEFAULT_PEERS = ("convnn-all", "convnn-random", "convnn-spatial", "eager", "sdpa", "conv2d")


# The exit status where another process must go on.
CRASHED = 70

# For --shapes.
SHAPES_EFFORT = Effort()


def _shape(text: str) -> Workload:
    try:
        batch, tokens, channels, k = (int(number) for number in text.split(","))
        return Workload(batch, tokens, channels, k, "random")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"B,N,C,k expected, got {text!r}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="suites:\n"
        + "\n".join(f"  {name:<12}{suite.purpose}" for name, suite in SUITES.items())
        + "\n\npeers:\n"
        + "\n".join(f"  {name:<22}{peer.label}" for name, peer in PEERS.items()),
    )
    add = parser.add_argument
    add(
        "--suite",
        nargs="+",
        choices=list(SUITES),
        metavar="SUITE",
        help="what to measure (cpu, or gpu on a GPU)",
    )
    add("--shapes", nargs="+", type=_shape, metavar="B,N,C,k", help="these, instead of a suite")
    add(
        "--sources",
        nargs="+",
        choices=SOURCES,
        default=["photographs"],
        help="tokens for --shapes (photographs)",
    )
    add("--groups", nargs="+", metavar="TEXT", help="only groups with one of these in their name")
    add(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        metavar="PEER",
        help="whom to measure (all of a suite)",
    )
    add("--device", default="cpu", help=f"where to measure: {' or '.join(DEVICES)} (cpu)")
    add("--threads", type=int, help="PyTorch's threads (all cores)")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="the JSON file (benchmarks/results/DEVICE-DATE-TIME.json); the others lie beside it",
    )
    add(
        "--limit",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="begin no group after that time",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with --output where it exists: groups that are in it are not measured again",
    )
    add("--no-pictures", action="store_true", help="leave out the pictures and the page")
    return parser


def _own_groups(options: argparse.Namespace) -> list[Group]:
    """Groups for --shapes."""
    peers = options.peers or DEFAULT_PEERS
    groups = []
    for source in options.sources:
        for shape in options.shapes:
            workload = replace(shape, source=source)
            cases = [
                Case(workload, peer, passes)
                for peer in peers
                for passes in ("forward", "forward+backward")
                if passes in PEERS[peer].passes
            ]
            name = f"shape {workload}"
            groups.append(Group(name, tuple(cases), SHAPES_EFFORT, tuple(peers)))
    return groups


def _groups(options: argparse.Namespace) -> list[Group]:
    if options.shapes:
        return _own_groups(options)
    found = []
    for suite in options.suite or [DEFAULT[options.device]]:
        found += SUITES[suite].groups(options.device)
    if options.peers:
        found = [
            replace(group, cases=tuple(c for c in group.cases if c.peer in options.peers))
            for group in found
        ]
    if options.groups:
        found = [g for g in found if any(text in g.name for text in options.groups)]
    return [group for group in found if group.cases]


def _measure(
    groups: Sequence[Group],
    device: Device,
    threads: int,
    result: report.Result,
    output: Path,
    seconds: float,
) -> None:
    began = time.perf_counter()
    for i, group in enumerate(groups, 1):
        title, start = f"[{i}/{len(groups)}] {group.name}", time.perf_counter()
        if start - began > seconds:
            left = [group.name for group in groups[i - 1 :]]
            result["left_out"] = left
            print(f"--limit {seconds:g}: left out {'; '.join(left)}", file=sys.stderr)
            return
        try:
            runner.measure(group, device, threads, result["rows"], title)
        finally:
            report.write(result, output)
        print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def _finish(result: report.Result, output: Path, draw: bool) -> None:
    """Everything but the JSON file."""
    print(report.terminal(result), end="\n\n")
    print(f"results: {output}")
    if not draw:
        return
    from . import page, pictures

    drawn = pictures.draw_all(result, output.parent, f"{output.stem}-")
    for _, path in drawn:
        print(f"picture: {path}")
    page.write(result, drawn, output.with_suffix(".html"))
    print(f"page: {output.with_suffix('.html')}")


def _run(options: argparse.Namespace, groups: Sequence[Group], device: Device, threads: int) -> int:
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    output = options.output or RESULTS / f"{device.name}-{date}.json"
    result: report.Result = {
        "complete": False,
        "stamp": make_stamp(device.name, threads, device.describe()),
        "left_out": [],
        "rows": [],
    }
    if options.resume and output.exists():
        before = report.read(output)
        result = {**before, "complete": False, "left_out": []}
        result.setdefault("resumed", []).append(make_stamp(device.name, threads, device.describe()))
        known = {row["group"] for row in before["rows"]}
        groups = [group for group in groups if group.name not in known]
    try:
        # Before the work, so that a folder that cannot be written is found out now.
        report.write(result, output)
    except OSError as error:
        print(f"python -m benchmarks: cannot write {output}: {error}", file=sys.stderr)
        return 2
    try:
        _measure(groups, device, threads, result, output, options.limit)
        result["complete"] = not result["left_out"]
        report.write(result, output)
        _finish(result, output, not options.no_pictures)
    except runner.DeviceBroken as error:
        print(f"python -m benchmarks: the device cannot be used any more: {error}", file=sys.stderr)
        return CRASHED
    except KeyboardInterrupt:
        print(report.terminal(result), end="\n\n")
        with contextlib.suppress(OSError):
            report.write(result, output)
        print(f"\ninterrupted; what was measured so far is in {output}", file=sys.stderr)
        return 130
    except OSError as error:
        if not result["complete"]:
            print(report.terminal(result), end="\n\n")
        kept = len(report.read(output)["rows"])
        print(
            f"python -m benchmarks: {error}\n{output} holds {kept} of the {len(result['rows'])} "
            "results so far; the tables above hold all of them",
            file=sys.stderr,
        )
        return 2
    wrong = [row for row in result["rows"] if row["status"] in ("refused", "failed")]
    for row in wrong:
        print(
            f"{row['status']}: {Workload(**row['workload'])}, {row['label']}, {row['pass']}: "
            f"{row['reason']}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all measured. 1: a result was refused or failed. 2: wrong use, or a file could not be
    written. 70: the device broke, see --resume. 130: interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    device = DEVICES.get(options.device)
    if device is None:
        parser.error(f"--device: nothing runs on {options.device!r}, only on {', '.join(DEVICES)}")
    if (reason := device.why_not()) is not None:
        parser.error(f"--device {options.device}: {reason}")
    threads = device.default_threads() if options.threads is None else options.threads
    if threads < 1:
        parser.error(f"--threads must be at least 1, got {threads}")
    try:
        groups = _groups(options)
    except ValueError as error:
        parser.error(str(error))
    if not groups:
        parser.error("no group is left to measure")
    return _run(options, groups, device, threads)


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # A time limit from outside keeps what was measured, as Ctrl-C does.
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
