# SPDX-License-Identifier: MIT
"""The same bits: for any thread count, alone or in a batch, from run to run, on every path."""

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, METRICS, SHORT
from torch import Tensor

import convnn_kernels  # noqa: F401

ops = torch.ops.convnn

B, N, M, D, C, K = 3, 210, 305, 19, 21, 9
THREADS = (1, 2, 4)

each_metric = pytest.mark.parametrize("metric", METRICS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
each_weight = pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])


def make_inputs(dtype: torch.dtype, kind: str) -> list[Tensor | None]:
    """query, key, value and weight. Keys repeat, so that ties are there."""
    query, key, value = torch.randn(B, N, D), torch.randn(B, M, D), torch.randn(B, M, C)
    key[:, 200:250] = key[:, :50]
    weight = {"none": None, "depthwise": torch.randn(C, 1, K), "dense": torch.randn(13, C, K)}[kind]
    return [None if X is None else X.to(dtype) for X in (query, key, value, weight)]


def forward(inputs: list[Tensor | None], metric: str) -> tuple[Tensor, ...]:
    query, key, value, weight = inputs
    return ops.forward(query, key, value, K, weight, metric=metric)


def backward(inputs: list[Tensor | None], metric: str) -> tuple[Tensor, ...]:
    leaves = [None if X is None else X.detach().requires_grad_() for X in inputs]
    Y, s, _ = forward(leaves, metric)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(X.shape, generator=generator).to(X.dtype) for X in (Y, s)]
    return torch.autograd.grad((Y, s), [X for X in leaves if X is not None], grads)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: object) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"result {i} differs: {what}"


@each_metric
@each_dtype
@each_weight
def test_forward_for_every_thread_count(metric: str, dtype: torch.dtype, kind: str) -> None:
    inputs = make_inputs(dtype, kind)
    torch.set_num_threads(THREADS[0])
    expected = forward(inputs, metric)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_same(forward(inputs, metric), expected, f"{threads} threads")


@each_metric
@each_dtype
@each_weight
def test_backward_for_every_thread_count(metric: str, dtype: torch.dtype, kind: str) -> None:
    torch.use_deterministic_algorithms(True)
    inputs = make_inputs(dtype, kind)
    torch.set_num_threads(THREADS[0])
    expected = backward(inputs, metric)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_same(backward(inputs, metric), expected, f"{threads} threads")


@each_metric
@each_weight
def test_many_queries_on_one_key_for_every_thread_count(metric: str, kind: str) -> None:
    """Where threads would meet in one row of a gradient."""
    torch.use_deterministic_algorithms(True)
    query, key, value, weight = make_inputs(torch.float32, kind)
    key[:, 17] = query.mean(dim=1) * 1e3
    torch.set_num_threads(THREADS[0])
    expected = backward([query, key, value, weight], metric)
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert_same(backward([query, key, value, weight], metric), expected, threads)


@each_metric
@each_dtype
@each_weight
def test_a_row_alone_or_in_a_batch(metric: str, dtype: torch.dtype, kind: str) -> None:
    query, key, value, weight = make_inputs(dtype, kind)
    expected = forward([query, key, value, weight], metric)
    for rows in (slice(0, 1), slice(7, 8), slice(N - 1, N), slice(3, 40), slice(N - 17, N)):
        found = forward([query[:, rows], key, value, weight], metric)
        assert_same(found, tuple(X[:, rows] for X in expected), rows)


@each_metric
@each_dtype
@each_weight
def test_a_batch_element_alone(metric: str, dtype: torch.dtype, kind: str) -> None:
    query, key, value, weight = make_inputs(dtype, kind)
    expected = forward([query, key, value, weight], metric)
    for b in range(B):
        found = forward([query[b], key[b], value[b], weight], metric)
        assert_same(found, tuple(X[b] for X in expected), b)
    folded = forward([X.unsqueeze(1) for X in (query, key, value)] + [weight], metric)
    assert_same(tuple(X.squeeze(1) for X in folded), expected, "another leading dimension")


@each_metric
def test_a_candidate_has_the_similarity_it_has_among_all_keys(metric: str) -> None:
    query, key, _, _ = make_inputs(torch.float32, "none")
    s, I = ops.select(query, key, M, metric=metric)
    by_row = torch.empty_like(s).scatter(-1, I, s)
    candidates = torch.randperm(M)[:101]
    own = torch.randint(M, (N,))
    mask = torch.rand(B, M) < 0.5
    for options in (
        {"candidates": candidates},
        {"key_mask": mask},
        {"candidates": candidates, "self_indices": own, "order": "index"},
    ):
        s, I = ops.select(query, key, K, metric=metric, **options)
        assert torch.equal(s, by_row.gather(-1, I)), options.keys()


@each_metric
def test_select_and_aggregate_are_forward(metric: str) -> None:
    query, key, value, weight = make_inputs(torch.float32, "depthwise")
    s, I = ops.select(query, key, K, metric=metric)
    Y = ops.aggregate(value, s, I, weight)
    assert_same(forward([query, key, value, weight], metric), (Y, s, I), "forward")


SOME_CASES = """
    import torch, convnn_kernels
    from cases import make_case
    from python_ref import assert_forward
    for seed in range({first}, {last}):
        torch.set_num_threads(2 if seed % 10 == 0 else 1)
        case = make_case(seed)
        try:
            assert_forward(torch.ops.convnn.forward, **case.arguments(), exact=case.exact)
        except AssertionError as error:
            raise SystemExit(f"{{case.id}}: {{error}}")
    print("passed")
"""


def test_each_instruction_set_passes_random_cases(
    instruction_set: str, run_python: Callable[..., str]
) -> None:
    code = SOME_CASES.format(first=3000, last=3060)
    assert "passed" in run_python(code, CONVNN_CPU_ISA=instruction_set)


@pytest.mark.slow
def test_each_instruction_set_passes_many_random_cases(
    instruction_set: str, run_python: Callable[..., str]
) -> None:
    code = SOME_CASES.format(first=4000, last=4500)
    assert "passed" in run_python(code, timeout=900.0, CONVNN_CPU_ISA=instruction_set)


DIGEST = """
    import hashlib, torch, convnn_kernels
    from test_reproducibility import backward, forward, make_inputs
    torch.manual_seed(0)
    torch.set_num_threads(2)
    digest = hashlib.sha256()
    for metric in ("cosine", "dot", "euclidean"):
        for kind in ("none", "depthwise", "dense"):
            inputs = make_inputs(torch.float32, kind)
            for result in (*forward(inputs, metric), *backward(inputs, metric)):
                digest.update(result.detach().contiguous().numpy().tobytes())
    print("digest", digest.hexdigest())
"""


@pytest.mark.slow
def test_another_process_gives_the_same_bits(
    instruction_set: str, run_python: Callable[..., str]
) -> None:
    pytest.importorskip("numpy")
    first, second = (run_python(DIGEST, CONVNN_CPU_ISA=instruction_set) for _ in range(2))
    assert first == second
