# SPDX-License-Identifier: MIT
"""``python -m benchmarks.paper``: trains rows of the paper, prints its tables, draws its figures.

Finished rows are not trained again and interrupted ones are resumed, so tables and figures that
share rows train them only once. For a full row of Table 1 and of Table 2, on a GPU:

  python -m benchmarks.paper --data FOLDER --table 1 --rows vgg11/conv2d vgg11/hybrid-0.5
  python -m benchmarks.paper --data FOLDER --table 2 --rows vit/attention vit/convnn-random-32

With --as-run, models and recipe are those of the authors' code, which differ from the paper's text
(docs/paper.md); --list says how. Such runs have a folder of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import make_stamp
from benchmarks.memory import MemoryNotMeasured
from benchmarks.paper import data, memory, report
from benchmarks.paper.argument_types import (
    at_least_one,
    device,
    fraction,
    not_negative,
    positive,
)
from benchmarks.paper.rows import FIGURES, ROWS, TABLES, Figure, Row
from benchmarks.paper.train import (
    AUGMENTATIONS,
    OPTIMIZERS,
    SCHEDULES,
    AnotherRunError,
    DivergedError,
    Recipe,
    train,
)

PROGRAM = "python -m benchmarks.paper"
_DEFAULT = "(default: %(default)s)"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_rows(parser.add_argument_group("what"))
    _add_places(parser.add_argument_group("where"))
    _add_recipe(parser.add_argument_group("how: the defaults are the paper's"))
    return parser


def _add_rows(what: argparse._ArgumentGroup) -> None:
    either = what.add_mutually_exclusive_group()
    either.add_argument(
        "--table", type=int, choices=sorted(TABLES), help="print this table and draw its curves"
    )
    either.add_argument("--figure", type=int, choices=sorted(FIGURES), help="draw this figure")
    what.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, see --list")
    what.add_argument(
        "--list", action="store_true", help="only list the rows that are chosen, or all"
    )
    what.add_argument(
        "--no-training", action="store_true", help="only print or draw rows trained so far"
    )
    what.add_argument("--memory", action="store_true", help="print the peak memory of one step")
    text_or_run = what.add_mutually_exclusive_group()
    text_or_run.add_argument(
        "--as-written", dest="as_run", action="store_false", help="as the paper's text has it"
    )
    text_or_run.add_argument(
        "--as-run", action="store_true", help="as the authors ran it, see docs/paper.md"
    )
    what.set_defaults(as_run=False)


def _add_places(where: argparse._ArgumentGroup) -> None:
    where.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("CONVNN_DATA"),
        help="folder of the dataset (default: the environment variable CONVNN_DATA)",
    )
    where.add_argument(
        "--dataset", choices=("cifar10", "cifar100"), default=Recipe.dataset, help=_DEFAULT
    )
    where.add_argument(
        "--out", type=Path, default=Path("paper_runs"), help=f"folder of the runs {_DEFAULT}"
    )
    where.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:INDEX (default: cuda, or cpu without it)",
    )
    where.add_argument(
        "--threads", type=at_least_one, help="CPU threads (default: as many as PyTorch uses)"
    )


def _add_recipe(how: argparse._ArgumentGroup) -> None:
    def add(flag: str, text: str = "", **options: Any) -> None:
        default = getattr(Recipe, flag[2:].replace("-", "_"))
        how.add_argument(flag, default=default, help=f"{text} {_DEFAULT}".lstrip(), **options)

    add("--epochs", type=at_least_one)
    add("--batch-size", type=at_least_one)
    add("--optimizer", choices=tuple(OPTIMIZERS))
    add("--lr", "learning rate", type=positive)
    add("--weight-decay", type=not_negative)
    add("--schedule", choices=SCHEDULES)
    add("--clip", "maximum norm of the gradients", type=positive)
    add("--label-smoothing", "of the cross-entropy", type=fraction)
    add("--augmentation", choices=AUGMENTATIONS)
    add("--seed", type=int)
    add("--amp", choices=("none", "bfloat16"))
    how.add_argument("--compile", action="store_true", help="with torch.compile")
    add(
        "--save-every",
        "between checkpoints; one of VGG-11 has 1.6 GB",
        type=at_least_one,
        metavar="EPOCHS",
    )
    how.add_argument("--reduced", action="store_true", help="small models, for a CPU")
    for split, name in (("train", "training"), ("test", "test")):
        how.add_argument(
            f"--{split}-limit",
            type=at_least_one,
            help=f"total number of {name} images (default: all)",
        )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.rows:
        unknown = [name for name in options.rows if name not in ROWS]
        if unknown:
            parser.error(f"--rows must be of those that --list prints, got {', '.join(unknown)}")
        missing = set(options.rows) - {row.name for row in wanted(options)}
        if missing:
            parser.error(
                f"--rows must be of that table or figure, got {', '.join(sorted(missing))}"
            )
    if not (options.table or options.figure or options.rows or options.list or options.memory):
        parser.error("one of --table, --figure, --rows, --list and --memory is needed")
    if options.memory and options.as_run:
        parser.error("--memory is of the models as written, not allowed with --as-run")
    return options


def command_line(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command without the paths of this machine, to be published."""
    words = [PROGRAM]
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if name == "data" and value is not None:
            words += [flag, "FOLDER"]
        elif name not in ("data", "out", "no_training") and value != parser.get_default(name):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [flag, *(shlex.quote(str(each)) for each in values)]
    return " ".join(words)


