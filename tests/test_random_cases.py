# SPDX-License-Identifier: MIT
"""2,000 random cases of `forward`, with every gradient, compared as python_ref.compare says.

The quick loop runs the first 300; each third case also runs `select` and `aggregate` alone.
"""

import pytest
import torch
from cases import Case, make_case

import convnn_kernels  # noqa: F401
from python_ref import assert_aggregate, assert_forward, assert_select

QUICK, ALL = 300, 2000


def _parameters() -> list:
    cases = [make_case(seed) for seed in range(ALL)]
    return [
        pytest.param(case, id=case.id, marks=[] if case.seed < QUICK else [pytest.mark.slow])
        for case in cases
    ]


@pytest.mark.parametrize("case", _parameters())
def test_random_case(case: Case) -> None:
    # Deterministic algorithms fill new tensors with NaN, so that an element nobody wrote is seen.
    torch.use_deterministic_algorithms(case.seed % 2 == 1)
    # The reference runs on one thread in a fraction of the time: only some cases take two.
    torch.set_num_threads(2 if case.seed % 10 == 0 else 1)
    arguments = case.arguments()
    _, s, I = assert_forward(
        torch.ops.convnn.forward, **arguments, exact=case.exact, seed=case.seed
    )
    if case.seed % 3 == 0:
        names = ("query", "key", "k", "candidates", "self_indices", "key_mask", "metric", "order")
        assert_select(
            torch.ops.convnn.select,
            **{name: arguments[name] for name in names},
            exact=case.exact,
            seed=case.seed,
        )
        names = ("value", "weight", "bias", "rho", "scale")
        assert_aggregate(
            torch.ops.convnn.aggregate,
            similarities=s,
            indices=I,
            **{name: arguments[name] for name in names},
            seed=case.seed,
        )
