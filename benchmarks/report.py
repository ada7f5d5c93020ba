# SPDX-License-Identifier: MIT
"""Result files, and their tables on a terminal and in Markdown.

python -m benchmarks.report FILE.json               print the tables of a result again
python -m benchmarks.report FILE.json --plots DIR   draw its plots again
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import goals, ratios
from .ratios import Row, groups
from .workloads import Workload

FOOTNOTE = (
    "ms: median and, in parentheses, the 20th to 80th percentile. ÷: our time divided by theirs, "
    "the median of the ratios within each round; below 1 is faster. Eager is plain PyTorch that "
    "computes the same, without an order among ties; SDPA is the fastest measured kernel of "
    "scaled_dot_product_attention; the original of a model has convolutions or attention. "
    "select finds neighbors, aggregate convolves them, ConvNN does both: depthwise, unless it says "
    "dense, which mixes channels like Conv2d. "
    "of bound: the least time that flops and bytes allow at the rates of torch.mm and of a copy in "
    "the same group, divided by the time; it exceeds 1 where a call is faster than torch.mm, whose "
    "product does not stay in the cache. "
    "MB: peak memory above the inputs, on a CPU the resident set of a separate process. "
    "÷ AVX-512: the kernels for AVX2 divided by those for AVX-512. "
    "With random or spatial candidates the token itself is always a neighbor."
)

Result = dict[str, Any]


def replace_file(path: Path, text: str) -> None:
    """Replaces the file as a whole: after an interruption or on a full disk the old one remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        # If it could not be written, there may be nothing to remove.
        with contextlib.suppress(OSError):
            partial.unlink()


def write(result: Result, path: Path) -> None:
    # One line per row and goal: a list of samples is not worth forty.
    lists = {name: result[name] for name in ("goals", "rows") if name in result}
    others = {name: value for name, value in result.items() if name not in lists}
    parts = [json.dumps(others, indent=1).removesuffix("\n}")]
    for name, each in lists.items():
        lines = ",\n".join(json.dumps(line) for line in each)
        parts.append(f' "{name}": [\n{lines}\n ]')
    replace_file(path, ",\n".join(parts) + "\n}\n")


def read(path: Path) -> Result:
    """Raises OSError or ValueError."""
    result = json.loads(path.read_text())
    rows = result.get("rows") if isinstance(result, dict) else None
    if not isinstance(rows, list) or not all("group" in row for row in rows):
        raise ValueError(f"{path} is not a result of this version of python -m benchmarks")
    return result


# Cells of a table.


def _milliseconds(row: Row, spread: bool) -> str:
    if row["seconds"] is None:
        return row["status"] if row["status"] != "measured" else "not timed"
    median, p20, p80 = (1e3 * row["seconds"][name] for name in ("median", "p20", "p80"))
    digits = 4 if median < 0.1 else 2 if median < 1 else 1 if median < 100 else 0
    text = f"{median:.{digits}f}"
    return f"{text} ({p20:.{digits}f}-{p80:.{digits}f})" if spread else text


def _number(value: float) -> str:
    return f"{value:.{0 if value >= 20 else 1 if value >= 10 else 2 if value >= 0.1 else 3}f}"


def _cells(row: Row, rows: Sequence[Row], spread: bool) -> dict[str, str]:
    """Of one row, by the title of the column."""
    cells = {"ms": _milliseconds(row, spread)}
    for title, other in ratios.references(row, rows).items():
        if found := ratios.ratio(row, other):
            cells[title] = _number(found[0])
    bound = ratios.bound(row, rows)
    if bound is not None and row["seconds"]:
        cells["of bound"] = f"{bound / row['seconds']['median']:.2f}"
    if row["peak_bytes"] is not None:
        megabytes = row["peak_bytes"] / 1e6
        cells["MB"] = f"{megabytes:.1f}" if megabytes < 10 else f"{megabytes:.0f}"
    return cells


