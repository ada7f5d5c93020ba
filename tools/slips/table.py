# SPDX-License-Identifier: MIT
"""The table of a campaign: how many slips of each area were noticed, and why the others were not.

`results.jsonl` has the outcomes; `survivors.json` says of each survivor why no test notices it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tools.slips import outcomes
from tools.slips.outcomes import Outcome
from tools.slips.testing import STAGES

RESULTS = Path(__file__).parent / "results.jsonl"
SURVIVORS = Path(__file__).parent / "survivors.json"


_COLUMNS = (
    *("area", "slips", "killed by quick tests", "by slow ones only", "survived, argued"),
    *("survived so far", "equivalent", "do not compile", "% by quick tests", "% by all"),
)


def reasons() -> dict[str, str]:
    """Why no test notices a survivor, by the name of the slip."""
    return json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}


def _kind(outcome: Outcome) -> str:
    if outcome.status == outcomes.KILLED:
        return outcome.stage
    if outcome.status == outcomes.SURVIVED:
        return "argued" if outcome.id in reasons() else "open"
    return outcome.status


def _row(name: str, found: list[Outcome]) -> str:
    count = Counter(map(_kind, found))
    counted = count["quick"] + count["slow"] + count["argued"] + count["open"]
    numbers = [counted, count["quick"], count["slow"], count["argued"], count["open"]]
    numbers += [count[outcomes.EQUIVALENT], count[outcomes.INVALID]]
    killed = (count["quick"], count["quick"] + count["slow"])
    rates = [f"{100 * part / max(1, counted):.1f}%" for part in killed]
    return f"| {' | '.join([name, *map(str, numbers), *rates])} |"


def summary(found: Iterable[Outcome], sources: dict[str, str]) -> str:
    """Markdown: a row for each area, then the survivors with their reasons.

    sources: the digest of the file of each slip as it is now.
    """
    everything = list(found)
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for area in dict.fromkeys(outcome.area for outcome in everything):
        lines.append(_row(area, [outcome for outcome in everything if outcome.area == area]))
    earlier = sum(sources.get(outcome.id) != outcome.source for outcome in everything)
    survived = [outcome for outcome in everything if outcome.status == outcomes.SURVIVED]
    unfinished = sum(not outcomes.is_finished(outcome, STAGES[-1]) for outcome in survived)
    lines += [_row("all", everything), ""]
    lines += [
        f"{len(everything)} of {len(sources)} slips have run, {earlier} of these when another part "
        f"of their file was different. Of {unfinished} that survived, not all tests have run.",
        "",
        "| survivor | change | tests that ran | why |",
        "|---|---|---|---|",
    ]
    for outcome in survived:
        change = outcome.change.replace("|", "\\|")
        why = reasons().get(outcome.id, "")
        lines.append(f"| {outcome.place} | `{change}` | {outcome.stage} | {why} |")
    return "\n".join(lines) + "\n"
