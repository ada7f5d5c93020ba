# SPDX-License-Identifier: MIT
"""The figures in the documentation, taken from result files: python -m benchmarks.figures

A document names a file of benchmarks/results, and after each figure a key, in comments that
Markdown does not show:

    <!-- figures: cpu-2026-11-22.json -->
    ... select reaches 0.74<!-- select-share/B8-N1024-C64-k9 --> of the torch.mm rate ...

    <!-- table: goals -->
    what stands here is replaced
    <!-- end -->

The command rewrites the numbers with as many decimals as they have, `74%` as a percentage, and the
tables. `--check` only says what disagrees; so does a test. `--keys FILE.json` lists the keys.

Keys: those of goals; `ms/PEER/PASS/SHAPE`, `MB/PEER/PASS/SHAPE` and
`over/PEER/OTHER/PASS/SHAPE` (time ÷ time), with a SHAPE like B8-N1024-C64-k9 (tokens of photographs
unless it ends in -random, float32 unless it ends in -bfloat16); `GFLOP/s` and `GB/s`, of torch.mm
and a copy. Tables: `goals`, `machine`, or the name of a group.

A figure without a key is an error, too: a decimal number, or one with a unit of time, memory or
rate, a percentage or a factor. `<!-- by hand: how it was measured -->` ... `<!-- end -->` is for
what no run prints, `<!-- paper: run -->` and `<!-- paper: memory -->` for the tables of
python -m benchmarks.paper. A number in code, after ≤ or ≥, or in a version is no figure.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from . import goals, report
from .stamp import REPOSITORY, RESULTS

DOCUMENTS = (REPOSITORY / "README.md", REPOSITORY / "docs" / "performance.md")

_FILE = re.compile(r"<!-- figures: (\S+) -->")
_FIGURE = re.compile(
    r"(?P<number>\d[\d,]*(?:\.\d+)?)(?P<unit>%|×|x| ?[A-Za-zµ/]+)?<!-- (?P<key>[^\s:]+) -->"
)
_BLOCK = re.compile(
    r"(?P<begin><!-- (?P<kind>table|paper|by hand): (?P<what>.+?) -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
_CODE = re.compile(r"```.*?```|`[^`\n]*`|!?\[[^\]]*\]\([^)]*\)|<!--.*?-->", re.DOTALL)
_UNMARKED = re.compile(
    r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?: ?(?:%|×(?! ?\d)|(?:ms|µs|ns|MB|GB|GFLOP/s|GB/s|x|times)\b))"
    r"|(?<![\w.,-])\d+\.\d+(?![\w.])"
)
_NO_FIGURE = re.compile(
    r"(?:[≤≥<>]|PyTorch|Python|Triton|CUDA|version|torch|section|Eq\.)[ =~]*\Z", re.IGNORECASE
)


class WrongFigureError(ValueError):
    """A key, a table or a file that is not there."""


def _shape(row: report.Row) -> str:
    w = row["workload"]
    text = f"B{w['batch']}-N{w['tokens']}-C{w['channels']}-k{w['k']}"
    if "random" in row["peer"] or "spatial" in row["peer"]:
        text += f"-R{w['candidates']}"
    text += "-random" * (w["source"] == "random")
    return text + (f"-{w['dtype']}" if w["dtype"] != "float32" else "")


def keys(result: report.Result) -> dict[str, float]:
    """Every figure of a result by its key; of two groups with the same case, the first."""
    found = {goal.key: goal.value for goal in goals.goals(result) if goal.value is not None}
    for name, peer, quantity in (("GFLOP/s", "mm", "flops"), ("GB/s", "copy", "bytes")):
        rates = [
            row[quantity] / row["seconds"]["median"] / 1e9
            for row in result["rows"]
            if row["peer"] == peer and row["seconds"] and row["workload"]["dtype"] == "float32"
        ]
        if rates:
            found[name] = float(np.median(rates))
    for rows in report.groups(result["rows"]).values():
        timed = [row for row in rows if row["seconds"] and row["peer"] not in ("mm", "copy")]
        for row in timed:
            name = f"{row['peer']}/{row['pass']}/{_shape(row)}"
            found.setdefault(f"ms/{name}", 1e3 * row["seconds"]["median"])
            if row["peak_bytes"] is not None:
                found.setdefault(f"MB/{name}", row["peak_bytes"] / 1e6)
            for other in timed:
                same = all(
                    row["workload"][each] == other["workload"][each]
                    for each in ("batch", "tokens", "channels")
                )
                if same and row["pass"] == other["pass"] and row is not other:
                    key = f"over/{row['peer']}/{other['peer']}/{row['pass']}/{_shape(row)}"
                    found.setdefault(key, goals.ratio(row, other)[0])
    return found


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("--:" for _ in header[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def table(result: report.Result, what: str) -> str:
    if what == "machine":
        return "\n".join([f"Measured by `make bench`: {report.describe(result)}."]) + "\n"
    if what == "goals":
        lines = [goals.cells(goal) for goal in goals.goals(result)]
        return "\n" + _markdown(("", "measured", "20% to 80%", "goal", ""), lines) + "\n"
    rows = report.groups(result["rows"]).get(what)
    if rows is None:
        raise WrongFigureError(f"no group {what!r}")
    notes = "".join(f"\n- {note}" for note in report.notes(rows))
    return "\n" + _markdown(*report.table(rows, spread=False)) + notes + "\n"


def paper_table(what: str) -> str:
    """Of the recorded training ("run") or of the memory of its steps ("memory")."""
    from .paper import memory, report

    name = {"run": "cifar10-rows.json", "memory": "memory.json"}.get(what)
    if name is None:
        raise WrongFigureError(f"no table {what!r} of the paper's command")
    result = json.loads((RESULTS / "paper" / name).read_text())
    if what == "memory":
        return f"\n{memory.table(result['steps'])}\n\n"
    return f"\n{report.summary(result['rows'], result['logs'])}\n\n"


def _rewrite_number(match: re.Match[str], value: float) -> str:
    unit = match["unit"] or ""
    decimals = len(match["number"].partition(".")[2])
    number = f"{100 * value if unit == '%' else value:,.{decimals}f}"
    return f"{number}{unit}<!-- {match['key']} -->"


def rewrite(text: str, read: Callable[[str], report.Result]) -> str:
    """The document with the figures of its result files. Raises WrongFigureError."""
    files = list(_FILE.finditer(text))
    known: dict[str, tuple[report.Result, dict[str, float]]] = {}

    def result_at(place: int) -> tuple[report.Result, dict[str, float]]:
        before = [match[1] for match in files if match.start() < place]
        if not before:
            raise WrongFigureError("a figure stands before any <!-- figures: FILE.json -->")
        name = before[-1]
        if name not in known:
            try:
                result = read(name)
            except (OSError, ValueError) as error:
                raise WrongFigureError(f"{name}: {error}") from error
            known[name] = result, keys(result)
        return known[name]

    def block(match: re.Match[str]) -> str:
        if match["kind"] == "by hand":
            return match[0]
        if match["kind"] == "paper":
            return match["begin"] + paper_table(match["what"]) + match["end"]
        return match["begin"] + table(result_at(match.start())[0], match["what"]) + match["end"]

    def figure(match: re.Match[str]) -> str:
        values = result_at(match.start())[1]
        if match["key"] == "end":
            return match[0]
        if match["key"] not in values:
            raise WrongFigureError(f"no figure {match['key']!r}")
        return _rewrite_number(match, values[match["key"]])

    # Numbers first: a table may move what follows it.
    text = _FIGURE.sub(figure, text)
    files = list(_FILE.finditer(text))
    return _BLOCK.sub(block, text)


def unmarked(text: str) -> list[str]:
    """Figures without a key, each with its line."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    bare = _CODE.sub(blank, _FIGURE.sub(blank, _BLOCK.sub(blank, text)))
    found = []
    for number, line in enumerate(bare.splitlines(), 1):
        for match in _UNMARKED.finditer(line):
            if not _NO_FIGURE.search(line[: match.start()]):
                found.append(f"line {number}: {match[0].strip()!r} has no key")
    return found


