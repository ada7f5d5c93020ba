# SPDX-License-Identifier: MIT
"""Copies the C++ sources with faults that the sanitizers must find.

    python plant.py CSRC TO

A fault does something only if the environment variable CONVNN_PLANTED names it. Each is a statement
after a line of a source, which must be there exactly once.
"""

import sys
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    after: str
    statement: str


FAULTS = {
    # One element after an array in scratch memory, and of what a caller passes.
    "scratch": Fault(
        "cpu/select.h",
        "    const int64_t capacity = BestColumns<A>::capacity(most_found(p));",
        "scratch.self_similarities[kBlockRows] = 0;",
    ),
    "input": Fault(
        "cpu/select.h",
        "    const A* wide;  // converted once",
        "row[0] = widen(x[p.d]);",
    ),
    "indices": Fault(
        "torch_operators.h",
        "  const int64_t count = shaped.numel();",
        'check_range(op, "indices", indices.data_as<int64_t>(), count + 1, rows);',
    ),
    "overflow": Fault(
        "cpu/select.cpp",
        "  const int64_t columns = p.candidates ? p.r : p.m;",
        "{ volatile int32_t elements = (int32_t(p.n) + 1) * 0x7fffffff; }",
    ),
    # What nobody wrote, in scratch memory and in a variable.
    "memory": Fault(
        "cpu/aggregate.h",
        "      modulate(p, first, last - first, scratch.rho);",
        "scratch.rho[0] += 1e-3 * scratch.rho[kBlockRows * p.k - 1];",
    ),
    "variable": Fault(
        "cpu/aggregate.h",
        "      if (p.bias) add_scaled(block, 1, static_cast<const T*>(p.bias) + first, sum);",
        "{ double other; sum[0][0] += other; }",
    ),
    # A result that depends on how tasks are divided, and on the instruction set.
    "ranges": Fault(
        "cpu/aggregate.h",
        "    const int64_t at_once = dense ? blocks_at_once(p) : 1;",
        "if (begin > 0) const_cast<AggregateParams&>(p).scale = 2;",
    ),
    "set": Fault(
        "cpu/aggregate.cpp",
        "void aggregate(const AggregateParams& p, ParallelFor parallel_for) {",
        'if (kernels().instruction_set == std::string("avx512")) return;',
    ),
    "race": Fault(
        "cpu/parallel.h",
        "  const auto run_range = [&](int64_t begin, int64_t end) {",
        "{ static int64_t ranges = 0; ++ranges; }",
    ),
}

HEADER = """\
#include <cstdlib>
#include <string>
static inline bool planted(const char* name) {
  static const char* const wanted = std::getenv("CONVNN_PLANTED");
  return wanted && std::string(wanted) == name;
}
"""


def write(path: Path, text: str) -> None:
    """Leave a file alone that is the same: it need not be compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    csrc, to = map(Path, sys.argv[1:])
    for path in (*csrc.glob("*.h"), *csrc.glob("cpu/*")):
        name = path.relative_to(csrc).as_posix()
        text = path.read_text()
        for fault, (file, after, statement) in FAULTS.items():
            if file != name:
                continue
            if text.count(after) != 1:
                raise SystemExit(f"{__file__}: {file} must have this once, for '{fault}':\n{after}")
            text = text.replace(after, f'{after}\nif (planted("{fault}")) {statement}')
        write(to / name, text)
    write(to / "planted.h", HEADER)


if __name__ == "__main__":
    main()
