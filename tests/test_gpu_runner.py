# SPDX-License-Identifier: MIT
"""`make gpu` without a GPU: time limits, cases that fail in every way, and what is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import outside_workers

pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")

from benchmarks import gpu
from benchmarks.environment import REPOSITORY
from benchmarks.gpu_runner import Context, Record, Skipped, Stage, run_stage
from benchmarks.gpu_stages import STAGES


def fault(case: str, context: Context) -> Record:
    """Does what its name says."""
    if case == "skips":
        raise Skipped("there is no such tool")
    assert case != "fails", "output: maximum error 1 > 0.1 at (0, 1)"
    actions: dict[str, Callable[[], object]] = {
        "hangs": lambda: time.sleep(60),
        "exits": lambda: os._exit(3),
        "segfaults": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "starts another": lambda: subprocess.run(["sleep", "60"]),
        "parts": lambda: context.emit("part", {"status": "passed"}),
    }
    actions.get(case, bool)()
    return {"pid": os.getpid()}


FAULTS = ["a", "fails", "b", "hangs", "c", "exits", "d", "segfaults", "skips", "parts", "e"]


def ran(cases: list[str], folder: Path, **options: Any) -> tuple[dict[str, Record], Record]:
    seconds, device = options.pop("seconds", 20.0), options.pop("device", "cpu")
    stage = Stage("some", seconds, lambda device: cases, fault, **options)
    context, results = Context(device, folder, seconds), list[Record]()
    counts = run_stage(stage, context, results.append)
    return {each["case"]: each for each in results}, counts


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_case_costs_only_itself(workers: int, tmp_path: Path) -> None:
    found, counts = ran(FAULTS, tmp_path, workers=workers, case_seconds=1.0)
    expected = dict.fromkeys(("a", "b", "c", "d", "e", "part", "parts"), "passed")
    expected |= {"fails": "failed", "hangs": "hung", "skips": "skipped"}
    expected |= {"exits": "crashed", "segfaults": "crashed"}
    assert {case: record["status"] for case, record in found.items()} == expected
    assert counts["counts"]["passed"] == 7
    assert "maximum error 1 > 0.1 at (0, 1)" in found["fails"]["why"]
    assert "exit status 3" in found["exits"]["why"]
    assert f"exit status -{signal.SIGSEGV:d}" in found["segfaults"]["why"]
    assert found["skips"]["why"] == "there is no such tool"
    if workers == 1:  # a mere failure does not cost a process
        assert found["a"]["pid"] == found["b"]["pid"] != found["c"]["pid"]


def test_a_broken_gpu_context_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mock.Mock(side_effect=RuntimeError("an illegal memory access was encountered"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    found, _ = ran(["a", "b"], tmp_path, device="cuda")
    assert [record["status"] for record in found.values()] == ["passed", "passed"]
    assert found["a"]["pid"] != found["b"]["pid"]


@pytest.mark.slow
def test_a_stage_ends_the_processes_of_its_cases(tmp_path: Path) -> None:
    found, counts = ran(["starts another", "b"], tmp_path, seconds=1.0)
    assert found["starts another"]["status"] == "stopped"
    assert counts["counts"] == {"stopped": 1, "not started": 1}
    left = subprocess.run(["pgrep", "-f", "^sleep 60$"], capture_output=True, text=True).stdout
    assert not left


def main(folder: Path, *arguments: str) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ):
        status = gpu.main(["--device", "cpu", "--output", str(folder), *arguments])
    signal.signal(signal.SIGTERM, handler)
    return status


def records(folder: Path) -> list[Record]:
    """Without stamps and truncated lines."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"stage"' in line and line.endswith("}")]


def faked(monkeypatch: pytest.MonkeyPatch, run: Any = fault) -> None:
    stages = tuple(replace(each, run=run, cases=lambda device: "ab") for each in STAGES)
    monkeypatch.setattr(gpu, "STAGES", stages)


def test_limits() -> None:
    seconds = {stage.name: stage.seconds for stage in STAGES}
    first, rest = ["load", "right", "time", "counters"], ["tests", "random", "sanitizer", "ratios"]
    assert [*seconds] == first + rest
    assert sum(seconds[name] for name in first) <= 200
    assert sum(seconds.values()) + 20 <= 560
    assert gpu.limit(STAGES[0], [*seconds], 560, 560) == 20
    assert gpu.limit(STAGES[0], [*seconds], 54, 54) == 2
    assert gpu.limit(STAGES[-1], [*seconds], 560, 123) == 123


