# SPDX-License-Identifier: MIT
"""``python -m tools.count_hits``: how many hits the sweep of the Triton path has, on real features.

The sweep (convnn_kernels/triton/sweep.py) takes a threshold for each query from a sample of the
columns of S, a lower bound of the k-th similarity. All columns that reach it are hits, and are
appended to queues of CAP entries; a row of which a queue is too short is computed again, exactly
and slowly. Threshold and queues are simulated here in PyTorch on the CPU, for tokens of photographs
and of CIFAR-10, and for what a VGG-11 makes of them. From the table that this command prints and
writes to hits.json follow the sizes of configs.py. Photographs are those of the benchmark:

    pip install -e .[bench]
    python -m tools.count_hits --cifar10 cifar10.tar.xz    # train and test, a folder for each class
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convnn_kernels.triton import configs

from .token_sets import EXTREMES, Cifar, token_sets, train

RESULT = Path("benchmarks/results/hits.json")
ROWS = 128  # consecutive queries of a program
NEVER = float("-inf")
CAPS = (8, 16, 32, 64, 128)
KS = (9, 16, 32, 64)
SIDES = (32, 64, 128)  # of the map of tokens
# Warp instructions on sm_90, counted from machine code: per element of a thread, per turn of the
# loop that appends a hit of every lane, per row, per hit beyond 32, and per column of a row in the
# exact path.
SAMPLED, SWEPT, TURN, FINISH, HIT, EXACT = 2.8, 3.2, 35, 369, 8, 4.9


@dataclass(frozen=True)
class Layout:
    """A tile of S has `tile` columns, the next one starts `advance` columns further on.

    Column c // pair * (queues * pair) + q * pair + c % pair of a tile is code c of queue q; column
    o of tile t takes the place of (o + rotate * t) % tile. A warp appends hits of `rows` rows at a
    time, a row and queue to a lane.
    """

    tile: int
    queues: int
    pair: int
    rows: int
    advance: int
    rotate: int = 0

    def columns(self) -> Tensor:
        """[queues, leaves]: the column, in its tile, of code c of queue q."""
        q = torch.arange(self.queues)[:, None]
        c = torch.arange(self.tile // self.queues)
        return c // self.pair * (self.queues * self.pair) + q * self.pair + c % self.pair

    def tiles(self, S: Tensor) -> Tensor:
        """S [N, columns] as [N, tiles, queues, leaves], without columns that the next tile has."""
        number = torch.arange(-(-S.shape[1] // self.advance))[:, None, None]
        column = (self.columns() - self.rotate * number) % self.tile
        tiles = F.pad(S, (0, self.tile), value=NEVER)[:, number * self.advance + column]
        return tiles.masked_fill_(column >= self.advance, NEVER)


@dataclass(frozen=True)
class Sample:
    """Of which tiles the threshold is taken, and how their columns are divided into groups.

    stride: every stride-th tile; own: and so many around the query's own position.
    groups: R; the threshold is the k-th largest of the maxima of R groups.
    adjacent: a group has adjacent codes of a queue, or those that are equal modulo R / queues.
    ties: equal maxima count as many times as they occur, and not once.
    """

    stride: int
    own: int
    groups: int
    adjacent: bool
    ties: bool = False

    def tiles(self, layout: Layout, count: int, first_row: int | None) -> Tensor:
        """Numbers of the sampled tiles of `count`, for queries from first_row on."""
        sampled = torch.arange(0, count, self.stride)
        if first_row is not None:
            first = (first_row + ROWS // 2) // layout.advance - self.own // 2
            near = (first + torch.arange(self.own)).clamp(0, count - 1)
            sampled = torch.cat([sampled, near]).unique()
        return sampled


def similarities(query: Tensor, key: Tensor) -> Tensor:
    """S by cosine, of rows that are rounded to float16."""
    query, key = (F.normalize(rows.half().float(), dim=-1) for rows in (query, key))
    return query @ key.T


def group_maxima(tiles: Tensor, sample: Sample) -> Tensor:
    """[N, R]: running maxima over tiles [N, sampled tiles, queues, leaves]."""
    maxima = tiles.amax(1)
    joined = maxima[0].numel() // sample.groups
    if sample.adjacent:
        return maxima.unflatten(2, (-1, joined)).amax(3).flatten(1)
    return maxima.unflatten(2, (joined, -1)).amax(2).flatten(1)


def kth_largest(maxima: Tensor, k: int, ties: bool = False) -> Tensor:
    """[N]: k - 1 times all that equal the largest are removed; then the largest, a bit lowered.

    With ties, those that are removed are counted, until they are k.
    """
    if ties:
        largest = maxima.topk(k, 1).values[:, -1]
    else:
        for _ in range(k - 1):
            maxima = maxima.masked_fill(maxima == maxima.amax(1, keepdim=True), NEVER)
        largest = maxima.amax(1)
    return torch.where(largest > NEVER, largest - largest.abs() * 2**-20, NEVER)


def hits_of_words(tiles: Tensor, threshold: Tensor) -> Tensor:
    """[N, tiles, queues] uint8: the hits that a thread has in a row of a tile."""
    finite = threshold.clamp(min=torch.finfo().min)
    return tiles.ge(finite[:, None, None, None]).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True)
class Case:
    """What is counted for a k; without a sample, the threshold is the k-th similarity itself."""

    k: int
    sample: Sample | None
    layout: Layout


@dataclass
class Counts:
    """queues [N, queues]: hits; turns: of appending, per word; tiles in all, and of the sample."""

    queues: Tensor
    turns: float
    tiles: int
    sampled: float


def count(case: Case, tiles: Tensor, first_row: int | None) -> Counts:
    """Hits of queries from first_row on (None: not among the keys) in tiles of S."""
    sampled = torch.arange(0)
    if case.sample is None:
        threshold = tiles.flatten(1).topk(case.k, 1).values[:, -1]
    else:
        sampled = case.sample.tiles(case.layout, tiles.shape[1], first_row)
        threshold = kth_largest(
            group_maxima(tiles[:, sampled], case.sample), case.k, case.sample.ties
        )
    words = hits_of_words(tiles, threshold)
    lanes = words.unflatten(2, (-1, 32 // case.layout.rows)).unflatten(0, (-1, case.layout.rows))
    turns = lanes.amax((1, 4)).float().mean().item()
    return Counts(words.sum(1, dtype=torch.int64), turns, tiles.shape[1], len(sampled))


def summary(case: Case, parts: list[Counts], caps: tuple[int, ...] = CAPS) -> dict[str, Any]:
    """Statistics of some programs, and by CAP the warp instructions per row, as if on sm_90."""
    queues = torch.cat([part.queues for part in parts])
    hits, longest = queues.sum(1).double(), queues.amax(1)
    turns = sum(part.turns for part in parts) / len(parts)
    sampled = sum(part.sampled for part in parts) / len(parts)
    layout, tiles = case.layout, parts[0].tiles
    rounds = 0.0
    if case.sample is not None:
        # A round of the k-th largest: of fours of two rows of a thread, then of four threads.
        each = 3 * case.sample.groups / 8 + 6
        if case.sample.ties:
            each += case.sample.groups / 4 + 2
        rounds = (case.k - 1) * each / 8
    overflow = {cap: (longest > cap).double().mean().item() for cap in caps}
    stored = {cap: queues.clamp(max=cap).sum(1).sub(32).clamp(min=0).double() for cap in caps}
    swept = layout.tile * SWEPT + layout.queues * TURN * turns
    exact = EXACT * tiles * layout.advance
    fixed = (sampled * layout.tile * SAMPLED + tiles * swept) / 32 + rounds + FINISH
    return {
        "hits": round(hits.mean().item(), 2),
        "hits_p99": round(hits.quantile(0.99).item(), 1),
        "turns": round(turns, 2),
        "overflow": {cap: round(share, 5) for cap, share in overflow.items()},
        "instructions": {
            cap: round(fixed + HIT * stored[cap].mean().item() + exact * overflow[cap])
            for cap in caps
        },
    }


def _layout(arch: int, rows: int) -> Layout:
    """That of a sweep in 16 bits, of which a warp appends hits of `rows` rows at a time."""
    blocks = configs.sweep(arch, 16, 64, 4096, 9)
    return Layout(
        blocks["BLOCK_M"], blocks["QUEUES"], blocks["PAIR"], rows, advance=blocks["ADVANCE"]
    )


LAYOUTS = {80: _layout(80, 8), 90: _layout(90, 8), 100: _layout(100, 32)}


def chosen(columns: int, k: int) -> tuple[Sample, int]:
    """The sample of configs.py, and CAP for four queues."""
    blocks = configs.sweep(90, 16, 64, columns, k)
    return Sample(blocks["sample_step"], 0, blocks["GROUPS"], False), blocks["CAP"]


def cases(columns: int, k: int) -> dict[str, Case]:
    """By name: what is chosen, for each architecture, and for sm_90 what differs in one thing."""
    sample, _ = chosen(columns, k)
    made = {f"sm_{arch}": Case(k, sample, layout) for arch, layout in LAYOUTS.items()}
    made["sm_100"] = Case(k, replace(sample, groups=min(sample.groups, 64)), LAYOUTS[100])
    samples = {f"stride {s}": replace(sample, stride=s) for s in (1, 2, 4, 8)}
    samples |= {f"own {n}": replace(sample, own=n) for n in (0, 1, 3)}
    samples |= {f"R {r}": replace(sample, groups=r) for r in (32, 64, 128) if r >= k}
    samples["adjacent"] = replace(sample, adjacent=True)
    samples["ties"] = replace(sample, ties=True)
    layout = LAYOUTS[90]
    layouts = {f"advance {a}": replace(layout, advance=a) for a in (124, 126, 128)}
    layouts["rotate 37"] = replace(layout, advance=layout.tile, rotate=37)
    made |= {name: Case(k, each, layout) for name, each in samples.items() if each != sample}
    made |= {name: Case(k, sample, each) for name, each in layouts.items() if each != layout}
    return made | {"perfect": Case(k, None, layout)}


def measure(tokens: list[Tensor], cases: list[Case]) -> list[dict[str, Any]]:
    """Statistics over some programs of each picture, whose positions differ."""
    columns = len(tokens[0])
    programs = columns // ROWS
    each = max(1, min(programs, 4096 // columns))
    parts: list[list[Counts]] = [[] for _ in cases]
    for i, rows in enumerate(tokens):
        for j in range(each):
            first = (5 * i + j * programs // each + j) % programs * ROWS
            S = similarities(rows[first : first + ROWS], rows)
            tiles = {layout: layout.tiles(S) for layout in {case.layout for case in cases}}
            for case, counts in zip(cases, parts, strict=True):
                counts.append(count(case, tiles[case.layout], first))
    return [summary(case, counts) for case, counts in zip(cases, parts, strict=True)]


def average(made: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over sets of tokens, and of the instructions also the largest."""
    mean = {
        name: round(sum(each[name] for each in made) / len(made), 2)
        for name in ("hits", "hits_p99", "turns")
    }
    by_cap = {
        name: {cap: sum(each[name][cap] for each in made) / len(made) for cap in CAPS}
        for name in ("overflow", "instructions")
    }
    return mean | by_cap | {"worst": {c: max(e["instructions"][c] for e in made) for c in CAPS}}