def disagreements(path: Path, folder: Path | None = None) -> list[str]:
    """What --check says of a document: nothing if all is well."""
    text = path.read_text()
    found = unmarked(text)
    try:
        right = rewrite(text, lambda name: report.read((folder or RESULTS) / name))
    except WrongFigureError as error:
        return [*found, str(error)]
    pairs = zip(text.splitlines(), right.splitlines(), strict=False)
    for number, (old, new) in enumerate(pairs, 1):
        if old != new:
            found.append(f"line {number}: {old.strip()!r}, the result says {new.strip()!r}")
            break
    else:
        if text != right:
            found.append("a table is longer or shorter than the result's")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all agrees, or is rewritten. 1: something disagrees. 2: wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("documents", type=Path, nargs="*", default=DOCUMENTS, metavar="FILE.md")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--keys", type=Path, metavar="FILE.json", help="list what may be quoted")
    options = parser.parse_args(arguments)
    try:
        if options.keys:
            for key, value in keys(report.read(options.keys)).items():
                print(f"{value:12.4g}  {key}")
            return 0
        if not options.check:
            for path in options.documents:
                text = path.read_text()
                path.write_text(rewrite(text, lambda name: report.read(RESULTS / name)))
        found = {path: disagreements(path) for path in options.documents}
    except (OSError, ValueError) as error:
        print(f"benchmarks.figures: {error}", file=sys.stderr)
        return 2
    for path, problems in found.items():
        for problem in problems:
            print(f"{path}: {problem}", file=sys.stderr)
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
