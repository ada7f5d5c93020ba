# SPDX-License-Identifier: MIT
"""Rows scaled by powers of two: their cosines are the same, and gradients of them are divided by
that power. Rows so small that they count as zero are among them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from inputs import gradients
from torch import Tensor

# The exponents of rows of whole numbers up to 7: norms from 0 to near the largest finite number.
_EXPONENTS = {
    torch.float64: (*range(-1070, -60, 30), *range(-60, 20), *range(20, 970, 7), *range(490, 520)),
    torch.float32: (*range(-145, -60, 5), *range(-60, 101)),
    torch.bfloat16: (*range(-130, -60, 5), *range(-60, 101)),
    torch.float16: tuple(range(-24, 13)),
}
# Rows of the first ones count as zero, as their norm is at most 1e-12, and no others do.
_LAST_OF_ZERO, _FIRST_OF_NOT_ZERO = -46, -39
# The first exponent and the last.
_SIZES = {"all": (-2000, 2000), "small": (-60, 10), "large": (10, 2000)}

# Between these, gradients are normal numbers, too.
_WITH_GRADIENTS = {
    torch.float64: (-39, 970),
    torch.float32: (-39, 90),
    torch.bfloat16: (-39, 90),
    torch.float16: (-6, 6),
}


class Rows(NamedTuple):
    plain: Tensor
    """[rows, D]: whole numbers; zeros where the scaled row counts as zero."""
    scaled: Tensor
    """[rows, D]"""
    power: Tensor
    """[rows, 1] float64, by which a row is scaled."""
    has_gradient: Tensor
    """[rows] bool: whether the gradients of both are normal numbers, or zero."""


def make_rows(dtype: torch.dtype, sizes: str, count: int, D: int, seed: int = 0) -> Rows:
    """Rows of the sizes "all", "small", some of which are zero, or "large", in any order."""
    generator = torch.Generator().manual_seed(seed)
    first, last = _SIZES[sizes]
    undecided = range(_LAST_OF_ZERO + 1, _FIRST_OF_NOT_ZERO)
    exponents = torch.tensor(
        [each for each in _EXPONENTS[dtype] if first <= each <= last and each not in undecided]
    )
    order = torch.randperm(max(count, len(exponents)), generator=generator)
    exponents = exponents[order[:count, None] % len(exponents)]
    numbers = torch.randint(-7, 8, (count, D), generator=generator).double()
    numbers[:, 0] = 5.0
    numbers[::3] = -numbers[::3].abs()
    power = 2.0 ** exponents.double()
    is_zero = exponents <= _LAST_OF_ZERO
    first, last = _WITH_GRADIENTS[dtype]
    has_gradient = (exponents >= first) & (exponents < last) | is_zero
    plain = torch.where(is_zero, 0.0, numbers)
    return Rows(plain.to(dtype), (numbers * power).to(dtype), power, has_gradient[:, 0])


def assert_sizes_do_not_matter(
    select: Callable[..., tuple[Tensor, Tensor]], query: Rows, key: Rows, k: int
) -> None:
    """Asserts that `select` finds the same bits, and gradients that differ by the power only."""
    grad_s = torch.randn(len(query.plain), k)
    found = []
    for rows in ((query.plain, key.plain), (query.scaled, key.scaled)):
        leaves = [X.clone().requires_grad_() for X in rows]
        s, I = select(*leaves, k)
        found.append((s, I, *gradients(s, leaves, grad_s.to(s))))
    (s, I, *grads), (s_of_scaled, I_of_scaled, *grads_of_scaled) = found
    assert torch.equal(I_of_scaled, I)
    assert torch.equal(s_of_scaled, s)
    assert s.any()
    for X, grad, of_scaled in zip((query, key), grads, grads_of_scaled, strict=True):
        expected = (grad.double() / X.power).to(grad.dtype)
        atol = torch.finfo(grad.dtype).tiny / 16  # they may be subnormal
        which = X.has_gradient
        torch.testing.assert_close(of_scaled[which], expected[which], rtol=0.0, atol=atol)
