# SPDX-License-Identifier: MIT
"""The command `python -m tools.slips`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tools.slips import outcomes, table
from tools.slips.building import INSTRUCTION_SETS
from tools.slips.campaign import Campaign, all_slips
from tools.slips.outcomes import Outcome
from tools.slips.slip import Slip, file_digest
from tools.slips.sources import AREAS, CUDA, area_of
from tools.slips.testing import STAGES

ROOT = Path(__file__).parent.parent.parent


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.slips",
        description="Mutation testing: small deliberate faults, and whether the tests notice them. "
        "Goes on where it was interrupted.",
    )
    parser.add_argument("--list", action="store_true", help="list the slips and run nothing")
    parser.add_argument(
        "--only", metavar="PATTERN", type=_pattern, default="", help="a regular expression of ids"
    )
    parser.add_argument(
        "--area",
        type=_pattern,
        default="",
        help=f"a regular expression of areas: {', '.join(AREAS)}",
    )
    parser.add_argument("--jobs", type=int, default=1, help="slips at a time, each in its own copy")
    parser.add_argument(
        "--rerun", choices=outcomes.STATUSES, help="run again what had this outcome"
    )
    parser.add_argument(
        "--stage",
        choices=STAGES,
        default="slow",
        help="the last stage of tests that runs: those that notice most, other quick ones, quick "
        "ones that start other processes, slow ones",
    )
    parser.add_argument(
        "--isa",
        choices=INSTRUCTION_SETS,
        default="avx2",
        help="instruction set of the CPU kernels",
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "slips")
    parser.add_argument("--write", action="store_true", help="only renew the table from outcomes")
    parser.add_argument("--summary", action="store_true", help="only print the table")
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {given.jobs}")
    if given.write and (given.only or given.area):
        parser.error("--write is for all slips: it would remove the others from the table")
    given.folder = given.folder.resolve()
    return given


def _known(folder: Path) -> dict[tuple[str, str], Outcome]:
    """The outcomes in the table, then those of this folder."""
    return outcomes.read(table.RESULTS) | outcomes.read(folder / "outcomes.jsonl")


def _pending(
    slips: Iterable[Slip], known: dict[tuple[str, str], Outcome], stage: str, rerun: str | None
) -> list[Slip]:
    pending = []
    for slip in slips:
        outcome = known.get((slip.id, file_digest(ROOT / slip.path)))
        if not outcomes.is_finished(outcome, stage) or (outcome and outcome.status == rerun):
            pending.append(slip)
    return pending


def _write_table(slips: Iterable[Slip], known: dict[tuple[str, str], Outcome]) -> None:
    found = [outcomes.latest(known, slip.id, file_digest(ROOT / slip.path)) for slip in slips]
    outcomes.write(table.RESULTS, [outcome for outcome in found if outcome])


def _run(slips: list[Slip], arguments: argparse.Namespace) -> None:
    results = arguments.folder / "outcomes.jsonl"
    stages = STAGES[: STAGES.index(arguments.stage) + 1]
    native = any(area_of(slip.path) == CUDA for slip in slips)
    free: SimpleQueue[Campaign] = SimpleQueue()
    kills = [each for each in _known(arguments.folder).values() if each.how]
    killers = [(each.place.rpartition(":")[0], each.by) for each in kills]
    for job in range(arguments.jobs):
        campaign = Campaign(ROOT, arguments.folder / str(job), arguments.isa, killers)
        campaign.prepare(native)
        free.put(campaign)

    def one(numbered: tuple[int, Slip]) -> None:
        number, slip = numbered
        campaign = free.get()
        try:
            outcome = campaign.run(slip, stages)
        finally:
            free.put(campaign)
        outcomes.append(results, outcome)
        text = f"{outcome.status:10} {outcome.stage:5} {outcome.seconds:6.1f} s {outcome.id}"
        print(f"{number:4}/{len(slips)} {text} {outcome.place}  {outcome.by}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, enumerate(slips, 1)))


def main() -> None:
    arguments = _arguments()
    slips = [
        slip
        for slip in all_slips(ROOT)
        if re.search(arguments.only, slip.id) and re.search(arguments.area, area_of(slip.path))
    ]
    if not slips:
        sys.exit("no slip has such an id and area; --list shows them")
    if arguments.list:
        for slip in slips:
            line = slip.line((ROOT / slip.path).read_text())
            print(f"{slip.id:45} {slip.path}:{line}  {slip.what}")
        print(f"{len(slips)} slips")
        return
    known = _known(arguments.folder)
    if arguments.write:
        _write_table(slips, known)
    if arguments.write or arguments.summary:
        sources = {slip.id: file_digest(ROOT / slip.path) for slip in slips}
        sys.stdout.write(table.summary(outcomes.read(table.RESULTS).values(), sources))
        return
    _run(_pending(slips, known, arguments.stage, arguments.rerun), arguments)


if __name__ == "__main__":
    main()
