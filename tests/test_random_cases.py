# SPDX-License-Identifier: MIT
"""2,000 random cases of `forward` with all gradients; every third one of `select` and `aggregate`.

Then 1,000 with restrictions: ranges, the token itself excluded, candidates, tokens and ranges of
each batch element; and 1,000 with special values: NaN, infinities, subnormal and huge numbers. The
quick tests include the first 300, the first 200 and the first 80 of these.
"""

from collections.abc import Callable

import pytest
import torch
from cases import Case, assert_special, make_case, make_restricted_case, make_special_case

import convnn_kernels  # noqa: F401
from python_ref import assert_aggregate, assert_forward, assert_select

QUICK, ALL = 300, 2000
QUICK_RESTRICTED, ALL_RESTRICTED = 200, 1000
QUICK_SPECIAL, ALL_SPECIAL = 80, 1000


def _parameters(count: int, quick: int, make: Callable[[int], Case]) -> list:
    return [
        pytest.param(case, id=case.id, marks=[] if case.seed < quick else [pytest.mark.slow])
        for case in map(make, range(count))
    ]


@pytest.mark.parametrize("case", _parameters(ALL, QUICK, make_case))
def test_random_case(case: Case) -> None:
    _compare(case)


@pytest.mark.parametrize(
    "case", _parameters(ALL_RESTRICTED, QUICK_RESTRICTED, make_restricted_case)
)
def test_random_restricted_case(case: Case) -> None:
    _compare(case)


@pytest.mark.parametrize("case", _parameters(ALL_SPECIAL, QUICK_SPECIAL, make_special_case))
def test_random_special_case(case: Case) -> None:
    _set_state(case)
    assert_special(case, torch.ops.convnn.forward, torch.ops.convnn.select)


def _set_state(case: Case) -> None:
    # No operator may raise if only deterministic algorithms are allowed.
    torch.use_deterministic_algorithms(case.seed % 2 == 1)
    # The reference is much faster on one thread: only every tenth case runs on two.
    torch.set_num_threads(2 if case.seed % 10 == 0 else 1)


def _compare(case: Case) -> None:
    _set_state(case)
    arguments = case.arguments()
    _, s, I = assert_forward(
        torch.ops.convnn.forward, **arguments, exact=case.exact, seed=case.seed
    )
    if case.seed % 3 == 0:
        no_selection = ("value", "weight", "bias", "rho", "scale")
        assert_select(
            torch.ops.convnn.select,
            **{name: each for name, each in arguments.items() if name not in no_selection},
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


@pytest.mark.parametrize(
    ("first", "last"), [(3000, 3060), pytest.param(4000, 4500, marks=pytest.mark.slow)]
)
def test_random_cases_of_each_instruction_set(
    first: int, last: int, instruction_set: str, run_forked: Callable[..., str]
) -> None:
    code = SOME_CASES.format(first=first, last=last)
    assert "passed" in run_forked(code, timeout=900.0, CONVNN_CPU_ISA=instruction_set)


SPECIAL_CASES = """
    import torch, convnn_kernels
    from cases import assert_special, make_special_case
    torch.set_num_threads(1)
    for case in map(make_special_case, range(5000, 5300)):
        try:
            assert_special(case, torch.ops.convnn.forward, torch.ops.convnn.select)
        except AssertionError as error:
            raise SystemExit(f"{case.id}: {error}")
    print("passed")
"""


@pytest.mark.slow
def test_special_cases_of_each_instruction_set(
    instruction_set: str, run_forked: Callable[..., str]
) -> None:
    assert "passed" in run_forked(SPECIAL_CASES, timeout=900.0, CONVNN_CPU_ISA=instruction_set)
