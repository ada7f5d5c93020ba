# SPDX-License-Identifier: MIT
"""Which cases `quick_one_in(n)` leaves among the quick tests."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import ROOT, outside_workers
from quick_cases import quick_cases


def cases(*parametrize: tuple[str, list[Any]], **fixtures: list[Any]) -> list[Any]:
    """Cases as pytest makes them; the last parameter varies fastest."""
    marks = [pytest.mark.parametrize(names, values).mark for names, values in parametrize]
    given = [
        [
            dict(zip(names.split(","), each if "," in names else [each], strict=True))
            for each in values
        ]
        for names, values in parametrize
    ]
    given += [[{name: each} for each in values] for name, values in fixtures.items()]
    return [
        SimpleNamespace(
            callspec=SimpleNamespace(params={k: v for each in made for k, v in each.items()}),
            iter_markers=lambda name: iter(marks),
        )
        for made in product(*given)
    ]


def params(found: list[Any]) -> list[tuple[Any, ...]]:
    return [tuple(case.callspec.params.values()) for case in found]


def test_one_parameter() -> None:
    assert params(quick_cases(cases(("size", [*"abcdefg"])), 3)) == [("a",), ("d",), ("g",)]


def test_values_that_go_together_are_one_parameter() -> None:
    made = cases(("name,change", [("a", 1), ("b", 2), ("c", 3), ("d", 4)]))
    assert params(quick_cases(made, 3)) == [("a", 1), ("d", 4)]


@pytest.mark.parametrize("n", [2, 3, 5, 6, 100])
def test_each_value_of_several_parameters_is_in_a_quick_case(n: int) -> None:
    for made in (
        cases(("x", [*"abcd"]), ("y", [*"efg"])),
        cases(("x", [*"abcd"]), y=[*"efg"]),
        cases(("x,z", [("a", 1), ("b", 2)]), ("y", [*"efghi"])),
    ):
        found = params(quick_cases(made, n))
        assert found[: len(made[::n])] == params(made[::n])
        for had, all_values in zip(
            zip(*found, strict=True), zip(*params(made), strict=True), strict=True
        ):
            assert set(had) == set(all_values)
        assert len(set(found)) == len(found) <= len(made)


SUITE = """
import pytest

@pytest.mark.quick_one_in(2)
@pytest.mark.parametrize("x", [1, 2, 3])
def test(x):
    pass

@pytest.mark.slow
@pytest.mark.quick_one_in(2)
@pytest.mark.parametrize("x", [4, 5])
def test_slow(x):
    pass
"""


def test_a_case_is_quick_or_slow_whichever_are_asked_for(
    run_forked: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(SUITE)
    options = ["-q", "--co", "-m", "not slow", "-p", "conftest", "-c", str(ROOT / "pyproject.toml")]
    arguments = [*options, f"{file}::test[2]", f"{file}::test[3]"]
    variables = outside_workers() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    printed = run_forked(f"import pytest; pytest.main({arguments})", **variables)
    assert re.findall(r"test\[\d\]", printed) == ["test[3]"]
