# SPDX-License-Identifier: MIT
"""The sweep of the Triton backend, in Triton's interpreter: every neighbor is a hit, with the
product of its rows, in the queue of its column; and what does not fit is listed."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from convnn_kernels.triton import configs

pytestmark = in_interpreter

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
        from convnn_kernels.triton.launch import Plan, Pointers, Workspace
        from convnn_kernels.triton.search import prepare
        from convnn_kernels.triton.select_large import (
            columns_of,
            parts_of,
            prepare_columns,
            prepare_sweep,
            sweep_buffers,
            sweep_of,
        )

        given = {"candidates": None, "self_indices": None, "key_mask": None, "metric": "dot"}
        search, tensors = prepare(query, key, k, **given | {"order": "similarity"} | options)
        sweep = sweep_of(search)
        self.sweep, self.found, self.listed = sweep, [], []
        columns = columns_of(sweep)
        parts = parts_of(sweep, Workspace(**columns.buffers).bytes)
        buffers = columns.buffers | sweep_buffers(sweep, max(each.rows for each in parts))
        buffers["p_listed"] = (len(parts) * search.Q.B, torch.int32)
        for number, part in enumerate(parts):
            pointers = Pointers(query.device, **tensors)
            # Buffers of another call are gone: each part computes its columns again.
            launches = [
                prepare_columns(sweep, columns, len(parts)),
                *prepare_sweep(sweep, part, number, columns.names),
            ]
            Plan(launches, **buffers)(pointers)
            self._read(pointers, part, number)
        self.parts = len(parts)

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
                    start = min(tile * config["ADVANCE"], sweep.search.columns - config["BLOCK_M"])
                    column = start + c // pair * queues * pair + queue * pair + c % pair
                    assert column not in hits, "appended twice"
                    hits[column] = float(product)
            self.found.append((hits, int(counts[row].sum())))
        B = sweep.search.Q.B
        listed = pointers.tensor("p_listed").view(-1, B)[number]
        rows = pointers.tensor("p_rows").view(B, -1)
        self.listed += [(b, n) for b in range(B) for n in rows[b, : int(listed[b])].tolist()]
        assert len(set(self.listed)) == len(self.listed), "listed twice"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def similarity(query: Tensor, key: Tensor, metric: str) -> Tensor:
    query, key = query.double(), key.double()
    if metric == "euclidean":
        return -(torch.cdist(query, key, compute_mode="donot_use_mm_for_euclid_dist") ** 2)
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
    if options.get("key_range") is not None:
        begin, end = options["key_range"].unsqueeze(-2).unbind(-1)
        rows = torch.arange(key.shape[-2])
        S = S.masked_fill((rows < begin) | (rows >= end), -math.inf)
    S = S if candidates is None else S[..., candidates]
    B, N, columns = S.flatten(0, -3).shape if S.dim() > 2 else (1, *S.shape)
    S = S.reshape(B * N, columns)
    products = (query.double() @ key.double().mT).reshape(B * N, -1)
    products = products if candidates is None else products[:, candidates]
    sizes = (query.double().abs() @ key.double().abs().mT).reshape(B * N, -1)
    sizes = sizes if candidates is None else sizes[:, candidates]
    kth = S.topk(min(hits.sweep.search.ranks, columns)).values[:, -1]
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


OPTIONS = {
    "mask": {"key_mask": torch.arange(600) % 7 > 2},
    "last_keys": {"key_mask": torch.arange(600) >= 560},
    "candidates": {"candidates": (torch.arange(530) * 7 + 3) % 600},
    "candidates_and_mask": {
        "candidates": torch.arange(599, 80, -1),
        "key_mask": torch.arange(600) % 3 == 0,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("metric", "dtype"), [("dot", F16), ("cosine", F32), ("euclidean", F32)])
def test_only_allowed_columns_are_hits(option: str, metric: str, dtype: torch.dtype) -> None:
    query, key = normal(7, 34, dtype=dtype), normal(600, 34, seed=1, dtype=dtype)
    key[::2] *= 30
    check(query, key, 5, metric=metric, **OPTIONS[option])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("metric", "dtype"), [("dot", F16), ("cosine", F32), ("euclidean", F32)])
def test_only_columns_in_ranges_are_hits(
    metric: str, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges from none to all of the keys in one block, whose ends are anywhere in a tile."""
    monkeypatch.setattr(configs, "column_splits", lambda *_: splits)
    query, key = normal(16, 34, dtype=dtype), normal(700, 34, seed=1, dtype=dtype)
    ends = [(0, 0), (7, 7), (0, 1), (699, 700), (0, 5), (62, 65), (60, 70), (300, 340), (0, 63)]
    ends += [(0, 700), (100, 400), (1, 699), (637, 700), (500, 628), (61, 189), (0, 350)]
    hits = check(query, key, 5, metric=metric, key_range=torch.tensor(ends))
    assert not hits.listed
    for (begin, end), (found, _) in zip(ends, hits.found, strict=True):
        # Each with a threshold of its own, from columns in its range.
        assert min(5, end - begin) <= len(found) <= min(60, end - begin)


