# SPDX-License-Identifier: MIT
"""`make gpu` without a GPU: its message there, its limits of time, and what it writes."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import convnn_kernels
from benchmarks import gpu, stamp


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "make gpu: nothing was run: PyTorch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("built", [False, True])
def test_all_steps_together_take_less_than_ten_minutes(
    built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "unusable_libraries", lambda _: [] if built else ["cuda"])
    steps = gpu.steps("cuda", tmp_path)
    kinds = [step.kind for step in steps if step.kind]
    assert kinds == list(gpu.DEFAULT)
    assert gpu.TOTAL_SECONDS < 600
    left = gpu.TOTAL_SECONDS
    for i, step in enumerate(steps, 1):
        seconds = gpu.seconds_for(step, steps[i:], left)
        # Less than it should take where it must be, enough for the first half of it.
        assert seconds >= (0.4 if built else 0.3) * step.seconds, step.name
        left -= seconds
    assert left >= 0


def test_one_step_alone_has_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unusable_libraries", lambda _: [])
    for kind in (*gpu.DEFAULT, *gpu.MORE):
        info, step = gpu.steps("cuda", tmp_path, [kind])
        assert step.kind == kind
        assert gpu.seconds_for(info, [step], 580) <= 140
        assert gpu.seconds_for(step, [], 570) == 570


def test_what_the_steps_run_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unusable_libraries", lambda _: [])
    for step in gpu.steps("cuda", tmp_path, [*gpu.DEFAULT, *gpu.MORE]):
        module = step.command[step.command.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None, module
        files = [each for each in step.command if each.endswith(".py")]
        assert bool(files) == (module == "pytest")
        assert all((gpu.REPOSITORY / each).exists() for each in files)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ('{"cpu": null, "cuda": null, "triton": null}', []),
        ('{"cpu": null, "cuda": "not built", "triton": null}', ["cuda"]),
        ("Traceback", ["cpu", "cuda"]),
        ("", ["cpu", "cuda"]),
    ],
)
def test_what_has_to_be_built(
    printed: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not load, which may be everything, but no CUDA library without nvcc."""
    monkeypatch.setattr(gpu, "_ASK", f"print({printed!r})")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu.unusable_libraries("cuda") == expected
    assert gpu.unusable_libraries("cpu") == [name for name in expected if name == "cpu"]
    assert gpu.steps("cuda", tmp_path)[0].name.startswith("build of") == bool(expected)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert "cuda" not in gpu.unusable_libraries("cuda")


@pytest.mark.slow
def test_libraries_that_are_here_are_asked() -> None:
    assert gpu.unusable_libraries("cpu") == []


def test_a_step_is_stopped_in_time() -> None:
    code = "import time; print('began', flush=True); time.sleep(60)"
    began = time.monotonic()
    record = gpu.run_step(gpu.Step("slow", (sys.executable, "-c", code), 2), 2, dict(os.environ))
    assert time.monotonic() - began < 20
    assert record["status"] == "stopped after 2 s"
    assert record["output"].startswith("began")


TESTS = """
import os, pytest
def test_right(record_property):
    record_property("cases", 50)
@pytest.mark.parametrize("i", range(2))
def test_wrong(i): assert 1 == 2
def test_not_here(): pytest.skip('no')
def test_that_ends_its_process():
    if {crash}: os._exit(1)
def test_after_that(): pass
"""


def step_of_tests(folder: Path, text: str, *options: str) -> gpu.Step:
    (folder / "test_some.py").write_text(text)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.outcomes", *options)
    command += ("-p", "no:cacheprovider", str(folder))
    return gpu.Step("some", command, 60, outcomes=folder / "some.outcomes")


def test_failed_tests_are_named(tmp_path: Path) -> None:
    step = step_of_tests(tmp_path, TESTS.format(crash=False))
    record = gpu.run_step(step, 60, dict(os.environ))
    assert record["status"] == "failed"
    assert record["tests"] == {"passed": 3, "failed": 2, "skipped": 1}
    assert record["sums"] == {"cases": 50}
    assert record["skipped"] == {"no": 1}
    assert [name.split("::")[1] for name in record["failed"]] == ["test_wrong[0]", "test_wrong[1]"]
    assert all("assert 1 == 2" in why for why in record["failed"].values())
    assert not (tmp_path / "some.outcomes").exists()


