# SPDX-License-Identifier: MIT
"""Slips made by rule: what is changed, and which places of a file are chosen."""

from __future__ import annotations

import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tools.slips.slip import Slip, digest

SEED = "2026"


@dataclass(frozen=True)
class Rule:
    name: str
    pattern: str  # of code in one line; comments and strings are blank
    replacement: str  # as in re.sub

    def __post_init__(self) -> None:
        re.compile(self.pattern)


_COMMON = [
    Rule("bound", r"(?<= )<(?= )", "<="),
    Rule("bound", r"(?<= )<=(?= )", "<"),
    Rule("bound", r"(?<= )>(?= )", ">="),
    Rule("bound", r"(?<= )>=(?= )", ">"),
    Rule("comparison", r"(?<= )==(?= )", "!="),
    Rule("comparison", r"(?<= )!=(?= )", "=="),
    Rule("sign", r"(?<=[\w)\]] )\+(?= [\w(])", "-"),
    Rule("sign", r"(?<=[\w)\]] )-(?= [\w(])", "+"),
    Rule("stride", r"(?<=[\w)\]] )\*(?= [\w(])", "+"),
    Rule("dropped-term", r" [+-] [\w.]+(\[\w+\])?(?=[;,)\]]|$)", ""),
    Rule("dropped-factor", r" \* [\w.]+(\[\w+\])?(?=[;,)\]]|$)", ""),
    Rule("off-by-one", r" [+-] 1\b(?!\.)", ""),
    Rule("accumulate", r" \+= ", " = "),
]

CPP = [
    *_COMMON,
    Rule("extreme", r"\bmin_of\(", "max_of("),
    Rule("extreme", r"\bmax_of\(", "min_of("),
    Rule("extreme", r"\bstd::min\b", "std::max"),
    Rule("extreme", r"\bstd::max\b", "std::min"),
    Rule("logic", r" && ", " || "),
    Rule("logic", r" \|\| ", " && "),
    Rule("flag", r"\btrue\b", "false"),
    Rule("flag", r"\bfalse\b", "true"),
    Rule("condition", r"(?<=\bif \()(?!constexpr)", "false && "),
    Rule("condition", r"(?<=\bif \()(?!constexpr)", "true || "),
    Rule("order", r"\? ([^?:;,]+?) : ([^?:;,()]+?)(?=[;,)])", r"? \2 : \1"),
    Rule("reset", r" = 0(?=;|,)", " = 1"),
    Rule("reset", r"(?<=\w) = \{\}(?=;)", ""),
    Rule("infinity", r"-(?=std::numeric_limits)", ""),
    Rule("thread-range", r"= begin\b", "= begin + (begin > 0)"),
    Rule("dropped-call", r"^(\s+)[\w.:\[\]>-]+\([^;]*\);$", r"\1;"),
    Rule("skip", r"\bcontinue;", ";"),
    Rule("element", r"\[0\]", "[1]"),
]

PYTHON = [
    *_COMMON,
    Rule("extreme", r"\bmin\(", "max("),
    Rule("extreme", r"\bmax\(", "min("),
    Rule("logic", r" and ", " or "),
    Rule("logic", r" or ", " and "),
    Rule("none", r" is None\b", " is not None"),
    Rule("none", r" is not None\b", " is None"),
    Rule("negation", r"\bnot (?!in\b)", ""),
    Rule("member", r" not in ", " in "),
    Rule("flag", r"\bTrue\b", "False"),
    Rule("flag", r"\bFalse\b", "True"),
    Rule("dimension", r"(?<=[(\[ =])-1\b", "-2"),
    Rule("dimension", r"(?<=[(\[ =])-2\b", "-1"),
    Rule("condition", r"^(\s+)(el)?if .+:$", r"\1\2if False:"),
    Rule("condition", r"^(\s+)(el)?if .+:$", r"\1\2if True:"),
    Rule("order", r" if (?=.+ else )", " if not "),
    Rule("default", r"(?<= = )1\b(?!\.)", "2"),
    Rule("default", r"(?<= = )1\.0\b", "2.0"),
    Rule("default", r"(?<==)0\b", "1"),
    Rule("dropped-call", r"^(\s+)(?!return|raise|yield)[\w.]+\(.*\)$", r"\1pass"),
    Rule("element", r"\[0\]", "[-1]"),
]

