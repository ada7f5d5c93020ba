# SPDX-License-Identifier: MIT
"""The nightly checks: a few cases of each part, and a fault that each part must find."""

import json
import threading
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools.nightly import __main__ as command
from tools.nightly import cases, leaks, parts, reruns, threads
from tools.nightly.parts import PARTS

ops = torch.ops.convnn
forward = ops.forward
COUNTS = {"random": 4, "special": 4, "derivatives": 20, "reruns": 48, "leaks": 2, "threads": 1}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls, and nothing kept from the runs of another test."""
    monkeypatch.setattr(leaks, "CALLS", 160)
    monkeypatch.setattr(leaks, "WARM_UP", 120)
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
        ("special", cases, lambda **arguments: forward(**arguments | {"bias": None})),
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
    fakes = SimpleNamespace(forward=wrong, select=ops.select, aggregate=ops.aggregate)
    monkeypatch.setattr(module, "ops", fakes)
    result = run(name, tmp_path)
    assert result["failures"], result
    assert result["failures"][0]["case"] >= 500_000
    _kept.clear()


def test_a_leak_is_found_again_by_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = SimpleNamespace(forward=_keeps_memory, select=ops.select, aggregate=ops.aggregate)
    monkeypatch.setattr(leaks, "ops", fakes)
    monkeypatch.setattr("sys.argv", ["nightly", "--part", "leaks", "--case", "500000"])
    with pytest.raises(AssertionError, match=r"grew by \d+ bytes in 40 calls"):
        command.main()
    _kept.clear()


def test_time_that_is_up_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    parts.run(PARTS["derivatives"], 0, 1000, 0.0, out)
    result = json.loads(out.read_text())
    assert (result["wanted"], result["failures"]) == (1000, [])
    assert result["compared"] < 1000


def test_a_shard_that_is_ended_leaves_a_whole_file(tmp_path: Path) -> None:
    """It may be ended while it writes: what is read is either the old file or the new one."""
    out = tmp_path / "out.json"
    parts._write(out, {"case": 1})
    with out.open() as old:
        parts._write(out, {"case": 2})
        assert json.load(old) == {"case": 1}
    assert json.loads(out.read_text()) == {"case": 2}


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
    again = {
        "python -m tools.fuzz --minutes 3e-08 --seed 7": command._fuzz(1e-9, 7),
        "python -m pytest -q -m sanitized tests/test_sanitized.py": command._sanitized(1e-9),
    }
    for words, result in again.items():
        assert result["failures"] == [{"case": None, "what": "does not end", "again": words}]


def test_a_failure_says_how_to_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(words: list[str], seconds: float) -> tuple[str, str]:
        failures = [{"case": 12, "what": "wrong"}]
        Path(words[words.index("--out") + 1]).write_text(
            json.dumps(_done("random", 3) | {"failures": failures, "case": 15})
        )
        return "", "exit status -11"

    monkeypatch.setattr(command, "_call", call)
    result = command._shard(PARTS["random"], 0, 1.0, 0.0, 5, tmp_path)
    again = ["python -m tools.nightly --part random --case " + case for case in ("12", "15")]
    assert [failure["again"] for failure in result["failures"]] == again
    command._print(command._summary([result]), 1.0, tmp_path)
    printed = capsys.readouterr().out
    assert f"FAILED (again: {again[0]}): wrong" in printed
    assert f"FAILED (again: {again[1]}): exit status -11" in printed


def test_each_day_tries_cases_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two shards of ten years have a case of a part in common."""
    shards = max(part.shards for part in PARTS.values())
    days = [date(2026, 1, 1) + timedelta(number) for number in range(3650)]
    firsts = {command.seed_of(day) + n * command.APART for day in days for n in range(shards)}
    assert len({first // command.OF_A_DAY for first in firsts}) == shards * len(days)
    assert all(2 * part.count // part.shards <= command.OF_A_DAY for part in PARTS.values())

    seeds: list[int] = []
    monkeypatch.setattr(command, "nightly", lambda hours, seed, *others: seeds.append(seed))
    for words in ([], ["--seed", "3"]):
        monkeypatch.setattr("sys.argv", ["nightly", *words])
        command.main()
    assert seeds == [command.seed_of(date.today()), 3]


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
    assert f"seed {report['seed']}\n" in printed
    assert set(report["parts"]) == set(only)
    for name, part in report["parts"].items():
        assert part["failures"] == [], printed
        assert part["compared"] >= PARTS[name].least if name in PARTS else part["compared"] > 20
    assert report["stamp"]["cpu"]["model"]
    assert {"commit", "dirty"} <= set(report["stamp"])
