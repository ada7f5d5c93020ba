# SPDX-License-Identifier: MIT
"""The sweep of the Triton backend, in Triton's interpreter: every neighbor is a hit, with the
product of its rows, in the queue of its column; and what does not fit is listed."""

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from convnn_kernels.triton import backend, configs

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" or backend.unavailable() is not None,
        reason="needs TRITON_INTERPRET=1 and Triton",
    ),
    # What NumPy says of NaN and infinity within the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

F32, F16 = torch.float32, torch.float16


@pytest.fixture(autouse=True)
def _fresh_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()
    yield
    monkeypatch.undo()
    forget_plans()


class Hits:
    """What the sweep left for each query: {column: product}; which are listed; the arguments."""

    def __init__(self, query: Tensor, key: Tensor, k: int, **options: Any) -> None:
        from convnn_kernels.triton.launch import Plan, Pointers
        from convnn_kernels.triton.search import prepare
        from convnn_kernels.triton.select_large import (
            parts_of,
            prepare_columns,
            prepare_sweep,
            sweep_buffers,
            sweep_of,
        )

        options = {"candidates": None, "key_mask": None, "metric": "dot"} | options
        search, tensors = prepare(
            query,
            key,
            k,
            options["candidates"],
            None,
            options["key_mask"],
            options["metric"],
            "similarity",
        )
        sweep = sweep_of(search)
        self.sweep, self.found, self.listed = sweep, [], []
        parts = parts_of(sweep)
        columns, buffers, names = prepare_columns(sweep, len(parts))
        for number, part in enumerate(parts):
            buffers |= sweep_buffers(sweep, max(each.rows for each in parts))
            pointers = Pointers(query.device, **tensors)
            launches = [columns] if number == 0 else []
            # Buffers of another call are gone: each part computes its columns again.
            launches = [columns, *prepare_sweep(sweep, part, number, names)]
            Plan(launches, **buffers)(pointers)
            self._read(pointers, part, number)

    def _read(self, pointers: Any, part: Any, number: int) -> None:
        sweep, config = self.sweep, self.sweep.config
        shape = (part.rows, sweep.splits, config["QUEUES"])
        size = math.prod(shape)
        counts = pointers.tensor("p_count")[:size].view(shape)
        entries = pointers.tensor("p_queue")[: size * config["CAP"]].view(*shape, config["CAP"])
        leaves = config["BLOCK_M"] // config["QUEUES"]
        pair, queues = config["PAIR"], config["QUEUES"]
        for row in range(part.rows):
            hits: dict[int, float] = {}
            for split, queue in torch.cartesian_prod(
                torch.arange(sweep.splits), torch.arange(queues)
            ).tolist():
                count = int(counts[row, split, queue])
                for entry in entries[row, split, queue, : min(count, config["CAP"])]:
                    x = int(entry) & 0xFFFFFFFF
                    product = (entry >> 32).to(torch.int32).view(F32)
                    tile, c = divmod(x, leaves)
                    start = min(tile * config["BLOCK_M"], sweep.search.columns - config["BLOCK_M"])
                    column = start + c // pair * queues * pair + queue * pair + c % pair
                    assert column not in hits, "appended twice"
                    hits[column] = float(product)
            self.found.append((hits, int(counts[row].sum())))
        B = sweep.search.Q.B
        listed = pointers.tensor("p_listed").view(-1, B)[number]
        rows = pointers.tensor("p_rows").view(B, -1)
        self.listed += [
            (b, n) for b in range(B) for n in set(rows[b, : int(listed[b])].tolist())
        ]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def similarity(query: Tensor, key: Tensor, metric: str) -> Tensor:
    query, key = query.double(), key.double()
    if metric == "euclidean":
        return -torch.cdist(query, key, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    if metric == "cosine":
        query, key = (torch.nn.functional.normalize(X, dim=-1) for X in (query, key))
    return query @ key.mT


def check(query: Tensor, key: Tensor, k: int, **options: Any) -> Hits:
    """Every one of the k nearest columns is a hit unless its row is listed."""
    hits = Hits(query, key, k, **options)
    allowed = torch.ones(key.shape[:-1], dtype=torch.bool)
    if options.get("key_mask") is not None:
        allowed = options["key_mask"].expand(allowed.shape)
    candidates = options.get("candidates")
    S = similarity(query, key, options.get("metric", "dot"))
    S = S.masked_fill(~allowed[..., None, :], -math.inf)
    S = S if candidates is None else S[..., candidates]
    B, N, columns = S.flatten(0, -3).shape if S.dim() > 2 else (1, *S.shape)
    S = S.reshape(B * N, columns)
    products = (query.double() @ key.double().mT).reshape(B * N, -1)
    products = products if candidates is None else products[:, candidates]
    sizes = (query.double().abs() @ key.double().abs().mT).reshape(B * N, -1)
    sizes = sizes if candidates is None else sizes[:, candidates]
    kth = S.topk(min(k, columns)).values[:, -1]
    for row in range(B * N):
        found, count = hits.found[row]
        if divmod(row, N) in hits.listed:
            continue
        assert len(found) == count
        wanted = ((S[row] >= kth[row]) & (S[row] > -math.inf)).nonzero().flatten().tolist()
        assert set(wanted) <= found.keys(), row
        for column, product in found.items():
            assert S[row, column] > -math.inf, "not allowed"
            if not hits.sweep.search.scales_rows:
                error = abs(product - float(products[row, column]))
                assert error <= (query.shape[-1] + 8) * 2.0**-24 * float(sizes[row, column])
    return hits


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(
    ("dtype", "N", "M", "D", "k"),
    [(F16, 17, 520, 20, 3), (F16, 5, 600, 8, 9), (F32, 5, 513, 40, 1), (F32, 3, 640, 3, 9)],
)
def test_every_neighbor_is_a_hit(
    metric: str, dtype: torch.dtype, N: int, M: int, D: int, k: int
) -> None:
    """The last column of the last tile is one of them."""
    query, key = normal(2, N, D, dtype=dtype), normal(2, M, D, seed=1, dtype=dtype)
    key[:, -1] = query[:, 0] * 4
    hits = check(query, key, k, metric=metric)
    if metric == "dot":
        assert M - 1 in hits.found[0][0]
    assert len(hits.listed) < N
