# SPDX-License-Identifier: MIT
"""Selection and aggregation together: shapes, strides, masks and extreme numbers."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import LAYOUTS, with_layout
from inputs import (
    each_dtype,
    each_metric,
    each_rho,
    each_weight,
    gradients,
    make_weight,
    one_thread,
    randn,
    two_threads,
)

import convnn_kernels  # noqa: F401
from python_ref import assert_certified_selection, assert_forward, assert_select

INF, NAN = math.inf, math.nan
ops = torch.ops.convnn
pytestmark = one_thread


@each_metric
def test_forward_is_select_and_aggregate(metric: str) -> None:
    query, key, value = randn(3, 210, 19), randn(3, 305, 19), randn(3, 305, 21)
    weight = make_weight("depthwise", 21, 9)
    s, I = ops.select(query, key, 9, metric=metric)
    expected = (ops.aggregate(value, s, I, weight), s, I)
    found = ops.forward(query, key, value, 9, weight, metric=metric)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@each_dtype
def test_ties(metric: str, dtype: torch.dtype) -> None:
    """Small integers give many ties, which are in the order of their indices."""
    query, key = (torch.randint(-1, 2, (2, n, 4)).to(dtype) for n in (33, 150))
    for k in (1, 9, 149, 150):
        assert_forward(ops.forward, query, key, randn(2, 150, 6), k, metric=metric, exact=True)


@pytest.mark.quick_one_in(5)
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


@pytest.mark.quick_one_in(7)
@each_metric
@each_weight
@each_rho
@pytest.mark.parametrize("M", [1, 2, 3, 33, 130])
def test_all_keys_are_neighbors(metric: str, kind: str, rho: str, M: int) -> None:
    query, key, value = randn(2, 9, 6), randn(2, M, 6), randn(2, M, 4)
    _, _, I = assert_forward(
        ops.forward, query, key, value, M, make_weight(kind, 4, M), metric=metric, rho=rho
    )
    assert torch.equal(I.sort(dim=-1).values, torch.arange(M).expand(2, 9, M))


@pytest.mark.quick_one_in(5)
@each_metric
@each_dtype
def test_every_small_number_of_channels(metric: str, dtype: torch.dtype) -> None:
    """Odd D and C, from 1 to beyond the width of a vector register."""
    for D in (*range(1, 19), 31, 33, 47, 65):
        query, key, value = (randn(n, D, dtype=dtype) for n in (5, 11, 11))
        assert_forward(ops.forward, query, key, value, 3, metric=metric, seed=D)


@two_threads
def test_more_than_65535_queries() -> None:
    query, key = randn(65_540, 2), randn(5, 2)
    assert_forward(ops.forward, query, key, randn(5, 3), 2)


@two_threads
def test_more_than_65535_batch_elements() -> None:
    query, key = randn(65_540, 2, 2), randn(65_540, 3, 2)
    assert_forward(ops.forward, query, key, randn(65_540, 3, 2), 2)


@two_threads
@each_metric
def test_indices_past_16_bits(metric: str) -> None:
    """Rows above 32,767 and 65,535 are selected and gathered."""
    key = torch.randint(-5, 0, (70_000, 3)).float()
    query = torch.full((4, 3), 5.0)
    key[[33_000, 66_000, 69_999]] = 5.0
    value = torch.arange(70_000.0).unsqueeze(-1)
    Y, _, I = ops.forward(query, key, value, 3, metric=metric, rho="ones")
    assert I.tolist() == [[33_000, 66_000, 69_999]] * 4
    assert Y.tolist() == [[168_999.0]] * 4


@each_metric
@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype
def test_strided_inputs(metric: str, layout: str, dtype: torch.dtype) -> None:
    """Strides do not change results, and the NaN between the elements is never read."""
    shapes = {"query": (2, 19, 9), "key": (2, 33, 9), "value": (2, 33, 6), "weight": (6, 1, 4)}
    tensors = {
        name: with_layout(randn(*shape, dtype=dtype), layout) for name, shape in shapes.items()
    }
    tensors["bias"] = with_layout(randn(6, dtype=dtype), layout)
    tensors["candidates"] = with_layout(torch.randperm(33)[:20], layout)
    tensors["self_indices"] = with_layout(torch.randint(33, (19,)), layout)
    tensors["key_mask"] = with_layout(torch.rand(2, 33) < 0.7, layout)
    found = assert_forward(ops.forward, **tensors, k=4, metric=metric)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert all(map(torch.equal, found, ops.forward(**contiguous, k=4, metric=metric)))


@each_metric
@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("k", [1, 2, 12])
def test_self_with_candidates_and_masks(metric: str, order: str, k: int) -> None:
    N, M = 25, 40
    query, key, value = randn(2, N, 6), randn(2, M, 6), randn(2, M, 5)
    candidates = torch.randperm(M)[:12]
    self_indices = torch.randint(M, (N,))
    self_indices[0], self_indices[1] = candidates[0], candidates[11]
    options = {"candidates": candidates, "self_indices": self_indices}
    options |= {"metric": metric, "order": order}
    for mask in (None, torch.rand(2, M) < 0.5, torch.rand(2, M) < 0.05):
        _, _, I = assert_forward(ops.forward, query, key, value, k, key_mask=mask, **options)
        if mask is None and order == "similarity":
            assert (I[..., 0] == self_indices).all()


@pytest.mark.quick_one_in(5)
@each_metric
@each_rho
@each_weight
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_self", [False, True])
def test_everything_masked(
    metric: str, rho: str, kind: str, has_bias: bool, has_self: bool
) -> None:
    """The output is the bias or zero and gradients are zero, even if key and value are NaN."""
    query, key, value = randn(2, 7, 4), randn(2, 9, 4), randn(2, 9, 3)
    key[1], value[1] = NAN, NAN
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    weight = make_weight(kind, 3, 4)
    bias = randn(5 if kind == "dense" else 3) if has_bias else None
    self_indices = torch.arange(7) if has_self else None
    options = {"self_indices": self_indices, "key_mask": mask, "metric": metric, "rho": rho}
    Y, s, I = assert_forward(ops.forward, query, key, value, 4, weight, bias, **options)
    expected = torch.zeros(()) if bias is None else bias
    assert torch.equal(Y[1], expected.expand_as(Y[1]))
    assert (s[1] == -INF).all()
    assert not I[1].any()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    Y, _, _ = ops.forward(*leaves, 4, weight, bias, **options)
    assert not any(grad[1].any() for grad in gradients(Y, leaves))


@each_metric
@each_rho
@pytest.mark.parametrize("order", ["similarity", "index"])
def test_missing_neighbors_add_nothing(metric: str, rho: str, order: str) -> None:
    """Missing neighbors have index 0; row 0 holds NaN and infinity and must not be read."""
    query, key, value = randn(6, 4), randn(8, 4), randn(8, 3)
    key[0], value[0] = NAN, INF
    mask = torch.tensor([False, True, False, True, True, False, False, False])
    options = {"key_mask": mask, "metric": metric, "rho": rho, "order": order}
    Y, s, I = assert_forward(ops.forward, query, key, value, 5, **options)
    assert Y.isfinite().all()
    assert (s[:, 3:] == -INF).all()
    assert not I[:, 3:].any()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    Y, _, _ = ops.forward(*leaves, 5, **options)
    assert all(grad.isfinite().all() for grad in gradients(Y, leaves))


@pytest.mark.quick_one_in(5)
@each_metric
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["query", "key", "value", "all"])
@each_rho
def test_one_nan_or_infinity(metric: str, bad: float, where: str, rho: str) -> None:
    """Only results that depend on the element are affected."""
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


@pytest.mark.quick_one_in(5)
@each_metric
@each_dtype
@each_rho
def test_all_nan(metric: str, dtype: torch.dtype, rho: str) -> None:
    """Indices are those of the first keys in order, and the backward works."""
    query, key = (torch.full((2, n, 5), NAN, dtype=dtype) for n in (9, 70))
    value = randn(2, 70, 3, dtype=dtype)
    for k in (1, 9, 70):
        _, _, I = assert_forward(ops.forward, query, key, value, k, metric=metric, rho=rho)
        assert torch.equal(I, torch.arange(k).expand(2, 9, k))


def test_similarity_of_minus_infinity_keeps_its_index() -> None:
    """A key at -inf ranks behind all other keys but before missing neighbors, and adds nothing."""
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
    """inf - inf, as in eager softmax."""
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
    """Norms do not overflow; where dot and euclidean do, the results are those of infinity."""
    query, key = (randn(2, n, 8) for n in (15, 50))
    value = randn(2, 50, 4, dtype=dtype)
    big_query, big_key = ((X.double() * size).to(dtype) for X in (query, key))
    # With terms of both signs a sum is inf or NaN, depending on its order: only certify it.
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
def test_euclidean_far_from_the_origin(offset: float, rho: str) -> None:
    """The formula |q|^2 + |k|^2 - 2 q.k would lose all digits here."""
    key = randn(100, 16) + offset
    query = torch.cat([key[:10], randn(20, 16) + offset])
    _, s, I = assert_forward(ops.forward, query, key, randn(100, 8), 9, metric="euclidean", rho=rho)
    assert (s <= 0).all()
    assert (s[:10, 0] == 0).all()
    assert I[:10, 0].tolist() == list(range(10))


@two_threads
def test_calls_from_several_threads() -> None:
    inputs = [(randn(60, 8), randn(200, 8), randn(200, 8)) for _ in range(4)]
    expected = [ops.forward(*tensors, 9) for tensors in inputs]

    def is_right(i: int) -> bool:
        return all(map(torch.equal, ops.forward(*inputs[i % 4], 9), expected[i % 4]))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(is_right, range(80)))
