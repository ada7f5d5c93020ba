# SPDX-License-Identifier: MIT
"""The table of what Triton's compiler made of each kernel, and what would be wrong in a row of it.

``python -m tools.aot_table`` writes the summary in docs/triton.md. Needs neither Triton nor a
GPU; `tools.aot` fills the table.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import hashlib
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "convnn_kernels" / "triton"
RESULTS = ROOT / "tools" / "aot_tables"
DOCUMENT = ROOT / "docs" / "triton.md"

VERSIONS = ("3.6.0", "3.7.1")
ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that one program may use.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MOST_STACK = 64

Row = dict[str, Any]
Table = dict[str, Any]

# What a row has; in the file, rows are lists in this order.
COLUMNS = (
    "kernel",
    "arch",
    "dtype",
    "launch",
    "configuration",
    "registers",
    "stack",
    "shared",
    "matrix",
    "matrix_in_loop",
    "main_loop",
    "spills_in_main_loop",
    "narrow_offsets",
    "error",
)


def source_hashes() -> dict[str, str]:
    """For each kernel a hash of its code and of all device code that it uses; and one of
    configs.py. Comments, docstrings and host code do not matter."""
    hashes = {"configs": _hash(_tokens((KERNELS / "configs.py").read_text()))}
    modules = {path.stem: _module(path.read_text()) for path in sorted(KERNELS.glob("*.py"))}
    for module, content in modules.items():
        for kernel in content.device_code:
            if kernel.endswith("_kernel"):
                seen: set[tuple[str, str]] = set()
                todo = [(module, kernel)]
                while todo:
                    part = todo.pop()
                    if part not in seen and part[1] in modules[part[0]].device_code:
                        seen.add(part)
                        todo += modules[part[0]].uses(*part)
                code = (modules[name].device_code[each] for name, each in sorted(seen))
                hashes[kernel] = _hash("\n".join(code))
    return hashes


class _Module:
    """The functions and constants of a module that Triton compiles, and the names it imports."""

    def __init__(self, source: str) -> None:
        self.device_code: dict[str, str] = {}
        self._imports: dict[str, str] = {}
        # ast.get_source_segment splits all of the source for each node.
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            text = "".join(lines[node.lineno - 1 : node.end_lineno])
            if isinstance(node, ast.FunctionDef):
                if {ast.unparse(each) for each in node.decorator_list} & {"triton.jit", "Kernel"}:
                    self.device_code[node.name] = _tokens(text)
            elif isinstance(node, ast.Assign) and "tl.constexpr(" in text:
                self.device_code[ast.unparse(node.targets[0])] = _tokens(text)
            elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                self._imports |= dict.fromkeys((name.name for name in node.names), node.module)

    def uses(self, module: str, name: str) -> list[tuple[str, str]]:
        """Modules and names of what the device code `name`, of this module, refers to."""
        words = set(self.device_code[name].split())
        here = [(module, word) for word in words if word in self.device_code]
        return here + [(self._imports[word], word) for word in words if word in self._imports]


@functools.cache
def _module(source: str) -> _Module:
    return _Module(source)


def _tokens(source: str) -> str:
    """Source without comments and docstrings, whatever its layout."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.DEDENT)
    kept, begins_statement = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = begins_statement and token.type == tokenize.STRING
        if token.type not in ignored and not is_docstring:
            kept.append(token.string.strip() or "|")
        begins_statement = token.type in (*ignored, tokenize.INDENT)
    return " ".join(kept)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path) -> Table:
    """The table in a file, or an empty one."""
    if not path.exists():
        return {"launches": 0, "sources": {}, "rows": []}
    table = json.loads(path.read_text())
    table["rows"] = [dict(zip(COLUMNS, row, strict=True)) for row in table["rows"]]
    return table


def up_to_date(table: Table) -> list[Row]:
    """The rows of kernels whose sources have not changed since. A launch has its tiles in it."""
    now = source_hashes()
    return [
        row
        for row in table["rows"]
        if table["sources"].get(row["kernel"]) == now.get(row["kernel"], "no longer a kernel")
    ]


