# SPDX-License-Identifier: MIT
"""A result as one HTML page that holds its pictures, tables and goals and needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import goals, report

_CSS = """
body { font: 16px/1.45 system-ui, sans-serif; color: #111; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.5rem 0; }
th, td { padding: 0.15rem 0.6rem; text-align: right; border-bottom: 1px solid #ccc; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
img { max-width: 100%; border: 1px solid #ccc; }
.lost { font-weight: bold; text-decoration: underline; }
.note { color: #444; font-size: 0.85rem; }
"""

_INTRODUCTION = (
    "ConvNN lets each of N tokens take its k nearest tokens and convolves them. It stands between "
    "attention, which weighs all tokens, and convolution, whose neighbors are those beside it. "
    "Shapes are (B, N, C, k): a batch of B, N tokens of C channels, k neighbors. The neighbors are "
    "searched among all tokens, or among random ones or a grid of them (candidates). All results "
    "were checked before they were timed."
)


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows = []
    for line in lines:
        cells = (_cell(title, cell) for title, cell in zip(header, line, strict=True))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n")
    body = "".join(rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _cell(title: str, cell: str) -> str:
    """A ratio above 1, where we or the peer are dearer, stands out."""
    try:
        above = title.startswith("÷") and float(cell) > 1
    except ValueError:
        above = False
    text = html.escape(cell)
    return f'<span class="lost">{text}</span>' if above else text


def _goals(result: report.Result) -> str:
    found = goals.goals(result)
    if not found:
        return ""
    lines = [list(goals.cells(goal)) for goal in found]
    met = sum(goal.met is True for goal in found)
    missed = sum(goal.met is False for goal in found)
    return (
        f"<h2>Goals</h2><p>{met} met, {missed} not met, {len(found) - met - missed} open. "
        "Time ÷ time, unless it says share.</p>"
        + _table(("", "value", "20th to 80th percentile", "goal", ""), lines)
    )


def _picture(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(title)
    return f'<h2>{name}</h2>\n<img alt="{name}" src="data:image/png;base64,{data}">'


def render(result: report.Result, pictures: Iterable[tuple[str, Path]]) -> str:
    blocks = [f"<p>{html.escape(report.describe(result))}</p>"]
    blocks += [f"<p><b>{html.escape(text)}</b></p>" for text in report.caveats(result)]
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in report.summary(result["rows"]))
    if lines:
        blocks.append(f"<h2>In short</h2><p>Ranges over the shapes below:</p><ul>{lines}</ul>")
    blocks += [_picture(title, path) for title, path in pictures]
    blocks.append(_goals(result))
    note = html.escape(report.FOOTNOTE + " Ratios above 1 are bold and underlined.")
    blocks.append(f'<h2>All times</h2><p class="note">{note}</p>')
    for name, rows in report.groups(result["rows"]).items():
        blocks.append(f"<h3>{html.escape(report.heading(name, rows))}</h3>")
        blocks.append(_table(*report.table(rows, spread=True)))
        blocks += [f'<p class="note">{html.escape(note)}</p>' for note in report.notes(rows)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>ConvNN benchmark</title><style>{_CSS}</style></head><body>\n"
        "<h1>What ConvNN costs beside attention, convolution and exact search</h1>\n"
        f"<p>{html.escape(_INTRODUCTION)}</p>\n" + "\n".join(blocks) + "\n</body></html>\n"
    )


def write(result: report.Result, pictures: Iterable[tuple[str, Path]], path: Path) -> None:
    report.replace_file(path, render(result, pictures))
