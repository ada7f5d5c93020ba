# SPDX-License-Identifier: MIT
"""Selection: order and ties, self, candidates and masks, sizes, and calls that are rejected."""

import multiprocessing

import pytest
import torch
from cases import METRICS
from inputs import OUT_OF_RANGE, by_key, each_dtype, each_metric, one_thread, randn, two_threads
from torch import Tensor

import convnn_kernels  # noqa: F401
from python_ref import assert_certified_selection, assert_select

NAN = float("nan")
ops = torch.ops.convnn
pytestmark = one_thread


@each_metric
@each_dtype
@pytest.mark.parametrize("k", [1, 9, 128, 300])
def test_constant_inputs(metric: str, dtype: torch.dtype, k: int) -> None:
    query, key = torch.full((17, 9), 0.3, dtype=dtype), torch.full((300, 9), 0.3, dtype=dtype)
    s, I = assert_select(ops.select, query, key, k, metric=metric)
    assert torch.equal(I, torch.arange(k).expand(17, k))
    assert torch.equal(s, s[:1, :1].expand_as(s))


@each_metric
@each_dtype
def test_identical_rows_tie_exactly(metric: str, dtype: torch.dtype) -> None:
    """The similarity of a key does not depend on its position in a tile or in the remainder."""
    for D in (1, 3, 16, 17, 67):
        M = 523
        query, key = randn(37, D, dtype=dtype), randn(M, D, dtype=dtype)
        rows = torch.tensor([0, 1, 5, 7, 16, 63, 64, 100, 255, 256, 300, 511, 512, 521, 522])
        key[rows] = key[5].clone()
        s, I = ops.select(query, key, M, metric=metric)
        of_rows = by_key(s, I)[:, rows]
        assert torch.equal(of_rows, of_rows[:, :1].expand_as(of_rows))
        assert_certified_selection(query, key, s, I, M, metric=metric)


@each_metric
def test_duplicates(metric: str) -> None:
    """Only four distinct keys, yet the neighbors of a query are 60 different rows."""
    key = randn(4, 8)[torch.randint(4, (200,))]
    query = torch.cat([key[:20], randn(20, 8)])
    _, I = assert_select(ops.select, query, key, 60, metric=metric)
    assert all(len(set(row)) == 60 for row in I.tolist())


@two_threads
@each_metric
@pytest.mark.parametrize("D", [8, 32])
@pytest.mark.parametrize("k", [1, 9, 300])
def test_ties_among_many_keys(metric: str, D: int, k: int) -> None:
    """Of keys that are all equal, and of keys that are NaN, each query selects the first ones."""
    N, M = 120, 4000
    query, key = torch.ones(N, D), torch.ones(M, D)
    s, I = ops.select(query, key, k, metric=metric)
    assert torch.equal(I, torch.arange(k).expand(N, k))
    assert s.isfinite().all()
    nan_rows = torch.tensor([1500, 1501, 1999, 2000, 3999])
    key[nan_rows] = NAN
    s, I = ops.select(query, key, k, metric=metric)
    first = torch.cat([nan_rows, torch.arange(k)])[:k]
    assert torch.equal(I, first.expand(N, k))
    assert torch.equal(s.isnan(), (first >= 1500).expand(N, k))
    key[:] = NAN
    s, I = ops.select(query, key, k, metric=metric)
    assert torch.equal(I, torch.arange(k).expand(N, k))
    assert s.isnan().all()


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_signed_zeros_tie(metric: str) -> None:
    """-0 equals +0, in the inputs and among the similarities."""
    key = torch.tensor([[-0.0, 0.0], [0.0, 0.0], [-0.0, -0.0], [0.0, -0.0]])
    query = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0], [-0.0, -0.0]])
    _, I = assert_select(ops.select, query, key, 4, metric=metric, exact=True)
    assert I.tolist() == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize("N", [1, 30])
@pytest.mark.parametrize("M", [5, 40, 3000])
def test_products_that_underflow_tie(N: int, M: int) -> None:
    """Positive ones are +0; negative ones are -0, if no zero is added to them."""
    query, key = torch.full((N, 16), 1e-30), torch.zeros(M, 16)
    key[:, -1] = torch.where(torch.rand(M) < 0.5, 1e-30, -1e-30)
    k = min(M, 20)
    similarities, I = ops.select(query, key, k, metric="dot")
    assert not similarities.any()
    assert torch.equal(I, torch.arange(k).expand(N, k))


