# SPDX-License-Identifier: MIT
"""The cosine of rows of every size in the CUDA kernels, run on the host."""

import pytest
import torch
from cases import DTYPES, SHORT
from host_cuda_program import HostCuda
from row_sizes import assert_sizes_do_not_matter, make_rows

pytestmark = [pytest.mark.slow, pytest.mark.host_cuda]


@pytest.mark.parametrize("M", [40, 400])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_powers_of_two_do_not_change_cosines(dtype: torch.dtype, M: int, device: HostCuda) -> None:
    """Nor gradients, but for the power."""
    query, key = make_rows(dtype, "all", 20, 18), make_rows(dtype, "all", M, 18, seed=1)
    assert_sizes_do_not_matter(device.select, query, key, 5)
