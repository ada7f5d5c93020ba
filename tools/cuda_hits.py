# SPDX-License-Identifier: MIT
"""How many hits the sweep of csrc/cuda/hopper_sweep.cuh has on random features, and what they make
its warps do: simulated on the CPU by the rules of the kernel, on similarities by cosine of normal
features.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 128  # columns
NEVER = float("-inf")


@dataclass(frozen=True)
class Rules:
    """Of a sweep over some columns.

    groups: the threshold is about the k-th largest of the maxima of so many groups of columns,
        those equal modulo that, of every step-th tile; found in so many halvings of their range.
    slots: room of a lane for groups of four accumulators, of two rows and two columns. Every 64
        columns they are emptied if in one lane there is no room for eight more.
    list: room of a lane for the hits of a row, before its threshold rises.
    """

    columns: int
    k: int
    step: int
    groups: int
    halvings: int
    slots: int
    list: int


@dataclass
class Hits:
    """Means."""

    hits: float  # of a row, those that are left at the end
    drains: float  # of a warp and 32 rows: how often slots are emptied,
    slots: float  # and how many the lane that has most has in all of those together
    headers: float  # tiles, of 16 rows and 128 columns, in which a lane has a hit
    raises: float  # of a row


def threshold(S: Tensor, rules: Rules) -> Tensor:
    """[rows], of similarities S [rows, columns]."""
    tiles = F.pad(S, (0, -S.shape[1] % TILE), value=NEVER).unflatten(1, (-1, TILE))
    maxima = tiles[:, :: rules.step].unflatten(2, (-1, rules.groups)).amax((1, 2))
    low, high = maxima.amin(1), maxima.amax(1)
    for _ in range(rules.halvings):
        middle = (low + high) / 2
        enough = maxima.ge(middle[:, None]).sum(1) >= rules.k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


class _Warps:
    """Of 32 rows each: similarities [warps, halves, 2, 8, columns], a lane having two rows of each
    half, and of eight columns two."""

    def __init__(self, S: Tensor, rules: Rules) -> None:
        self.rules, self.warps = rules, S.shape[0] // 32
        self.S = F.pad(S, (0, -S.shape[1] % TILE), value=NEVER)
        self.S = self.S.view(self.warps, 2, 2, 8, -1)
        self.T = threshold(S, rules).view(self.warps, 2, 2, 8)
        self.slots = torch.zeros(self.warps, 8, 4, dtype=torch.int64)
        self.lists = torch.zeros(self.warps, 2, 2, 8, 4, dtype=torch.int64)
        self.waiting = torch.zeros_like(self.lists)
        self.drains = self.emptied = self.headers = self.raises = 0

    def look(self, half: int, first: int) -> None:
        """At 64 columns."""
        full = self.slots.amax((1, 2)) > self.rules.slots - 8
        self.drain(full, first)
        part = self.S[:, half, :, :, first : first + 64].unflatten(3, (8, 4, 2))
        hits = part >= self.T[:, half, :, :, None, None, None]
        self.slots += hits.any(5).any(1).sum(2)
        self.waiting[:, half] += hits.sum((3, 5))

    def drain(self, which: Tensor, end: int) -> None:
        self.drains += int(which.sum())
        self.emptied += int(self.slots.amax((1, 2))[which].sum())
        self.slots[which] = 0
        self.lists[which] += self.waiting[which]
        self.waiting[which] = 0
        # Without room for what may come until the next time.
        long = self.lists.amax(4) > self.rules.list - 8
        for place in long.nonzero().tolist():
            self.raises += 1
            row, k = tuple(place), self.rules.k
            self.T[row] = self.S[row][:end].topk(min(k, end)).values[-1]
            self.lists[row] = k // 4

    def run(self) -> Hits:
        columns = self.S.shape[4]
        for first in range(0, columns, TILE):
            for half in range(2):
                before = self.waiting[:, half].sum((1, 2, 3)) + self.lists[:, half].sum((1, 2, 3))
                for part in range(first, first + TILE, 64):
                    self.look(half, part)
                after = self.waiting[:, half].sum((1, 2, 3)) + self.lists[:, half].sum((1, 2, 3))
                self.headers += int((after != before).sum())
        self.drain(torch.ones(self.warps, dtype=torch.bool), columns)
        return Hits(
            hits=self.lists.sum().item() / (32 * self.warps),
            drains=self.drains / self.warps,
            slots=self.emptied / self.warps,
            headers=self.headers / self.warps,
            raises=self.raises / (32 * self.warps),
        )


@functools.cache
def simulate(rules: Rules, rows: int, d: int) -> Hits:
    generator = torch.Generator().manual_seed(0)
    query, key = (
        F.normalize(torch.randn(count, d, generator=generator), dim=1)
        for count in (rows, rules.columns)
    )
    return _Warps(query @ key.T, rules).run()
