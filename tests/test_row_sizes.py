# SPDX-License-Identifier: MIT
"""The cosine of rows of every size: nothing overflows, and only rows of norm up to 1e-12 are 0."""

import pytest
import torch
from cases import DTYPES, SHORT
from inputs import by_key, each_dtype, gradients, one_thread, randn
from instruction_sets import INSTRUCTION_SETS
from row_sizes import assert_sizes_do_not_matter, make_rows

import python_ref
from convnn_kernels import native

ops = torch.ops.convnn
pytestmark = one_thread

each_instruction_set = pytest.mark.parametrize("name", INSTRUCTION_SETS)
# Queries: so few that keys are not normalized, few, many, and so many that a screen pays.
N, M, D = {"very few": 3, "few": 14, "many": 70, "screened": 200}, 530, 18

# No screen is used where rows of all sizes meet, nor for queries of zero, to which all keys tie.
DTYPES_AND_SIZES = [
    *(pytest.param(dtype, "all", "all", id=f"{SHORT[dtype]}-all") for dtype in DTYPES),
    *(pytest.param(torch.float32, "large", each, id=f"f32-{each}") for each in ("small", "large")),
]


@each_instruction_set
@pytest.mark.parametrize("queries", N)
@pytest.mark.parametrize(("dtype", "of_query", "of_key"), DTYPES_AND_SIZES)
def test_powers_of_two_do_not_change_cosines(
    dtype: torch.dtype, of_query: str, of_key: str, queries: str, name: str
) -> None:
    """Nor gradients, but for the power."""
    query = make_rows(dtype, of_query, N[queries], D)
    key = make_rows(dtype, of_key, M, D, seed=1)
    with native.use_cpu_instruction_set(name):
        assert_sizes_do_not_matter(ops.select, query, key, 9)


@each_instruction_set
@pytest.mark.parametrize("queries", N)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_a_norm_of_exactly_epsilon_is_zero(dtype: torch.dtype, queries: str, name: str) -> None:
    largest_zero = torch.tensor(1e-12, dtype=dtype)  # rounded down in float32
    above = torch.nextafter(largest_zero, torch.ones_like(largest_zero))
    tiny, ones = torch.zeros(M, D, dtype=dtype), torch.zeros(N[queries], D, dtype=dtype)
    tiny[::2, 5], tiny[1::2, 5], ones[:, 5] = largest_zero, above, 1.0
    expected = (torch.arange(M) % 2).to(dtype)
    with native.use_cpu_instruction_set(name):
        s = by_key(*ops.select(ones, tiny, M))
        assert torch.equal(s, expected.expand(s.shape))
        s = by_key(*ops.select(tiny[: len(ones)], ones, len(ones)))
        assert torch.equal(s, expected[: len(ones), None].expand(s.shape))


@each_instruction_set
@pytest.mark.parametrize("position", [0, 5, D - 1])
def test_one_element_whose_square_overflows(position: int, name: str) -> None:
    leaves = [randn(14, D, dtype=torch.float64), randn(M, D, dtype=torch.float64)]
    for X in leaves:
        X[:, position] *= 2.0**18
        X.requires_grad_()
    scaled = [(X.detach() * 2.0**497).requires_grad_() for X in leaves]
    with native.use_cpu_instruction_set(name):
        s, I = ops.select(*leaves, 9)
        of_scaled, J = ops.select(*scaled, 9)
        assert torch.equal(of_scaled, s)
        assert torch.equal(J, I)
        along = randn(*s.shape, dtype=torch.float64)
        grads = gradients(s, leaves, along)
        for grad, other in zip(grads, gradients(of_scaled, scaled, along), strict=True):
            assert torch.equal(other * 2.0**497, grad)


@each_dtype
def test_powers_of_two_do_not_change_the_rows_of_the_reference(dtype: torch.dtype) -> None:
    rows = make_rows(dtype, "all", 150, D)
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    plain, scaled = (
        X.to(computed_in).requires_grad_() for X in (rows.plain.clone(), rows.scaled.clone())
    )
    unit, unit_of_scaled = python_ref.normalize(plain), python_ref.normalize(scaled)
    assert torch.equal(unit_of_scaled, unit)
    along = randn(150, D, dtype=computed_in)
    (grad,) = gradients(unit, [plain], along)
    (of_scaled,) = gradients(unit_of_scaled, [scaled], along)
    expected = (grad.double() / rows.power).to(computed_in)
    torch.testing.assert_close(of_scaled[rows.has_gradient], expected[rows.has_gradient])
