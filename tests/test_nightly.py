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

from tools.nightly import __main__ as command
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


def _done(part: str, compared: int, *failures: str) -> dict[str, Any]:
    whats = [{"case": None, "what": what} for what in failures]
    return {"part": part, "wanted": 5, "compared": compared, "seconds": 1.0, "failures": whats}


def test_a_part_of_which_nothing_ran_is_a_failure() -> None:
    """As where all tests of the sanitized library are skipped, which pytest calls a success."""
    summary = command._summary([_done("random", 0), _done("random", 5), _done("sanitized", 0)])
    assert summary["random"]["failures"] == []
    assert summary["sanitized"]["failures"] == [{"case": None, "what": "nothing ran"}]


def test_a_program_that_does_not_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE_SECONDS", 0.001)
    for result in (command._fuzz(1e-9, 0), command._sanitized(1e-9)):
        assert result["failures"] == [{"case": None, "what": "does not end"}]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--hours", "0"], "--hours: must be a number of hours above 0, got '0'"),
        (["--hours", "two"], "--hours: must be a number of hours above 0, got 'two'"),
        (["--case", "3"], "--case needs --part"),
        (["--part", "random"], "--part needs --case"),
    ],
)
def test_wrong_commands(
    wrong: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["nightly", *wrong])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


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
    assert report["complete"]
    assert set(report["parts"]) == set(only)
    for name, part in report["parts"].items():
        assert part["failures"] == [], printed
        assert part["compared"] >= PARTS[name].least if name in PARTS else part["compared"] > 20
    assert report["stamp"]["cpu"]["model"]
    assert {"commit", "dirty"} <= set(report["stamp"])
