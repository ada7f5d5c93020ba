# SPDX-License-Identifier: MIT
"""`make gpu` without a GPU: limits, cases that fail in every way, what is kept, and the kit."""

import importlib.util
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

pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")

from benchmarks import gpu, gpu_stages
from benchmarks.gpu_runner import Context, Record, Skipped, Stage, run_stage
from benchmarks.gpu_stages import STAGES
from benchmarks.stamp import REPOSITORY
from tools import gpu_kit


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


@pytest.mark.parametrize("workers", [1, 3])
def test_a_case_costs_itself(workers: int, tmp_path: Path) -> None:
    found, counts = ran(FAULTS, tmp_path, workers=workers, case_seconds=1.0)
    assert {case: record["status"] for case, record in found.items()} == {
        **dict.fromkeys(("a", "b", "c", "d", "e", "part", "parts"), "passed"),
        "fails": "failed",
        "hangs": "hung",
        "exits": "crashed",
        "segfaults": "crashed",
        "skips": "skipped",
    }
    assert counts["counts"]["passed"] == 7
    assert "maximum error 1 > 0.1 at (0, 1)" in found["fails"]["why"]
    assert "exit status 3" in found["exits"]["why"]
    assert f"exit status -{signal.SIGSEGV:d}" in found["segfaults"]["why"]
    assert found["skips"]["why"] == "there is no such tool"
    if workers == 1:  # no process is begun anew for a mere failure
        assert found["a"]["pid"] == found["b"]["pid"] != found["c"]["pid"]


