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


def peak(size: int) -> int:
    """In a rank: the most bytes of tensors at a time, during a forward and a backward pass."""
    exchange.LEAST_TABLE_ROWS = 1
    rows = torch.randn(2, ROWS // size, WIDTH, requires_grad=True)
    weight = torch.randn(WIDTH, 1, 9, requires_grad=True)
    with Live() as live:
        distributed.convnn(rows, rows, rows, 9, weight, group=groups[size]).sum().backward()
    return live.peak


@pytest.mark.slow
def test_memory_of_a_rank(tmp_path: Path) -> None:
    with started(4, tmp_path) as ranks:
        one, two, four = (max(ranks.call(peak, [(size,)] * size)) for size in (1, 2, 4))
    assert two <= 0.6 * one
    assert four <= 0.6 * two