TRITON = [
    *[rule for rule in PYTHON if rule.name not in ("none", "member", "dimension")],
    # In a kernel, -1 is a dimension only in brackets; elsewhere it is a row that stands for none,
    # as -2 does.
    Rule("dimension", r"(?<=\[)-1\b", "-2"),
    Rule("mask", r", mask=[^,()]+(?=[,)])", ""),
    Rule("logic", r" & ", " | "),
    Rule("logic", r" \| ", " & "),
    Rule("extreme", r"\btl\.minimum\(", "tl.maximum("),
    Rule("extreme", r"\btl\.maximum\(", "tl.minimum("),
    Rule("extreme", r"\btl\.sum\(", "tl.max("),
    Rule("extreme", r"\btl\.max\(", "tl.min("),
]

# Places that no test can be expected to notice: declarations, includes, messages, and hints for
# speed only.
_NEVER = re.compile(
    r"^\s*(#|//|template|using|typedef|static_assert|namespace|@|import|from |assert )"
    r"|prefetch|#pragma|tl\.static_assert|TYPE_CHECKING|__all__|strict="
)


def rules_of(path: str) -> list[Rule]:
    if path.startswith("convnn_kernels/triton/"):
        return TRITON
    return PYTHON if path.endswith(".py") else CPP


def code_of(path: str, text: str) -> str:
    """The text with blanks in place of comments and strings."""
    if not path.endswith(".py"):
        pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'"
        return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    lines = [list(line) for line in text.splitlines(keepends=True)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.STRING, tokenize.COMMENT):
            continue
        for row in range(token.start[0], token.end[0] + 1):
            line = lines[row - 1]
            start = token.start[1] if row == token.start[0] else 0
            stop = token.end[1] if row == token.end[0] else len(line)
            for column in range(start, stop):
                line[column] = " " if line[column] != "\n" else "\n"
    return "".join("".join(line) for line in lines)


def _in_context(lines: list[str], row: int, text: str) -> str | None:
    """The line with as many of those before it as make it occur once in the text."""
    for first in range(row, max(-1, row - 12), -1):
        part = "".join(lines[first : row + 1])
        if text.count(part) == 1:
            return part
    return None


def candidates(path: str, text: str, skip: str = "") -> Iterator[Slip]:
    """All slips that the rules make of a file, except within what `skip` matches in a line."""
    lines = text.splitlines(keepends=True)
    codes = code_of(path, text).splitlines(keepends=True)
    for row, (line, code) in enumerate(zip(lines, codes, strict=True)):
        if _NEVER.search(line):
            continue
        if skip:
            code = re.sub(skip, lambda found: " " * len(found[0]), code)
        part = _in_context(lines, row, text)
        if part is None:
            continue
        lead = part[: len(part) - len(line)]
        for rule in rules_of(path):
            for found in re.finditer(rule.pattern, code.rstrip("\n")):
                changed = found.expand(rule.replacement)
                after = line[: found.start()] + changed + line[found.end() :]
                yield Slip(path, part, lead + after, rule.name)


def chosen(path: str, text: str, count: int, skip: str = "", seed: str = SEED) -> list[Slip]:
    """`count` slips of a file, at most one in a line, of as many rules as there are.

    Which ones depends only on the seed and on the text of each slip, so that a change elsewhere in
    the file moves few of them.
    """
    by_rule: dict[str, list[Slip]] = defaultdict(list)
    for slip in candidates(path, text, skip):
        by_rule[slip.what].append(slip)

    def rank(text: str) -> str:
        return digest(f"{seed}\0{text}".encode())

    for slips in by_rule.values():
        slips.sort(key=lambda slip: rank(slip.id))
    names = sorted(by_rule, key=lambda name: rank(f"{path}\0{name}"))
    taken: list[Slip] = []
    used: set[int] = set()
    while len(taken) < count and any(by_rule.values()):
        for name in names:
            while by_rule[name]:
                slip = by_rule[name].pop(0)
                if slip.line(text) not in used:
                    used.add(slip.line(text))
                    taken.append(slip)
                    break
            if len(taken) == count:
                break
    return taken