@pytest.mark.slow
def test_what_had_ended_is_kept(tmp_path: Path) -> None:
    step = step_of_tests(tmp_path, TESTS.format(crash=True))
    record = gpu.run_step(step, 60, dict(os.environ))
    assert record["status"] == "failed"
    assert record["tests"] == {"passed": 1, "failed": 2, "skipped": 1}


@pytest.mark.slow
def test_a_test_that_ends_its_process_ends_no_other(tmp_path: Path) -> None:
    """As on a GPU machine, where pytest-xdist is."""
    pytest.importorskip("xdist")
    step = step_of_tests(tmp_path, TESTS.format(crash=True), "-n", "1")
    record = gpu.run_step(step, 60, dict(os.environ))
    assert record["tests"] == {"passed": 2, "failed": 3, "skipped": 1}
    assert any("crashed" in why for why in record["failed"].values())


def test_a_step_that_resumes_is_begun_again(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = f"import os, pathlib; p = pathlib.Path({str(seen)!r}); n = p.exists(); p.touch(); "
    command = (sys.executable, "-c", code + f"print(n); os._exit(0 if n else {gpu.CRASHED})")
    for resumes in (True, False):
        seen.unlink(missing_ok=True)
        record = gpu.run_step(gpu.Step("some", command, 60, resumes=resumes), 60, {})
        assert record["status"] == ("passed" if resumes else "failed")


def test_skipped_tests_alone_are_no_success(tmp_path: Path) -> None:
    step = step_of_tests(tmp_path, "import pytest\ndef test(): pytest.skip('no')\n")
    record = gpu.run_step(step, 60, dict(os.environ))
    assert record["exit_status"] == 0
    assert record["status"] == "failed"


def test_a_step_without_its_packages_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        gpu.Step("some", (sys.executable, "-c", ""), 60, needs=("json", "no_such_package")),
        gpu.Step("other", (sys.executable, "-c", ""), 60, needs=("json",)),
    ]
    monkeypatch.setattr(gpu, "steps", lambda *_: steps)
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "left out: " in capsys.readouterr().out
    result = json.loads((tmp_path / "tests.json").read_text())
    records = [record["status"] for record in result["steps"]]
    assert records[0].endswith(" has no no_such_package")
    assert records[1] == "passed"


def test_it_starts_where_there_is_nothing_but_pytorch() -> None:
    """What a step needs is its own matter."""
    packages = ("numpy", "psutil", "tqdm", "pytest", "matplotlib", "PIL", "skimage")
    code = f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
    code += "from benchmarks import gpu, stamp\nprint(stamp.make_stamp('cpu', 1)['commit'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=gpu.REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.triton
def test_from_end_to_end_on_cpu_tensors(tmp_path: Path) -> None:
    """Kernels in Triton's interpreter, where Triton is installed."""
    pytest.importorskip("triton")
    status = gpu.main(["--device", "cpu", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "tests.json").read_text())
    steps = {record["step"]: record for record in result["steps"]}
    assert status == 0, [(name, record["status"]) for name, record in steps.items()]
    assert result["complete"] is True
    assert result["stamp"]["commit"]
    assert result["gpu"]["triton"]
    assert steps["tests: runtime"]["tests"]["passed"] >= 2
    assert steps["tests: operators"]["tests"]["passed"] >= 10
    assert steps["tests: random"]["sums"]["cases"] >= 16
    benchmark = json.loads((tmp_path / "benchmark.json").read_text())
    assert benchmark["complete"] is True


@pytest.mark.parametrize(("said", "dirty"), [("0123abc", False), ("0123abc-dirty", True)])
def test_commit_of_a_copy_without_history(
    said: str, dirty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamp, "_git", lambda *arguments: None)
    monkeypatch.setenv("CONVNN_COMMIT", said)
    found = stamp.make_stamp("cpu", 1)
    assert (found["commit"], found["dirty"]) == ("0123abc", dirty)
    assert found["versions"]["convnn_kernels"] == convnn_kernels.__version__
    monkeypatch.delenv("CONVNN_COMMIT")
    assert stamp.make_stamp("cpu", 1)["commit"] is None
