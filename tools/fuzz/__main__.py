# SPDX-License-Identifier: MIT
"""Command line of the fuzzer; see ``tools.fuzz``."""

import argparse
import collections
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tools.fuzz.calls import Call
from tools.fuzz.child import Child
from tools.fuzz.strategies import calls
from tools.fuzz.verdict import Verdict

EXAMPLES = 500
# Of a round. The smallest of these will do: each takes as long as a call may.
MOST_HANGS = 10


class Fuzzer:
    """Draws calls and keeps those that went wrong, the smallest of each kind."""

    def __init__(self, limit: float, ignore: str = "", only: Sequence[str] = ()) -> None:
        self.ignore = ignore
        self.calls = calls(only)
        self.child = Child(limit)
        self.counts: collections.Counter[str] = collections.Counter()
        # Of each function: its results, and those that the reference confirmed.
        self.results: collections.Counter[str] = collections.Counter()
        self.compared: collections.Counter[str] = collections.Counter()
        self.found: dict[str, tuple[Call, Verdict]] = {}

    def round(self, seed: int, examples: int) -> bool:
        """Draws some calls; returns whether one went wrong in a way that none did before."""
        known = set(self.found)
        failing: dict[str, tuple[Call, Verdict]] = {}
        hangs: dict[str, Verdict] = {}

        def judge(call: Call) -> Verdict:
            text = json.dumps(call)
            if text in hangs:
                return hangs[text]
            if len(hangs) == MOST_HANGS:
                return Verdict("skipped")
            verdict = self.child.judge(call)
            if verdict.outcome == "hang":
                hangs[text] = verdict
            return verdict

        @hypothesis.seed(seed)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(self.calls)
        def run(call: Call) -> None:
            verdict = judge(call)
            self.counts[verdict.outcome] += 1
            self.results[call["call"]] += verdict.outcome == "result"
            self.compared[call["call"]] += verdict.compared
            kind = kind_of(call, verdict)
            if verdict.complaint and kind not in known and not self._is_ignored(verdict):
                # Hypothesis ends with the smallest.
                failing[kind] = (call, verdict)
                raise AssertionError(kind)

        try:
            run()
        except (AssertionError, hypothesis.errors.FlakyFailure) as error:
            for kind, found in failing.items():
                self.found[kind] = found
                print(f"{kind}\n  {json.dumps(found[0])}", flush=True)
            if not failing:
                raise RuntimeError("Hypothesis failed without a call") from error
        return bool(failing)

    def _is_ignored(self, verdict: Verdict) -> bool:
        return bool(self.ignore and re.search(self.ignore, verdict.complaint))


def kind_of(call: Call, verdict: Verdict) -> str:
    """Calls of one kind have the same fault: their complaints differ in numbers and values."""
    text = verdict.complaint.splitlines()[0][:160] if verdict.complaint else ""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", text)
    return f"{call['call']}: {re.sub(r'-?[0-9.]+(e[-+][0-9]+)?', '#', text)}"


def fuzz(minutes: float, seed: int, out: Path, limit: float, ignore: str) -> int:
    fuzzer = Fuzzer(limit, ignore)
    began = time.monotonic()
    while time.monotonic() < began + 60 * minutes:
        fuzzer.round(seed, EXAMPLES)
        seed += 1
    fuzzer.child.close()
    for number, (call, verdict) in enumerate(fuzzer.found.values()):
        write(out / f"{call['call']}-{number}.json", call, verdict.complaint)
    seconds = time.monotonic() - began
    print(f"{fuzzer.child.calls} calls in {seconds:.0f} s, next seed {seed}")
    total = sum(fuzzer.counts[name] for name in ("result", "error", "crash", "hang"))
    for name, count in fuzzer.counts.items():
        print(f"  {name}: {count} ({count / max(total, 1):.0%})")
    compared, results = fuzzer.compared.total(), fuzzer.results.total()
    print(f"compared with the reference: {compared / max(results, 1):.0%} of the results")
    for name in sorted(fuzzer.results):
        print(f"  {name}: {fuzzer.compared[name]} of {fuzzer.results[name]}")
    print(f"{len(fuzzer.found)} kinds of faults" + (f" in {out}" if fuzzer.found else ""))
    return bool(fuzzer.found)


def write(path: Path, call: Call, why: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(call | {"found": why.splitlines()[0]}, indent=1) + "\n")


def replay(paths: list[Path], limit: float) -> int:
    child, wrong = Child(limit), 0
    for path in paths:
        verdict = child.judge(json.loads(path.read_text()))
        print(f"{path.name}: {verdict.complaint or verdict.outcome}")
        wrong += bool(verdict.complaint)
    child.close()
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first round of calls")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="folder of faults")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that a call may take")
    parser.add_argument("--ignore", default="", help="pattern of complaints that are known")
    parser.add_argument("--replay", type=Path, nargs="+", help="files of calls, made again")
    given = parser.parse_args()
    if given.replay:
        return replay(given.replay, given.limit)
    return fuzz(given.minutes, given.seed, given.out, given.limit, given.ignore)


if __name__ == "__main__":
    sys.exit(main())
