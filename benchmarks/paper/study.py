# SPDX-License-Identifier: MIT
"""``python -m benchmarks.paper.study``: reduced tables and figures, every point with three seeds.

Trains what is not finished, resumes what was interrupted, and writes study.json and a PNG per
figure to the folder of the runs. The tables say which differences stand out from the spread over
seeds.

  python -m benchmarks.paper.study --data FOLDER --workers 2     # about an hour on two cores
  python -m benchmarks.paper.study --times 60                    # step times: run nothing beside it
  python -m benchmarks.paper.study --no-training                 # with these times

Accuracy does not depend on how busy the machine is, but times do; so they are taken by themselves.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.environment import make_stamp
from benchmarks.paper import argument_types, data, study_report
from benchmarks.paper.study_rows import FIGURES, OPTIONS, POINTS, RECIPES, SEEDS, TIMED
from benchmarks.paper.train import AnotherRunError, DivergedError, Recipe, replaced, train

PROGRAM = "python -m benchmarks.paper.study"

# Name of a point, and its recipe with the seed.
Job = tuple[str, Recipe]

_dataset: data.Dataset | None = None


def jobs(names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All runs; every point with the first seed, then with the next."""
    return [
        (name, Recipe(**{**asdict(RECIPES[POINTS[name].family]), "seed": seed}))
        for seed in seeds
        for name in names
    ]


def folder_of(out: Path, job: Job) -> Path:
    return out / job[0] / f"seed{job[1].seed}"


def finished(out: Path, job: Job) -> dict[str, Any] | None:
    """The log of a run that had all epochs of its recipe, or None."""
    path = folder_of(out, job) / "log.json"
    if not path.exists():
        return None
    log: dict[str, Any] = json.loads(path.read_text())
    # Logs of older runs lack settings that have been added.
    is_same = {**asdict(Recipe()), **log["recipe"]} == asdict(job[1])
    return log if is_same and len(log["epochs"]) == job[1].epochs else None


def _start(folder: Path, wanted: Sequence[Job]) -> None:
    """Prepares a process that trains: one thread, and the images of all runs."""
    global _dataset
    torch.set_num_threads(1)

    def most(split: str) -> int | None:
        limits = [getattr(recipe, split) for _, recipe in wanted]
        return None if None in limits else max(limits)

    _dataset = data.load(folder, wanted[0][1].dataset, most("train_limit"), most("test_limit"))


def _run(job: Job, out: Path, stamp: dict[str, Any]) -> str:
    assert _dataset is not None
    name, recipe = job
    log = train(POINTS[name], _dataset, recipe, folder_of(out, job), stamp)
    return f"{name}, seed {recipe.seed}: {100 * log['epochs'][-1]['test_accuracy']:.1f}%"