def show(columns: int, k: int, name: str, made: dict[str, Any]) -> None:
    shares = "".join(f"{100 * share:7.2f}" for share in made["overflow"].values())
    costs = "".join(f"{cost:7.0f}" for cost in made["instructions"].values())
    numbers = f"{made['hits']:8.1f}{made['hits_p99']:8.0f}{made['turns']:7.2f}"
    print(f"{columns:7}{k:4} {name:36}{numbers} |{shares} |{costs}", flush=True)


@torch.inference_mode()
def count_all(cifar: Cifar | None) -> dict[str, Any]:
    """Prints the table, and returns what is written."""
    records, means = [], []
    print("columns   k tokens" + " " * 34 + "hits  99th %  turns | overflow % | instructions")
    print(f"for CAP = {', '.join(map(str, CAPS))}; turns per word of a thread")
    for side in SIDES:
        columns = side * side
        several = {(k, name): case for k in KS for name, case in cases(columns, k).items()}
        made: dict[tuple[int, str], list[dict[str, Any]]] = {key: [] for key in several}
        for tokens_name, tokens in token_sets(side, cifar):
            numbers = measure(tokens, list(several.values()))
            for (k, name), each in zip(several, numbers, strict=True):
                if name.startswith("sm_") or name in ("perfect", "ties"):
                    what = {"columns": columns, "k": k, "tokens": tokens_name, "case": name}
                    records.append(what | each)
                if name == "sm_90":
                    show(columns, k, tokens_name, each)
                if tokens_name not in EXTREMES:
                    made[k, name].append(each)
        for (k, name), counted in made.items():
            if counted:
                means.append({"columns": columns, "k": k, "case": name} | average(counted))
                show(columns, k, f"mean, {name}", means[-1])
    settings = [
        {"columns": side * side, "k": k, "CAP": cap} | asdict(sample)
        for side in SIDES
        for k in KS
        for sample, cap in [chosen(side * side, k)]
    ]
    return {"settings": settings, "tokens": records, "means": means}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.count_hits", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--cifar10", type=Path, help="archive of CIFAR-10 as class folders")
    parser.add_argument("--train-images", type=int, default=20_000, help="that VGG-11 is shown")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    cifar = None
    if options.cifar10 is None:
        print("Without --cifar10: no tokens of CIFAR-10, and no features of a VGG-11.")
    else:
        cifar = train(options.cifar10, options.train_images)
    result = count_all(cifar)
    if cifar is not None:
        result["vgg"] = {"images": options.train_images, "accuracy": cifar.accuracy}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
