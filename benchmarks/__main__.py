# SPDX-License-Identifier: MIT
"""Measures ConvNN beside eager PyTorch, attention, convolution and exact search.

Every result is checked before it is timed. A run ends with tables, a JSON file with machine,
versions and commit, and plots. The last table is that of the goals on a CPU: which are met, which
are not, which were not measured. A goal that is missed is no error. `python -m benchmarks compare
BEFORE.json AFTER.json` says what changed between two runs. `make bench ISA=avx2` runs the suite cpu
as on a processor without AVX-512; with CONVNN_CPU_ISA=avx2 in the environment only our kernels do.
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

from . import compare, goals, report, runner
from .devices import DEVICES, Cpu
from .environment import RESULTS, make_stamp
from .peers import PEERS, TRAINING
from .runner import Case, Effort, Group
from .suites import DEFAULT, MODELS, SUITES
from .workloads import SOURCES, Workload

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
    help_suite = "what to measure (default: cpu, or gpu on a GPU)"
    add("--suite", nargs="+", choices=list(SUITES), metavar="SUITE", help=help_suite)
    add("--shapes", nargs="+", type=_shape, metavar="B,N,C,k", help="measure these, not a suite")
    help_source = "tokens for --shapes (default: photographs)"
    add("--source", choices=SOURCES, default="photographs", help=help_source)
    add("--groups", nargs="+", metavar="TEXT", help="only groups with one of these in their name")
    help_peers = "only these (default: all of the suite)"
    add("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=help_peers)
    add("--device", default="cpu", help=f"{' or '.join(DEVICES)} (default: cpu)")
    add("--threads", type=int, help="PyTorch's threads (default: all cores)")
    help_output = "the JSON file (default: benchmarks/results/DEVICE-DATE.json); plots go beside it"
    add("--output", type=Path, metavar="FILE", help=help_output)
    add("--no-plots", action="store_true", help="leave out the plots")
    return parser


def _groups(options: argparse.Namespace) -> list[Group]:
    if options.shapes:
        found = []
        for shape in options.shapes:
            workload = replace(shape, source=options.source)
            peers = tuple(options.peers or MODELS)
            cases = (
                Case(workload, peer, passes)
                for peer in peers
                for passes in TRAINING
                if passes in PEERS[peer].passes
            )
            found.append(Group(f"shape {workload}", tuple(cases), SHAPES_EFFORT, peers))
        return found
    suites = options.suite or [DEFAULT[options.device]]
    found = [group for suite in suites for group in SUITES[suite].groups(options.device)]
    if options.peers:
        found = [
            replace(group, cases=tuple(c for c in group.cases if c.peer in options.peers))
            for group in found
        ]
    if options.groups:
        found = [g for g in found if any(text in g.name for text in options.groups)]
    return [group for group in found if group.cases]


def _measure(
    groups: Sequence[Group], device: Cpu, threads: int, result: report.Result, output: Path
) -> None:
    for i, group in enumerate(groups, 1):
        start = time.perf_counter()
        try:
            runner.measure(group, device, threads, result["rows"])
        finally:
            result["goals"] = goals.evaluate(result["rows"])
            report.write(result, output)
        seconds = time.perf_counter() - start
        print(f"[{i}/{len(groups)}] {group.name}: {seconds:.0f} s", file=sys.stderr)
    result["complete"] = True
    report.write(result, output)


def _finish(result: report.Result, output: Path, draw: bool) -> None:
    print(report.terminal(result), end="\n\n")
    print(f"results: {output}")
    if draw:
        from . import plots

        for path in plots.draw_all(result, output.parent, f"{output.stem}-"):
            print(f"plot: {path}")


def _complain(text: str) -> None:
    print(f"python -m benchmarks: {text}", file=sys.stderr)


def _run(options: argparse.Namespace, groups: Sequence[Group], device: Cpu, threads: int) -> int:
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    output = options.output or RESULTS / f"{device.name}-{date}.json"
    stamp = make_stamp(device.name, threads, device.describe())
    result: report.Result = {"complete": False, "stamp": stamp, "rows": []}
    try:
        # First of all, to learn whether the folder can be written.
        report.write(result, output)
    except OSError as error:
        _complain(f"cannot write {output}: {error}")
        return 2
    try:
        _measure(groups, device, threads, result, output)
        _finish(result, output, not options.no_plots)
    except KeyboardInterrupt:
        print(report.terminal(result), end="\n\n")
        with contextlib.suppress(OSError):
            report.write(result, output)
        _complain(f"interrupted; the results so far are in {output}")
        return 130
    except (OSError, runner.DeviceBroken) as error:
        if not result["complete"]:
            print(report.terminal(result), end="\n\n")
        kept = len(report.read(output)["rows"])
        _complain(f"{error}\n{output} has {kept} of the {len(result['rows'])} results so far")
        return 2
    wrong = [row for row in result["rows"] if row["status"] in ("refused", "failed")]
    for row in wrong:
        case = f"{Workload(**row['workload'])}, {row['label']}, {row['pass']}"
        _complain(f"{row['status']}: {case}: {row['reason']}")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all measured. 1: a result was refused or failed. 2: wrong use, an unwritable file, or a
    broken device. 130: interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    device = DEVICES.get(options.device)
    if device is None:
        parser.error(f"--device must be one of {', '.join(DEVICES)}, got {options.device!r}")
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
    # Like Ctrl-C, a time limit from outside keeps the results so far.
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
