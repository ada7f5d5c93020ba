# SPDX-License-Identifier: MIT
"""Results as a file, as tables on the terminal, and as tables in Markdown.

python -m benchmarks.report FILE.json                  print the tables again
python -m benchmarks.report FILE.json --pictures DIR   draw the pictures again
python -m benchmarks.report FILE.json --page FILE.html write the page again
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import goals
from .peers import PEERS
from .workloads import Workload

FOOTNOTE = (
    "ms: median and, in parentheses, the 20th to 80th percentile. ÷ eager, SDPA, Conv2d, FAISS, "
    "original: the time divided by theirs, the median of the ratios within each round, not the "
    "quotient of the medians; below 1 is quicker. Eager is plain PyTorch that computes the same; "
    "SDPA is the fastest of the kernels of scaled_dot_product_attention that were measured; the "
    "original of a model is that of convolutions or attention. "
    "select finds neighbors, aggregate convolves them, ConvNN is both; depthwise, unless it says "
    "dense, which like Conv2d mixes channels. "
    "of bound: the least time that the flops and bytes of the call allow, at the rates of torch.mm "
    "and of a copy in the same group, divided by the time; above 1 where a call is quicker than "
    "torch.mm, whose product does not stay in the cache. "
    "MB: peak memory above the inputs, on a CPU the resident set of a process of its own. "
    "With random or spatial candidates the token itself is always a neighbor. "
    "Eager ConvNN uses torch.topk and keeps no order among ties."
)

Result = dict[str, Any]
Row = dict[str, Any]


def replace_file(path: Path, text: str) -> None:
    """As a whole, so that an interrupted run or a full disk leaves a readable one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        # Where it could not be written there may be nothing to remove, nor a folder.
        with contextlib.suppress(OSError):
            partial.unlink()


def times_line(rows: Iterable[Row]) -> str:
    """Milliseconds of what was measured, with b for passes that have a backward."""
    measured = [row for row in rows if row["seconds"]]
    return ", ".join(
        f"{row['peer']}{'+b' * ('backward' in row['pass'])} {1e3 * row['seconds']['median']:.3f}"
        for row in measured
    )


def kernel_lines(rows: Iterable[Row], most: int) -> list[str]:
    """The heaviest kernels of the last pass that has any."""
    kernels = [row["kernels"] for row in rows if row["kernels"]][-1:]
    return [
        f"    {each['kernel']:<30}{each['us']:>9.1f} µs"
        + "".join(f"  {name} {each[name]}" for name in ("predicted", "bound") if each[name])
        for each in (kernels[0][:most] if kernels else ())
    ]


def write(result: Result, path: Path) -> None:
    # A line for each row: a list of samples is not worth forty.
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    others = {name: value for name, value in result.items() if name != "rows"}
    head = json.dumps(others, indent=1).removesuffix("\n}")
    replace_file(path, f'{head},\n "rows": [\n{rows}\n ]\n}}\n')


