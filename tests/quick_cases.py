# SPDX-License-Identifier: MIT
"""Which cases of a test are quick ones, where all of them would take seconds."""

from collections.abc import Sequence

import pytest


def quick_cases(cases: Sequence[pytest.Function], n: int) -> list[pytest.Function]:
    """Each n-th case; of several parameters, also cases with the values that none of these has."""
    quick = list(cases[::n])
    if _parameters(cases[0]) > 1:
        had = {value for case in quick for value in _values(case)}
        for case in cases:
            if not _values(case) <= had:
                quick.append(case)
                had |= _values(case)
    return quick


def _parameters(case: pytest.Function) -> int:
    """How many there are; those of one `parametrize`, whose values go together, count as one."""
    together = [mark.args[0] for mark in case.iter_markers("parametrize")]
    names = {name for each in together for name in _names(each)}
    return len(together) + len(case.callspec.params.keys() - names)


def _names(argument: str | Sequence[str]) -> list[str]:
    return [*argument] if not isinstance(argument, str) else argument.replace(",", " ").split()


def _values(case: pytest.Function) -> set[tuple[str, int]]:
    """The values of the parameters, each by what it is rather than by what it equals."""
    return {(name, id(value)) for name, value in case.callspec.params.items()}
