# SPDX-License-Identifier: MIT
"""The memory of a rank is its share: tokens divided by ranks."""

from pathlib import Path

import pytest
import torch
from allocations import Live
from ranks import groups, started

from convnn_kernels import distributed
from convnn_kernels.distributed import exchange

ROWS, WIDTH = 4096, 32


def peak(size: int, of_one_rank: bool) -> int:
    """In a rank: the most bytes of tensors at a time, during a forward and a backward pass.

    of_one_rank: whether all neighbors are rows of the first of four ranks.
    """
    exchange.LEAST_TABLE_ROWS = 1
    rows = torch.randn(2, ROWS // size, WIDTH, requires_grad=True)
    weight = torch.randn(WIDTH, 1, 9, requires_grad=True)
    candidates = torch.arange(ROWS // 4) if of_one_rank else None
    with Live() as live:
        y = distributed.convnn(
            rows, rows, rows, 9, weight, candidates=candidates, group=groups[size]
        )
        y.sum().backward()
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize("of_one_rank", [False, True])
def test_memory_of_a_rank(of_one_rank: bool, tmp_path: Path) -> None:
    with started(4, tmp_path) as ranks:
        one, two, four = (max(ranks.call(peak, [(size, of_one_rank)] * size)) for size in (1, 2, 4))
    assert two <= 0.6 * one
    assert four <= 0.6 * two
