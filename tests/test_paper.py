# SPDX-License-Identifier: MIT
"""`python -m benchmarks.paper` from images to table and figure, at a small scale."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.paper import __main__ as command
from benchmarks.paper import data, memory, report, train
from benchmarks.paper.rows import FIGURES, ROWS, TABLES
from benchmarks.paper.train import DivergedError, Recipe

CLASSES = [f"class{i}" for i in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders of images whose class is their brightness, which is soon learned."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-10, 11, (32, 32, 3))
                pixels = np.clip(25 * label + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def run(folder: Path, out: Path, *arguments: str) -> None:
    fixed = ["--data", str(folder), "--out", str(out), "--reduced", "--device", "cpu"]
    # Models this small are slower with more threads, above all beside other processes.
    command.main([*fixed, "--threads", "1", "--batch-size", "20", *arguments])


def test_class_folders(folder: Path) -> None:
    loaded = data.load(folder, "cifar10")
    assert loaded.train.images.shape == (60, 3, 32, 32)
    assert loaded.train.images.dtype == torch.uint8
    assert loaded.test.labels.bincount().tolist() == [2] * 10
    assert loaded.train.images[0].float().mean() < loaded.train.images[-1].float().mean()
    mean, deviation = loaded.mean_and_deviation()
    pixels = loaded.train.images.double() / 255
    torch.testing.assert_close(mean.flatten(), pixels.mean((0, 2, 3)).float())
    expected = pixels.transpose(0, 1).flatten(1).std(1, unbiased=False)
    torch.testing.assert_close(deviation.flatten(), expected.float())
    limited = loaded.train.limited(25)
    assert sorted(limited.labels.bincount().tolist()) == [2] * 5 + [3] * 5
    (folder / "train" / "another").mkdir()
    with pytest.raises(ValueError, match=r"cifar10 has 10 classes, but .* has 11"):
        data.load(folder, "cifar10")
    with pytest.raises(FileNotFoundError, match="neither cifar-100-python nor"):
        data.load(folder.parent, "cifar100")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_torchvision_layout(tmp_path: Path, dataset: str) -> None:
    base = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[dataset]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[dataset]
    names = {
        "cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
        "cifar100": ["train", "test"],
    }[dataset]
    (tmp_path / base).mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for name in names:
        rows.append(generator.integers(0, 256, (4, 3072), dtype=np.uint8))
        batch = {"data": rows[-1], key: [1, 2, 3, 4], "filenames": ["a"] * 4}
        (tmp_path / base / name).write_bytes(pickle.dumps(batch))
    loaded = data.load(tmp_path, dataset)
    assert len(loaded.train.labels) == 4 * (len(names) - 1)
    assert loaded.train.labels[:4].tolist() == [1, 2, 3, 4]
    # Channel by channel, row by row.
    assert loaded.test.images[1, 2, 3, 4] == rows[-1][1, 2 * 1024 + 3 * 32 + 4]


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(pickle.UnpicklingError, match="does not belong into a CIFAR file"):
        data.load(tmp_path, "cifar100")


def test_a_row_of_each_table(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "runs"
    rows = ["vgg11/conv2d", "vgg11/hybrid-0.5"]
    run(folder, out, "--table", "1", "--rows", *rows, "--epochs", "1")
    rows = ["vit/attention", "vit/convnn-random-32"]
    run(folder, out, "--table", "2", "--rows", *rows, "--epochs", "1")
    printed = capsys.readouterr().out
    for cells in (("Conv2D", "1.529", "80.65", "0.293"), ("λ = 0.5", "1.424", "130.015M")):
        line = next(line for line in printed.splitlines() if f"| {cells[0]} " in line)
        assert all(cell in line for cell in cells)
    result = json.loads((out / "cifar10-table2.json").read_text())
    assert result["stamp"]["versions"]["torch"]
    # Each run has its own recipe; a table may show runs of several.
    assert result["logs"]["vit/attention"]["recipe"]["weight_decay"] == 0.01
    assert [line["row"] for line in result["rows"]] == rows
    assert all(0 < line["test_loss"] < 10 for line in result["rows"])


def test_a_run_with_a_break_is_the_run_without(folder: Path, tmp_path: Path) -> None:
    row = "vit/convnn-random-32"
    run(folder, tmp_path / "a", "--rows", row, "--epochs", "2")
    run(folder, tmp_path / "b", "--rows", row, "--epochs", "1")
    run(folder, tmp_path / "b", "--rows", row, "--epochs", "2")
    logs = []
    for name in ("a", "b"):
        log = json.loads((tmp_path / name / "cifar10" / row / "log.json").read_text())
        logs.append([{**epoch, "seconds": 0} for epoch in log["epochs"]])
    assert logs[0] == logs[1]
    assert [epoch["epoch"] for epoch in logs[0]] == [1, 2]
    a, b = (
        load_file(tmp_path / name / "cifar10" / row / "checkpoint.safetensors") for name in "ab"
    )
    assert a.keys() == b.keys()
    assert any(key.startswith("optimizer.") for key in a)
    for key, value in a.items():
        assert torch.equal(value, b[key]), key
    with pytest.raises(ValueError, match="holds a run with another lr"):
        run(folder, tmp_path / "b", "--rows", row, "--epochs", "3", "--lr", "0.5")


def test_loss_falls(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, "--rows", "vit/convnn-all", "--epochs", "4", "--lr", "2e-3")
    log = json.loads((tmp_path / "cifar10/vit/convnn-all/log.json").read_text())
    assert log["epochs"][-1]["train_loss"] < 0.95 * log["epochs"][0]["train_loss"]


def test_divergence_is_an_error(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loaded = data.load(folder, "cifar10")
    recipe = Recipe(epochs=3, batch_size=20, lr=1e30, reduced=True)
    with pytest.raises(DivergedError, match="vit/attention: training loss is nan"):
        train.train(ROWS["vit/attention"], loaded, recipe, tmp_path)


def test_the_recipe_is_the_papers() -> None:
    assert Recipe() == Recipe(
        epochs=150, batch_size=256, lr=1e-4, weight_decay=0.01, clip=1.0, amp="none"
    )


def log_of(epochs: int) -> dict:
    return {
        "epochs": [
            {
                "epoch": i + 1,
                "train_loss": 2.0 / (i + 1),
                "test_loss": 2.5 / (i + 1),
                "train_accuracy": 0.5,
                "test_accuracy": 0.4,
                "seconds": 3.0,
            }
            for i in range(epochs)
        ]
    }


@pytest.mark.parametrize("number", sorted(FIGURES))
def test_figures(number: int, tmp_path: Path) -> None:
    figure = FIGURES[number]
    logs = {row.name: log_of(3) for row in figure.all_rows()}
    logs.pop(figure.all_rows()[0].name)
    path = tmp_path / "figure.png"
    report.draw(figure, logs, path, "cifar10")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    # Curves are colored, an empty frame is not.
    assert (np.ptp(pixels.astype(int), axis=2) > 60).sum() > 200


def test_a_figure_without_training(tmp_path: Path) -> None:
    for row in FIGURES[6].rows:
        path = tmp_path / "cifar10" / row.name / "log.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(log_of(2)))
    run(tmp_path, tmp_path, "--figure", "6", "--no-training")
    assert (tmp_path / "cifar10-figure6.png").stat().st_size > 1000


def test_smoothing() -> None:
    assert report.smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_rows_have_names_of_their_own() -> None:
    for rows in (*TABLES.values(), *(figure.all_rows() for figure in FIGURES.values())):
        assert all(ROWS[row.name] == row for row in rows)
    assert len(TABLES[1]) == 17
    assert len(TABLES[2]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --table, --figure, --rows, --list and --memory is needed"),
        (["--rows", "vgg16"], "--rows must be of those that --list prints, got vgg16"),
        (["--table", "3"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_data_must_be_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CONVNN_DATA", raising=False)
    with pytest.raises(SystemExit, match="--data, or CONVNN_DATA, must name"):
        command.main(["--rows", "vit/attention", "--out", str(tmp_path), "--reduced"])


@pytest.mark.slow
def test_a_step_needs_less_memory_than_eager() -> None:
    for line in memory.measure(8, "cpu", reduced=True):
        assert 0 < line["ours"] < line["eager"], line
