# SPDX-License-Identifier: MIT
"""The nightly checks: a few cases of each part, and a fault that each part must find."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools.nightly import cases, leaks, parts, reruns, threads
from tools.nightly.parts import PARTS

forward = torch.ops.convnn.forward
COUNTS = {"random": 4, "derivatives": 20, "reruns": 48, "leaks": 6, "threads": 1}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls, and nothing kept from the runs of another test."""
    monkeypatch.setattr(leaks, "CALLS", 40)
    monkeypatch.setattr(leaks, "_history", [])
    monkeypatch.setattr(threads, "CALLS", 2)
    monkeypatch.setattr(reruns, "_made", {})
    monkeypatch.setattr(parts, "MOST_FAILURES", 1)


def run(name: str, folder: Path, count: int | None = None) -> dict[str, Any]:
    out = folder / "out.json"
    parts.run(PARTS[name], 500_000, count or COUNTS[name], 60.0, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", PARTS)
def test_some_cases(name: str, tmp_path: Path) -> None:
    result = run(name, tmp_path)
    assert result["failures"] == []
    assert result["compared"] == COUNTS[name]


def _twice_the_gradient(**arguments: Any) -> Any:
    value = arguments["value"]
    return forward(**arguments | {"value": 2 * value - value.detach()})


def _by_number_of_threads(*args: Any, **options: Any) -> Any:
    Y, s, I = forward(*args, **options)
    return Y + 1e-3 * (torch.get_num_threads() > 1), s, I


def _not_in_the_main_thread(**arguments: Any) -> Any:
    Y, s, I = forward(**arguments)
    return Y + 1.0 * (threading.current_thread() is not threading.main_thread()), s, I


_kept: list[torch.Tensor] = []


def _keeps_memory(*args: Any, **options: Any) -> Any:
    _kept.append(torch.ones(100_000))
    return forward(*args, **options)


@pytest.mark.parametrize(
    ("name", "module", "wrong"),
    [
        ("random", cases, lambda *args: forward(*args[:3], args[3], None, *args[5:])),
        ("derivatives", cases, _twice_the_gradient),
        ("reruns", reruns, _by_number_of_threads),
        ("leaks", leaks, _keeps_memory),
        ("threads", threads, _not_in_the_main_thread),
    ],
)
def test_a_fault_is_found(
    name: str,
    module: Any,
    wrong: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    select, aggregate = torch.ops.convnn.select, torch.ops.convnn.aggregate
    fakes = SimpleNamespace(forward=wrong, select=select, aggregate=aggregate)
    monkeypatch.setattr(module, "ops", fakes)
    result = run(name, tmp_path)
    assert result["failures"], result
    assert result["failures"][0]["case"] >= 500_000
    _kept.clear()


def test_time_that_is_up_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    parts.run(PARTS["derivatives"], 0, 1000, 0.0, out)
    result = json.loads(out.read_text())
    assert (result["wanted"], result["failures"]) == (1000, [])
    assert result["compared"] < 1000


@pytest.mark.slow
def test_the_command(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """A run of seconds; the sanitized library, which is built for minutes, has tests of its own."""
    out = tmp_path / "nightly.json"
    only = [*PARTS, "fuzz"]
    code = f"""
        import sys
        from tools.nightly.__main__ import main
        sys.argv = ["nightly", "--hours", "0.002", "--only", *{only}, "--out", {str(out)!r}]
        sys.exit(main())
    """
    printed = run_python(code)
    report = json.loads(out.read_text())
    assert set(report["parts"]) == set(only)
    for name, part in report["parts"].items():
        assert part["failures"] == [], printed
        assert part["compared"] >= PARTS[name].least if name in PARTS else part["compared"] > 20
    assert report["stamp"]["cpu"]["model"]
    assert {"commit", "dirty"} <= set(report["stamp"])