def read(path: Path) -> Result:
    """Raises OSError or ValueError."""
    result = json.loads(path.read_text())
    rows = result.get("rows") if isinstance(result, dict) else None
    if not isinstance(rows, list) or not all("group" in row for row in rows):
        raise ValueError(f"{path} is not a result of this version of python -m benchmarks")
    return result


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """In the order in which they were measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


@dataclass(frozen=True)
class References:
    """Whom the rows of a group are divided by: those that take the same map of tokens."""

    rows: Sequence[Row]

    def _like(self, row: Row, peers: Iterable[str], same_source: bool) -> Row | None:
        own = row["workload"]
        same = ["batch", "tokens", "channels", "dtype", "keys"] + ["source"] * same_source
        return goals.quickest(
            other
            for other in self.rows
            if other["peer"] in peers
            and other["pass"] == row["pass"]
            and all(other["workload"][name] == own[name] for name in same)
        )

    def find(self, row: Row, against: str) -> Row | None:
        """The row that `row` is divided by, or None. A reference is not divided by itself."""
        peer = PEERS.get(row["peer"])
        if peer is None or peer.computes in ("rate", "copy"):
            return None
        # A search is held against a search, a layer against a layer.
        is_search, of_search = peer.computes in _SEARCHES, against == "faiss"
        if against in ("sdpa", "conv2d", "faiss") and is_search != of_search:
            return None
        if against in ("eager", "original"):
            wanted = (against == "original") == (peer.computes == "model")
            if not wanted or not peer.baseline or peer.baseline == row["peer"]:
                return None
            return self._like(row, [peer.baseline], same_source=True)
        names = [name for name, each in PEERS.items() if (each.family or name) == against]
        return None if row["peer"] in names else self._like(row, names, same_source=False)

    def bound(self, row: Row) -> float | None:
        """The least seconds that flops and bytes allow, at rates measured in the same run."""
        if row["flops"] is None or row["bytes"] is None:
            return None
        rates = {}
        for name, quantity in (("mm", "flops"), ("copy", "bytes")):
            like = [
                other
                for other in self.rows
                if other["peer"] == name
                and other["seconds"] is not None
                and (name == "copy" or other["workload"]["dtype"] == row["workload"]["dtype"])
            ]
            if like:
                rates[quantity] = max(o[quantity] / o["seconds"]["median"] for o in like)
        if "flops" not in rates:
            return None
        return max(row[quantity] / rate for quantity, rate in rates.items())


_AGAINST = {
    "eager": "÷ eager",
    "original": "÷ original",
    "sdpa": "÷ SDPA",
    "conv2d": "÷ Conv2d",
    "faiss": "÷ FAISS",
}
_SEARCHES = ("select", "product")


def _milliseconds(row: Row | None, spread: bool) -> str:
    if row is None:
        return ""
    if row["seconds"] is None:
        return row["status"] if row["status"] != "measured" else "not timed"
    median, p20, p80 = (1e3 * row["seconds"][name] for name in ("median", "p20", "p80"))
    digits = 4 if median < 0.1 else 2 if median < 1 else 1 if median < 100 else 0
    text = f"{median:.{digits}f}"
    return f"{text} ({p20:.{digits}f}-{p80:.{digits}f})" if spread else text


def _ratio(row: Row | None, other: Row | None) -> str:
    if row is None or other is None or row["seconds"] is None:
        return ""
    value = goals.ratio(row, other)[0]
    return f"{value:.{0 if value >= 20 else 1 if value >= 10 else 2 if value >= 0.1 else 3}f}"


def _megabytes(row: Row | None) -> str:
    if row is None or row["peak_bytes"] is None:
        return ""
    megabytes = row["peak_bytes"] / 1e6
    return f"{megabytes:.1f}" if megabytes < 10 else f"{megabytes:.0f}"


def label(row: Row, first: Row) -> str:
    """The label of the peer, with what sets its workload apart from the group's first one."""
    own, base = row["workload"], first["workload"]
    text = row["label"]
    if "random" in row["peer"] or "spatial" in row["peer"]:
        text = text.replace("random", f"{own['candidates']} random")
        text = text.replace("spatial", f"{own['candidates']} spatial")
    if row["peer"] in ("mm", "copy"):
        return text
    if (own["batch"], own["tokens"], own["channels"]) != tuple(
        base[name] for name in ("batch", "tokens", "channels")
    ):
        text += f", N = {own['tokens']}"
    return text + (f", {own['source']} features" if own["source"] != base["source"] else "")


