# SPDX-License-Identifier: MIT
"""Numbers of 16 bits are read exactly, and results rounded to the nearest, ties to even."""

import pytest
import torch
from inputs import one_thread
from instruction_sets import INSTRUCTION_SETS

from convnn_kernels import native

pytestmark = one_thread


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_number_of_16_bits(dtype: torch.dtype, name: str) -> None:
    """x + t (y - x) of every x and the next larger magnitude y; for t = 1/2 a tie.

    Each is the sum of two neighbors, x and y - x, in a channel of its own.
    """
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x.repeat(4)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75]).repeat_interleave(2**16)
    # Of the largest finite number, from the one before, so that it rounds to infinity.
    is_last = x.abs() == torch.finfo(dtype).max
    bits = x.view(torch.int16)
    step = torch.where(is_last, x - (bits - 1).view(dtype), (bits + 1).view(dtype) - x)
    step = torch.where(x.isfinite(), step, 0.0)
    expected = (x.float() + t * step.float()).to(dtype)

    weight = torch.stack([torch.ones_like(t), t], dim=1).to(dtype)  # [C, 2]
    with native.use_cpu_instruction_set(name):
        Y = torch.ops.convnn.aggregate(
            torch.stack([x, step]),
            torch.zeros(1, 2),
            torch.tensor([[0, 1]]),
            weight.unsqueeze(1),
            rho="ones",
        )[0]
    assert torch.equal(Y.isnan(), expected.isnan())
    right = expected.isnan() | (expected == Y)
    assert right.all(), [X[~right][:4].tolist() for X in (x, t, Y, expected)]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_nan_of_any_bits_stays_nan(dtype: torch.dtype, name: str) -> None:
    """Rounded as numbers are, those of all ones would become zero."""
    bits = torch.tensor([-1, 2**31 - 1, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    value, indices = torch.ones(1, 3, dtype=dtype), torch.zeros(4, 1, dtype=torch.int64)
    with native.use_cpu_instruction_set(name):
        Y = torch.ops.convnn.aggregate(
            value, bits.view(torch.float32).unsqueeze(1), indices, rho="similarity"
        )
    assert Y.isnan().all()
