# SPDX-License-Identifier: MIT
"""Keeps the figures in the documentation equal to those in result files.

    python -m benchmarks.figures             rewrite the tables of the three pages
    python -m benchmarks.figures --check     only report differences; a test does the same

A document names a file of benchmarks/results and then the tables that it shows, in comments that
Markdown does not render:

    <!-- figures: cpu-2026-11-30.json -->

    <!-- table: layer (8, 1024, 64, 9) -->
    (this text is replaced)
    <!-- end -->

A table is `machine`, `goals` or the name of a group; `<!-- paper: run -->` and
`<!-- paper: memory -->` are the tables of python -m benchmarks.paper, and `<!-- paper: study -->`,
`study table 1`, `study table 2` and `study sweeps` those of its study. A figure that no run prints
belongs between `<!-- by hand: how it was measured -->` and `<!-- end -->`; anywhere else a decimal
number, a percentage, a factor, or a number with a unit of time, memory or rate is an error, except
in code, after ≤ or ≥, and in versions.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from . import goals, ratios, report
from .environment import REPOSITORY, RESULTS

DOCUMENTS = (
    REPOSITORY / "README.md",
    *(REPOSITORY / "docs" / name for name in ("performance.md", "study.md")),
)

_FILE = re.compile(r"<!-- figures: (\S+) -->")
_BLOCK = re.compile(
    r"(?P<begin><!-- (?P<kind>table|paper|by hand): (?P<what>.+?) -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
_CODE = re.compile(r"```.*?```|`[^`\n]*`|!?\[[^\]]*\]\([^)]*\)|<!--.*?-->", re.DOTALL)
_FIGURE = re.compile(
    r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?: ?(?:%|×(?! ?\d)|(?:ms|µs|ns|MB|GB|GFLOP/s|GB/s|x|times)\b))"
    r"|(?<![\w.,-])\d+\.\d+(?![\w.])"
)
_EXEMPT = re.compile(
    r"(?:[≤≥<>]|PyTorch|Python|Triton|CUDA|version|torch|section|Eq\.)[ =~]*\Z", re.IGNORECASE
)


class WrongFigureError(ValueError):
    """A table or file that does not exist."""


def _markdown(
    header: list[str], lines: list[list[str]], notes: Sequence[str], left: int = 1
) -> str:
    """A table whose first `left` columns are aligned on the left, and a list of notes."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    text = "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))
    listed = "".join(f"\n- {note}" for note in notes)
    return f"\n{text}{listed}\n"


def table(result: report.Result, what: str) -> str:
    if what == "machine":
        return f"Measured by `make bench`: {report.describe(result)}.\n"
    if what == "goals":
        if not result.get("goals"):
            raise WrongFigureError("no goals")
        header, lines = goals.table(result["goals"])
        reasons = [f"not measured: {reason}" for reason in goals.notes(result["goals"])]
        return f"\n{report.goals_heading(result)}\n{_markdown(header, lines, reasons, left=2)}"
    rows = ratios.groups(result["rows"]).get(what)
    if rows is None:
        raise WrongFigureError(f"no group {what!r}")
    return _markdown(*report.table(rows, spread=False), report.notes(rows))


def paper_table(what: str) -> str:
    """The recorded training ("run"), the memory of its steps ("memory"), or a part of the study."""
    from .paper import memory, report

    if what.startswith("study"):
        return f"\n{_study_table(what)}\n\n"
    name = {"run": "cifar10-rows.json", "memory": "memory.json"}.get(what)
    if name is None:
        raise WrongFigureError(f"no table {what!r} of the paper's command")
    result = json.loads((RESULTS / "paper" / name).read_text())
    if what == "memory":
        return f"\n{memory.table(result['steps'])}\n\n"
    return f"\n{report.summary(result['rows'], result['logs'])}\n\n"


def _study_table(what: str) -> str:
    from .paper import study_report
    from .paper.study_rows import TABLES

    study = json.loads((RESULTS / "paper" / "study.json").read_text())
    if what == "study":
        return textwrap.fill(f"{study_report.what_was_run(study)}.", 100)
    if what == "study sweeps":
        return study_report.sweeps_table(study)
    tables = {f"study table {number}": rows for number, rows in TABLES.items()}
    if what not in tables:
        raise WrongFigureError(f"no part {what!r} of the study")
    names = [row.name for row in tables[what]]
    words = textwrap.fill(study_report.conclusion(study, names), 100)
    return f"{study_report.table(study, names)}\n\n{words}"


def rewrite(text: str, folder: Path = RESULTS) -> str:
    """The document with the tables of its result files. Raises WrongFigureError."""

    def result_before(position: int) -> report.Result:
        names = [match[1] for match in _FILE.finditer(text) if match.start() < position]
        if not names:
            raise WrongFigureError("a table comes before any <!-- figures: FILE.json -->")
        try:
            return report.read(folder / names[-1])
        except (OSError, ValueError) as error:
            raise WrongFigureError(f"{names[-1]}: {error}") from error

    def block(match: re.Match[str]) -> str:
        if match["kind"] == "by hand":
            return match[0]
        if match["kind"] == "paper":
            return match["begin"] + paper_table(match["what"]) + match["end"]
        found = table(result_before(match.start()), match["what"])
        return match["begin"] + found + match["end"]

    return _BLOCK.sub(block, text)


def unmarked(text: str) -> list[str]:
    """Figures outside any block, each with its line."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    found = []
    for number, line in enumerate(_CODE.sub(blank, _BLOCK.sub(blank, text)).splitlines(), 1):
        for match in _FIGURE.finditer(line):
            if not _EXEMPT.search(line[: match.start()]):
                found.append(f"line {number}: {match[0].strip()!r} comes from no result file")
    return found


def disagreements(path: Path, folder: Path = RESULTS) -> list[str]:
    """The problems that --check reports for a document."""
    text = path.read_text()
    found = unmarked(text)
    try:
        right = rewrite(text, folder)
    except WrongFigureError as error:
        return [*found, str(error)]
    pairs = zip(text.splitlines(), right.splitlines(), strict=False)
    for number, (old, new) in enumerate(pairs, 1):
        if old != new:
            return [*found, f"line {number}: {old.strip()!r}, the result says {new.strip()!r}"]
    return found if text == right else [*found, "a table has more or fewer lines than the result"]


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all agrees, or is rewritten. 1: something disagrees. 2: wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("documents", type=Path, nargs="*", default=DOCUMENTS, metavar="FILE.md")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            for path in options.documents:
                path.write_text(rewrite(path.read_text()))
        found = [f"{path}: {each}" for path in options.documents for each in disagreements(path)]
    except (OSError, ValueError) as error:
        print(f"benchmarks.figures: {error}", file=sys.stderr)
        return 2
    for problem in found:
        print(problem, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
