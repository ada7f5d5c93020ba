# SPDX-License-Identifier: MIT
"""Aggregation at any indices: repeated, missing, out of range, past 2^31 elements."""

from pathlib import Path

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHORT, with_layout
from inputs import OUT_OF_RANGE, each_rho, each_weight, make_weight, one_thread, randn
from instruction_sets import INSTRUCTION_SETS

from convnn_kernels import native
from python_ref import assert_aggregate

INF = float("inf")
ops = torch.ops.convnn
pytestmark = one_thread


@each_weight
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(kind: str, layout: str) -> None:
    value = with_layout(randn(2, 30, 6), layout)
    s = with_layout(randn(2, 11, 5), layout)
    I = with_layout(torch.randint(30, (2, 11, 5)), layout)
    weight = make_weight(kind, 6, 5)
    if weight is not None:
        weight = with_layout(weight, layout)
    assert_aggregate(ops.aggregate, value, s, I, weight)


@pytest.mark.parametrize("scale", [1e20, -1e20, 1e300, -1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_with_a_scale_that_leaves_one_neighbor(scale: float, dtype: torch.dtype) -> None:
    """A product with the scale has an error that exp does not forgive; a difference has none."""
    value = randn(40, 4).requires_grad_()
    s = randn(50, 5, dtype=dtype).requires_grad_()
    s.data[:, 3] = -INF
    I = torch.randint(40, (50, 5))
    signed = (s * (1 if scale > 0 else -1)).masked_fill(s == -INF, -INF)
    nearest = I.gather(-1, signed.argmax(dim=-1, keepdim=True))[:, 0]
    output = ops.aggregate(value, s, I, scale=scale)
    assert torch.equal(output, value[nearest])
    grads = torch.autograd.grad(output.sum(), [value, s])
    expected = torch.bincount(nearest, minlength=40)[:, None].expand(40, 4)
    assert torch.equal(grads[0], expected.float())
    assert torch.equal(grads[1], torch.zeros_like(s))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_softmax_is_exact_to_the_last_bits(instruction_set: str) -> None:
    """From 0 to where e^x is the least subnormal number, and then 0."""
    x = torch.cat([-torch.linspace(0, 760, 4001), -(torch.linspace(0, 1, 500) ** 8)]).double()
    value, I = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1])
    s = torch.stack([torch.zeros_like(x), x], dim=-1)
    with native.use_cpu_instruction_set(instruction_set):
        rho = ops.aggregate(value, s, I.expand(len(x), 2))[:, 0]
    torch.testing.assert_close(rho, x.exp() / (1 + x.exp()), rtol=6e-16, atol=1e-323)


def test_softmax_of_similarities_whose_difference_exceeds_float64() -> None:
    value, I = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([[0, 1]])
    s = torch.tensor([[1.5e308, -1.5e308]], dtype=torch.float64)
    for scale in (0.0, 1e-308, -1e-308, 1.0):
        expected = torch.softmax(s * scale, dim=-1)[:, 1:]
        torch.testing.assert_close(ops.aggregate(value, s, I, scale=scale), expected)


@each_rho
@each_weight
def test_repeated_indices_and_missing_neighbors(rho: str, kind: str) -> None:
    """A row may be repeated, and neighbors may be missing (-inf) in any position."""
    value = randn(2, 6, 4)
    s, I = randn(2, 50, 5), torch.randint(3, (2, 50, 5))
    s[torch.rand(2, 50, 5) < 0.3] = -INF
    s[0, 0] = -INF
    for similarities in (s, s.double()):
        assert_aggregate(ops.aggregate, value, similarities, I, make_weight(kind, 4, 5), rho=rho)


@each_rho
@each_weight
def test_no_channels(kind: str, rho: str) -> None:
    """With C = 0 the output is the bias, and gradients of similarities are 0."""
    I = torch.randint(20, (2, 30, 3))
    for dtype in DTYPES:
        value, weight = randn(2, 20, 0, dtype=dtype), make_weight(kind, 0, 3, dtype)
        s = randn(2, 30, 3, dtype=torch.promote_types(dtype, torch.float32))
        assert_aggregate(ops.aggregate, value, s, I, weight, rho=rho)


# A dense convolution gathers slots of 512 channels together and multiplies them in steps of 128;
# others take 64 channels at a time, and gradients of a dense weight 128.
@each_weight
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize(("C", "k"), [(129, 4), (200, 5), (257, 3), (300, 2), (513, 2), (600, 1)])
def test_many_channels(C: int, k: int, dtype: torch.dtype, kind: str) -> None:
    I, s = torch.randint(9, (2, 7, k)), randn(2, 7, k)
    s = s.double() if dtype == torch.float64 else s
    weight = make_weight(kind, C, k, dtype, outputs=3)
    assert_aggregate(ops.aggregate, randn(2, 9, C, dtype=dtype), s, I, weight, scale=0.5)


@pytest.mark.parametrize("scale", [-1.0, 1.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=SHORT.get)
@each_weight
def test_softmax_of_a_large_spread(kind: str, dtype: torch.dtype, scale: float) -> None:
    """exp would overflow or be 0 everywhere without the largest of scale times the similarity."""
    s, I = 2000 * randn(2, 12, 5, dtype=dtype), torch.randint(9, (2, 12, 5))
    s[0] /= 1000
    s[torch.rand(2, 12, 5) < 0.2] = -INF
    value, weight = randn(2, 9, 6, dtype=dtype), make_weight(kind, 6, 5, dtype)
    Y = assert_aggregate(ops.aggregate, value, s, I, weight, scale=scale)
    assert bool(Y.isfinite().all())
    assert bool(Y[(s != -INF).any(-1)].any(-1).all())


@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_indices_out_of_range_are_rejected(wrong: int) -> None:
    I = torch.tensor([[0, 6], [wrong, 1]])
    with pytest.raises(RuntimeError, match="aggregate: indices"):
        ops.aggregate(randn(7, 3), torch.zeros(2, 2), I)


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