def train_all(
    wanted: Sequence[Job], folder: Path, out: Path, workers: int, stamp: dict[str, Any]
) -> None:
    """Trains the runs that are not finished, each in a process with one thread."""
    left = [job for job in wanted if finished(out, job) is None]
    if not left:
        return
    # Fails here, and not in every worker, if the folder holds something else.
    data.load(folder, left[0][1].dataset, 1, 1)
    if workers == 1:
        _start(folder, left)
        for count, job in enumerate(left, 1):
            print(f"{count}/{len(left)} {_run(job, out, stamp)}", flush=True)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (folder, left)
    )
    try:
        waiting = [pool.submit(_run, job, out, stamp) for job in left]
        for count, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            print(f"{count}/{len(left)} {future.result()}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def collect(wanted: Sequence[Job], out: Path) -> dict[str, Any]:
    """What the report needs of the finished runs: their last epoch, recipes, data and commits."""
    points: dict[str, Any] = {}
    commits, images, recipes = [], {}, {}
    for job in wanted:
        if (log := finished(out, job)) is None:
            continue
        name, recipe = job
        row = POINTS[name]
        seconds = sorted(epoch["seconds"] for epoch in log["epochs"])
        last = {key: log["epochs"][-1][key] for key in ("train_loss", "test_loss", "test_accuracy")}
        point = points.setdefault(name, {"label": row.label, "runs": {}})
        point["runs"][str(recipe.seed)] = {
            **{key: round(value, 6) for key, value in last.items()},
            "seconds_per_epoch": round(seconds[len(seconds) // 2], 3),
        }
        recipes[row.family] = {**asdict(recipe), "seed": None}
        images = {key: log["data"][key] for key in ("source", "train", "test", "image_size")}
        for part in log["parts"]:
            commit = {key: part["stamp"][key] for key in ("commit", "dirty")}
            commits += [] if commit in commits else [commit]
    times = out / "times.json"
    return {
        "data": images,
        "recipes": recipes,
        "options": {family: OPTIONS[family] for family in recipes},
        "commits": commits,
        "points": points,
        "times": json.loads(times.read_text()) if times.exists() else None,
    }


def _step(name: str) -> Any:
    """A function that does one training step of a point on random images."""
    row = POINTS[name]
    recipe = RECIPES[row.family]
    torch.manual_seed(0)
    model = row.build(10, reduced=True).train()
    optimizer = torch.optim.AdamW(model.parameters())
    size = row.image_size(reduced=True)
    images = torch.randn(recipe.batch_size, 3, size, size)
    labels = torch.randint(0, 10, (recipe.batch_size,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def time_steps(names: Sequence[str], seconds: float) -> dict[str, list[float]]:
    """Times of one training step by point, in ms, in rounds over all points.

    A round takes one step of every point, so that what slows down the machine for a while slows
    down all of them. There are two rounds at least, of which the first is left out.
    """
    torch.set_num_threads(1)
    end = time.perf_counter() + seconds
    steps = {name: _step(name) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    while min(map(len, found.values())) < 2 or time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name].append(round(1e3 * (time.perf_counter() - start), 3))
    return {name: values[1:] for name, values in found.items()}


def add_times(out: Path, names: Sequence[str], seconds: float, stamp: dict[str, Any]) -> None:
    """Times steps and adds them to times.json, which holds the stamp of its last part."""
    path = out / "times.json"
    before = json.loads(path.read_text())["steps"] if path.exists() else {}
    found = time_steps(names, seconds)
    steps = {name: before.get(name, []) + values for name, values in found.items()}
    _write(path, {"unit": "ms", "stamp": stamp, "steps": {**before, **steps}})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print(path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("CONVNN_DATA"),
        help="folder of CIFAR-10 (default: the environment variable CONVNN_DATA)",
    )
    parser.add_argument("--out", type=Path, default=Path("study_runs"), help="folder of the runs")
    parser.add_argument(
        "--workers",
        type=argument_types.at_least_one,
        default=1,
        help="processes with one thread each",
    )
    parser.add_argument("--only", nargs="+", metavar="POINT", help="only these, see --list")
    parser.add_argument(
        "--seed", type=int, choices=SEEDS, help="only this; with it, or --only, writes no report"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--list", action="store_true", help="list all points")
    either.add_argument("--no-training", action="store_true", help="report the finished runs")
    either.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="report the study.json of this folder again"
    )
    either.add_argument(
        "--times",
        type=argument_types.not_negative,
        metavar="SECONDS",
        help="only time steps of some points",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only or () if name not in POINTS]
    if unknown:
        parser.error(f"--only must be of those that --list prints, got {', '.join(unknown)}")
    if options.list:
        print("\n".join(f"{name:34}{row.label}" for name, row in POINTS.items()))
        return
    if options.draw:
        report(options.draw)
        return
    stamp = make_stamp("cpu", 1)
    if options.times is not None:
        add_times(options.out, options.only or TIMED, options.times, stamp)
        return
    seeds = SEEDS if options.seed is None else (options.seed,)
    wanted = jobs(options.only or list(POINTS), seeds)
    if not options.no_training:
        if options.data is None:
            parser.error("--data, or CONVNN_DATA, must name the folder of the dataset")
        _train(wanted, options, stamp)
    if options.only or options.seed is not None:
        return
    content = {"command": PROGRAM, "stamp": stamp, **collect(wanted, options.out)}
    _write(options.out / "study.json", content)
    report(options.out)


def report(folder: Path) -> None:
    """Prints the tables of study.json in a folder, and draws its figures there."""
    content = json.loads((folder / "study.json").read_text())
    print(study_report.tables(content))
    for number in FIGURES:
        path = folder / f"figure-{number}.png"
        study_report.draw(content, number, path)
        print(path)


def _train(wanted: Sequence[Job], options: argparse.Namespace, stamp: dict[str, Any]) -> None:
    try:
        train_all(wanted, options.data, options.out, options.workers, stamp)
    except (data.NoDataError, AnotherRunError, DivergedError) as error:
        raise SystemExit(f"{PROGRAM}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; the same command resumes after the last complete epochs"
        ) from None


if __name__ == "__main__":
    main()