def write(
    path: Path, version: str, rows: list[Row], sources: dict[str, str], launches: int
) -> None:
    """Write rows, one in a line, that were compiled from sources with these hashes.

    `launches` is how many rows there will be when all configurations are compiled.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: [str(row.get(name)) for name in COLUMNS])
    lines = ",\n".join(json.dumps([row.get(name) for name in COLUMNS]) for row in ordered)
    names = {"configs", *(row["kernel"] for row in rows)}
    head = {
        "triton": version,
        "launches": launches,
        "columns": COLUMNS,
        "sources": {k: v for k, v in sources.items() if k in names},
    }
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


def machine_code(sass: str) -> Row:
    """Matrix instructions of a disassembled kernel, and what its loops consist of.

    A loop is what lies between a branch and an earlier position that it goes to. The main loop
    is the smallest with a matrix instruction, or, without any, the largest that has no other
    inside.
    """
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    positions = {int(address, 16): i for i, (address, _, _) in enumerate(code)}
    loops = []
    for i, (_, name, operands) in enumerate(code):
        target = re.search(r"\b0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target:
            begin = positions.get(int(target[1], 16), i)
            if begin < i - 1:
                loops.append(range(begin, i + 1))
    names = [name for _, name, _ in code]
    matrix = {i for i, name in enumerate(names) if re.match(r"(U?\w*MMA)\b", name)}
    inside = {i for loop in loops for i in loop}
    with_matrix = [loop for loop in loops if matrix & set(loop)]
    innermost = [loop for loop in loops if not any(a != loop and set(a) < set(loop) for a in loops)]
    main = min(with_matrix, key=len) if with_matrix else max(innermost, key=len, default=range(0))
    return {
        "matrix": "+".join(sorted({names[i].split(".")[0] for i in matrix})),
        "matrix_in_loop": "+".join(sorted({names[i].split(".")[0] for i in matrix & inside})),
        "main_loop": len(main),
        "spills_in_main_loop": sum(names[i].split(".")[0] in ("LDL", "STL") for i in main),
    }


def faults(row: Row) -> list[str]:
    """What is wrong with a row, whatever its kernel."""
    if row.get("error"):
        return [row["error"]]
    found = []
    if row["stack"] > MOST_STACK:
        found.append(f"{row['stack']} bytes of stack")
    if row["spills_in_main_loop"]:
        found.append(f"{row['spills_in_main_loop']} spills in the main loop")
    if row["shared"] > SHARED_MEMORY[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory")
    if row["narrow_offsets"]:
        found.append(f"{row['narrow_offsets']} offsets in 32 bits")
    return found


def summary(tables: Iterable[Table]) -> str:
    """A table in Markdown: for each kernel and architecture the extremes over all rows."""
    groups: dict[tuple[str, int], list[Row]] = collections.defaultdict(list)
    compiled = []
    for table in tables:
        compiled.append(
            f"{table.get('triton', 'none')}: {len(table['rows'])} of {table.get('launches', 0)}"
        )
        for row in table["rows"]:
            groups[row["kernel"], row["arch"]].append(row)
    lines = [
        f"Launches compiled: {', '.join(compiled)}.",
        "",
        "| kernel | architecture | rows | registers | stack, bytes | shared memory, KiB "
        "| matrix instructions | does not compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, arch), rows in sorted(groups.items()):
        good = [row for row in rows if not row["error"]]

        def most(name: str, good: list[Row] = good) -> int:
            return max((row[name] for row in good), default=0)

        matrix = sorted({row["matrix"] for row in good} - {""})
        lines.append(
            f"| `{kernel}` | sm_{arch} | {len(rows)} | {most('registers')} | {most('stack')} "
            f"| {most('shared') / 1024:.0f} | {', '.join(matrix)} | {len(rows) - len(good) or ''} |"
        )
    return "\n".join(lines)


def main() -> int:
    argparse.ArgumentParser(prog="python -m tools.aot_table", description=__doc__).parse_args()
    tables = [read(RESULTS / f"triton-{version}.json") for version in VERSIONS]
    text = DOCUMENT.read_text()
    begin, end = "<!-- aot -->\n", "<!-- end of aot -->"
    before, rest = text.split(begin)
    DOCUMENT.write_text(before + begin + summary(tables) + "\n" + end + rest.split(end)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
