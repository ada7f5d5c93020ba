# SPDX-License-Identifier: MIT
"""Cases by name: the corners of the contract, and faults that happened to libraries like this."""

import math
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
from cases import DTYPES, LAYOUTS, METRICS, RHOS, SHORT, with_layout
from torch import Tensor

import convnn_kernels  # noqa: F401
from python_ref import assert_aggregate, assert_certified_selection, assert_forward, assert_select

INF, NAN = math.inf, math.nan
ops = torch.ops.convnn

each_metric = pytest.mark.parametrize("metric", METRICS)
each_rho = pytest.mark.parametrize("rho", RHOS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
each_weight = pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The reference is faster on one thread; results do not depend on it."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)


on_two_threads = pytest.mark.usefixtures("two_threads")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def make_weight(kind: str, C: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    shapes = {"depthwise": (C, 1, k), "dense": (5, C, k)}
    return randn(*shapes[kind], dtype=dtype) if kind in shapes else None


def make_grads(
    outputs: tuple[Tensor, ...], leaves: list[Tensor], grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of the first output."""
    Y = outputs[0]
    grad = torch.ones_like(Y) if grad is None else grad
    found = torch.autograd.grad(Y, leaves, grad, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
    )


# Ties and duplicates


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@each_dtype
def test_ties(metric: str, dtype: torch.dtype) -> None:
    """Integers from -1 to 1 tie everywhere; the order of ties is the order of the indices."""
    query, key = (torch.randint(-1, 2, (2, n, 4)).to(dtype) for n in (33, 150))
    for k in (1, 9, 149, 150):
        assert_forward(ops.forward, query, key, randn(2, 150, 6), k, metric=metric, exact=True)


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
def test_equal_rows_far_apart_tie_exactly(metric: str, dtype: torch.dtype) -> None:
    """Whatever tile or tail a key lies in, its similarity is the same computation."""
    for D in (1, 3, 16, 17, 67):
        M = 523
        query, key = randn(37, D, dtype=dtype), randn(M, D, dtype=dtype)
        places = torch.tensor([0, 1, 7, 16, 63, 64, 100, 255, 256, 300, 511, 512, 521, 522])
        key[places] = key[5].clone()
        places = torch.cat([torch.tensor([5]), places]).sort().values
        s, I = ops.select(query, key, M, metric=metric)
        by_row = torch.empty_like(s).scatter_(-1, I, s)[:, places]
        assert torch.equal(by_row, by_row[:, :1].expand_as(by_row))
        assert_certified_selection(query, key, s, I, M, metric=metric)


@each_metric
def test_duplicates(metric: str) -> None:
    """Few distinct keys, each often: neighbors are distinct rows all the same."""
    key = randn(4, 8)[torch.randint(4, (200,))]
    query = torch.cat([key[:20], randn(20, 8)])
    _, I = assert_select(ops.select, query, key, 60, metric=metric)
    assert all(len(set(row)) == 60 for row in I.tolist())


@each_metric
def test_ties_with_self(metric: str) -> None:
    """All keys tie; self comes first, the others by index, and self is not repeated."""
    query, key = torch.ones(5, 3), torch.ones(9, 3)
    own = torch.tensor([8, 0, 3, 3, 1])
    _, I = assert_select(ops.select, query, key, 4, self_indices=own, metric=metric)
    assert I.tolist() == [[8, 0, 1, 2], [0, 1, 2, 3], [3, 0, 1, 2], [3, 0, 1, 2], [1, 0, 2, 3]]


@each_metric
def test_top_1_does_not_change_with_k(metric: str) -> None:
    query, key = randn(2, 40, 8), torch.randint(-2, 3, (2, 200, 8)).float()
    full_s, full_I = ops.select(query, key, 200, metric=metric)
    for k in (1, 2, 7, 8, 9, 31, 32, 33, 64, 100, 199):
        s, I = ops.select(query, key, k, metric=metric)
        assert torch.equal(I, full_I[..., :k])
        assert torch.equal(s, full_s[..., :k])


# Zeros, infinities, NaN, large and small numbers


@each_dtype
@each_rho
def test_zero_rows_have_cosine_zero_and_no_gradient(dtype: torch.dtype, rho: str) -> None:
    query, key, value = (randn(n, 6, dtype=dtype) for n in (12, 20, 20))
    query[3] = 0.0
    query[4] = -0.0
    key[[0, 7, 19]] = 0.0
    assert_forward(ops.forward, query, key, value, 20, rho=rho)
    leaves = [t.requires_grad_() for t in (query, key)]
    outputs = ops.forward(query, key, value, 20, rho=rho)
    s = torch.empty_like(outputs[1]).scatter(-1, outputs[2], outputs[1])
    assert not s[[3, 4]].any()
    assert not s[:, [0, 7, 19]].any()
    grad_query, grad_key = make_grads((outputs[1],), leaves, randn(12, 20).to(outputs[1].dtype))
    assert not grad_query[[3, 4]].any()
    assert not grad_key[[0, 7, 19]].any()
    assert grad_query[0].any()
    assert grad_key[1].any()


def test_rows_below_epsilon_are_zero_rows() -> None:
    query, key = randn(3, 4), randn(5, 4)
    query[0] *= 1e-14
    key[1] *= 1e-20
    s, I = assert_select(ops.select, query, key, 5)
    assert not s[0].any()
    assert I[0].tolist() == [0, 1, 2, 3, 4]
    assert not torch.empty_like(s).scatter(-1, I, s)[:, 1].any()


@each_metric
def test_small_rows_above_epsilon_are_normalized(metric: str) -> None:
    query, key = randn(4, 5) * 1e-10, randn(6, 5) * 1e-11
    assert_select(ops.select, query, key, 3, metric=metric)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_signed_zeros_tie(metric: str) -> None:
    """-0 equals +0, in inputs and among similarities."""
    key = torch.tensor([[-0.0, 0.0], [0.0, 0.0], [-0.0, -0.0], [0.0, -0.0]])
    query = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0], [-0.0, -0.0]])
    _, I = assert_select(ops.select, query, key, 4, metric=metric, exact=True)
    assert I.tolist() == [[0, 1, 2, 3]] * 4


@each_metric
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["query", "key", "value", "all"])
@each_rho
def test_not_finite(metric: str, bad: float, where: str, rho: str) -> None:
    """One bad element reaches what depends on it, and nothing else."""
    tensors = {"query": randn(2, 20, 7), "key": randn(2, 40, 7), "value": randn(2, 40, 5)}
    for name, tensor in tensors.items():
        if where in (name, "all"):
            tensor[0, 3, 2] = bad
    weight = make_weight("depthwise", 5, 9)
    _, s, I = assert_forward(ops.forward, **tensors, k=9, weight=weight, metric=metric, rho=rho)
    assert torch.isfinite(s[1]).all()
    if where == "key" and math.isnan(bad):
        assert s[0, :, 0].isnan().all()
        assert (I[0, :, 0] == 3).all()


@each_metric
def test_negative_nan_ranks_as_nan(metric: str) -> None:
    """The sign of a NaN means nothing: NaNs tie by index, above every number."""
    key = randn(30, 4)
    key[25, 1] = NAN
    key[11, 1] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    key[12, 1] = torch.copysign(torch.tensor(NAN), torch.tensor(-1.0))
    _, I = assert_select(ops.select, randn(8, 4), key, 6, metric=metric)
    assert (I[:, :3] == torch.tensor([11, 12, 25])).all()


@each_metric
def test_self_comes_before_nan(metric: str) -> None:
    key = randn(30, 4)
    key[[4, 9]] = NAN
    own = torch.tensor([20, 9, 4])
    _, I = assert_select(ops.select, randn(3, 4), key, 4, self_indices=own, metric=metric)
    assert I[:, :3].tolist() == [[20, 4, 9], [9, 4, I[1, 2]], [4, 9, I[2, 2]]]


@each_metric
@each_dtype
@each_rho
def test_all_nan(metric: str, dtype: torch.dtype, rho: str) -> None:
    """Indices are distinct and ascending, and backward does not fail."""
    query, key = (torch.full((2, n, 5), NAN, dtype=dtype) for n in (9, 70))
    value = randn(2, 70, 3, dtype=dtype)
    for k in (1, 9, 70):
        _, _, I = assert_forward(ops.forward, query, key, value, k, metric=metric, rho=rho)
        assert torch.equal(I, torch.arange(k).expand(2, 9, k))


def test_similarity_of_minus_infinity_keeps_its_index() -> None:
    """A real -inf is the last of the allowed keys, before missing places, and adds nothing."""
    query = torch.ones(2, 1)
    key = torch.tensor([[-INF], [1.0], [-INF], [5.0], [-INF], [2.0]])
    value = torch.tensor([[NAN], [1.0], [NAN], [5.0], [NAN], [2.0]])
    Y, s, I = ops.forward(query, key, value, 6, metric="dot", rho="ones")
    assert I.tolist() == [[3, 5, 1, 0, 2, 4]] * 2
    assert s[0].tolist() == [5, 2, 1, -INF, -INF, -INF]
    assert Y.tolist() == [[8.0], [8.0]]
    mask = torch.tensor([True, True, False, True, True, False])
    _, I = assert_select(ops.select, query, key, 6, key_mask=mask, metric="dot")
    assert I.tolist() == [[3, 1, 0, 4, 0, 0]] * 2


def test_infinite_similarity_gives_nan_under_softmax() -> None:
    """As in eager softmax: inf - inf."""
    query, key = torch.ones(1, 1), torch.tensor([[1.0], [INF], [2.0]])
    Y, s, I = ops.forward(query, key, torch.ones(3, 2), 2, metric="dot")
    assert I.tolist() == [[1, 2]]
    assert s.tolist() == [[INF, 2.0]]
    assert Y.isnan().all()


@each_metric
@each_rho
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e20), (torch.bfloat16, 1e20), (torch.float64, 1e200), (torch.float16, 7e3)],
    ids=["f32", "bf16", "f64", "f16"],
)
def test_large_entries(metric: str, rho: str, dtype: torch.dtype, size: float) -> None:
    """Norms do not overflow; dot and euclidean overflow to infinity and nothing breaks."""
    query, key = (randn(2, n, 8) for n in (15, 50))
    value = randn(2, 50, 4, dtype=dtype)
    big_query, big_key = ((X.double() * size).to(dtype) for X in (query, key))
    # With terms of both signs, inf - inf depends on the order of a sum: only the certificate.
    s, I = ops.select(big_query, big_key, 9, metric=metric)
    assert_certified_selection(big_query, big_key, s, I, 9, metric=metric)
    if metric == "cosine":
        assert (s.abs() <= 1.001).all()
    if metric == "dot":
        big_query, big_key = big_query.abs() * query[..., :1].sign().to(dtype), big_key.abs()
    assert_forward(ops.forward, big_query, big_key, value, 9, metric=metric, rho=rho)
    # One large row among ordinary ones.
    query, key = query.to(dtype), key.to(dtype)
    query[0, 3] = big_query[0, 3]
    key[1, 7] = big_key[1, 7]
    assert_forward(ops.forward, query, key, value, 9, metric=metric, rho=rho)


@pytest.mark.parametrize("offset", [1e3, -1e5])
@each_rho
def test_euclidean_at_a_common_offset(offset: float, rho: str) -> None:
    """Direct differences: |q|^2 + |k|^2 - 2 q.k would have lost every digit."""
    key = randn(100, 16) + offset
    query = torch.cat([key[:10], randn(20, 16) + offset])
    _, s, I = assert_forward(ops.forward, query, key, randn(100, 8), 9, metric="euclidean", rho=rho)
    assert (s <= 0).all()
    assert (s[:10, 0] == 0).all()
    assert I[:10, 0].tolist() == list(range(10))


def test_metrics_prefer_the_nearest() -> None:
    """Higher is nearer for each metric."""
    query = torch.tensor([[1.0, 1.0]])
    key = torch.tensor([[-1.0, -1.0], [1.0, 0.9], [1.0, -1.0], [9.0, 0.0]])
    nearest = {m: ops.select(query, key, 1, metric=m)[1].item() for m in METRICS}
    assert nearest == {"cosine": 1, "dot": 3, "euclidean": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=SHORT.get)
@each_metric
def test_half_gradients_stay_finite(dtype: torch.dtype, metric: str) -> None:
    """Sharp softmax and rows of tiny norm, as late in training."""
    query, key, value = (randn(2, n, 16, dtype=dtype) for n in (20, 40, 40))
    query[0] *= 1e-4
    key[1, :20] *= 1e-4
    scale = 1000.0 if metric == "cosine" else 30.0
    leaves = [t.requires_grad_() for t in (query, key, value)]
    outputs = ops.forward(query, key, value, 9, metric=metric, scale=scale)
    assert all(g.isfinite().all() for g in make_grads(outputs, leaves[2:]))
    assert_forward(ops.forward, query, key, value, 9, metric=metric, scale=scale)


# Shapes


@each_metric
@each_weight
@pytest.mark.parametrize("lead", [(), (2,), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("N", [0, 1, 5])
def test_no_queries_and_empty_batch(metric: str, kind: str, lead: tuple[int, ...], N: int) -> None:
    query, key, value = randn(*lead, N, 3), randn(*lead, 7, 3), randn(*lead, 7, 4)
    weight = make_weight(kind, 4, 2)
    bias = randn(5 if kind == "dense" else 4)
    Y, s, I = assert_forward(ops.forward, query, key, value, 2, weight, bias, metric=metric)
    assert Y.shape == (*lead, N, bias.shape[0])
    assert s.shape == I.shape == (*lead, N, 2)


@each_metric
@each_weight
def test_one_of_everything(metric: str, kind: str) -> None:
    query, key, value = randn(1, 1), randn(1, 1), randn(1, 1)
    assert_forward(ops.forward, query, key, value, 1, make_weight(kind, 1, 1), metric=metric)


@each_metric
@each_weight
@each_rho
@pytest.mark.parametrize("M", [1, 2, 3, 33, 130])
def test_all_keys_are_neighbors(metric: str, kind: str, rho: str, M: int) -> None:
    """k = M."""
    query, key, value = randn(2, 9, 6), randn(2, M, 6), randn(2, M, 4)
    _, _, I = assert_forward(
        ops.forward, query, key, value, M, make_weight(kind, 4, M), metric=metric, rho=rho
    )
    assert torch.equal(I.sort(dim=-1).values, torch.arange(M).expand(2, 9, M))


@each_metric
@each_dtype
def test_every_small_width(metric: str, dtype: torch.dtype) -> None:
    """Odd D and C, below and around the width of a vector."""
    for D in (*range(1, 19), 31, 33, 47, 65):
        query, key, value = (randn(n, D, dtype=dtype) for n in (5, 11, 11))
        assert_forward(ops.forward, query, key, value, 3, metric=metric, seed=D)


@on_two_threads
@each_metric
def test_more_neighbors_than_a_tile_holds(metric: str) -> None:
    """Large k, then small, then large again: nothing is left over from another k."""
    query, key = randn(3, 8), randn(3000, 8)
    fresh = {k: ops.select(query, key, k, metric=metric) for k in (2999, 1, 600, 9)}
    for k in (9, 2999, 600, 1):
        s, I = assert_select(ops.select, query, key, k, metric=metric, backward=False)
        assert torch.equal(s, fresh[k][0])
        assert torch.equal(I, fresh[k][1])


@on_two_threads
@each_metric
@pytest.mark.parametrize("D", [8, 32])
@pytest.mark.parametrize("k", [1, 9, 300])
def test_ties_far_from_a_query(metric: str, D: int, k: int) -> None:
    """Among equal keys, and among keys of NaN, the first ones are taken by every query, wherever
    between them it stands."""
    N, M = 120, 4000
    query, key = torch.ones(N, D), torch.ones(M, D)
    s, I = ops.select(query, key, k, metric=metric)
    assert torch.equal(I, torch.arange(k).expand(N, k))
    assert s.isfinite().all()
    places = torch.tensor([1500, 1501, 1999, 2000, 3999])
    key[places] = NAN
    s, I = ops.select(query, key, k, metric=metric)
    first = torch.cat([places, torch.arange(k)])[:k]
    assert torch.equal(I, first.expand(N, k))
    assert torch.equal(s.isnan(), (first >= 1500).expand(N, k))
    key[:] = NAN
    s, I = ops.select(query, key, k, metric=metric)
    assert torch.equal(I, torch.arange(k).expand(N, k))
    assert s.isnan().all()


@each_weight
@pytest.mark.parametrize("chosen", [[7], [0, 1, 39], list(range(5, 20)), [38, 39]])
def test_keys_that_many_queries_choose(kind: str, chosen: list[int]) -> None:
    """Gradients of keys with up to thousands of queries, of their neighbors with none, and with
    missing neighbors in between."""
    B, N, M, C, k = 2, 1100, 40, 33, 3
    index = torch.tensor(chosen)
    I = index[torch.randint(len(chosen), (B, N, k))]
    s = randn(B, N, k)
    s[torch.rand(B, N, k) < 0.2] = -INF
    value, weight = randn(B, M, C), make_weight(kind, C, k)
    assert_aggregate(ops.aggregate, value, s, I, weight, rho="softmax", scale=0.5)


@pytest.mark.parametrize("count", [8191, 8192, 8193])
def test_a_key_that_ends_where_a_task_does(count: int) -> None:
    """8192 is a multiple of the pairs that a task of any instruction set takes."""
    I = (torch.arange(9000) >= count).long().reshape(1, 9000, 1)
    value, weight = randn(1, 3, 4), make_weight("dense", 4, 1)
    assert_aggregate(ops.aggregate, value, randn(1, 9000, 1), I, weight, rho="similarity")


@each_rho
@each_weight
def test_no_channels(kind: str, rho: str) -> None:
    """C = 0: outputs are biases, and gradients of similarities 0."""
    I, s = torch.randint(20, (2, 30, 3)), randn(2, 30, 3)
    for dtype in DTYPES:
        value, weight = randn(2, 20, 0, dtype=dtype), make_weight(kind, 0, 3, dtype)
        assert_aggregate(
            ops.aggregate,
            value,
            s.to(value.dtype) if dtype == torch.float64 else s,
            I,
            weight,
            rho=rho,
        )


@on_two_threads
def test_more_than_65535_queries() -> None:
    query, key = randn(65_540, 2), randn(5, 2)
    assert_forward(ops.forward, query, key, randn(5, 3), 2)


@on_two_threads
def test_more_than_65535_batch_elements() -> None:
    query, key = randn(65_540, 2, 2), randn(65_540, 3, 2)
    assert_forward(ops.forward, query, key, randn(65_540, 3, 2), 2)


@on_two_threads
@each_metric
def test_indices_past_16_bits(metric: str) -> None:
    """Row indices above 32,767 and 65,535, found and gathered."""
    key = torch.randint(-5, 0, (70_000, 3)).float()
    query = torch.full((4, 3), 5.0)
    key[[33_000, 66_000, 69_999]] = 5.0
    value = torch.arange(70_000.0).unsqueeze(-1)
    Y, _, I = ops.forward(query, key, value, 3, metric=metric, rho="ones")
    assert I.tolist() == [[33_000, 66_000, 69_999]] * 4
    assert Y.tolist() == [[168_999.0]] * 4


@pytest.mark.slow
@on_two_threads
def test_more_than_2_to_the_32_pairs() -> None:
    """The last queries and the last keys, behind 2^32 pairs."""
    N = 65_600
    query, key = randn(N, 2), randn(N, 2)
    s, I = ops.select(query, key, 5, metric="euclidean")
    last = slice(N - 64, N)
    assert_certified_selection(query[last], key, s[last], I[last], 5, metric="euclidean")


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.slow
def test_value_with_more_than_2_to_the_31_elements() -> None:
    if _available_memory() < 14 * 2**30:
        pytest.skip("needs 14 GiB of available memory")
    M, C = 2**21 + 3, 1024
    value = torch.zeros(M, C, dtype=torch.bfloat16)
    value[-1], value[-2] = 3.0, 5.0
    I = torch.tensor([[M - 1, M - 2], [0, M - 1]])
    s = torch.zeros(2, 2)
    Y = ops.aggregate(value, s, I, rho="ones")
    assert torch.equal(Y.float(), torch.tensor([[8.0], [3.0]]).expand(2, C))


# Self, candidates and masks


@each_metric
@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("k", [1, 2, 12])
def test_self_with_candidates_and_masks(metric: str, order: str, k: int) -> None:
    N, M = 25, 40
    query, key, value = randn(2, N, 6), randn(2, M, 6), randn(2, M, 5)
    candidates = torch.randperm(M)[:12]
    own = torch.randint(M, (N,))
    own[0], own[1] = candidates[0], candidates[11]
    masks = (None, torch.rand(2, M) < 0.5, torch.rand(2, M) < 0.05)
    for mask in masks:
        _, _, I = assert_forward(
            ops.forward,
            query,
            key,
            value,
            k,
            candidates=candidates,
            self_indices=own,
            key_mask=mask,
            metric=metric,
            order=order,
        )
        if mask is None and order == "similarity":
            assert (I[..., 0] == own).all()


def test_masked_self_is_no_neighbor() -> None:
    query, key = randn(3, 4), randn(6, 4)
    mask = torch.tensor([True, False, True, True, True, True])
    own = torch.tensor([1, 0, 1])
    _, I = assert_select(ops.select, query, key, 3, self_indices=own, key_mask=mask)
    assert (I != 1).all()
    assert I[1, 0] == 0


def test_self_outside_the_candidates_is_a_neighbor() -> None:
    query, key = randn(3, 4), randn(6, 4)
    own, candidates = torch.tensor([0, 1, 5]), torch.tensor([4, 2])
    _, I = assert_select(ops.select, query, key, 2, candidates=candidates, self_indices=own)
    assert I[:, 0].tolist() == [0, 1, 5]
    assert torch.isin(I[:, 1], candidates).all()


@each_metric
@each_rho
@each_weight
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_self", [False, True])
def test_everything_masked(
    metric: str, rho: str, kind: str, has_bias: bool, has_self: bool
) -> None:
    """The output is the bias or zero, and gradients are zero, even next to NaN."""
    query, key, value = randn(2, 7, 4), randn(2, 9, 4), randn(2, 9, 3)
    key[1], value[1] = NAN, NAN
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    weight = make_weight(kind, 3, 4)
    bias = randn(5 if kind == "dense" else 3) if has_bias else None
    own = torch.arange(7) if has_self else None
    Y, s, I = assert_forward(
        ops.forward,
        query,
        key,
        value,
        4,
        weight,
        bias,
        self_indices=own,
        key_mask=mask,
        metric=metric,
        rho=rho,
    )
    expected = torch.zeros(()) if bias is None else bias
    assert torch.equal(Y[1], expected.expand_as(Y[1]))
    assert (s[1] == -INF).all()
    assert not I[1].any()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    outputs = ops.forward(*leaves, 4, weight, bias, None, own, mask, metric=metric, rho=rho)
    for grad in make_grads(outputs, leaves):
        assert not grad[1].any()


@each_metric
@each_rho
@pytest.mark.parametrize("order", ["similarity", "index"])
def test_missing_neighbors_add_nothing(metric: str, rho: str, order: str) -> None:
    """Missing places point at row 0, which holds NaN here and must not be read."""
    query, key, value = randn(6, 4), randn(8, 4), randn(8, 3)
    key[0], value[0] = NAN, INF
    mask = torch.tensor([False, True, False, True, True, False, False, False])
    Y, s, I = assert_forward(
        ops.forward, query, key, value, 5, key_mask=mask, metric=metric, rho=rho, order=order
    )
    assert Y.isfinite().all()
    assert (s[:, 3:] == -INF).all()
    assert not I[:, 3:].any()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    outputs = ops.forward(*leaves, 5, key_mask=mask, metric=metric, rho=rho, order=order)
    assert all(grad.isfinite().all() for grad in make_grads(outputs, leaves))


# Gradients


@on_two_threads
@each_metric
@each_weight
def test_all_queries_choose_one_key(metric: str, kind: str) -> None:
    """Every gradient lands in the same few rows of key and value."""
    query = 1 + 0.1 * randn(2, 300, 5).abs()
    key = -randn(2, 60, 5).abs()
    key[:, 41] = 1.0
    for k in (1, 3):
        _, _, I = assert_forward(
            ops.forward, query, key, randn(2, 60, 4), k, make_weight(kind, 4, k), metric=metric
        )
        assert (I[..., 0] == 41).all()


@each_weight
@each_dtype
def test_expanded_gradient(kind: str, dtype: torch.dtype) -> None:
    """`sum().backward()` passes a gradient whose strides are all 0."""
    query, key, value = (randn(2, n, 6, dtype=dtype) for n in (21, 30, 30))
    weight = make_weight(kind, 6, 4, dtype)
    outputs = 5 if kind == "dense" else 6
    one = torch.ones((), dtype=dtype)
    for grad in (one.expand(2, 21, outputs), randn(2, 21, 1, dtype=dtype).expand(2, 21, outputs)):
        assert_forward(ops.forward, query, key, value, 4, weight, grad_output=grad)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    Y, s, _ = ops.forward(*leaves, 4, weight)
    (Y.sum() + s.sum()).backward()
    contiguous = torch.autograd.grad(
        ops.forward(*leaves, 4, weight)[:2], leaves, [torch.ones_like(Y), torch.ones_like(s)]
    )
    for leaf, grad in zip(leaves, contiguous, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_weight
def test_strided_gradient(layout: str, kind: str) -> None:
    query, key, value = (randn(3, n, 6) for n in (21, 30, 30))
    weight = make_weight(kind, 6, 4)
    grad = with_layout(randn(3, 21, 5 if kind == "dense" else 6), layout)
    assert_forward(ops.forward, query, key, value, 4, weight, grad_output=grad)


def test_unused_gradients() -> None:
    """One output, or one input, at a time gives the gradients of all at once."""
    query, key, value, weight, bias = randn(9, 4), randn(12, 4), randn(12, 3), randn(3, 1, 5), None
    bias = randn(3)
    everything = [query, key, value, weight, bias]

    def run(wanted: list[int]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(everything)]
        Y, _, _ = ops.forward(leaves[0], leaves[1], leaves[2], 5, leaves[3], leaves[4])
        return torch.autograd.grad(Y.square().sum(), [leaves[i] for i in wanted])

    together = run([0, 1, 2, 3, 4])
    for i in range(5):
        torch.testing.assert_close(run([i])[0], together[i])


def test_ones_gives_query_and_key_no_gradient() -> None:
    leaves = [t.requires_grad_() for t in (randn(9, 4), randn(12, 4), randn(12, 3))]
    Y, _, _ = ops.forward(*leaves, 5, rho="ones")
    found = torch.autograd.grad(Y.sum(), leaves, allow_unused=True)
    assert found[0] is None or not found[0].any()
    assert found[1] is None or not found[1].any()
    assert found[2].any()


def test_gradient_through_similarities_alone() -> None:
    query, key = randn(9, 4, dtype=torch.float64), randn(12, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (query, key)]
    _, s, I = ops.forward(*leaves, randn(12, 3, dtype=torch.float64), 5)
    cosine = torch.nn.functional.cosine_similarity(query.unsqueeze(1), key[I], dim=-1)
    grad = randn(9, 5, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(s, leaves, grad),
        torch.autograd.grad(cosine, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


# Strides and neighboring memory


@each_metric
@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype
def test_strided_inputs(metric: str, layout: str, dtype: torch.dtype) -> None:
    """Strides change nothing; NaN around a tensor is never read."""
    shapes = {"query": (2, 19, 9), "key": (2, 33, 9), "value": (2, 33, 6), "weight": (6, 1, 4)}
    tensors = {
        name: with_layout(randn(*shape, dtype=dtype), layout) for name, shape in shapes.items()
    }
    tensors["bias"] = with_layout(randn(6, dtype=dtype), layout)
    tensors["candidates"] = with_layout(torch.randperm(33)[:20], layout)
    tensors["self_indices"] = with_layout(torch.randint(33, (19,)), layout)
    tensors["key_mask"] = with_layout(torch.rand(2, 33) < 0.7, layout)
    found = assert_forward(ops.forward, **tensors, k=4, metric=metric)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for one, other in zip(found, ops.forward(**plain, k=4, metric=metric), strict=True):
        assert torch.equal(one, other)


@each_weight
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_aggregate(kind: str, layout: str) -> None:
    value = with_layout(randn(2, 30, 6), layout)
    s = with_layout(randn(2, 11, 5), layout)
    I = with_layout(torch.randint(30, (2, 11, 5)), layout)
    weight = make_weight(kind, 6, 5)
    assert_aggregate(
        ops.aggregate, value, s, I, None if weight is None else with_layout(weight, layout)
    )


@each_rho
@each_weight
def test_aggregate_with_repeated_indices_and_missing_places(rho: str, kind: str) -> None:
    """`aggregate` takes any indices: the same row more than once, -inf in any place."""
    value = randn(2, 6, 4)
    s, I = randn(2, 50, 5), torch.randint(3, (2, 50, 5))
    s[torch.rand(2, 50, 5) < 0.3] = -INF
    s[0, 0] = -INF
    for similarities in (s, s.double()):
        assert_aggregate(ops.aggregate, value, similarities, I, make_weight(kind, 4, 5), rho=rho)


# Wrong indices, threads, processes


@pytest.mark.parametrize("wrong", [-1, 7, 2**31, -(2**31), 2**40])
def test_indices_out_of_range_are_refused(wrong: int) -> None:
    I = torch.tensor([[0, 6], [wrong, 1]])
    with pytest.raises(RuntimeError, match="indices"):
        ops.aggregate(randn(7, 3), torch.zeros(2, 2), I)
    with pytest.raises(RuntimeError, match="candidates"):
        ops.select(randn(2, 3), randn(7, 3), 1, candidates=I[1])
    with pytest.raises(RuntimeError, match="self_indices"):
        ops.select(randn(2, 3), randn(7, 3), 1, self_indices=I[1])


@pytest.mark.parametrize("M", [0, 3])
def test_too_few_keys_are_refused(M: int) -> None:
    for k in (0, -1, M + 1):
        with pytest.raises(RuntimeError, match="k must be"):
            ops.select(randn(2, 3), randn(M, 3), k)


@on_two_threads
def test_calls_from_several_threads() -> None:
    inputs = [(randn(60, 8), randn(200, 8), randn(200, 8)) for _ in range(4)]
    expected = [ops.forward(*tensors, 9) for tensors in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(20):
            found = ops.forward(*inputs[i], 9)
            if not all(map(torch.equal, found, expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _forked(query: Tensor, key: Tensor, expected: Tensor) -> None:
    # As workers of a data loader do.
    torch.set_num_threads(1)
    _, I = ops.select(query, key, 9)
    raise SystemExit(0 if torch.equal(I, expected) else 1)


@on_two_threads
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


def test_missing_neighbor_meets_an_infinite_gradient() -> None:
    """A padding row or an overflow of the loss scale: grad_weight at a missing tap stays finite."""
    similarities = torch.tensor([[1.0, -math.inf], [0.0, 0.0]])
    indices = torch.tensor([[0, 0], [1, 2]])
    weight = torch.ones(2, 2, 2, requires_grad=True)
    output = torch.ops.convnn.aggregate(torch.ones(3, 2), similarities, indices, weight)
    grad_output = torch.tensor([[math.inf, 1.0], [1.0, 1.0]])
    (grad,) = torch.autograd.grad(output, weight, grad_output)
    assert grad[0, :, 0].isinf().all()
    torch.testing.assert_close(grad[:, :, 1], torch.full((2, 2), 0.5))


def test_gradient_of_rows_near_the_largest_number() -> None:
    query = torch.full((1, 4), 1.5e308, dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[1.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    similarities, _ = torch.ops.convnn.select(query, key, 1)
    (grad,) = torch.autograd.grad(similarities.sum(), query)
    assert grad.isfinite().all()
    assert grad[0, 3] > 0 > grad[0, 0]
