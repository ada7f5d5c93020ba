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

RESULTS = Path(__file__).parent / "results.jsonl"
SURVIVORS = Path(__file__).parent / "survivors.json"


def _row(name: str, found: list[Outcome]) -> str:
    count: Counter[str] = Counter()
    for outcome in found:
        count[outcome.stage if outcome.status == outcomes.KILLED else outcome.status] += 1
    counted = count["quick"] + count["slow"] + count[outcomes.SURVIVED]
    rates = [
        f"{100 * part / max(1, counted):.1f}%"
        for part in (count["quick"], counted - count[outcomes.SURVIVED])
    ]
    numbers = [counted, count["quick"], count["slow"], count[outcomes.SURVIVED]]
    numbers += [count[outcomes.EQUIVALENT], count[outcomes.INVALID]]
    return f"| {' | '.join([name, *map(str, numbers), *rates])} |"


def summary(found: Iterable[Outcome]) -> str:
    """Markdown: a row for each area, then the survivors with their reasons."""
    everything = list(found)
    lines = [
        "| area | slips | killed by quick tests | by slow ones only | survived | equivalent |"
        " do not compile | quick | all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for area in dict.fromkeys(outcome.area for outcome in everything):
        lines.append(_row(area, [outcome for outcome in everything if outcome.area == area]))
    lines += [_row("all", everything), "", "| survivor | change | why |", "|---|---|---|"]
    reasons = json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}
    for outcome in everything:
        if outcome.status == outcomes.SURVIVED:
            change = outcome.change.replace("|", "\\|")
            lines.append(f"| {outcome.place} | `{change}` | {reasons.get(outcome.id, '')} |")
    return "\n".join(lines) + "\n"
