# SPDX-License-Identifier: MIT
"""Gradients of aggregation: rows that many queries share, and neighbors that are missing."""

import json
import sys
from collections.abc import Callable

import pytest
import torch
from inputs import each_weight, make_weight, one_thread, randn

import convnn_kernels  # noqa: F401
from python_ref import assert_aggregate

INF = float("inf")
ops = torch.ops.convnn
pytestmark = one_thread


@each_weight
@pytest.mark.parametrize("chosen", [[7], [0, 1, 39], list(range(5, 20)), [38, 39]])
def test_keys_that_many_queries_choose(kind: str, chosen: list[int]) -> None:
    """Keys with thousands of queries beside keys with none, and missing neighbors among them."""
    B, N, M, C, k = 2, 1100, 40, 33, 3
    index = torch.tensor(chosen)
    I = index[torch.randint(len(chosen), (B, N, k))]
    s = randn(B, N, k)
    s[torch.rand(B, N, k) < 0.2] = -INF
    value, weight = randn(B, M, C), make_weight(kind, C, k)
    assert_aggregate(ops.aggregate, value, s, I, weight, rho="softmax", scale=0.5)


@pytest.mark.parametrize(("C", "O"), [(64, 40), (140, 70)])
def test_dense_weight_of_many_channels(C: int, O: int) -> None:
    """Blocks of 64 channels, whole and in part, in sums of more than 64 products."""
    B, N, M, k = 2, 197, 70, 3
    s = randn(B, N, k)
    s[torch.rand(B, N, k) < 0.2] = -INF
    I = torch.randint(M, (B, N, k))
    assert_aggregate(
        ops.aggregate, randn(B, M, C), s, I, randn(O, C, k) / C**0.5, rho="softmax", scale=0.5
    )


@pytest.mark.parametrize("count", [8191, 8192, 8193])
def test_pairs_of_a_key_end_at_a_task_boundary(count: int) -> None:
    """8192 is a multiple of the number of pairs in a task, for every instruction set."""
    I = (torch.arange(9000) >= count).long().reshape(1, 9000, 1)
    value, weight = randn(1, 3, 4), make_weight("dense", 4, 1)
    assert_aggregate(ops.aggregate, value, randn(1, 9000, 1), I, weight, rho="similarity")


@pytest.mark.slow
def test_more_pairs_than_float32_can_count() -> None:
    """The slot of a pair and its query are bits of one number."""
    N, k = 2**18 + 1, 65
    I = torch.arange(N)[:, None].expand(N, k)
    value, weight = torch.ones(N, 1), torch.arange(k).float().reshape(1, 1, k)
    value.requires_grad_()
    ops.aggregate(value, torch.zeros(N, k), I, weight, rho="ones").sum().backward()
    assert value.grad.eq(weight.sum()).all()


def test_missing_neighbor_with_an_infinite_gradient() -> None:
    """With a padding row or an overflow of the loss scale, the gradient of the
    weight of a missing neighbor stays finite."""
    s = torch.tensor([[1.0, -INF], [0.0, 0.0]])
    I = torch.tensor([[0, 0], [1, 2]])
    weight = torch.ones(2, 2, 2, requires_grad=True)
    output = ops.aggregate(torch.ones(3, 2), s, I, weight)
    grad_output = torch.tensor([[INF, 1.0], [1.0, 1.0]])
    (grad,) = torch.autograd.grad(output, weight, grad_output)
    assert grad[0, :, 0].isinf().all()
    torch.testing.assert_close(grad[:, :, 1], torch.full((2, 2), 0.5))


# Prints the bytes of arguments and results, and how far peak resident memory rose above what was
# there before them.
LARGE_WEIGHT = """
    import json, pathlib, torch, convnn_kernels

    def resident(field):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024

    def run(N, C, O):
        arguments = torch.randn(N, O), torch.randn(N, C), torch.ones(N, 1)
        arguments += torch.arange(N)[:, None], torch.randn(O, C, 1)
        needs = dict(need_value=False, need_similarities=False, need_weight=True, need_bias=False)
        backward = torch.ops.convnn.aggregate_backward
        results = backward(*arguments, has_bias=False, rho="ones", scale=1.0, **needs)
        return sum(X.numel() * X.element_size() for X in (*arguments, *results))

    torch.set_num_threads(2)
    run(64, 8, 8)  # starts threads and fills caches that remain
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    total = run(1024, 512, 2048)
    print(json.dumps(dict(total=total, rise=resident("VmHWM") - before)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_gradient_of_a_large_weight(run_python: Callable[..., str]) -> None:
    """Parts of it that tasks sum for themselves would take four times its memory."""
    found = json.loads(run_python(LARGE_WEIGHT).splitlines()[-1])
    assert found["total"] < found["rise"] < 2 * found["total"]
