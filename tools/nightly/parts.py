# SPDX-License-Identifier: MIT
"""The parts of the nightly checks, and a process that runs some cases of one."""

import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convnn_kernels  # noqa: F401

# The hours that the counts of the parts are for.
HOURS = 2.0
MOST_FAILURES = 20


@dataclass(frozen=True)
class Part:
    """Cases that a function runs, each from its number; the count is that of HOURS."""

    name: str
    function: str
    count: int
    what: str
    shards: int = 1
    least: int = 1

    def load(self) -> Callable[[int], bool]:
        """Returns whether there was something to compare; raises AssertionError for a fault."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"tools.nightly.{module}"), name)


PARTS = {
    part.name: part
    for part in (
        Part("random", "cases:random_case", 100_000, "random cases against the reference", 4),
        Part("special", "cases:special_case", 20_000, "random cases of NaN, infinity and the like"),
        Part("derivatives", "cases:derivative", 20_000, "cases of directional derivatives"),
        Part("reruns", "reruns:rerun", 24_000, "reruns of 24 configurations, bit by bit", least=48),
        Part("leaks", "leaks:leak", 10, "times 10,000 calls without growth of memory", least=2),
        Part("threads", "threads:at_once", 400, "times 128 calls of 16 threads at once", least=2),
    )
}


def run(part: Part, first: int, count: int, seconds: float, out: Path) -> None:
    """Runs cases until `count` had something to compare, or time is up; writes what happened.

    `out` always names the case that runs, for what ends the process.
    """
    case = part.load()
    began = time.monotonic()
    result: dict[str, Any] = {"part": part.name, "wanted": count, "compared": 0, "failures": []}
    for seed in _seeds(first):
        result |= {"case": seed, "seconds": time.monotonic() - began}
        if result["compared"] >= count or result["seconds"] > seconds:
            break
        _write(out, result)
        try:
            result["compared"] += case(seed)
        except Exception as error:
            complaint = str(error) if isinstance(error, AssertionError) else _described(error)
            result["failures"].append({"case": seed, "what": complaint[:1000]})
            if len(result["failures"]) == MOST_FAILURES:
                break
    _write(out, result | {"case": None})


def _write(out: Path, result: dict[str, Any]) -> None:
    """Replaces the file at once: whatever ends this process leaves a whole one."""
    new = out.with_suffix(".new")
    new.write_text(json.dumps(result))
    new.replace(out)


def _seeds(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def _described(error: Exception) -> str:
    return "".join(traceback.format_exception(error)[-3:])