def test_a_sample_is_dense_enough_for_short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the tiles would have no column of half of the ranges."""
    sweep = configs.sweep
    monkeypatch.setattr(configs, "sweep", lambda *sizes: sweep(*sizes) | {"sample_step": 3})
    monkeypatch.setattr(configs, "column_splits", lambda *_: 1)
    query, key = normal(16, 16, dtype=F16), normal(700, 16, seed=1, dtype=F16)
    ends = torch.tensor([[70, 190], [130, 250]]).repeat(8, 1)
    hits = check(query, key, 5, key_range=ends)
    assert hits.sweep.config["sample_step"] == 3
    assert max(len(found) for found, _ in hits.found) < 40


def test_one_more_hit_where_self_is_excluded() -> None:
    query, key = normal(9, 16, dtype=F16), normal(600, 16, seed=1, dtype=F16)
    own = torch.arange(9)
    key[:9] = query * 4
    hits = check(query, key, 5, self_indices=own, exclude_self=True)
    for row, (found, _) in enumerate(hits.found):
        assert row in found
        assert len(found) >= 6


@pytest.mark.parametrize("splits", [1, 3])
def test_equal_products_are_all_hits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many ties with the k-th neighbor, in every column of a tile, and negative similarities."""
    monkeypatch.setattr(configs, "column_splits", lambda *_: splits)
    query, key = integers(5, 16, dtype=F16), integers(700, 16, seed=1, dtype=F16)
    hits = check(query, -key.abs(), 9)
    assert hits.sweep.splits == splits


def equal_columns(columns: list[int], monkeypatch: pytest.MonkeyPatch) -> Hits:
    """The nearest key, in these columns; all others are far."""
    query, key = torch.ones(1, 16, dtype=F16), integers(640, 16, dtype=F16) / 8 - 1
    key[columns] = 1.0
    monkeypatch.setattr(configs, "column_splits", lambda *_: 1)
    return check(query, key, 1)


def test_a_queue_that_is_one_too_short_lists_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue with columns 2, 3, 10, 11, ... of tiles holds as many hits as it has places."""
    config = configs.sweep(configs.INTERPRETER, 16, 16, 640, 1)
    advance = config["ADVANCE"]
    queue = [t * advance + 8 * a + 2 + p for t in range(10) for a in range(7) for p in range(2)]
    fits = equal_columns(queue[: config["CAP"]], monkeypatch)
    assert fits.found[0][1] == config["CAP"]
    assert not fits.listed
    short = equal_columns(queue[: config["CAP"] + 1], monkeypatch)
    assert short.found[0][1] == config["CAP"] + 1
    assert short.listed == [(0, 0)]


@pytest.mark.parametrize("k", [5, 64])
def test_nothing_is_lost_of_special_values(k: int) -> None:
    """NaN, infinity, zeros; a row is listed, or has them all."""
    query, key = normal(7, 20), normal(530, 20, seed=1)
    key[5], key[131], key[520:] = math.nan, math.inf, 0.0
    query[1], query[2, 3], query[3], query[4, 0] = 0.0, math.nan, -0.0, math.inf
    for metric in ("cosine", "dot", "euclidean"):
        hits = Hits(query.half(), key.half(), k, metric=metric)
        for row in range(7):
            found, count = hits.found[row]
            finite = bool(query[row].isfinite().all()) and bool(query[row].any())
            if (0, row) in hits.listed:
                assert count > len(found)
            elif finite:
                assert 5 in found, "NaN is above every number"


def test_products_may_be_wrong_by_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbor is a hit though its product is too small and those of all others too large."""
    import triton.language as tl

    from convnn_kernels.triton import sweep

    k, D = 3, 32
    query, key = torch.zeros(1, D), torch.zeros(600, D)
    query[:, 0] = 1
    good = torch.arange(0, 600, 117)
    key[:, 0], key[good, 0] = 0.1, 0.9 - torch.arange(len(good)) * 2**-23
    key[:, 1] = (1 - key[:, 0] ** 2).sqrt()
    check(query, key, k, metric="euclidean")

    tolerance = (2 * D + 32) * 2.0**-24
    error = 0.8 * tolerance * 2  # relative to ||q||^2 + ||k||^2 = 2
    multiply = sweep._multiply

    def wrong(*args: Any) -> Any:
        b_s = multiply(*args)
        return b_s + tl.where(b_s > 0.9 - 2**-24, -error, error)

    monkeypatch.setattr(sweep, "_multiply", wrong)
    found, count = Hits(query, key, k, metric="euclidean").found[0]
    assert set(good[:k].tolist()) <= found.keys()
    assert count == len(good)


def test_queries_that_do_not_fit_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch elements, and rows of one, after another."""
    query, key = normal(2, 18, 16, dtype=F16), normal(2, 520, 16, seed=1, dtype=F16)
    query[1, 17] = 0.0
    for rows, parts in ((36, 1), (30, 2), (17, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(configs, "column_splits", lambda *_: 1)
            hits = check(query, key, 2, metric="cosine")
            bytes_each = hits.sweep.row_bytes
            patch.setattr(configs, "WORKSPACE", 4 * rows * bytes_each)
            patch.setattr(configs, "allowed_memory", lambda *_: 0)
            forget()
            again = check(query, key, 2, metric="cosine")
            assert again.parts == parts
            assert again.found == hits.found
            assert sorted(again.listed) == sorted(hits.listed)


def forget() -> None:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()
