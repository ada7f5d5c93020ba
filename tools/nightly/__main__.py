# SPDX-License-Identifier: MIT
"""Command line of the nightly checks; see ``tools.nightly``."""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, make_stamp
from tools.nightly import parts
from tools.nightly.parts import HOURS, PARTS, Part

# First seeds of days, and of shards, are this far apart: those of a shard are some 25,000.
OF_A_DAY = 100_000
APART = 10_000 * OF_A_DAY
# Of the whole time, on one of the two cores.
FUZZ_SHARE = 0.5
SANITIZED = Path("tests/test_sanitized.py")
# What each shard has even if time is up, so that a short run has some of all parts.
LEAST_SECONDS = 120.0
# A shard may take so much longer, before it counts as one that does not end.
GRACE_SECONDS = 120


def seed_of(day: date) -> int:
    """The default seed: each day tries other cases."""
    return day.toordinal() * OF_A_DAY


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "2", "CONVNN_CACHE": "0"} | dict(os.environ)


def _shard(
    part: Part, number: int, hours: float, ends: float, seed: int, folder: Path
) -> dict[str, Any]:
    """Runs one shard of a part in a process of its own, until time.monotonic() is `ends`."""
    count = max(round(part.count * hours / HOURS), part.least)
    share = (count + part.shards - 1 - number) // part.shards
    first, seconds = seed + number * APART, max(ends - time.monotonic(), LEAST_SECONDS)
    out = folder / f"{part.name}-{number}.json"
    command = [sys.executable, "-m", "tools.nightly", "--part", part.name, "--out", str(out)]
    command += ["--first", str(first), "--count", str(share), "--seconds", str(seconds)]
    _, ending = _call(command, seconds + GRACE_SECONDS)
    result: dict[str, Any] = {"part": part.name}
    result |= {"wanted": share, "compared": 0, "failures": [], "seconds": 0.0}
    if out.exists():
        result |= json.loads(out.read_text())
    if ending:
        result["failures"].append({"case": result.get("case"), "what": ending})
    for failure in result["failures"]:
        if failure["case"] is not None:
            failure["again"] = (
                f"python -m tools.nightly --part {part.name} --case {failure['case']}"
            )
    return result


def _failure(command: list[str], what: str) -> dict[str, Any]:
    """Of a command that runs no cases of a part, but may be run again."""
    return {"case": None, "what": what, "again": shlex.join(["python", *command[1:]])}


def _call(command: list[str], seconds: float) -> tuple[str, str]:
    """What a command prints, and what is wrong with how it ended; nothing if it succeeded."""
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", "does not end"
    ending = f"exit status {done.returncode}: {done.stdout[-3000:]}" if done.returncode else ""
    return done.stdout, ending


def _fuzz(hours: float, seed: int) -> dict[str, Any]:
    began = time.monotonic()
    minutes = 60 * hours * FUZZ_SHARE
    command = [sys.executable, "-m", "tools.fuzz", "--minutes", f"{minutes:g}"]
    command += ["--seed", str(seed)]
    printed, ending = _call(command, 60 * minutes + 10 * GRACE_SECONDS)
    calls = re.search(r"^(\d+) calls", printed, re.M)
    count = int(calls[1]) if calls else 0
    failures = [_failure(command, ending)] if ending else []
    seconds = time.monotonic() - began
    return {"part": "fuzz", "compared": count, "failures": failures, "seconds": seconds}


def _sanitized(hours: float) -> dict[str, Any]:
    """The tests of the sanitized library."""
    result: dict[str, Any] = {"part": "sanitized", "compared": 0, "failures": [], "seconds": 0.0}
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "sanitized", str(SANITIZED)]
    printed, ending = _call(command, 3600 * hours + 10 * GRACE_SECONDS)
    passed = re.search(r"(\d+) passed", printed)
    if ending:
        result["failures"].append(_failure(command, ending))
    result["compared"] = int(passed[1]) if passed else 0
    return result | {"seconds": time.monotonic() - began}


def nightly(hours: float, seed: int, only: list[str], out: Path, jobs: int) -> int:
    began = time.monotonic()
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        futures = []
        if "fuzz" in only:
            futures.append(pool.submit(_fuzz, hours, seed))
        if "sanitized" in only:
            futures.append(pool.submit(_sanitized, hours))
        for part in PARTS.values():
            if part.name in only:
                for number in range(part.shards):
                    ends = began + 3600 * hours
                    futures.append(pool.submit(_shard, part, number, hours, ends, seed, folder))
        report = {"stamp": make_stamp("cpu", threads=jobs), "hours": hours, "seed": seed}
        results = []
        for future in as_completed(futures):
            results.append(future.result())
            seconds, summary = round(time.monotonic() - began, 1), _summary(results)
            print(f"{results[-1]['part']}: {len(results)} of {len(futures)} ended", flush=True)
            # What has ended is not lost if this is stopped.
            report |= {"complete": len(results) == len(futures), "seconds": seconds}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report | {"parts": summary}, indent=1) + "\n")
    _print(summary, seconds, out)
    return int(any(each["failures"] for each in summary.values()))


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of all shards of each part together."""
    summary: dict[str, Any] = {}
    for result in results:
        zero = {"wanted": 0, "compared": 0, "seconds": 0.0, "failures": []}
        part = summary.setdefault(result["part"], zero)
        for name in ("wanted", "compared", "seconds"):
            part[name] = round(part[name] + result.get(name, 0), 1)
        part["failures"] += result["failures"]
    for part in summary.values():
        if not part["compared"] and not part["failures"]:
            part["failures"].append({"case": None, "what": "nothing ran"})
    return summary


def _print(summary: dict[str, Any], seconds: float, out: Path) -> None:
    for name, part in summary.items():
        what = PARTS[name].what if name in PARTS else {"fuzz": "calls", "sanitized": "tests"}[name]
        rate = part["compared"] / part["seconds"] if part["seconds"] else 0.0
        short = ""
        if part["compared"] < part["wanted"] and not part["failures"]:
            short = f", short of {part['wanted']}: time was up"
        print(f"{name}: {part['compared']} {what}, {rate:.1f}/s{short}")
        for failure in part["failures"][:3]:
            again = f" (again: {failure['again']})" if "again" in failure else ""
            print(f"  FAILED{again}: {failure['what']}")
        if len(part["failures"]) > 3:
            print(f"  and {len(part['failures']) - 3} more failures")
    print(f"{seconds:.0f} s; {out}")


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of hours above 0, got {text!r}")
    return hours


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.nightly", description=__doc__)
    parser.add_argument("--hours", type=_hours, default=HOURS, help="counts are in proportion")
    today = seed_of(date.today())
    parser.add_argument("--seed", type=int, default=today, help="first case; by default today's")
    every = [*PARTS, "fuzz", "sanitized"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("build/nightly.json"))
    parser.add_argument("--part", choices=PARTS, help="run cases of one part in this process")
    parser.add_argument("--case", type=int, help="the one case of the part to run")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=3600.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        if given.part is None:
            parser.error("--case needs --part")
        print("compared" if PARTS[given.part].load()(given.case) else "nothing to compare")
        return 0
    if given.part is not None:
        if given.first is None:
            parser.error("--part needs --case")
        part = PARTS[given.part]
        parts.run(part, given.first, given.count, given.seconds, given.out)
        return 0
    return nightly(given.hours, given.seed, given.only, given.out, given.jobs)


if __name__ == "__main__":
    sys.exit(main())
