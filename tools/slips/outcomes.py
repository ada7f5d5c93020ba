# SPDX-License-Identifier: MIT
"""What became of each slip, in a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tools.slips.testing import STAGES

STATUSES = KILLED, SURVIVED, EQUIVALENT, INVALID = "killed", "survived", "equivalent", "invalid"


@dataclass
class Outcome:
    id: str
    source: str  # digest of the unmodified file
    area: str
    place: str  # file:line
    change: str
    status: str
    stage: str = ""  # of a kill: quick or slow; of a survivor: the last of testing.STAGES asked for
    by: str = ""  # the test, or what the compiler says
    how: str = ""  # of a kill: failed, crashed or timeout
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        return self.id, self.source


def read(path: Path) -> dict[tuple[str, str], Outcome]:
    """The last outcome of each slip of each version of its file."""
    if not path.exists():
        return {}
    names = {each.name for each in fields(Outcome)}
    outcomes = {}
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was interrupted
        outcome = Outcome(**{name: value for name, value in values.items() if name in names})
        outcomes[outcome.key] = outcome
    return outcomes


def is_finished(outcome: Outcome | None, stage: str) -> bool:
    """Whether nothing more is to be learned of a slip by the tests up to a stage."""
    if outcome is None:
        return False
    if outcome.status != SURVIVED:
        return True
    return outcome.stage in STAGES and STAGES.index(outcome.stage) >= STAGES.index(stage)


def latest(found: dict[tuple[str, str], Outcome], name: str, source: str) -> Outcome | None:
    """The outcome of a slip for this version of its file, or else the last for any other.

    A slip has the same name as long as the text that it changes is the same.
    """
    if (name, source) in found:
        return found[name, source]
    of_others = [outcome for outcome in found.values() if outcome.id == name]
    return of_others[-1] if of_others else None


def append(path: Path, outcome: Outcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def write(path: Path, outcomes: Iterable[Outcome]) -> None:
    """One line for each, in the order of their places."""

    def place(outcome: Outcome) -> tuple[str, int, str]:
        name, _, line = outcome.place.rpartition(":")
        return name, int(line), outcome.id

    lines = [json.dumps(asdict(outcome)) for outcome in sorted(outcomes, key=place)]
    path.write_text("\n".join(lines) + "\n")
