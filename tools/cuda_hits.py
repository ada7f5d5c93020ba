# SPDX-License-Identifier: MIT
"""How many hits the sweep of csrc/cuda/hopper_sweep.cuh has on random features, and what they make
its warps and those of the finish do: simulated on the CPU by the rules of the kernels, on
similarities by cosine of normal features.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

Floats = npt.NDArray[np.float32]
TILE = 128  # columns
PART = 64  # columns that are looked at together, with both halves of the rows
CHECKED = 32  # of these, between two looks at how many slots are left
NEVER = float("-inf")


@dataclass(frozen=True)
class Rules:
    """Of a sweep over some columns.

    groups: the threshold is about the k-th largest of the maxima of so many groups of columns,
        those equal modulo that, of every step-th tile; found in so many halvings of their range.
    slots: of a lane, each for four accumulators, of two rows and two columns. When less than eight
        of a lane are left, the last `moved` of each lane go to its lists.
    list: room in a list. Of a row of which it may not suffice, the k nearest stay.
    period: tiles after which slots are emptied anyway; 0: all are at the end.
    """

    columns: int
    k: int
    step: int
    groups: int
    halvings: int
    slots: int
    moved: int
    list: int
    period: int


@dataclass
class Hits:
    """Means over warps of 32 rows; `planned` drains are those after a period or at the end."""

    stored: float = 0.0  # of a row, those that are put into a list
    drains: float = 0.0  # that are not planned
    # Of one drain; more than one if a list may not suffice, and how probable that is in a pass.
    passes: float = 0.0
    crowded: float = 0.0
    moves: float = 0.0  # of one pass: slots that the lane moves that moves most
    planned: float = 0.0
    planned_passes: float = 0.0
    planned_crowded: float = 0.0
    planned_moves: float = 0.0
    headers: float = 0.0  # of a part: how probable it is that a lane has a hit
    lanes: float = 0.0  # of four accumulators: how probable it is that one is a hit
    raises: float = 0.0  # of a warp: rows of which a list did not suffice
    quarters: float = 0.0  # of a pass that makes room: of the four rows of a lane, those raised
    cut: float = 0.0  # halvings until the k nearest of a row are found


def threshold(S: Floats, rules: Rules) -> Floats:
    """[rows], of similarities S [rows, columns], a multiple of TILE."""
    tiles = S.reshape(len(S), -1, TILE)[:, :: rules.step]
    maxima = tiles.reshape(len(S), -1, rules.groups).max(1)
    low, high = maxima.min(1), maxima.max(1)
    found = np.full_like(low, NEVER)
    middle = low
    for _ in range(rules.halvings):
        enough = (maxima >= middle[:, None]).sum(1) >= rules.k
        found, high = np.where(enough, middle, found), np.where(enough, high, middle)
        middle = (found + high) / 2
    return found


def halvings(values: list[float], k: int, most: int) -> tuple[int, int]:
    """Of the range of the bits of numbers above 0, until between k and `most` are left; and how
    many are."""
    keys = np.array(values, np.float32).view(np.int32)
    low, high, steps, reach = int(keys.min()), int(keys.max()) + 1, 0, len(keys)
    while reach > most and high - low > 1:
        steps, middle = steps + 1, (low + high) // 2
        count = int((keys >= middle).sum())
        if count > most:
            low = middle
        elif count < k:
            high = middle
        else:
            reach = count
    return steps, min(reach, most)


class _Warp:
    """similarities [2 halves, 2, 8, columns]: lane 4 g + t has rows g and 8 + g of each half, and
    of eight columns those from 2 t on."""

    def __init__(self, S: Floats, rules: Rules) -> None:
        self.rules = rules
        self.S = S.reshape(2, 2, 8, -1)
        self.T = threshold(S, rules).reshape(2, 2, 8).copy()
        self.slots: list[list[tuple[int, Floats]]] = [[] for _ in range(32)]  # half, [2, 2]
        self.lists: list[list[list[float]]] = [[[] for _ in range(4)] for _ in range(32)]
        # Of each pass the moves; of planned drains, too.
        self.drains: list[list[int]] = []
        self.planned: list[list[int]] = []
        self.raised: list[int] = []  # rows of each pass that makes room
        self.quarters: list[int] = []
        self.crowded = [0, 0]  # passes of drains, and of planned ones
        self.cuts: list[int] = []
        self.headers = self.hits_of_four = self.stored = 0

    def look(self, first: int) -> bool:
        """At a part; whether there are hits."""
        found = 0
        for start in range(first, first + PART, CHECKED):
            if max(map(len, self.slots)) > self.rules.slots - CHECKED // 4:
                self.drain(self.drains)
            # [2 halves, 2 rows, g, n, t, 2 columns]
            part = self.S[..., start : start + CHECKED].reshape(2, 2, 8, CHECKED // 8, 4, 2)
            hits = (part >= self.T[..., None, None, None]).any((1, 5))
            for half, g, n, t in sorted(np.argwhere(hits).tolist(), key=lambda at: at[2]):
                self.slots[4 * g + t].append((half, part[half, :, g, n, t]))
            found += int(hits.sum())
        self.hits_of_four += found
        return found > 0

    def drain(self, kind: list[list[int]], everything: bool = False) -> None:
        moves = [len(own) if everything else min(len(own), self.rules.moved) for own in self.slots]
        kind.append([])
        crowded = False
        while True:
            full = [self.move_slots(lane, count) for lane, count in enumerate(moves)]
            kind[-1].append(max(moved for moved, _ in full))
            crowded = crowded or any(is_full for _, is_full in full)
            if not crowded:
                break
            self.crowded[kind is self.planned] += 1
            self.make_room()
            moves = list(map(len, self.slots))
            if not any(moves):
                break

    def move_slots(self, lane: int, count: int) -> tuple[int, bool]:
        """Until a list of the slot has no room for two more: how many, and whether one has not."""
        for moved in range(1, count + 1):
            half = self.move(lane)
            longest = max(map(len, self.lists[lane][2 * half : 2 * half + 2]))
            if longest > self.rules.list - 2:
                return moved, True
        return count, False

    def move(self, lane: int) -> int:
        half, values = self.slots[lane].pop()
        for r in range(2):
            bound = self.T[half, r, lane // 4]
            hits = [x for x in values[r].tolist() if x >= bound]
            self.lists[lane][2 * half + r] += hits
            self.stored += len(hits)
        return half

    def make_room(self) -> None:
        rows, quarters = 0, set()
        for g in range(8):
            for i in range(4):
                quad = [self.lists[4 * g + t][i] for t in range(4)]
                if max(map(len, quad)) <= self.rules.list - 2:
                    continue
                rows += 1
                quarters.add(i)
                hits = [x for own in quad for x in own]
                self.cuts.append(halvings(hits, self.rules.k, self.rules.k)[0])
                last = sorted(hits, reverse=True)[self.rules.k - 1]
                for t in range(4):
                    self.lists[4 * g + t][i] = [x for x in quad[t] if x >= last]
                self.T[i // 2, i % 2, g] = np.nextafter(np.float32(last), np.float32(2))
        self.raised.append(rows)
        self.quarters.append(len(quarters))

    def run(self) -> None:
        tiles, period = self.S.shape[3] // TILE, self.rules.period
        for tile in range(tiles):
            if period and tile and tile % period == 0:
                self.drain(self.planned)
            for first in range(tile * TILE, (tile + 1) * TILE, PART):
                self.headers += self.look(first)
        self.drain(self.planned, everything=True)

    def of_rows(self) -> list[list[list[float]]]:
        """Of each row the lists of its four lanes."""
        quads = range(0, 32, 4)
        return [[self.lists[q + t][i] for t in range(4)] for i in range(4) for q in quads]


def _mean(values: list[int]) -> float:
    return sum(values) / max(1, len(values))


@functools.cache
def _simulated(rules: Rules, d: int) -> list[_Warp]:
    count = 16 if rules.columns <= 8192 else 4
    generator = torch.Generator().manual_seed(0)
    query, key = (
        F.normalize(torch.randn(rows, d, generator=generator), dim=1)
        for rows in (32 * count, rules.columns)
    )
    S = F.pad(query @ key.T, (0, -rules.columns % TILE), value=NEVER).numpy()
    warps = [_Warp(S[32 * i : 32 * i + 32], rules) for i in range(count)]
    for warp in warps:
        warp.run()
    return warps


@functools.cache
def simulate(rules: Rules, d: int) -> Hits:
    warps = _simulated(rules, d)
    tiles = -(-rules.columns // TILE)
    early = [passes for warp in warps for passes in warp.drains]
    late = [passes for warp in warps for passes in warp.planned]
    return Hits(
        stored=sum(warp.stored for warp in warps) / (32 * len(warps)),
        drains=len(early) / len(warps),
        passes=_mean([len(passes) for passes in early]) or 1.0,
        crowded=sum(warp.crowded[0] for warp in warps) / max(1, sum(map(len, early))),
        moves=_mean([moves for passes in early for moves in passes]),
        planned=len(late) / len(warps),
        planned_passes=_mean([len(passes) for passes in late]),
        planned_crowded=sum(warp.crowded[1] for warp in warps) / max(1, sum(map(len, late))),
        planned_moves=_mean([moves for passes in late for moves in passes]),
        headers=sum(warp.headers for warp in warps) / (len(warps) * tiles * 2),
        lanes=sum(warp.hits_of_four for warp in warps) / (len(warps) * tiles * 2 * 32 * 16),
        raises=sum(sum(warp.raised) for warp in warps) / len(warps),
        quarters=_mean([each for warp in warps for each in warp.quarters]),
        cut=_mean([each for warp in warps for each in warp.cuts]),
    )


@dataclass
class Finish:
    """Means of what hopper_finish_kernel does with the hits of a row, `together` rows at a time."""

    sectors: float  # of a list, with four hits each
    long: float  # how probable it is that a list is longer than `usual`
    many: float  # how probable it is that a row has more than `most` hits
    halvings: float  # until at most `most` are left, in the row that takes most
    left: float  # hits of the row that has most then


@functools.cache
def finish(rules: Rules, d: int, most: int, together: int, usual: int) -> Finish:
    """Of the hits of one split."""
    rows = [lists for warp in _simulated(rules, d) for lists in warp.of_rows()]
    lengths = np.array([list(map(len, lists)) for lists in rows])
    cuts = np.array([halvings([x for own in lists for x in own], rules.k, most) for lists in rows])
    of_groups = cuts.reshape(-1, together, 2).max(1).mean(0)
    long = lengths.reshape(-1, 4 * together).max(1) > usual
    hits = lengths.sum(1).reshape(-1, together).max(1)
    return Finish(
        float((-(-(lengths + rules.list * np.arange(4) % 4) // 4)).mean()),
        float(long.mean()),
        float((hits > most).mean()),
        *of_groups.tolist(),
    )