def label(row: Row, first: Row) -> str:
    """The label of the peer, and how its workload differs from the group's first one."""
    workload, base = row["workload"], first["workload"]
    text = row["label"]
    if "random" in row["peer"] or "spatial" in row["peer"]:
        for kind in ("random", "spatial"):
            text = text.replace(kind, f"{workload['candidates']} {kind}")
    if row["peer"] in ("mm", "copy"):
        return text
    if any(workload[name] != base[name] for name in ("batch", "tokens", "channels")):
        text += f", N = {workload['tokens']}"
    if workload["dtype"] != base["dtype"]:
        text += f", {workload['dtype']}"
    return text + (f", {workload['source']} features" * (workload["source"] != base["source"]))


def table(rows: Sequence[Row], spread: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one group: time, ratios, bound and memory of each pass."""
    lines: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        cells = _cells(row, rows, spread)
        line = lines.setdefault(label(row, rows[0]), {})
        line |= {(row["pass"], title): cell for title, cell in cells.items()}
    passes = dict.fromkeys(row["pass"] for row in rows)
    titles = ("ms", *ratios.TITLES, "of bound", "MB")
    columns = [(each, title) for each in passes for title in titles]
    columns = [column for column in columns if any(column in line for line in lines.values())]
    header = ["", *(f"{each}: {title}" if title == "ms" else title for each, title in columns)]
    return header, [
        [name, *(line.get(column, "") for column in columns)] for name, line in lines.items()
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why."""
    found = []
    for row in rows:
        name = f"{row['label']}, {row['pass']}"
        if row["status"] != "measured":
            found.append(f"{name}: {row['status']}: {row['reason']}")
        elif row["seconds"] is None:
            found.append(f"{name}: checked but not timed: the run ended")
        elif row["peak_reason"]:
            found.append(f"{name}: no peak memory: {row['peak_reason']}")
    return list(dict.fromkeys(found))


def heading(name: str, rows: Sequence[Row]) -> str:
    workload = Workload(**rows[0]["workload"])
    shape = "" if workload.shape in name else f" {workload.shape}"
    source = "" if workload.source in name else f", {workload.source}"
    dtype = "" if workload.dtype in name else f", {workload.dtype}"
    return f"{name}{shape} = (B, N, C, k){source}{dtype}"


# Lines of text.


def summary(rows: Iterable[Row]) -> list[str]:
    """For each of our peers and passes the range of each ratio over the shapes."""
    found: dict[str, dict[str, list[float]]] = {}
    for row, values in ratios.ours(rows):
        name = f"{label(row, row)}, {row['pass']}"
        for title, (median, _, _) in values.items():
            found.setdefault(name, {}).setdefault(title, []).append(median)
    lines = []
    for name, titles in found.items():
        spans = (dict.fromkeys((_number(min(v)), _number(max(v)))) for v in titles.values())
        parts = (f"{title} {' to '.join(span)}" for title, span in zip(titles, spans, strict=True))
        lines.append(f"{name}: {', '.join(parts)}")
    return lines


def ratio_lines(rows: Iterable[Row]) -> list[str]:
    """The ratios of each of our peers and shapes in one line; +b marks passes with a backward. The
    curves against N are left to the result file.
    """
    rows = [row for row in rows if "against N" not in row["group"]]
    lines: dict[str, dict[str, list[str]]] = {}
    for row, values in ratios.ours(rows):
        w = Workload(**row["workload"])
        line = lines.setdefault(f"{row['peer']} {w.shape} {w.dtype}", {})
        cells = line.setdefault(w.source, [])
        backward = "+b " * ("backward" in row["pass"])
        cells += [f"{backward}{title} {_number(value)}" for title, (value, _, _) in values.items()]
    sums: dict[str, list[str]] = {}
    for (peer, passes, source), value in ratios.sums_of_layers(rows).items():
        backward = "+b " * ("backward" in passes)
        cell = f"{backward}{source} {_number(value)}"
        sums.setdefault(f"all layers of VGG-11 ÷ Conv2d, {peer}", []).append(cell)
    return [f"{name}: {', '.join(cells)}" for name, cells in sums.items()] + [
        f"{name}: {'; '.join(f'{source} ' + ', '.join(cells) for source, cells in parts)}"
        for name, line in lines.items()
        if (parts := [(source, cells) for source, cells in line.items() if cells])
    ]


def times_line(rows: Iterable[Row]) -> str:
    """Milliseconds of what was measured; +b marks passes with a backward."""
    measured = [row for row in rows if row["seconds"]]
    return ", ".join(
        f"{row['peer']}{'+b' * ('backward' in row['pass'])} {1e3 * row['seconds']['median']:.3f}"
        for row in measured
    )


def kernel_lines(rows: Iterable[Row], most: int) -> list[str]:
    """The slowest kernels of the last pass with kernel times."""
    kernels = [row["kernels"] for row in rows if row["kernels"]][-1:]
    return [
        f"    {each['kernel']:<30}{each['us']:>9.1f} µs"
        + "".join(f"  {name} {each[name]}" for name in ("predicted", "bound") if each[name])
        for each in (kernels[0][:most] if kernels else ())
    ]


def processor(result: Result) -> str:
    """The processor, and which of its instructions were used."""
    stamp = result["stamp"]
    cpu = stamp["cpu"]
    parts = [cpu["model"] + (f" ({cpu['family']})" if cpu.get("family") else "")]
    parts += [f"{stamp['threads']} threads of {cpu['logical_cores']}"]
    parts += [cpu["pytorch_instruction_set"]]
    if ours := cpu.get("convnn_instruction_set"):
        parts.append(f"convnn_kernels on {ours}")
    if forced := stamp.get("forced"):
        parts.append("forced by " + " ".join(f"{name}={forced[name]}" for name in forced))
    return ", ".join(parts)


def describe(result: Result) -> str:
    """Machine, versions and commit in one line."""
    stamp = result["stamp"]
    versions = stamp["versions"]
    commit = (stamp["commit"] or "no commit")[:12] + (" with changes" if stamp["dirty"] else "")
    gpu = "" if stamp.get("gpu") is None else f"{stamp['gpu']['name']}; "
    return (
        f"{gpu}{processor(result)}; Python {versions['python']}, "
        f"PyTorch {versions['torch']}, convnn_kernels {versions['convnn_kernels']} ({commit}); "
        f"{stamp['date'][:10]}"
    )


def caveats(result: Result) -> list[str]:
    """What a reader must know before trusting the figures."""
    stamp, found = result["stamp"], []
    load, cores = stamp["load_average"], stamp["cpu"]["logical_cores"]
    if load is not None and load >= 0.5 * cores:
        found.append(
            f"The machine was busy when this run began (load average {load:.1f} on {cores} cores): "
            "times are noisy."
        )
    if not result["complete"]:
        found.append("This run did not finish; some groups were not measured.")
    return found


def _aligned(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of text; the first `left` columns are aligned on the left."""
    table = [header, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    found = []
    for line in table:
        pairs = list(zip(line, widths, strict=True))
        cells = [cell.ljust(width) for cell, width in pairs[:left]]
        cells += [cell.rjust(width) for cell, width in pairs[left:]]
        found.append("  ".join(cells).rstrip())
    return found


def goals_heading(result: Result) -> str:
    return f"goals on {processor(result)}: {goals.summary(result['goals'])}"


def _goals_block(result: Result) -> str:
    """Every goal, what was measured, and whether it is met."""
    lines = _aligned(*goals.table(result["goals"]), left=2)
    reasons = [f"  not measured: {reason}" for reason in goals.notes(result["goals"])]
    return "\n".join([goals_heading(result), *lines, *reasons])


def terminal(result: Result) -> str:
    """One table per group, the ratios in short, then the goals."""
    blocks = []
    for name, rows in groups(result["rows"]).items():
        block = [heading(name, rows), *_aligned(*table(rows, spread=True))]
        blocks.append("\n".join([*block, *(f"  {note}" for note in notes(rows))]))
    if short := summary(result["rows"]):
        blocks.append("\n".join(["in short, over the shapes above", *short]))
    last = [_goals_block(result)] if result.get("goals") else []
    return "\n\n".join([describe(result), *blocks, FOOTNOTE, *caveats(result), *last])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="a JSON file that python -m benchmarks wrote")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the plots there")
    options = parser.parse_args(arguments)
    try:
        result = read(options.result)
        if options.plots:
            from . import plots

            print(*plots.draw_all(result, options.plots), sep="\n")
        else:
            print(terminal(result))
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