@two_threads
def test_masked_keys_are_listed_in_threads() -> None:
    """In each batch element one key may be a neighbor."""
    B, N, M = 4, 70, 20_000
    only = torch.randint(M, (B, 1))
    key_mask = torch.arange(M) == only
    _, I = ops.select(randn(B, N, 1), randn(B, M, 1), 1, key_mask=key_mask)
    assert torch.equal(I[..., 0], only.expand(B, N))


@each_metric
def test_ties_with_self(metric: str) -> None:
    """All keys tie: self comes first and only once, then the others by index."""
    query, key = torch.ones(5, 3), torch.ones(9, 3)
    self_indices = torch.tensor([8, 0, 3, 3, 1])
    _, I = assert_select(ops.select, query, key, 4, self_indices=self_indices, metric=metric)
    assert I.tolist() == [[8, 0, 1, 2], [0, 1, 2, 3], [3, 0, 1, 2], [3, 0, 1, 2], [1, 0, 2, 3]]


@each_metric
def test_self_comes_before_nan(metric: str) -> None:
    key = randn(30, 4)
    key[[4, 9]] = NAN
    self_indices = torch.tensor([20, 9, 4])
    _, I = assert_select(ops.select, randn(3, 4), key, 4, self_indices=self_indices, metric=metric)
    assert I[:, :3].tolist() == [[20, 4, 9], [9, 4, I[1, 2]], [4, 9, I[2, 2]]]


@each_metric
def test_negative_nan_ranks_as_nan(metric: str) -> None:
    """The sign of a NaN has no effect: NaNs rank above all numbers and tie by index."""
    key = randn(30, 4)
    key[25, 1] = NAN
    key[11, 1] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    key[12, 1] = torch.copysign(torch.tensor(NAN), torch.tensor(-1.0))
    _, I = assert_select(ops.select, randn(8, 4), key, 6, metric=metric)
    assert (I[:, :3] == torch.tensor([11, 12, 25])).all()


def test_masked_self_is_not_a_neighbor() -> None:
    query, key = randn(3, 4), randn(6, 4)
    mask = torch.tensor([True, False, True, True, True, True])
    self_indices = torch.tensor([1, 0, 1])
    _, I = assert_select(ops.select, query, key, 3, self_indices=self_indices, key_mask=mask)
    assert (I != 1).all()
    assert I[1, 0] == 0


def test_self_outside_the_candidates_is_a_neighbor() -> None:
    query, key = randn(3, 4), randn(6, 4)
    self_indices, candidates = torch.tensor([0, 1, 5]), torch.tensor([4, 2])
    _, I = assert_select(
        ops.select, query, key, 2, candidates=candidates, self_indices=self_indices
    )
    assert I[:, 0].tolist() == [0, 1, 5]
    assert torch.isin(I[:, 1], candidates).all()


@each_metric
def test_candidates_and_masks_do_not_change_similarities(metric: str) -> None:
    query, key = randn(3, 210, 19), randn(3, 305, 19)
    all_keys = by_key(*ops.select(query, key, 305, metric=metric))
    candidates = torch.randperm(305)[:101]
    self_indices = torch.randint(305, (210,))
    for options in (
        {"candidates": candidates},
        {"key_mask": torch.rand(3, 305) < 0.5},
        {"candidates": candidates, "self_indices": self_indices, "order": "index"},
    ):
        s, I = ops.select(query, key, 9, metric=metric, **options)
        assert torch.equal(s, all_keys.gather(-1, I)), options.keys()


@each_metric
def test_first_neighbors_do_not_depend_on_k(metric: str) -> None:
    query, key = randn(2, 40, 8), torch.randint(-2, 3, (2, 200, 8)).float()
    all_s, all_I = ops.select(query, key, 200, metric=metric)
    for k in (1, 2, 7, 8, 9, 31, 32, 33, 64, 100, 199):
        s, I = ops.select(query, key, k, metric=metric)
        assert torch.equal(I, all_I[..., :k])
        assert torch.equal(s, all_s[..., :k])


