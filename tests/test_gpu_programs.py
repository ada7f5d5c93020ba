# SPDX-License-Identifier: MIT
"""What `make gpu` runs beside tests and benchmark, without a GPU: on CPU tensors, and on what the
tools of a GPU machine print."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")

from PIL import Image

from benchmarks import gpu_epochs, gpu_profile, gpu_sanitizer
from benchmarks.gpu_epochs import Epoch
from convnn_kernels import functional


@pytest.mark.slow
def test_profile_on_cpu_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile.json"
    assert gpu_profile.main(["--device", "cpu", "--output", str(output)]) == 0
    (entry,) = json.loads(output.read_text())["calls"]
    assert "convnn::forward" in {row["kernel"] for row in entry["kernels"]}
    assert all(row["microseconds"] > 0 for row in entry["kernels"])
    assert "convnn::forward" in capsys.readouterr().out


def test_a_call_that_cannot_be_profiled_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_profile, "profiled", fails)
    output = tmp_path / "profile.json"
    assert gpu_profile.main(["--device", "cpu", "--output", str(output)]) == 1
    assert "illegal memory" in json.loads(output.read_text())["calls"][0]["reason"]


def test_launches_are_gathered_by_kernel() -> None:
    def event(name: str, device: str, microseconds: float) -> SimpleNamespace:
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=span)

    name = "void convnn::cuda::(anonymous namespace)::sweep_kernel<float>(SelectWork<float>)"
    events = [event("sweep_kernel", "gpu", 2.0), event(name, "gpu", 3.0), event("x", "cpu", 9.0)]
    assert gpu_profile.times(events, "gpu") == {"sweep_kernel": [2.0, 3.0]}


def test_every_kernel_has_a_prediction() -> None:
    names = set(gpu_profile.PREDICTED) | {"group_flags_kernel", "select_small_kernel"}
    folder = Path(gpu_profile.REPOSITORY) / "convnn_kernels" / "triton_kernels"
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    assert {name for name in names if f"def {name}(" in text} == names
    assert text.count("_kernel(\n") == len(names)


def test_counters_are_read() -> None:
    text = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","sm__throughput.avg.pct_of_peak_sustained_elapsed","Block Size"
"","","","%",""
"0","7","sweep_kernel","61.5","(256, 1, 1)"
"1","7","void convnn::cuda::refine_kernel<Half>(SelectWork<Half>)","20.0","(64, 1, 1)"
"""
    name = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
    assert gpu_profile.read_counters(text) == [
        {"kernel": "sweep_kernel", name: "61.5"},
        {"kernel": "refine_kernel", name: "20.0"},
    ]
    assert gpu_profile.read_counters("==ERROR== LibraryNotLoaded") == []


@pytest.mark.slow
def test_short_list_of_calls() -> None:
    assert gpu_sanitizer.calls(torch.device("cpu")) == 18
    record = gpu_sanitizer.run(None, "--calls", "cpu", seconds=120)
    assert record["exit_status"] == 0
    assert "18 calls" in record["printed"]


@pytest.mark.parametrize(
    ("status", "printed", "expected"),
    [
        (0, "18 calls\n========= ERROR SUMMARY: 0 errors\n", ("clean", 0)),
        (0, "18 calls\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)", ("clean", 0)),
        (86, "18 calls\n========= ERROR SUMMARY: 2 errors\n", ("errors", 2)),
        (86, "18 calls\n========= RACECHECK SUMMARY: 1 hazard displayed", ("errors", 1)),
        # It did not run to its end.
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors\n", ("errors", 0)),
        (0, "========= ERROR SUMMARY: 0 errors\n", ("errors", 0)),
        (1, "========= Device not supported\n", ("refused", None)),
        (None, "", ("stopped", None)),
    ],
)
def test_verdict(status: int | None, printed: str, expected: tuple[str, int | None]) -> None:
    assert gpu_sanitizer.verdict(status, printed) == expected


FAKE = """#!{python}
import sys
assert sys.argv[-3:-1] == ["benchmarks.gpu_sanitizer", "--calls"] or sys.argv[-1] == "--plant"
planted = "--plant" in sys.argv
print("1 calls")
tool = sys.argv[sys.argv.index("--tool") + 1]
name = "RACECHECK" if tool == "racecheck" else "ERROR"
what = "errors" if name == "ERROR" else "hazards"
print(f"========= {{name}} SUMMARY: {{int(planted)}} {{what}}")
sys.exit(86 if planted else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("finds", [True, False])
def test_sanitizer_with_a_faked_tool(
    finds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool must find the fault that is planted."""
    tool = tmp_path / "compute-sanitizer"
    text = FAKE if finds else FAKE.replace('"--plant" in sys.argv', "0")
    tool.write_text(text.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(gpu_sanitizer, "BACKENDS", ("cpu",))
    output = tmp_path / "sanitizer.json"
    assert gpu_sanitizer.main(["--output", str(output)]) == (0 if finds else 1)
    runs = json.loads(output.read_text())["runs"]
    verdicts = {(run["tool"], run["what"]): run.get("verdict") for run in runs}
    assert len(runs) == 5
    assert [verdicts[tool, "--calls cpu"] for tool in gpu_sanitizer.TOOLS] == ["clean"] * 3
    assert verdicts["memcheck", "--plant"] == ("errors" if finds else "clean")


@pytest.mark.slow
def test_epochs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        for i in range(10):
            (tmp_path / split / f"class{i}").mkdir(parents=True)
            image = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(image).save(tmp_path / split / f"class{i}" / "0.png")
    epochs = (
        Epoch("vgg11/hybrid-0.5"),
        Epoch("vit/convnn-random-32", eager=True, images=5),
        Epoch("no/such"),
    )
    monkeypatch.setattr(gpu_epochs, "EPOCHS", epochs)
    monkeypatch.setenv("CONVNN_DATA", str(tmp_path))
    ours = functional.convnn
    output = tmp_path / "epochs.json"
    arguments = ["--device", "cpu", "--reduced", "--batch-size", "5", "--output", str(output)]
    assert gpu_epochs.main(arguments) == 1
    first, second, third = json.loads(output.read_text())["epochs"]
    assert (first["images"], first["implementation"], first["epoch"]) == (10, "kernels", 2)
    assert (second["images"], second["implementation"]) == (5, "python_ref")
    assert first["seconds"] > 0
    assert "no/such" in third["reason"]
    assert functional.convnn is ours
    monkeypatch.setenv("CONVNN_DATA", str(tmp_path / "train"))
    assert gpu_epochs.main(arguments) == 2
    assert "CONVNN_DATA must name the dataset" in capsys.readouterr().out
