# SPDX-License-Identifier: MIT
"""Key ranges on the CPU: results are, bit for bit, those of masking all similarities by hand.

Few queries read keys where they lie, many share panels of 8 to 64 packed keys and chunks of 1024,
and from 192 queries and 512 keys in a range on, keys are screened. Ranges begin and end anywhere.
"""

import pytest
import torch
from cases import DTYPES, METRICS
from inputs import allowed_by, by_key, each_dtype, one_thread, randn
from torch import Tensor

import convnn_kernels  # noqa: F401, defines the operators
from convnn_kernels import native
from python_ref import assert_forward, assert_select

ops = torch.ops.convnn

EDGES = (0, 1, 7, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 1088, 1300)
RANGES = (
    *("causal", "window", "long window", "segments", "alternating", "falling", "random"),
    *("edges", "single", "empty", "all empty", "whole"),
)
# Of N, M and D: few queries, a block and a part of the next one, and screened keys.
SIZES = {"few": (5, 2500, 19), "many": (75, 1100, 7), "screened": (200, 1100, 24)}


def make_range(kind: str, N: int, M: int) -> Tensor:
    """[N, 2]"""
    at = torch.arange(N) * M // N
    if kind == "causal":
        begin, end = 0 * at, at + 1
    elif kind == "window":
        begin, end = at - 20, at + 21
    elif kind == "long window":
        begin, end = at - 600, at + 601
    elif kind == "segments":
        begin = at // 90 * 90
        end = begin + 90
    elif kind == "alternating":  # rows side by side have nothing in common
        begin = torch.arange(N) % 3 * (M // 2)
        end = begin + M // 3
    elif kind == "falling":
        begin, end = M - at - 30, M - at
    elif kind == "single":
        begin, end = at, at + 1
    elif kind == "all empty":
        begin, end = at, at
    elif kind == "whole":
        begin, end = 0 * at, 0 * at + M
    else:
        ends = torch.randint(M + 1, (N, 2))
        if kind == "edges":
            ends = torch.tensor([*(e for e in EDGES if e < M), M])
            ends = ends[torch.randint(len(ends), (N, 2))]
        begin, end = ends.sort(dim=-1).values.unbind(-1)
        if kind == "empty":
            begin = torch.where(torch.rand(N) < 0.5, end, begin)
    return torch.stack([begin, end], dim=-1).clamp(0, M)


def all_similarities(query: Tensor, key: Tensor, metric: str) -> Tensor:
    """[N, M], bit for bit those of every other selection."""
    return by_key(*ops.select(query, key, key.shape[-2], metric=metric))


def select_by_hand(
    S: Tensor, allowed: Tensor, k: int, first: Tensor | None = None, order: str = "similarity"
) -> tuple[Tensor, Tensor]:
    """From all similarities S [N, M], those of the keys that are allowed [N, M], or come first
    [N, M] whatever they are.
    """
    M = S.shape[1]
    place = 2 - allowed.long()
    if first is not None:
        place[first] = 0
    ranked = S.sort(dim=-1, descending=True, stable=True).indices
    by_place = place.gather(1, ranked).sort(dim=-1, stable=True).indices
    indices = ranked.gather(1, by_place)[:, :k]
    found = place.gather(1, indices) < 2
    if order == "index":
        indices = torch.where(found, indices, M).sort(dim=-1).values
        found = indices < M
    indices = torch.where(found, indices, 0)
    return S.gather(1, indices).masked_fill(~found, -torch.inf), indices


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: object) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        same = (one == other) | (one.isnan() & other.isnan())
        assert same.all(), (what, int((~same).sum()), (~same).nonzero()[0].tolist())


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", RANGES)
def test_masking_by_hand(instruction_set: str, kind: str, size: str) -> None:
    N, M, D = SIZES[size]
    ranges, turn = make_range(kind, N, M), RANGES.index(kind)
    # Of all dtypes and metrics, only some have a screen.
    metric = METRICS[turn % (2 if size == "screened" else 3)]
    dtype = torch.float32 if size == "screened" and turn % 3 else DTYPES[turn % 4]
    query, key = randn(N, D, dtype=dtype), randn(M, D, dtype=dtype)
    key[M // 2 :][:100] = key[:100]
    with native.use_cpu_instruction_set(instruction_set):
        S = all_similarities(query, key, metric)
        for k in (1, 9, 50):
            found = ops.select(query, key, k, metric=metric, key_range=ranges)
            assert_same(found, select_by_hand(S, allowed_by(ranges, M), k), k)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_keys_that_no_query_may_see(instruction_set: str, metric: str, size: str) -> None:
    """At either end; they are not packed, up to and from any place in a panel."""
    N, M, D = SIZES[size]
    query, key = randn(N, D), randn(M, D)
    with native.use_cpu_instruction_set(instruction_set):
        S = all_similarities(query, key, metric)
        for begin in (7, 15, 31, 63, 64, 65, 127):
            for end in (begin + 1, begin + 600):
                ranges = torch.randint(begin, end + 1, (N, 2)).sort(dim=-1).values
                ranges[0] = torch.tensor([begin, end])
                found = ops.select(query, key, 9, metric=metric, key_range=ranges)
                assert_same(found, select_by_hand(S, allowed_by(ranges, M), 9), (begin, end))


@pytest.mark.quick_one_in(7)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["long window", "segments", "alternating", "edges", "empty"])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_restrictions_of_each_batch_element(
    instruction_set: str, exclude_self: bool, kind: str, size: str
) -> None:
    """Candidates, tokens, masks and ranges, of which each batch element has its own; tokens outside
    their ranges, masked, or not among the candidates."""
    B, (N, M, D) = 3, SIZES[size]
    query, key = randn(B, N, D), randn(B, M, D)
    ranges = torch.stack([make_range(kind, N, M) for _ in range(B)])
    own = torch.randint(M, (B, N))
    own[0] = ranges[0].sum(-1).div(2, rounding_mode="floor").clamp(max=M - 1)  # inside, if any is
    candidates = torch.rand(B, M).argsort(dim=-1)[:, : M * 4 // 5]
    mask = torch.rand(B, M) < 0.9
    is_candidate = torch.zeros(B, M, dtype=torch.bool).scatter(-1, candidates, True)
    seen = allowed_by(ranges, M) & mask[:, None]
    with native.use_cpu_instruction_set(instruction_set):
        S = [all_similarities(query[b], key[b], "cosine") for b in range(B)]
        for order in ("similarity", "index"):
            found = ops.select(
                *(query, key, 9, candidates, own, mask, "cosine", order, ranges, exclude_self)
            )
            for b in range(B):
                itself = torch.zeros(N, M, dtype=torch.bool).scatter(1, own[b][:, None], True)
                allowed = seen[b] & is_candidate[b] & ~itself
                first = itself & seen[b] & (not exclude_self)
                expected = select_by_hand(S[b], allowed, 9, first, order)
                assert_same((found[0][b], found[1][b]), expected, (order, b))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_nan_and_infinity(instruction_set: str, metric: str, size: str) -> None:
    """NaN and -inf, inside and outside of ranges, of which some have fewer keys than k."""
    N, M, D = SIZES[size]
    query, key = randn(N, D).abs(), randn(M, D)
    key[[3, M // 2, M - 1]] = torch.nan
    key[M // 4 : M // 4 + 40, 0] = -torch.inf
    for kind in ("window", "long window", "edges", "random", "causal"):
        ranges = make_range(kind, N, M)
        with native.use_cpu_instruction_set(instruction_set):
            S = all_similarities(query, key, metric)
            for k in (9, 60):
                found = ops.select(query, key, k, metric=metric, key_range=ranges)
                assert_same(found, select_by_hand(S, allowed_by(ranges, M), k), (kind, k))
    outside = torch.tensor([[10, 60]]).expand(N, 2).contiguous()
    key[:10], key[60:] = torch.nan, torch.nan
    s, _ = ops.select(query, key, 9, metric=metric, key_range=outside)
    assert not s.isnan().any()


@pytest.mark.parametrize("shared", ["keys", "keys and candidates", "all"])
@pytest.mark.parametrize("N", [1, 30, 250])
def test_shared_keys(instruction_set: str, N: int, shared: str) -> None:
    """A batch with the same keys is selected as one with more queries, each with its own ranges,
    tokens and candidates."""
    B, H, M, D = 2, 3, 1300, 24
    query, bank = randn(B, H, N, D), randn(B, 1, M, D)
    lead = () if shared == "all" else (B, H)
    ranges = make_range("random", N * (1 if shared == "all" else B * H), M).view(*lead, N, 2)
    own = torch.randint(M, (*lead, N))
    each = {"keys": (B, H), "keys and candidates": (B, 1), "all": ()}[shared]
    candidates = torch.rand(*each, M).argsort(dim=-1)[..., :1000]
    if shared == "keys and candidates":
        candidates = candidates.expand(B, H, -1)
    mask = (torch.rand(B, 1, M) < 0.8).expand(B, H, M)
    key = bank.expand(B, H, M, D)
    for exclude_self in (False, True):
        options = (candidates, own, mask, "cosine", "similarity", ranges, exclude_self)
        with native.use_cpu_instruction_set(instruction_set):
            found = ops.select(query, key, 9, *options)
            for b in range(B):
                for h in range(H):
                    i = () if shared == "all" else (b, h)
                    alone = ops.select(
                        *(query[b, h], bank[b, 0], 9),
                        candidates if shared == "all" else candidates[b, h],
                        *(own[i], mask[b, h], "cosine", "similarity", ranges[i], exclude_self),
                    )
                    assert_same(tuple(x[b, h] for x in found), alone, (b, h, exclude_self))


LENGTHS = (1, 5, 24, 64, 65, 0, 130, 17, 700, 3, 1030, 40)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@each_dtype
def test_packed_sequences_are_those_alone(
    instruction_set: str, dtype: torch.dtype, metric: str
) -> None:
    X = randn(sum(LENGTHS), 16, dtype=dtype)
    ends = torch.tensor(LENGTHS).cumsum(0)
    ranges = torch.stack([ends - torch.tensor(LENGTHS), ends], -1)
    ranges = ranges.repeat_interleave(torch.tensor(LENGTHS), 0)
    with native.use_cpu_instruction_set(instruction_set):
        found = ops.select(X, X, 9, metric=metric, key_range=ranges)
        begin = 0
        for length in LENGTHS:
            rows = slice(begin, begin + length)
            s, indices = ops.select(X[rows], X[rows], 9, metric=metric)
            indices = torch.where(s.isneginf(), indices, indices + begin)
            assert_same(tuple(x[rows] for x in found), (s, indices), length)
            begin += length


@pytest.mark.parametrize("kind", RANGES)
def test_threads_and_rows_alone(kind: str) -> None:
    N, M = 250, 1300
    query, key, ranges = randn(2, N, 24), randn(2, M, 24), make_range(kind, N, M)
    torch.set_num_threads(1)
    expected = ops.select(query, key, 9, key_range=ranges)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same(ops.select(query, key, 9, key_range=ranges), expected, threads)
    for rows in (slice(0, 1), slice(100, 130), slice(249, 250)):
        few = ops.select(query[:, rows], key, 9, key_range=ranges[rows])
        assert_same(few, tuple(x[:, rows] for x in expected), rows)


@one_thread
@pytest.mark.parametrize("kind", ["causal", "segments"])
@pytest.mark.parametrize("size", SIZES)
def test_against_the_reference(size: str, kind: str) -> None:
    """Certified; of the medium size with the gradients."""
    N, M, D = SIZES[size]
    query, key = randn(2, N, D), randn(2, M, D)
    own, ranges = torch.randint(M, (N,)), make_range(kind, N, M)
    options = {"self_indices": own, "key_range": ranges, "exclude_self": kind != "causal"}
    assert_select(ops.select, query, key, 9, **options, backward=size == "many")
    if size == "many":
        assert_forward(ops.forward, query, key, randn(2, M, 5), 9, randn(5, 1, 9), **options)


def test_ranges_of_many_queries_are_joined_in_threads() -> None:
    """Only the first query of the second thread sees the last key."""
    N = 2**13 * 9  # in two threads for any number of queries in a block
    M = 128 + 1  # the last key is the only one in its panel
    key_range = torch.tensor([0, M - 1]).repeat(N, 1)
    key_range[N // 2] = torch.tensor([M - 1, M])
    key = torch.arange(M).float()[:, None]
    similarities, I = ops.select(torch.ones(N, 1), key, 1, metric="dot", key_range=key_range)
    assert torch.equal(I[:, 0], key_range[:, 1] - 1)
    assert torch.equal(similarities, I.float())
