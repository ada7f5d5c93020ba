# SPDX-License-Identifier: MIT
"""A batch whose keys take more than 16 MiB is searched in parts: each with its own restrictions.

Selection holds as many batch elements at a time as fit, here two of three.
"""

from typing import Any

import pytest
import torch
from inputs import one_thread
from torch import Tensor

import convnn_kernels  # noqa: F401

pytestmark = one_thread
ops = torch.ops.convnn


def windows(rows: Tensor, batch: int, count: int) -> Tensor:
    """[batch, count, D]: consecutive rows, from the b-th on, which share their memory."""
    D = rows.shape[1]
    return rows.as_strided((batch, count, D), (D, D, 1))


def restrictions(batch: int, N: int, M: int) -> dict[str, dict[str, Any]]:
    """Each batch element sees keys of its own."""
    first = torch.arange(batch)[:, None, None] * (M // batch)
    ranges = torch.randint(M // batch + 1, (batch, N, 2)).sort(dim=-1).values + first
    key_range = {"key_range": ranges}
    own = {"self_indices": torch.randint(M, (batch, N)), "key_mask": torch.rand(batch, M) < 0.5}
    candidates = (torch.arange(M) + torch.arange(batch)[:, None])[:, : M - batch]
    every = {"candidates": candidates, "exclude_self": True}
    return {"key_range": key_range, "self_indices": own, "all": key_range | own | every}


def assert_equal_alone(query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    """Asserts that each batch element has the results that it has in a call of its own."""
    s, I = ops.select(query, key, 3, metric="dot", **options)
    for b in range(len(query)):
        own = {name: X[b] if isinstance(X, Tensor) else X for name, X in options.items()}
        alone = ops.select(query[b], key[b], 3, metric="dot", **own)
        assert torch.equal(I[b], alone[1]), b
        assert torch.equal(s[b], alone[0]), b


@pytest.mark.parametrize("option", ["key_range", "self_indices", "all"])
def test_long_rows(option: str) -> None:
    """Of 6.1 MiB for each batch element; more queries than are searched without packed keys."""
    B, N, M, D = 3, 65, 200, 8000
    rows = torch.randint(-3, 4, (N + M + 2 * B, D), dtype=torch.int8).float()
    query, key = windows(rows[: N + B], B, N), windows(rows[N + B :], B, M)
    assert_equal_alone(query, key, restrictions(B, N, M)[option])


@pytest.mark.parametrize("option", ["self_indices", "all"])
def test_many_keys_of_few_queries(option: str) -> None:
    """Lists of 7 MiB of the keys that may be neighbors."""
    B, N, M = 3, 2, 920_000
    rows = torch.randint(-(2**22), 2**22, (M + B, 1)).float()
    query, key = torch.randint(1, 4, (B, N, 1)).float(), windows(rows, B, M)
    assert_equal_alone(query, key, restrictions(B, N, M)[option])
