# SPDX-License-Identifier: MIT
"""`make gpu` without a GPU: its message there, its limits of time, and what it writes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "make gpu: nothing was run: PyTorch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("built", [False, True])
def test_all_steps_together_take_less_than_ten_minutes(
    built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "missing_libraries", lambda _: [] if built else ["cuda"])
    steps = gpu.steps("cuda", tmp_path)
    names = [step.name for step in steps]
    assert names[-4:] == ["tests: runtime", "tests: operators", "tests: large", "benchmark"]
    assert gpu.TOTAL_SECONDS < 600
    left = gpu.TOTAL_SECONDS
    for step in steps:
        seconds = gpu.seconds_for(step, left)
        assert seconds >= (50 if built else 35), step.name
        left -= seconds


def test_what_has_to_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIBRARIES", tmp_path)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu.missing_libraries("cuda") == ["cpu", "cuda"]
    assert gpu.missing_libraries("cpu") == ["cpu"]
    assert gpu.steps("cuda", tmp_path)[0].name.startswith("build of cpu")
    for name in ("cpu", "cuda"):
        (tmp_path / f"libconvnn_{name}.so").touch()
    assert gpu.missing_libraries("cuda") == []


def test_a_step_is_stopped_in_time() -> None:
    code = "import time; print('began', flush=True); time.sleep(60)"
    began = time.monotonic()
    record = gpu.run_step(gpu.Step("slow", (sys.executable, "-c", code), 2), 2, dict(os.environ))
    assert time.monotonic() - began < 20
    assert record["status"] == "stopped after 2 s"
    assert record["output"].startswith("began")


def test_failed_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_not_here(): pytest.skip('no')\n"
    )
    junit = tmp_path / "some.xml"
    command = (sys.executable, "-m", "pytest", "-q", str(tmp_path), f"--junitxml={junit}")
    record = gpu.run_step(gpu.Step("some", command, 60, junit=junit), 60, dict(os.environ))
    assert record["status"] == "failed"
    assert record["tests"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert [name.split("::")[1] for name in record["failed"]] == ["test_wrong"]
    assert not junit.exists()


def test_skipped_tests_alone_are_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("import pytest\ndef test(): pytest.skip('no')\n")
    junit = tmp_path / "some.xml"
    command = (sys.executable, "-m", "pytest", "-q", str(tmp_path), f"--junitxml={junit}")
    record = gpu.run_step(gpu.Step("some", command, 60, junit=junit), 60, dict(os.environ))
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
    benchmark = json.loads((tmp_path / "benchmark.json").read_text())
    assert benchmark["complete"] is True
