# SPDX-License-Identifier: MIT
"""The cosine of rows of every size in the Triton kernels."""

import pytest
import torch
from interpreter import in_interpreter
from row_sizes import assert_sizes_do_not_matter, make_rows

import convnn_kernels

pytestmark = in_interpreter


@pytest.mark.parametrize("M", [40, 300])
@pytest.mark.parametrize(
    ("dtype", "of_query"), [(torch.float32, "all"), (torch.float16, "large")], ids=["f32", "f16"]
)
def test_powers_of_two_do_not_change_cosines(dtype: torch.dtype, of_query: str, M: int) -> None:
    """Nor gradients, but for the power.

    In float16, the factors 1 / ||q|| of a key must not differ by more than its range.
    """
    query, key = make_rows(dtype, of_query, 20, 18), make_rows(dtype, "all", M, 18, seed=1)
    with convnn_kernels.backend("triton"):
        assert_sizes_do_not_matter(torch.ops.convnn.select, query, key, 5)
