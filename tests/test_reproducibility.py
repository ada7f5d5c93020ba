# SPDX-License-Identifier: MIT
"""Bitwise equal results: for every number of threads, alone or in a batch, in every process, and
for every instruction set with fused multiply-adds."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from cases import Case, make_case
from inputs import each_dtype, each_metric, each_weight, make_weight, randn
from instruction_sets import INSTRUCTION_SETS
from torch import Tensor

from convnn_kernels import native

ops = torch.ops.convnn

B, N, M, D, C, K = 3, 210, 305, 19, 21, 9
THREADS = (1, 2, 4)


def make_inputs(dtype: torch.dtype, kind: str) -> list[Tensor | None]:
    """query, key, value and weight. Some keys are repeated, which gives ties."""
    query, key, value = (randn(B, *shape, dtype=dtype) for shape in ((N, D), (M, D), (M, C)))
    key[:, 200:250] = key[:, :50]
    return [query, key, value, make_weight(kind, C, K, dtype, outputs=13)]


def forward(inputs: list[Tensor | None], metric: str) -> tuple[Tensor, ...]:
    query, key, value, weight = inputs
    return ops.forward(query, key, value, K, weight, metric=metric)


def backward(inputs: list[Tensor | None], metric: str) -> tuple[Tensor, ...]:
    leaves = [None if X is None else X.detach().requires_grad_() for X in inputs]
    Y, s, _ = forward(leaves, metric)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(X.shape, generator=generator).to(X.dtype) for X in (Y, s)]
    return torch.autograd.grad((Y, s), [X for X in leaves if X is not None], grads)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], what: object) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"result {i} differs: {what}"


def assert_same_for_every_thread_count(
    run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor | None], metric: str
) -> None:
    torch.set_num_threads(THREADS[0])
    expected = run(inputs, metric)
    for threads in (*THREADS, *THREADS):
        torch.set_num_threads(threads)
        assert_same(run(inputs, metric), expected, f"{threads} threads")


@each_metric
@each_dtype
@each_weight
def test_forward_for_every_thread_count(metric: str, dtype: torch.dtype, kind: str) -> None:
    assert_same_for_every_thread_count(forward, make_inputs(dtype, kind), metric)


@each_metric
@each_dtype
@each_weight
def test_backward_for_every_thread_count(metric: str, dtype: torch.dtype, kind: str) -> None:
    torch.use_deterministic_algorithms(True)
    assert_same_for_every_thread_count(backward, make_inputs(dtype, kind), metric)


@each_metric
@each_weight
def test_many_queries_of_one_key_for_every_thread_count(metric: str, kind: str) -> None:
    """All threads contribute to the same row of a gradient."""
    torch.use_deterministic_algorithms(True)
    inputs = make_inputs(torch.float32, kind)
    inputs[1][:, 17] = inputs[0].mean(dim=1) * 1e3
    assert_same_for_every_thread_count(backward, inputs, metric)


@pytest.mark.parametrize("flush", [pytest.param(False, marks=pytest.mark.slow), True])
def test_denormals_for_every_thread_count(flush: bool, run_forked: Callable[..., str]) -> None:
    """set_flush_denormal is of one thread; the others do as it does."""
    run_forked(f"""
        import torch, convnn_kernels
        torch.manual_seed(0)
        X = torch.randn(4000, 8) * 1e-20  # products are denormal, or zero
        tensors = [X, X.flip(0).contiguous(), X]

        def call(threads):
            torch.set_num_threads(threads)
            leaves = [each.detach().requires_grad_() for each in tensors]
            output, s, indices = torch.ops.convnn.forward(*leaves, 5, metric="dot")
            loss = output.sum() + (s * 1e-10).sum()
            return output, s, indices, *torch.autograd.grad(loss, leaves)

        call(4)  # a thread that starts later has the mode of the one that starts it
        torch.set_flush_denormal({flush})
        expected = call(1)
        assert (expected[1] == 0).all() == {flush}
        for found in (call(2), call(4), call(1)):
            assert all(map(torch.equal, found, expected))
        small = torch.tensor([1e-30]) * 1e-10
        assert (small == 0) == {flush}  # the calling thread keeps its mode
    """)


def test_threads_keep_their_treatment_of_denormals() -> None:
    """While they work for a caller that flushes them to zero, they do so, too."""
    torch.set_num_threads(2)
    denormal = torch.full((2**20,), 1e-40)
    # A thread that starts later has the mode of the one that starts it.
    assert (denormal * 1.0).ne(0).all()
    torch.set_flush_denormal(True)
    try:
        ops.select(torch.randn(4000, 16), torch.randn(100, 16), 3)
    finally:
        torch.set_flush_denormal(False)
    assert (denormal * 1.0).ne(0).all()


@pytest.mark.slow
def test_denormals_of_every_operator(run_forked: Callable[..., str]) -> None:
    """Every pass of every operator, forward and backward, has the mode of the calling thread."""
    run_forked("""
        import torch, convnn_kernels
        ops = torch.ops.convnn
        torch.manual_seed(0)
        N, C, K = 4000, 8, 5
        X, s, indices = torch.randn(N, C), torch.randn(N, K), torch.randint(N, (N, K))
        # value is denormal in half of the channels, the gradient of the output in the other half,
        # so that every sum of products of the two is denormal
        first, last = (torch.arange(C) < C // 2), (torch.arange(C) >= C // 2)
        V = torch.where(first, X, X * 1e-39)
        G = torch.where(last, X, X * 1e-39)
        dense = torch.randn(C, C, K) * (first[:, None] == first)[..., None]
        tiny_s = torch.full((N, K), 1e-39)

        calls = {"select cosine": (lambda q, k: ops.select(q, k, K)[0], [X, X * 2], tiny_s)}
        for metric in ("dot", "euclidean"):
            calls[f"select {metric}"] = (
                lambda q, k, m=metric: ops.select(q, k, K, metric=m)[0],
                [X * 1e-20, X * 2e-20],
                torch.full((N, K), 1e-19),
            )
        for kind, W in [("none", []), ("depthwise", [torch.randn(C, 1, K)]), ("dense", [dense])]:
            bias = [] if not W else [torch.zeros(C)]
            calls[f"aggregate {kind}"] = (
                lambda v, s, *w: ops.aggregate(v, s, indices, *w), [V, s, *W, *bias], G)
            calls[f"forward {kind}"] = (
                lambda q, k, v, *w: ops.forward(q, k, v, K, *w)[0], [X, X * 2, V, *W, *bias], G)

        def run(threads, function, tensors, grad):
            torch.set_num_threads(threads)
            leaves = [each.detach().clone().requires_grad_() for each in tensors]
            output = function(*leaves)
            return output.detach(), *torch.autograd.grad(output, leaves, grad)

        run(4, *calls["forward dense"])  # a later thread would have the mode of its parent
        for name, call in calls.items():
            kept = run(1, *call)
            torch.set_flush_denormal(True)
            flushed = [run(threads, *call) for threads in (1, 2, 4)]
            torch.set_flush_denormal(False)
            for i, one in enumerate(flushed[0]):
                if (name, i) != ("select cosine", 0):
                    assert not torch.equal(one, kept[i]), f"{name}: {i} does not show the mode"
                for other in flushed[1:]:
                    assert torch.equal(one, other[i]), f"{name}: {i} depends on the threads"
            for threads in (2, 4):
                assert all(map(torch.equal, run(threads, *call), kept)), name
    """)


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
    assert_same(tuple(X.squeeze(1) for X in folded), expected, "one more leading dimension")


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
    instruction_set: str, run_forked: Callable[..., str]
) -> None:
    pytest.importorskip("numpy")
    first, second = (run_forked(DIGEST, CONVNN_CPU_ISA=instruction_set) for _ in range(2))
    assert first == second


# Those with fused multiply-adds; how fast each is decides which of them a process uses.
FUSED = [name for name in INSTRUCTION_SETS if name != "portable"]
needs_two_sets = pytest.mark.skipif(len(FUSED) < 2, reason="nothing to compare")


def results_of(run: Callable[[], Sequence[Tensor]], name: str) -> list[Tensor]:
    """The bits of what ``run`` returns with one instruction set."""
    with native.use_cpu_instruction_set(name):
        return [X.detach().contiguous().view(torch.uint8) for X in run() if X.numel()]


def forward_and_gradients(case: Case) -> list[Tensor]:
    arguments = case.arguments()
    leaves = {
        name: X.detach().requires_grad_()
        for name, X in arguments.items()
        if isinstance(X, Tensor) and X.is_floating_point()
    }
    Y, s, I = ops.forward(**{**arguments, **leaves})
    generator = torch.Generator().manual_seed(case.seed)
    grads = [torch.randn(X.shape, generator=generator).to(X.dtype) for X in (Y, s)]
    found = torch.autograd.grad((Y, s), list(leaves.values()), grads, allow_unused=True)
    return [Y, s, I, *(grad for grad in found if grad is not None)]


# The first five have sums that were divided, or rounded, by instruction set.
@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param((26, 374, 502, 890, 1195, *range(5000, 5060)), id="some"),
        pytest.param(range(5060, 5600), id="many", marks=pytest.mark.slow),
    ],
)
@needs_two_sets
def test_random_cases_for_every_instruction_set(seeds: Sequence[int]) -> None:
    for case in map(make_case, seeds):
        expected, *others = (results_of(partial(forward_and_gradients, case), n) for n in FUSED)
        for found in others:
            assert_same(found, expected, case.id)


@each_metric
@each_dtype
@needs_two_sets
def test_many_columns_for_every_instruction_set(metric: str, dtype: torch.dtype) -> None:
    """Enough to select in chunks, and from a screen."""
    query, key = randn(1, 230, 61, dtype=dtype), randn(1, 1500, 61, dtype=dtype)
    key[:, 700:800] = key[:, :100]
    select = partial(ops.select, query, key, K, metric=metric)
    expected, *others = (results_of(select, name) for name in FUSED)
    for found in others:
        assert_same(found, expected, metric)


@needs_two_sets
def test_dense_weight_of_many_channels_for_every_instruction_set() -> None:
    """Blocks of 64 channels, whole and in part, in sums of more than 64 products."""
    B, N, C, O = 2, 300, 140, 70
    s, I = randn(B, N, K), torch.randint(N, (B, N, K))
    leaves = [X.requires_grad_() for X in (randn(B, N, C), s, randn(O, C, K))]

    def run() -> list[Tensor]:
        Y = ops.aggregate(leaves[0], leaves[1], I, leaves[2])
        return [Y, *torch.autograd.grad(Y, leaves, torch.ones_like(Y).cumsum(1) / N)]

    expected, *others = (results_of(run, name) for name in FUSED)
    for found in others:
        assert_same(found, expected, "dense")