def test_a_broken_gpu_is_left_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mock.Mock(side_effect=RuntimeError("an illegal memory access was encountered"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    found, _ = ran(["a", "b"], tmp_path, device="cuda")
    assert [record["status"] for record in found.values()] == ["passed", "passed"]
    assert found["a"]["pid"] != found["b"]["pid"]


def test_a_stage_ends_with_all_that_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    found, counts = ran(["starts another", "b"], tmp_path, seconds=1.0)
    assert time.monotonic() - began < 5
    assert found["starts another"]["status"] == "stopped"
    assert counts["counts"] == {"stopped": 1, "not begun": 1}
    left = subprocess.run(["pgrep", "-f", "^sleep 60$"], capture_output=True, text=True).stdout
    assert not left


def main(folder: Path, *arguments: str) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ):
        status = gpu.main(["--device", "cpu", "--output", str(folder), *arguments])
    signal.signal(signal.SIGTERM, handler)
    return status


def records(folder: Path) -> list[Record]:
    """Without stamps, and without a line that was cut off."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"stage"' in line and line.endswith("}")]


def faked(monkeypatch: pytest.MonkeyPatch, run: Any = fault) -> None:
    stages = tuple(replace(each, run=run, cases=lambda device: "ab") for each in STAGES)
    monkeypatch.setattr(gpu, "STAGES", stages)


def test_limits() -> None:
    own = {stage.name: stage.seconds for stage in STAGES}
    first, rest = ["load", "right", "time", "counters"], ["tests", "random", "sanitizer", "goals"]
    assert [*own] == first + rest
    assert sum(own[name] for name in first) <= 200
    assert sum(own.values()) + 20 <= 560
    assert gpu.limit(STAGES[0], [*own], 560, 560) == 20
    assert gpu.limit(STAGES[0], [*own], 54, 54) == 2
    assert gpu.limit(STAGES[-1], [*own], 560, 123) == 123


def test_every_stage_runs_into_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in its share of 4 seconds, and the whole in little more."""
    faked(monkeypatch, lambda case, context: time.sleep(60))
    began = time.monotonic()
    assert main(tmp_path, "--seconds", "4") == 1
    assert 3 < time.monotonic() - began < 9
    said = capsys.readouterr().out
    assert said.count("stopped: a: after") == len(STAGES)
    assert len(said.splitlines()) < 150
    assert len(records(tmp_path)) >= len(STAGES)


def test_what_is_there_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    assert main(tmp_path, "--only", "load", "time") == 0
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('\n{"stage": "right", "case": "cut o')  # a call that was cut off
    assert main(tmp_path, "--only", "load", "time", "right") == 0
    stages = [record["stage"] for record in records(tmp_path)]
    assert stages == ["load"] * 2 + ["time"] * 2 + ["right"] * 2
    monkeypatch.setenv("CONVNN_COMMIT", "another")
    monkeypatch.setattr("benchmarks.stamp._git", lambda *arguments: None)
    with pytest.raises(SystemExit, match="of another commit: name another folder"):
        main(tmp_path)


def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("results.jsonl", "report.txt", "benchmark.json.partial"):
        (tmp_path / name).symlink_to("/dev/full")
    faked(monkeypatch)
    assert main(tmp_path) == 1
    said = capsys.readouterr().out
    assert "could not be written to: No space left on device" in said
    assert said.count("2 passed") == len(STAGES)


def test_without_the_package_or_its_tools(tmp_path: Path) -> None:
    """Each case says what is missing, and the next one follows."""
    code = "import sys; sys.modules['convnn_kernels'] = None; from benchmarks import gpu; "
    code += "sys.exit(gpu.main(['--device', 'cpu', '--output', '.', '--only', 'load', 'counters']))"
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    for said in ("3 failed", "import of convnn_kernels halted", "nvidia-smi is not", "ncu is not"):
        assert said in done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch has CUDA")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("was built without CUDA\n")


SANITIZER = """#!{python}
import sys
tool, planted = sys.argv[sys.argv.index("--tool") + 1], "fault" in sys.argv
print("it ran to its end")
errors = int(planted) if {finds} else 0
what = "RACECHECK SUMMARY: %d hazards" if tool == "racecheck" else "ERROR SUMMARY: %d errors"
print("=========", what % errors if {runs} else "Device not supported")
"""


@pytest.mark.parametrize(
    ("runs", "finds", "expected"),
    [(1, 1, ["passed"] * 4), (1, 0, ["passed"] * 3 + ["failed"]), (0, 0, ["skipped"] * 4)],
)
def test_sanitizer_with_a_faked_tool(
    runs: int, finds: int, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool must find the fault that is planted."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(python=sys.executable, runs=runs, finds=finds))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    results = list[Record]()
    run_stage(STAGES[6], Context("cuda", tmp_path, 60.0), results.append)
    found = {each["case"]: each["status"] for each in results}
    assert [found[case] for case in STAGES[6].cases("cuda")] == expected


def test_counters_are_read() -> None:
    text = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","sm__inst_executed_pipe_tensor.avg.pct","Block Size"
"","","","%",""
"0","7","sweep_kernel","61.5","(256, 1, 1)"
"""
    (row,) = gpu_stages.counters(text)
    name = "sm__inst_executed_pipe_tensor.avg.pct"
    assert row == {"Kernel Name": "sweep_kernel", name: "61.5"}
    assert gpu_stages.counters("==ERROR== LibraryNotLoaded") == []


TESTS = """
import pytest
def test_right(record_property): record_property("cases", 50)
def test_wrong(): assert 1 == 2
def test_not_here(): pytest.skip("no")
"""


def test_each_test_is_a_result(tmp_path: Path) -> None:
    """And those that were run are left out."""
    (tmp_path / "test_some.py").write_text(TESTS)
    outcomes, done = tmp_path / "outcomes", tmp_path / "done"
    environment = {"CONVNN_OUTCOMES": str(outcomes), "CONVNN_DONE": str(done)}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.outcomes", "test_some.py"]
    wrong = "test_some.py::test_wrong"
    for known, expected in (("", "passed failed skipped"), (wrong, "passed skipped")):
        outcomes.write_text("")
        done.write_text(known)
        subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True)
        found = [json.loads(line) for line in outcomes.read_text().splitlines()]
        assert " ".join(record["status"] for _, record in found) == expected
    assert found[0][1]["cases"] == 50
    assert found[1][1]["why"] == "no"


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit of the sources as they are, in a checkout of its own."""
    folder, cached = tmp_path / "kit", tmp_path / "kit" / "triton" / "KEY"
    cached.mkdir(parents=True)
    (cached / "kernel.cubin").write_text("code")
    group = {"child_paths": {"kernel.cubin": "/elsewhere/KEY/kernel.cubin"}}
    (cached / "__grp__kernel.json").write_text(json.dumps(group))
    (folder / "lib").mkdir()
    (folder / "lib" / "libconvnn_cuda.so").write_text("library")
    digests = {part: gpu_kit.sources(part) for part in ("lib", "triton")}
    manifest = {"commit": "0123456789abcdef", "triton key": "k", **digests}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(gpu_kit, "sources", digests.__getitem__)
    monkeypatch.setattr(gpu_kit, "REPOSITORY", tmp_path)
    for name in ("TRITON_CACHE_DIR", "PYTHONPATH", "CONVNN_KIT_TRITON", "CONVNN_COMMIT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
    return folder


def test_a_kit_is_put_in_its_place(kit: Path, tmp_path: Path) -> None:
    del os.environ["CONVNN_COMMIT"]
    assert gpu_kit.install(kit) == "0123456789abcdef"
    assert (tmp_path / "convnn_kernels" / "lib" / "libconvnn_cuda.so").read_text() == "library"
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    (group,) = cache.glob("*/__grp__*")
    (path,) = json.loads(group.read_text())["child_paths"].values()
    assert Path(path).read_text() == "code"
    assert cache in Path(path).parents
    assert os.environ["CONVNN_COMMIT"] == "0123456789abcdef"
    if importlib.util.find_spec("triton"):
        with pytest.raises(AssertionError, match="not the Triton of the kit"):
            gpu_kit.check_triton()


def test_a_kit_that_is_older_than_the_sources_is_refused(
    kit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((kit / "manifest.json").read_text())
    (kit / "manifest.json").write_text(json.dumps(manifest | {"triton": "other"}))
    with pytest.raises(gpu_kit.Refused, match=r"^the kit of 0123456789ab is older .* triton: "):
        gpu_kit.install(kit)
    assert gpu_kit.install(kit / "none") is None
    assert "there is no kit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.triton
def test_a_rehearsal_on_cpu_tensors(tmp_path: Path) -> None:
    """Every stage, with the kernels in Triton's interpreter; what it lacks is named."""
    pytest.importorskip("triton")
    main(tmp_path)
    found: dict[str, list[str]] = {}
    for record in records(tmp_path):
        found.setdefault(record["stage"], []).append(record["status"])
    assert [*found] == [stage.name for stage in STAGES]
    assert {status for each in found.values() for status in each} == {"passed", "skipped"}
    for stage in ("load", "right", "time", "tests", "random", "goals"):
        assert "passed" in found[stage], stage
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"]