@two_threads
@each_metric
def test_large_k_after_small_k(metric: str) -> None:
    """More neighbors than a tile holds; no call depends on the k of the one before."""
    query, key = randn(3, 8), randn(3000, 8)
    fresh = {k: ops.select(query, key, k, metric=metric) for k in (2999, 1, 600, 9)}
    for k in (9, 2999, 600, 1):
        s, I = assert_select(ops.select, query, key, k, metric=metric, backward=False)
        assert torch.equal(s, fresh[k][0])
        assert torch.equal(I, fresh[k][1])


def test_metrics_prefer_the_nearest() -> None:
    """Higher is nearer for each metric."""
    query = torch.tensor([[1.0, 1.0]])
    key = torch.tensor([[-1.0, -1.0], [1.0, 0.9], [1.0, -1.0], [9.0, 0.0]])
    nearest = {m: ops.select(query, key, 1, metric=m)[1].item() for m in METRICS}
    assert nearest == {"cosine": 1, "dot": 3, "euclidean": 1}


def test_rows_below_epsilon_are_zero_rows() -> None:
    query, key = randn(3, 4), randn(5, 4)
    query[0] *= 1e-14
    key[1] *= 1e-20
    s, I = assert_select(ops.select, query, key, 5)
    assert not s[0].any()
    assert I[0].tolist() == [0, 1, 2, 3, 4]
    assert not by_key(s, I)[:, 1].any()


@each_metric
def test_small_rows_above_epsilon_are_normalized(metric: str) -> None:
    query, key = randn(4, 5) * 1e-10, randn(6, 5) * 1e-11
    assert_select(ops.select, query, key, 3, metric=metric)


@pytest.mark.slow
@two_threads
def test_more_than_2_to_the_32_pairs() -> None:
    """The last queries are right: their pairs have numbers above 2^32."""
    N = 65_600
    query, key = randn(N, 2), randn(N, 2)
    s, I = ops.select(query, key, 5, metric="euclidean")
    last = slice(N - 64, N)
    assert_certified_selection(query[last], key, s[last], I[last], 5, metric="euclidean")


@pytest.mark.parametrize("name", ["candidates", "self_indices"])
@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_indices_out_of_range_are_rejected(wrong: int, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"select: {name}"):
        ops.select(randn(2, 3), randn(7, 3), 1, **{name: torch.tensor([wrong, 1])})


@pytest.mark.parametrize("M", [0, 3])
def test_no_neighbors_are_rejected(M: int) -> None:
    for k in (0, -1):
        with pytest.raises(RuntimeError, match="k must be at least 1"):
            ops.select(randn(2, 3), randn(M, 3), k)


def _forked(query: Tensor, key: Tensor, expected: Tensor) -> None:
    # The workers of a data loader run on one thread, too.
    torch.set_num_threads(1)
    _, I = ops.select(query, key, 9)
    raise SystemExit(0 if torch.equal(I, expected) else 1)


@two_threads
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_hang() -> None:
    query, key = randn(500, 32), randn(500, 32)
    _, expected = ops.select(query, key, 9)
    process = multiprocessing.get_context("fork").Process(
        target=_forked, args=(query, key, expected)
    )
    process.start()
    process.join(60)
    hangs = process.is_alive()
    if hangs:
        process.kill()
    assert not hangs
    assert process.exitcode == 0


def test_no_candidates() -> None:
    """Nothing but the token itself, and that only if its range has it."""
    query, key, own = randn(2, 50, 8), randn(2, 6, 8), torch.randint(6, (50,))
    ranges = torch.stack([own - own % 2, own + own % 2], dim=-1)
    for key_range, present in ((None, torch.ones(50).bool()), (ranges, own % 2 == 1)):
        options = {"candidates": own.new_empty(0), "key_range": key_range}
        s, I = ops.select(query, key, 2, **options)
        assert bool((s == -torch.inf).all())
        s, I = ops.select(query, key, 2, self_indices=own, **options)
        assert torch.equal(s[..., 0] != -torch.inf, present.expand(2, -1))
        assert bool((s[..., 1] == -torch.inf).all())
        assert torch.equal(I[..., 0], torch.where(present, own, 0).expand(2, -1))