def table(rows: Sequence[Row], spread: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one group: for each pass time, ratios, bound and memory."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(label(row, rows[0]), {})[row["pass"]] = row
    references = References(rows)
    columns: dict[tuple[str, str], list[str]] = {}
    for each in passes:
        own = [of_pass.get(each) for of_pass in found.values()]
        columns[each, "ms"] = [_milliseconds(row, spread) for row in own]
        for against, title in _AGAINST.items():
            others = [None if row is None else references.find(row, against) for row in own]
            columns[each, title] = [_ratio(*pair) for pair in zip(own, others, strict=True)]
        bounds = [None if row is None else references.bound(row) for row in own]
        columns[each, "of bound"] = [
            ""
            if row is None or bound is None or row["seconds"] is None
            else f"{bound / row['seconds']['median']:.2f}"
            for row, bound in zip(own, bounds, strict=True)
        ]
        columns[each, "MB"] = [_megabytes(row) for row in own]
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    header = ["", *(f"{each}: {name}" if name == "ms" else name for each, name in kept)]
    lines = [[name, *(cells[i] for cells in kept.values())] for i, name in enumerate(found)]
    return header, lines


def notes(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why."""
    found = []
    for row in rows:
        name = f"{row['label']}, {row['pass']}"
        if row["status"] != "measured":
            found.append(f"{name}: {row['status']}: {row['reason']}")
        elif row["seconds"] is None:
            found.append(f"{name}: checked, not timed: the run ended")
        elif row["peak_reason"]:
            found.append(f"{name}: no peak memory: {row['peak_reason']}")
    return list(dict.fromkeys(found))


def heading(name: str, rows: Sequence[Row]) -> str:
    workload = Workload(**rows[0]["workload"])
    shape = "" if workload.shape in name else f" {workload.shape}"
    source = "" if workload.source in name else f", {workload.source}"
    dtype = "" if workload.dtype in name else f", {workload.dtype}"
    return f"{name}{shape} = (B, N, C, k){source}{dtype}"


# Whom each of ours is divided by: what does the same, or what it stands in for.
_OURS = {
    "convnn-all": ("sdpa", "conv2d"),
    "convnn-random": ("sdpa", "conv2d"),
    "convnn-dense": ("conv2d",),
    "aggregate-dense": ("conv2d",),
    "select": ("faiss",),
}
THEIRS = {
    "sdpa": "attention (SDPA)",
    "conv2d": "Conv2d 3×3",
    "faiss": "FAISS, exact search",
}


# A small call says what the host costs, and bfloat16 has a table of its own.
_NO_BARS = ("host overhead", "bfloat16")


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """By whom against, label and pass: our time divided by theirs."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in THEIRS}
    for group, members in groups(rows).items():
        if group.startswith(_NO_BARS):
            continue
        references, source = References(members), members[0]["workload"]["source"]
        for row in members:
            w = Workload(**row["workload"])
            if row["peer"] not in _OURS or w.source != source:
                continue
            for against in _OURS[row["peer"]]:
                value = goals.ratio(row, references.find(row, against))[0]
                dtype = "" if w.dtype == "float32" else f", {w.dtype}"
                name = f"{label(row, row)}, {w.shape}{dtype}"
                if not math.isnan(value):
                    found[against].setdefault(name, {}).setdefault(row["pass"], value)
    return {name: bars for name, bars in found.items() if bars}


def two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:#.2g}"


def summary(rows: Sequence[Row]) -> list[str]:
    """What ConvNN costs in a sentence for each kind and reference: ranges over the shapes."""
    lines = []
    for against, bars in ratios(rows).items():
        ranges: dict[str, dict[str, list[float]]] = {}
        for name, passes in bars.items():
            for each, value in passes.items():
                # The label without its shape.
                kind = name.partition(", (")[0]
                ranges.setdefault(kind, {}).setdefault(each, []).append(value)
        for kind, passes_of in ranges.items():
            parts = []
            for each, values in passes_of.items():
                low, high = two_digits(min(values)), two_digits(max(values))
                span = low if low == high else f"{low} to {high}"
                parts.append(f"{each} {span} times")
            lines.append(f"{kind}: {', '.join(parts)} the time of {THEIRS[against]}")
    return lines


def describe(result: Result) -> str:
    """Machine, versions and commit in one line."""
    stamp = result["stamp"]
    cpu, versions = stamp["cpu"], stamp["versions"]
    commit = (stamp["commit"] or "no commit")[:12] + (" with changes" if stamp["dirty"] else "")
    gpu = "" if stamp.get("gpu") is None else f"{stamp['gpu']['name']}; "
    return (
        f"{gpu}{cpu['model']}, {stamp['threads']} threads of {cpu['logical_cores']}, "
        f"{cpu['pytorch_instruction_set']}; Python {versions['python']}, "
        f"PyTorch {versions['torch']}, convnn_kernels {versions['convnn_kernels']} ({commit}); "
        f"{stamp['date'][:10]}"
    )


def caveats(result: Result) -> list[str]:
    """What a reader must know before the figures."""
    stamp, found = result["stamp"], []
    load, cores = stamp["load_average"], stamp["cpu"]["logical_cores"]
    if load is not None and load >= 0.5 * cores:
        found.append(
            f"The machine was busy when this run began (load average {load:.1f} on {cores} cores): "
            "times are noisy."
        )
    if result.get("left_out"):
        found.append(f"Left out for want of time: {'; '.join(result['left_out'])}.")
    elif not result["complete"]:
        found.append("This run did not finish: what is missing was not measured.")
    return found


def terminal(result: Result) -> str:
    """Tables to read on a terminal, one for each group, then the goals."""
    blocks = []
    for name, rows in groups(result["rows"]).items():
        header, lines = table(rows, spread=True)
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
        block = [heading(name, rows)]
        for line in (header, *lines):
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            block.append("  ".join(cells).rstrip())
        block += [f"  {note}" for note in notes(rows)]
        blocks.append("\n".join(block))
    found = goals.goals(result)
    if short := summary(result["rows"]):
        blocks.append("\n".join(["in short, over the shapes above", *short]))
    if found:
        blocks.append(f"goals (time ÷ time unless it says share)\n{goals.table(found)}")
    return "\n\n".join([describe(result), *blocks, FOOTNOTE, *caveats(result)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="a JSON file that python -m benchmarks wrote")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw the pictures there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page there")
    options = parser.parse_args(arguments)
    try:
        result = read(options.result)
        if not options.pictures and not options.page:
            print(terminal(result))
            return 0

        from . import page, pictures

        with tempfile.TemporaryDirectory() as folder:
            drawn = pictures.draw_all(result, options.pictures or Path(folder))
            if options.page:
                page.write(result, drawn, options.page)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    for path in [*(path for _, path in drawn if options.pictures), options.page]:
        if path:
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