@pytest.mark.slow
def test_every_stage_runs_into_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stages share 8 seconds; starting processes is at the expense of the last ones."""
    faked(monkeypatch, lambda case, context: time.sleep(60))
    began = time.monotonic()
    assert main(tmp_path, "--seconds", "8") == 1
    assert 7 < time.monotonic() - began < 40  # a busy machine starts processes slowly
    said = capsys.readouterr().out
    assert said.count("stopped: a: after") >= 6
    assert "passed" not in said
    assert len(said.splitlines()) < 150


@pytest.mark.slow
def test_stopped_cases_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, lambda case, context: time.sleep(3))
    assert main(tmp_path, "--only", "load", "--seconds", "1") == 1
    faked(monkeypatch)
    assert main(tmp_path, "--only", "load") == 0
    assert [each["status"] for each in records(tmp_path)] == ["stopped", "passed", "passed"]
    assert "stopped" not in (tmp_path / "report.txt").read_text()


def test_nothing_starts_without_time(tmp_path: Path) -> None:
    for seconds in (0.0, -3.0):
        found, counts = ran(["a", "b"], tmp_path, seconds=seconds)
        assert not found
        assert counts["counts"] == {"not started": 2}


@pytest.mark.slow
def test_workers_end_with_the_program(tmp_path: Path) -> None:
    """Even if it is killed: a worker that is left would hold the GPU."""
    code = "import sys; sys.path.insert(0, 'tests'); from test_gpu_runner import *\n"
    code += "faked_by_hand = replace(STAGES[0], run=fault, cases=lambda device: ['hangs'])\n"
    code += "run_stage(faked_by_hand, Context('cpu', Path(), 60.0), print)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.05)
    (child,) = children.read_text().split()
    time.sleep(0.5)
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the worker is still there")


def test_the_summary_fits_the_log(tmp_path: Path) -> None:
    """With as many times, ratios and failures as possible; the failures come last."""
    results = gpu.Results(tmp_path, {"commit": "c"})
    seconds = {"median": 1e-3, "samples": [1e-3] * 3}
    kernels = [{"kernel": "k" * 30, "us": 1.0, "predicted": 2.0, "bound": 1.0}] * 20
    for stage in STAGES:
        for i in range(300):
            row = {"peer": "p" * 20, "pass": "forward", "seconds": seconds, "kernels": kernels}
            rows = {"rows": [row] * 4} if stage.name == "time" else {}
            why = {"status": "failed", "why": f"{i} " + "w" * 500} if i % 2 else {}
            record = {"stage": stage.name, "case": f"{i}" + "c" * 50, "status": "passed"}
            results.append(record | rows | why)
    how = {"seconds": 1.0, "limit": 2.0, "counts": {"failed": 150, "passed": 150}}
    text = gpu.summary(results, {stage.name: how for stage in STAGES})
    assert len(text.splitlines()) <= 150
    assert len(text) < 12_000
    assert text.splitlines()[-5].startswith("ratios ")


def test_finished_cases_do_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    assert main(tmp_path, "--only", "load", "time") == 0
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('\n{"stage": "right", "case": "cut o')  # a truncated line
    assert main(tmp_path, "--only", "load", "time", "right") == 0
    assert [each["stage"][0] for each in records(tmp_path)] == [*"llttrr"]
    monkeypatch.setenv("CONVNN_COMMIT", "another")
    monkeypatch.setattr("benchmarks.environment._git", lambda *arguments: None)
    assert main(tmp_path, "--only", "load") == 0
    assert len(records(tmp_path)) == 2
    assert len(list(tmp_path.glob("results-*.jsonl"))) == 1  # of the commit before


def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("results.jsonl", "report.txt", "benchmark.json.partial"):
        (tmp_path / name).symlink_to("/dev/full")
    faked(monkeypatch)
    assert main(tmp_path) == 1
    said = capsys.readouterr().out
    assert f"cannot write to {tmp_path}: No space left on device" in said
    assert said.count("2 passed") == len(STAGES)


@pytest.mark.slow
def test_without_the_package_or_its_tools(tmp_path: Path) -> None:
    """Each case reports what is missing, and the next one runs."""
    code = "import sys; sys.modules['convnn_kernels'] = None; from benchmarks import gpu; "
    code += "sys.exit(gpu.main(['--device', 'cpu', '--output', '.', '--only', 'load', 'counters']))"
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    for said in ("3 failed", "import of convnn_kernels halted", "nvidia-smi is not", "ncu is not"):
        assert said in done.stdout


def test_missing_gpu_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "finds no CUDA device: --device cpu is a rehearsal" in capsys.readouterr().err


TESTS = """
import pytest
def test_right(record_property): record_property("cases", 50)
def test_wrong(): assert 1 == 2
def test_not_here(): pytest.skip("no")
"""


@pytest.mark.slow
def test_each_test_is_a_result(tmp_path: Path) -> None:
    """Tests that have a result are skipped."""
    (tmp_path / "test_some.py").write_text(TESTS)
    outcomes, done = tmp_path / "outcomes", tmp_path / "done"
    environment = {**outside_workers(), "PYTHONPATH": str(REPOSITORY)}
    environment |= {"CONVNN_OUTCOMES": str(outcomes), "CONVNN_DONE": str(done)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.outcomes", "test_some.py"]
    for finished, expected in (("", "passed failed skipped"), ("wrong", "passed skipped")):
        outcomes.write_text("")
        done.write_text(finished and f"test_some.py::test_{finished}")
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        found = [json.loads(line) for line in outcomes.read_text().splitlines()]
        assert " ".join(record["status"] for _, record in found) == expected
    assert found[0][1]["cases"] == 50
    assert found[1][1]["why"] == "no"


@pytest.mark.slow
@pytest.mark.triton
def test_a_rehearsal_on_cpu_tensors(tmp_path: Path) -> None:
    """Every stage, with the kernels in Triton's interpreter; what is missing is skipped."""
    pytest.importorskip("triton")
    main(tmp_path)
    found: dict[str, list[str]] = {}
    for record in records(tmp_path):
        found.setdefault(record["stage"], []).append(record["status"])
    assert [*found] == [stage.name for stage in STAGES]
    assert {status for each in found.values() for status in each} == {"passed", "skipped"}
    for stage in ("load", "right", "time", "tests", "random", "ratios"):
        assert "passed" in found[stage], stage
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"]
