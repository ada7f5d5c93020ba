# SPDX-License-Identifier: MIT
"""Results as a file, as tables on the terminal, and as the block of figures in the README.

python -m benchmarks.report FILE.json                  print the tables again
python -m benchmarks.report FILE.json --pictures DIR   draw the pictures again
python -m benchmarks.report FILE.json --readme         rewrite the figures in README.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .peers import PASSES
from .stamp import REPOSITORY
from .workloads import REQUIRED, Workload

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

FOOTNOTE = (
    "ms: median (in parentheses, where shown, the 20th to 80th percentile). eager, SDPA: how many "
    "times as fast as that, the median of the ratios within each round, not the quotient of the "
    "medians; below 1 is slower. ConvNN with candidates is held against eager with the same "
    "candidates, SDPA and Conv2d against eager ConvNN over all. "
    "MB: peak resident memory above the inputs, in a process of its own. "
    "With random or spatial candidates the token itself is always a neighbor. "
    "Eager ConvNN uses torch.topk and keeps no order among ties."
)

Result = dict[str, Any]
Row = dict[str, Any]


def write(result: Result, path: Path) -> None:
    """Replace the file as a whole, so that an interrupted run leaves a readable one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> Result:
    return json.loads(path.read_text())


def workloads(rows: Iterable[Row]) -> list[Workload]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(Workload(**row["workload"]) for row in rows))


def _milliseconds(row: Row | None, spread: bool) -> str:
    if row is None:
        return ""
    if row["seconds"] is None:
        return row["status"]
    median, p20, p80 = (1e3 * row["seconds"][name] for name in ("median", "p20", "p80"))
    digits = 2 if median < 1 else 1 if median < 100 else 0
    text = f"{median:.{digits}f}"
    return f"{text} ({p20:.{digits}f}-{p80:.{digits}f})" if spread else text


def _ratio(row: Row | None, against: str) -> str:
    # A peer against itself is 1 and says nothing.
    if row is None or row["ratios"].get(against, {"peer": row["peer"]})["peer"] == row["peer"]:
        return ""
    ratio = row["ratios"][against]["median"]
    return f"{ratio:.{0 if ratio >= 20 else 1 if ratio >= 1 else 2}f}x"


def _megabytes(row: Row | None) -> str:
    if row is None or row["peak_bytes"] is None:
        return ""
    megabytes = row["peak_bytes"] / 1e6
    return f"{megabytes:.1f}" if megabytes < 10 else f"{megabytes:.0f}"


def _cells(rows: Sequence[Row], workload: Workload, spread: bool) -> list[list[str]]:
    """One line for each peer: its label, then four columns for each pass."""
    found = {
        (row["peer"], row["pass"]): row for row in rows if Workload(**row["workload"]) == workload
    }
    lines = []
    for peer in dict.fromkeys(peer for peer, _ in found):
        pair = [found.get((peer, passes)) for passes in PASSES]
        line = [next(row["label"] for row in pair if row is not None)]
        for row in pair:
            line += [_milliseconds(row, spread), _ratio(row, "eager"), _ratio(row, "sdpa")]
            line += [_megabytes(row)]
        lines.append(line)
    return lines


def _notes(rows: Sequence[Row], workload: Workload) -> list[str]:
    notes = []
    for row in rows:
        if Workload(**row["workload"]) != workload:
            continue
        if row["status"] != "measured":
            notes.append(f"{row['label']}, {row['pass']}: {row['status']}: {row['reason']}")
        elif row["peak_reason"]:
            notes.append(f"{row['label']}, {row['pass']}: no peak memory: {row['peak_reason']}")
    return notes


def describe(result: Result) -> str:
    """Machine, versions and commit in one line."""
    stamp = result["stamp"]
    cpu, versions = stamp["cpu"], stamp["versions"]
    commit = (stamp["commit"] or "no commit")[:12] + (" with changes" if stamp["dirty"] else "")
    return (
        f"{cpu['model']}, {stamp['threads']} threads of {cpu['logical_cores']}, "
        f"{cpu['pytorch_instruction_set']}; Python {versions['python']}, "
        f"PyTorch {versions['torch']}, convnn_kernels {versions['convnn_kernels']} ({commit}); "
        f"{stamp['date'][:10]}"
    )


def _busy(result: Result) -> str | None:
    load, cores = result["stamp"]["load_average"], result["stamp"]["cpu"]["logical_cores"]
    if load is None or load < 0.5 * cores:
        return None
    return (
        f"The machine was busy when this run began (load average {load:.1f} on {cores} cores): "
        "times are noisy."
    )


def terminal(result: Result) -> str:
    """Tables to read on a terminal, one for each workload."""
    rows = result["rows"]
    header = ["", *(column for _ in PASSES for column in ("ms", "eager", "SDPA", "MB"))]
    blocks = []
    for workload in workloads(rows):
        lines = [header, *_cells(rows, workload, spread=True)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        title = f"(B, N, C, k) = {workload.shape}, float32, {workload.source}"
        passes = [
            f"{name:-^{sum(group) + 2 * (len(group) - 1)}}"
            for name, group in zip(PASSES, (widths[1:5], widths[5:9]), strict=True)
        ]
        block = [title, " " * widths[0] + "  " + "  ".join(passes)]
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            block.append("  ".join(cells).rstrip())
        block += [f"  {note}" for note in _notes(rows, workload)]
        blocks.append("\n".join(block))
    busy = _busy(result)
    return "\n\n".join([describe(result), *blocks, FOOTNOTE, *([busy] if busy else [])])


def markdown(result: Result) -> str:
    """Tables for the README: the required shapes on photographs, or all there are."""
    rows = result["rows"]
    present = workloads(rows)
    chosen = [Workload(*shape) for shape in REQUIRED if Workload(*shape) in present] or present
    blocks = [f"Measured by `make bench`: {describe(result)}."]
    for workload in chosen:
        lines = [
            f"(B, N, C, k) = {workload.shape}, float32, {workload.source}:",
            "",
            "| | forward, ms | × eager | × SDPA | MB "
            "| forward + backward, ms | × eager | × SDPA | MB |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for line in _cells(rows, workload, spread=False):
            lines.append("| " + " | ".join(line) + " |")
        blocks.append("\n".join(lines))
        notes = _notes(rows, workload)
        if notes:
            blocks.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join([*blocks, FOOTNOTE])


def rewrite_block(path: Path, text: str) -> None:
    """Put the text between the two markers of a file."""
    content = path.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{path} must contain {BEGIN} and {END}, once each")
    before, rest = content.split(BEGIN)
    if END not in rest:
        raise ValueError(f"{path} must contain {BEGIN} before {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="a JSON file that python -m benchmarks wrote")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="?",
        const=REPOSITORY / "README.md",
        metavar="FILE",
        help="the file to rewrite (README.md)",
    )
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw the pictures there")
    options = parser.parse_args(arguments)
    try:
        result = read(options.result)
        if options.readme:
            rewrite_block(options.readme, markdown(result))
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    if options.pictures:
        from . import pictures

        for path in pictures.draw_all(result, options.pictures):
            print(path)
    if not options.readme and not options.pictures:
        print(terminal(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