def wanted(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, as the text has them or as the authors ran them."""
    if options.figure:
        rows = FIGURES[options.figure].all_rows()
    else:
        rows = list(TABLES[options.table]) if options.table else list(ROWS.values())
    rows = [row for row in rows if not options.rows or row.name in options.rows]
    return [row.as_run() for row in rows] if options.as_run else rows


def folder(options: argparse.Namespace) -> Path:
    """Where runs and results go. Those as run and as written have the same names of rows."""
    out: Path = options.out
    return out / "as-run" if options.as_run else out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parse(parser, arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.list:
        _print_to_pipe(report.listing(wanted(options)))
        return
    stamp = make_stamp(_device_name(options.device), torch.get_num_threads())
    head = {"command": command_line(parser, options), "stamp": stamp}
    if options.memory:
        try:
            lines = memory.measure(options.device)
        except MemoryNotMeasured as error:
            raise SystemExit(f"{PROGRAM}: {error}") from None
        print(memory.table(lines))
        _write(options.out / "memory.json", {**head, "steps": lines})
        return

    rows = wanted(options)
    try:
        logs = _trained(rows, options, stamp)
    except (data.NoDataError, AnotherRunError, DivergedError) as error:
        raise SystemExit(f"{PROGRAM}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; the same command resumes after the last complete epoch"
        ) from None

    lines = [report.entry(row, logs[row.name], options.dataset, options.reduced) for row in rows]
    parts = (report.table(lines), report.summary(lines, logs), report.what_was_run(logs))
    notes = (report.not_the_papers(lines), report.switches(rows, options.as_run))
    print(*parts, *filter(None, notes), sep="\n\n")
    kind = "figure" if options.figure else "table" if options.table else "rows"
    name = f"{options.dataset}-{kind}{options.figure or options.table or ''}"
    what = {"as_run": options.as_run, "recipe_switches": report.recipe_switches(rows)}
    _write(folder(options) / f"{name}.json", {**head, **what, "rows": lines, "logs": logs})
    title = f"Table {options.table}" if options.table else ""
    trained = tuple(row for row in rows if logs[row.name]["epochs"])
    figure = FIGURES[options.figure] if options.figure else Figure(title, trained)
    path = folder(options) / f"{name}.png"
    report.draw(figure, logs, path)
    print(path)


def _trained(
    rows: Sequence[Row], options: argparse.Namespace, stamp: dict[str, Any]
) -> report.Logs:
    """The log of each row, trained now or, with --no-training, read from its folder."""
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.__dataclass_fields__})
    logs: report.Logs = {}
    dataset = None
    for row in rows:
        place = folder(options) / options.dataset / row.name
        if options.no_training:
            path = place / "log.json"
            logs[row.name] = json.loads(path.read_text()) if path.exists() else {"epochs": []}
            continue
        if dataset is None:
            if options.data is None:
                raise data.NoDataError(
                    "--data, or CONVNN_DATA, must name the folder of the dataset"
                )
            dataset = data.load(
                options.data, options.dataset, options.train_limit, options.test_limit
            )
        logs[row.name] = train(row, dataset, recipe, place, stamp)
    if not any(log["epochs"] for log in logs.values()):
        place = folder(options) / options.dataset
        raise SystemExit(f"{PROGRAM}: none of these rows has been trained in {place}")
    return logs


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _print_to_pipe(text: str) -> None:
    """Prints to a reader that may stop early, such as head."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer is written when Python exits.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
