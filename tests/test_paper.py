# SPDX-License-Identifier: MIT
"""`python -m benchmarks.paper` from images to table and figure, at a small scale."""

import dataclasses
import functools
import json
import os
import pickle
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from benchmarks.memory import in_own_process
from benchmarks.models.vgg import LAYERS as VGG_LAYERS
from benchmarks.models.vit import LAYERS as VIT_LAYERS
from benchmarks.paper import __main__ as command
from benchmarks.paper import data, memory, report, train
from benchmarks.paper.data import NoDataError
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


@pytest.fixture
def torchvision_folder(folder: Path, tmp_path: Path) -> Path:
    """The same images as torchvision unpacks CIFAR-10."""
    loaded = data.load(folder, "cifar10")
    base = tmp_path / "pickled" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    parts = {f"data_batch_{i}": (loaded.train, slice(i - 1, None, 5)) for i in range(1, 6)}
    for name, (split, rows) in {**parts, "test_batch": (loaded.test, slice(None))}.items():
        batch = {
            "data": split.images[rows].flatten(1).numpy(),
            "labels": split.labels[rows].tolist(),
        }
        (base / name).write_bytes(pickle.dumps(batch))
    return base.parent


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
    assert loaded.source == "class folders of .png images"
    with pytest.raises(NoDataError, match="neither cifar-100-python nor"):
        data.load(folder.parent, "cifar100")
    (folder / "train" / "another").mkdir()
    with pytest.raises(NoDataError, match=r"cifar10 has 10 classes, but .* has 11"):
        data.load(folder, "cifar10")


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
    with pytest.raises(NoDataError, match="does not belong in a CIFAR file"):
        data.load(tmp_path, "cifar100")


def test_a_file_as_python_2_wrote_it(tmp_path: Path) -> None:
    """The original files hold byte strings where Python 3 would pickle something else."""
    pixels = np.arange(2 * 3072).astype(np.uint8)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ"
        b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(pixels).to_bytes(4, "little")
        + pixels.tobytes()
        + b"tb"
    )
    batch = b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels](K\x07K\x63eu."
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(batch)
    loaded = data.load(tmp_path, "cifar100")
    assert loaded.test.labels.tolist() == [7, 99]
    assert loaded.test.images.flatten().tolist() == pixels.tolist()


def test_files_that_cannot_be_read_are_named(folder: Path, torchvision_folder: Path) -> None:
    for path, where in (
        (torchvision_folder / "cifar-10-batches-py" / "data_batch_3", torchvision_folder),
        (folder / "test" / "class4" / "1.png", folder),
    ):
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(NoDataError, match=f"cannot read .*{path.name}"):
            data.load(where, "cifar10")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folder", "torchvision_folder"])
def test_a_row_of_each_table(layout: str, tmp_path: Path, capsys, request) -> None:
    folder = request.getfixturevalue(layout)
    out = tmp_path / "runs"
    rows = ["vgg11/conv2d", "vgg11/hybrid-0.5"]
    run(folder, out, "--table", "1", "--rows", *rows, "--epochs", "1")
    rows = ["vit/attention", "vit/convnn-random-32"]
    run(folder, out, "--table", "2", "--rows", *rows, "--epochs", "1")
    printed = capsys.readouterr().out
    for label, *papers in (("Conv2D", "1.529", "80.65", "0.293"), ("λ = 0.5", "1.424", "130.015M")):
        line = next(line for line in printed.splitlines() if line.startswith(f"| {label} "))
        assert not any(cell in line for cell in papers)
    assert "(paper)" not in printed
    assert (
        "The paper's numbers are left out where a run is unlike the paper's: reduced models, "
        "60 training images, 20 test images, 1 epoch, batch size 20\n"
    ) in printed
    text = (out / "cifar10-table2.json").read_text()
    result = json.loads(text)
    assert result["stamp"]["versions"]["torch"]
    assert str(tmp_path) not in text
    assert result["command"] == (
        "python -m benchmarks.paper --table 2 --rows vit/attention vit/convnn-random-32 "
        "--data FOLDER --threads 1 --epochs 1 --batch-size 20 --reduced"
    )
    # Each run has its own recipe, data and stamp; a table may show runs of several.
    log = result["logs"]["vit/attention"]
    assert log["recipe"]["weight_decay"] == 0.01
    assert (log["data"]["train"], log["data"]["test"]) == (60, 20)
    assert [part["first_epoch"] for part in log["parts"]] == [1]
    assert log["parts"][0]["stamp"].keys() == result["stamp"].keys()
    assert [line["row"] for line in result["rows"]] == rows
    assert all(0 < line["test_loss"] < 10 for line in result["rows"])
    assert colored_pixels(out / "cifar10-table2.png") > 200


@pytest.mark.slow
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
    with pytest.raises(SystemExit, match=r"holds a run with another lr: 0.0001, now 0.5"):
        run(folder, tmp_path / "b", "--rows", row, "--epochs", "3", "--lr", "0.5")
    (folder / "train" / "class3" / "0.png").unlink()
    with pytest.raises(SystemExit, match="holds a run with another train: 60, now 59"):
        run(folder, tmp_path / "b", "--rows", row, "--epochs", "3")


@pytest.mark.slow
def test_a_run_of_either_kind(folder: Path, tmp_path: Path, capsys) -> None:
    """Each has a folder of its own, and neither goes on where the other stopped."""
    row, out = "vit/convnn-spatial-32", tmp_path / "runs"
    options = ("--rows", row, "--epochs", "1", "--batch-size", "25")
    run(folder, out, *options)
    written = capsys.readouterr().out
    run(folder, out, *options, "--as-run")
    as_run = capsys.readouterr().out
    switches = ROWS[row].switches()
    assert len(switches) == 4
    for printed, head in ((written, "The authors ran"), (as_run, "The paper's text has these")):
        assert head in printed
        assert f"- ConvNN, spatial, r = 32: {', '.join(switches)}\n" in printed
        assert "- all: seed 42, set after the weights are drawn; " in printed
    assert "as the authors ran it, cifar10" in as_run
    results = [
        json.loads((out / kind / "cifar10-rows.json").read_text()) for kind in (".", "as-run")
    ]
    assert [result["as_run"] for result in results] == [False, True]
    assert all(result["rows"][0]["switches"] == switches for result in results)
    assert " --as-run" in results[1]["command"]
    logs = [result["logs"][row] for result in results]
    assert [log["recipe"]["as_run"] for log in logs] == [False, True]
    assert logs[0]["epochs"][0]["test_loss"] != logs[1]["epochs"][0]["test_loss"]
    assert logs[1]["data"]["mean"] == pytest.approx([0.4914, 0.4822, 0.4465])
    # The class token, which one step has hardly changed, is drawn with 0.02 and with 1.
    tokens = [
        load_file(out / kind / "cifar10" / row / "checkpoint.safetensors")["model.class_token"]
        for kind in (".", "as-run")
    ]
    assert tokens[0].std() < 0.1 < 0.5 < tokens[1].std()
    # Moved into the folder of the other.
    (out / "as-run" / "cifar10").rename(out / "moved")
    (out / "cifar10").rename(out / "as-run" / "cifar10")
    with pytest.raises(SystemExit, match="holds a run with another as_run: False, now True"):
        run(folder, out, *options, "--as-run")


def test_a_run_from_before_this_setting_goes_on(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loaded = data.load(folder, "cifar10")
    recipe = Recipe(epochs=1, batch_size=20, reduced=True, train_limit=20, test_limit=10)
    row = ROWS["vit/attention"]
    asdict = dataclasses.asdict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train, "asdict", lambda each: {k: v for k, v in asdict(each).items() if k != "as_run"}
        )
        before = train.train(row, loaded, recipe, tmp_path, {})
    assert "as_run" not in before["recipe"]
    with pytest.raises(train.AnotherRunError, match="another as_run: False, now True"):
        as_run = dataclasses.replace(recipe, as_run=True)
        train.train(row.as_run(), loaded, as_run, tmp_path, {})
    log = train.train(row, loaded, dataclasses.replace(recipe, epochs=2), tmp_path, {})
    assert [epoch["epoch"] for epoch in log["epochs"]] == [1, 2]


def test_seeds_as_run() -> None:
    """The seed draws the weights; what follows is the same for all."""
    assert [Recipe(as_run=True, seed=seed).seed_of(3) for seed in (0, 1)] == [42_000_129] * 2
    assert [Recipe(seed=seed).seed_of(3) for seed in (0, 1)] == [3, 1_000_006]


def test_metrics_as_run(folder: Path) -> None:
    """Means over batches, in which an image of the last batch counts more."""
    torch.set_num_threads(1)
    dataset = data.load(folder, "cifar10")
    model = ROWS["vit/attention"].build(10, reduced=True).eval()
    recipe = Recipe(batch_size=7, as_run=True)
    scale = train._scale(dataset, recipe)
    loss, accuracy = train.evaluate(model, dataset.test, recipe, scale, 32)
    mean, deviation = (torch.tensor(each)[:, None, None] for each in data.AS_RUN_SCALE["cifar10"])
    with torch.no_grad():
        logits = model((dataset.test.images / 255 - mean) / deviation)
    losses = torch.nn.functional.cross_entropy(logits, dataset.test.labels, reduction="none")
    correct = (logits.argmax(1) == dataset.test.labels).double()
    assert loss == pytest.approx(sum(part.mean().item() for part in losses.split(7)) / 3, rel=1e-5)
    assert accuracy == pytest.approx(sum(part.mean().item() for part in correct.split(7)) / 3)


@pytest.mark.parametrize(("before", "after"), [(32, 224), (5, 23), (64, 32)])
def test_images_are_enlarged_as_by_pillow(before: int, after: int) -> None:
    """And shrunk: folders of images need not have 32×32 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (before, before, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels).resize((after, after), Image.Resampling.BILINEAR)
    images = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    assert torch.equal(
        data.resized(images, after)[0].permute(1, 2, 0), torch.tensor(np.array(expected)).float()
    )
    # In the recipe, before they are normalized; as written, after.
    split = data.Split(images, torch.tensor([0]))
    scale = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.2)
    inputs, _ = train._inputs(split, torch.tensor([0]), scale, after, Recipe(as_run=True))
    torch.testing.assert_close(inputs, (data.resized(images, after) / 255 - 0.4) / 0.2)
    inputs, _ = train._inputs(split, torch.tensor([0]), scale, after, Recipe())
    assert (inputs - (data.resized(images, after) / 255 - 0.4) / 0.2).abs().max() > 1e-3


@pytest.mark.parametrize("as_run", [False, True])
def test_only_rows_of_vit_tiny_have_its_images(as_run: bool) -> None:
    vgg, vit = ROWS["vgg11/conv2d"], ROWS["vit/attention"]
    for rows, has_images in (([vgg], False), ([vit], True), ([vgg, vit], True)):
        last = report.switches(rows, as_run).splitlines()[-1]
        assert last.startswith("- all: seed 42")
        assert ("images of ViT-Tiny" in last) == has_images


def test_every_row_of_the_tables_says_what_was_run(capsys) -> None:
    command.main(["--list"])
    printed = capsys.readouterr().out.splitlines()
    for row in (*TABLES[1], *TABLES[2]):
        assert row.changes
        at = next(i for i, line in enumerate(printed) if line.split()[:1] == [row.name])
        assert printed[at + 1].split(maxsplit=2)[2] == ", ".join(row.switches())
    assert ROWS["vgg11/conv2d"].switches() == ["layer='hybrid'", "branch_ratio=0.0"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], list(ROWS)),
        (["--table", "2"], [row.name for row in TABLES[2]]),
        (["--figure", "5"], [row.name for row in FIGURES[5].all_rows()]),
        (["--rows", "vit/local", "vgg11/conv2d"], ["vgg11/conv2d", "vit/local"]),
        (["--table", "1", "--rows", "vgg11/hybrid-1", "--as-run"], ["vgg11/hybrid-1"]),
    ],
)
def test_rows_that_are_listed(arguments: list[str], names: list[str], capsys) -> None:
    command.main([*arguments, "--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[::2]] == names


@pytest.mark.parametrize("rows", [[], ["--rows", "vit/local"]], ids=["long", "short"])
def test_a_list_whose_reader_stops_early(rows: list[str], monkeypatch) -> None:
    """A short one stays in the buffer, and Python writes it once more at its exit."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        command.main(["--list", *rows])
        pipe.flush()


@pytest.mark.parametrize("name", [row.name for row in (*TABLES[1], *TABLES[2])])
def test_rows_as_run(name: str) -> None:
    """They have the parameters that the paper prints, all of them this time."""
    row = ROWS[name]
    as_run = row.as_run()
    assert as_run.as_run() == as_run
    assert as_run.options != row.options
    assert row.paper is not None
    for dataset, classes in (("cifar10", 10), ("cifar100", 100)):
        count = as_run.parameters(classes, reduced=False)
        assert f"{count // 1000 / 1000:.3f}M" == row.paper.parameters[dataset]


@pytest.mark.slow
def test_checkpoints_now_and_then(folder: Path, tmp_path: Path) -> None:
    """The log has every epoch; a run goes on from the last checkpoint."""
    row = "vit/attention"
    place = tmp_path / "runs" / "cifar10" / row
    options = ("--rows", row, "--save-every", "2")
    with pytest.MonkeyPatch.context() as patch:
        saved = []
        patch.setattr(train, "_save", lambda *arguments: saved.append(1))
        run(folder, tmp_path / "runs", *options, "--epochs", "3")
        assert len(saved) == 2
    log = json.loads((place / "log.json").read_text())
    assert [epoch["epoch"] for epoch in log["epochs"]] == [1, 2, 3]
    run(folder, tmp_path / "runs", *options, "--epochs", "2")
    run(folder, tmp_path / "runs", *options, "--epochs", "3")
    again = json.loads((place / "log.json").read_text())
    assert [part["first_epoch"] for part in again["parts"]] == [1, 3]
    assert [e["test_loss"] for e in again["epochs"]] == [e["test_loss"] for e in log["epochs"]]


@pytest.mark.slow
def test_interrupted_runs_go_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Broken off within an epoch, and while a checkpoint is being written."""

    def run_two_epochs(name: str) -> list[dict]:
        run(folder, tmp_path / name, "--rows", "vit/attention", "--epochs", "2")
        return epochs(name)

    def epochs(name: str) -> list[dict]:
        log = json.loads((tmp_path / name / "cifar10/vit/attention/log.json").read_text())
        return [{**epoch, "seconds": 0} for epoch in log["epochs"]]

    expected = run_two_epochs("a")
    steps = []
    clip = torch.nn.utils.clip_grad_norm_

    def break_off(*arguments: object) -> None:
        steps.append(1)
        # Of three batches an epoch, the second of the second.
        if len(steps) == 5:
            raise KeyboardInterrupt
        clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", break_off)
        with pytest.raises(SystemExit, match="interrupted; the same command resumes"):
            run_two_epochs("b")
    assert epochs("b") == expected[:1]
    assert run_two_epochs("b") == expected

    saves = []
    save_file = train.save_file

    def write_half(tensors: dict, path: Path, **options: object) -> None:
        saves.append(1)
        if len(saves) == 2:
            path.write_bytes(b"half")
            raise OSError("disk full")
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_file", write_half)
        with pytest.raises(OSError, match="disk full"):
            run_two_epochs("c")
    assert epochs("c") == expected[:1]
    assert run_two_epochs("c") == expected


@pytest.mark.slow
def test_loss_falls(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, "--rows", "vit/convnn-all", "--epochs", "4", "--lr", "2e-3")
    log = json.loads((tmp_path / "cifar10/vit/convnn-all/log.json").read_text())
    assert log["epochs"][-1]["train_loss"] < 0.95 * log["epochs"][0]["train_loss"]


def test_divergence_is_an_error(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loaded = data.load(folder, "cifar10")
    recipe = Recipe(epochs=3, batch_size=20, lr=1e30, reduced=True)
    with pytest.raises(DivergedError, match="vit/attention: training loss is nan"):
        train.train(ROWS["vit/attention"], loaded, recipe, tmp_path, {})
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_recipe_is_the_papers() -> None:
    assert Recipe() == Recipe(
        epochs=150,
        batch_size=256,
        optimizer="adamw",
        lr=1e-4,
        weight_decay=0.01,
        schedule="none",
        clip=1.0,
        label_smoothing=0.0,
        augmentation="none",
        amp="none",
        reduced=False,
        train_limit=None,
        test_limit=None,
    )
    options = command.parse(command.make_parser(), ["--table", "1"])
    for name, value in vars(Recipe()).items():
        if name != "device":
            assert getattr(options, name) == value, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-size", "30"],
        ["--optimizer", "sgd"],
        ["--lr", "2e-4"],
        ["--weight-decay", "0.5"],
        ["--schedule", "cosine"],
        ["--clip", "0.01"],
        ["--label-smoothing", "0.1"],
        ["--augmentation", "flip-shift"],
        ["--seed", "1"],
        ["--amp", "bfloat16"],
    ],
    ids=lambda flags: flags[0],
)
def test_every_part_of_the_recipe_is_a_flag(flags: list[str], folder: Path, tmp_path: Path) -> None:
    row = ["--rows", "vit/attention", "--epochs", "2"]
    run(folder, tmp_path / "plain", *row)
    run(folder, tmp_path / "other", *row, *flags)
    plain, other = (
        json.loads((tmp_path / name / "cifar10/vit/attention/log.json").read_text())
        for name in ("plain", "other")
    )
    field = flags[0][2:].replace("-", "_")
    changed = [name for name, value in plain["recipe"].items() if value != other["recipe"][name]]
    assert changed == [field]
    losses = [[epoch["train_loss"] for epoch in log["epochs"]] for log in (plain, other)]
    assert losses[0] != losses[1]
    if field == "schedule":
        # It starts as without one, and is part of what must not change when a run goes on.
        assert losses[0][0] == losses[1][0]
        assert [Recipe(**other["recipe"]).lr_of(epoch) for epoch in (0, 1)] == [1e-4, 5e-5]
        with pytest.raises(SystemExit, match="another epochs: 2, now 3"):
            run(folder, tmp_path / "other", *row, *flags, "--epochs", "3")


def test_evaluation(folder: Path) -> None:
    """Without dropout, on normalized images, the mean over all, whatever the batches are."""
    dataset = data.load(folder, "cifar10")
    scale = dataset.mean_and_deviation()
    model = ROWS["vit/attention"].build(10, reduced=True)
    recipe = Recipe(batch_size=7)
    loss, accuracy = train.evaluate(model, dataset.test, recipe, scale, 32)
    pixels = dataset.train.images.double() / 255
    mean, deviation = pixels.mean((0, 2, 3)), pixels.transpose(0, 1).flatten(1).std(1)
    images = (dataset.test.images / 255 - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        logits = model.eval()(images.float())
    expected = torch.nn.functional.cross_entropy(logits, dataset.test.labels).item()
    assert loss == pytest.approx(expected, rel=1e-3)
    assert accuracy == (logits.argmax(1) == dataset.test.labels).double().mean().item()


def test_flip_and_shift() -> None:
    images = torch.arange(1, 2 * 3 * 6 * 7 + 1.0).view(2, 3, 6, 7).repeat(50, 1, 1, 1)
    seen = set()
    for image, moved in zip(images, train._flip_and_shift(images), strict=True):
        padded = {
            False: torch.nn.functional.pad(image, (4, 4, 4, 4)),
            True: torch.nn.functional.pad(image.flip(-1), (4, 4, 4, 4)),
        }
        found = [
            (mirrored, y, x)
            for mirrored, whole in padded.items()
            for y in range(9)
            for x in range(9)
            if torch.equal(whole[:, y : y + 6, x : x + 7], moved)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 30
    assert {mirrored for mirrored, _, _ in seen} == {False, True}


def log_of(epochs: int, papers: bool = False, **recipe: Any) -> dict:
    """The log of a reduced run, or of one that is the paper's but for its epochs and `recipe`."""
    stamp = {"device": "cpu", "commit": "0123456789abcdef", "dirty": False}
    reduced = {} if papers else {"batch_size": 20, "lr": 1e-3, "reduced": True}
    count = {"train": 50_000, "test": 10_000} if papers else {"train": 60, "test": 20}
    return {
        "recipe": {**vars(Recipe()), **reduced, **recipe},
        "data": {"source": "class folders", **count},
        "parts": [{"first_epoch": 1, "stamp": stamp}],
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
        ],
    }


def colored_pixels(path: Path) -> int:
    """Curves are colored, an empty frame is not."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.ptp(pixels, axis=2) > 60).sum())


def test_sweeps_are_those_of_the_authors() -> None:
    """As in their argument files; the horizontal lines are at 0."""
    values = {
        number: {tuple(sweep.rows) for sweep in FIGURES[number].sweeps} for number in (4, 5, 7, 8)
    }
    assert values == {
        4: {(*range(1, 13),), (0,)},
        5: {tuple(n * n for n in range(4, 33, 2)), (0,)},
        7: {(*range(1, 13),), (0,)},
        8: {(*range(16, 193, 16),), (0,)},
    }
    spatial = ROWS["vgg11/hybrid-0.5-spatial-36"]
    assert spatial.switches() == ["candidates=FlatRowCandidates(6)"]


def test_figures_as_run_show_the_best_epoch(tmp_path: Path) -> None:
    drawn = []

    class Axis:
        def __getattr__(self, name: str):
            return lambda *values, **_: drawn.append((name, values))

    figure = FIGURES[8]
    for as_run in (False, True):
        logs = {row.name: log_of(3, as_run=as_run) for row in figure.all_rows()}
        for log in logs.values():
            log["epochs"][1]["test_accuracy"] = 0.7
        report._sweep(figure, logs, Axis(), "test_accuracy", 100.0, "accuracy")
    heights = [values[0] for name, values in drawn if name == "axhline"]
    assert heights == pytest.approx([40, 40, 70, 70])


@pytest.mark.quick_one_in(2)
@pytest.mark.parametrize("number", sorted(FIGURES))
def test_figures(number: int, tmp_path: Path) -> None:
    figure = FIGURES[number]
    logs = {row.name: log_of(3) for row in figure.all_rows()}
    logs.pop(figure.all_rows()[0].name)
    path = tmp_path / "figure.png"
    report.draw(figure, logs, path)
    assert colored_pixels(path) > 200


def test_a_figure_without_training(tmp_path: Path) -> None:
    for row in FIGURES[6].rows:
        path = tmp_path / "cifar10" / row.name / "log.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(log_of(2)))
    run(tmp_path, tmp_path, "--figure", "6", "--no-training")
    assert (tmp_path / "cifar10-figure6.png").stat().st_size > 1000


def test_nothing_has_been_trained(tmp_path: Path, capsys) -> None:
    """Of the rows that are asked for; with one of them there is a table, and a panel for it."""
    path = tmp_path / "cifar10" / "vit" / "attention" / "log.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(log_of(2)))
    for arguments in (["--figure", "3"], ["--table", "1"], ["--table", "2", "--as-run"]):
        place = tmp_path / ("as-run" if "--as-run" in arguments else ".") / "cifar10"
        message = f"none of these rows has been trained in {re.escape(str(place))}$"
        with pytest.raises(SystemExit, match=message):
            run(tmp_path, tmp_path, *arguments, "--no-training")
    assert capsys.readouterr().out == ""
    assert not [*tmp_path.rglob("*.png"), *tmp_path.glob("*.json")]
    # A panel for VGG-11 would have an empty legend, of which matplotlib warns.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = ["vit/attention", "vgg11/conv2d"]
        run(tmp_path, tmp_path, "--rows", *rows, "--no-training")
    assert colored_pixels(tmp_path / "cifar10-rows.png") > 200


def test_what_was_run_names_every_recipe() -> None:
    logs = {"a": log_of(2), "b": log_of(2), "never": {"epochs": []}}
    logs["b"]["recipe"]["lr"] = 0.5
    logs["b"]["parts"].append(
        {"first_epoch": 2, "stamp": {"device": "cpu", "commit": None, "dirty": None}}
    )
    assert report.what_was_run(logs) == (
        "cifar10 from class folders, 60 training and 20 test images, reduced models, "
        "batches of 20, learning rate 0.001 and 0.5; cpu, commit 0123456789ab and none"
    )


def test_the_papers_numbers_of_either_dataset() -> None:
    for dataset, cells in (
        ("cifar10", ("1.558", "77.41", "2.507", "5.479M", "5,479,306")),
        ("cifar100", ("3.817", "50.07", "2.507", "5.496M", "5,496,676")),
    ):
        line = report.entry(ROWS["vit/attention"], log_of(150, papers=True), dataset, reduced=False)
        printed = report.table([line])
        assert all(cell in printed for cell in cells), printed
        # Ours: the loss and accuracy after the last epoch, and the median of the seconds.
        assert all(cell in printed for cell in ("0.017", "40.00", "3.0"))
        assert report.not_the_papers([line]) == ""


UNLIKE: list[tuple[str, dict]] = [
    ("reduced models, 60 training images, 20 test images, 3 epochs, batch size 20, lr 0.001", {}),
    ("149 epochs", {"epochs": 149}),
    ("151 epochs", {"epochs": 151}),
    ("reduced models", {"recipe": {"reduced": True}}),
    ("lr 0.001", {"recipe": {"lr": 0.001}}),
    ("augmentation flip-shift", {"recipe": {"augmentation": "flip-shift"}}),
    ("label smoothing 0.1", {"recipe": {"label_smoothing": 0.1}}),
    ("amp bfloat16", {"recipe": {"amp": "bfloat16"}}),
    ("49999 training images", {"data": {"train": 49_999}}),
    ("9999 test images", {"data": {"test": 9_999}}),
    ("images of 64x64", {"data": {"image_size": [64, 64]}}),
]


@pytest.mark.quick_one_in(6)
@pytest.mark.parametrize(("unlike", "change"), UNLIKE, ids=[unlike for unlike, _ in UNLIKE])
def test_other_runs_do_not_stand_beside_the_papers_numbers(unlike: str, change: dict) -> None:
    log = log_of(3)
    if change:
        log = log_of(change.get("epochs", 150), papers=True, **change.get("recipe", {}))
        log["data"] |= change.get("data", {})
    line = report.entry(ROWS["vit/attention"], log, "cifar10", log["recipe"]["reduced"])
    assert line["paper"] is None
    assert "(paper)" not in report.table([line])
    assert report.not_the_papers([line]).endswith(f": {unlike}")
    # Beside a row that may be compared, its cells are empty.
    whole = report.entry(ROWS["vit/local"], log_of(150, papers=True), "cifar10", False)
    printed = report.table([line, whole]).splitlines()
    assert "loss (paper)" in printed[0]
    assert "1.558" not in printed[2]
    assert "1.626" in printed[3]
    # Nor do their curves under the paper's title.
    figure = dataclasses.replace(FIGURES[6], title="Figure 6")
    logs = {figure.all_rows()[0].name: log}
    assert report._title(figure, logs) == "Figure 6: runs unlike the paper's, see below"


@pytest.mark.parametrize("setting", [{"seed": 1}, {"compile": True}], ids=str)
def test_what_does_not_make_another_recipe(setting: dict) -> None:
    assert report.differences(log_of(150, papers=True, **setting)) == []
    figure = dataclasses.replace(FIGURES[6], title="Figure 6")
    logs = {figure.all_rows()[0].name: log_of(150, papers=True, **setting)}
    assert report._title(figure, logs) == "Figure 6"


def test_rows_that_were_not_trained() -> None:
    """The paper's numbers, but beside those of a reduced model only if they are asked for."""
    row = ROWS["vit/attention"]
    assert report.entry(row, {"epochs": []}, "cifar10", reduced=False)["paper"] is not None
    assert report.entry(row, {"epochs": []}, "cifar10", reduced=True)["paper"] is None


def test_only_the_images_of_the_limit_are_decoded(folder: Path, monkeypatch) -> None:
    """Those that the limit would keep of all, in the same order, though classes differ in size."""
    for name in ("0.png", "2.png", "3.png", "5.png"):
        (folder / "train" / "class3" / name).unlink()
    everything = data.load(folder, "cifar10")
    opened = []
    open_image = Image.open
    monkeypatch.setattr(data.Image, "open", lambda path: (opened.append(path), open_image(path))[1])
    for train_limit, test_limit in ((25, 7), (1, 1), (56, 20), (1000, 1000), (None, None)):
        opened.clear()
        some = data.load(folder, "cifar10", train_limit, test_limit)
        expected = everything.limited(train_limit, test_limit)
        assert torch.equal(some.train.images, expected.train.images)
        assert torch.equal(some.train.labels, expected.train.labels)
        assert torch.equal(some.test.images, expected.test.images)
        assert torch.equal(some.test.labels, expected.test.labels)
        assert len(opened) == min(train_limit or 56, 56) + min(test_limit or 20, 20)
        assert some.source == everything.source


def test_decoding_shows_a_bar(folder: Path, capsys) -> None:
    data.load(folder, "cifar10", 20, 10)
    shown = capsys.readouterr().err
    assert "train images" in shown
    assert "/20" in shown
    assert "test images" in shown
    assert "/10" in shown


def test_limits_of_pickled_images(torchvision_folder: Path) -> None:
    loaded = data.load(torchvision_folder, "cifar10", 25, 10)
    assert sorted(loaded.train.labels.bincount().tolist()) == [2] * 5 + [3] * 5
    assert len(loaded.test.labels) == 10


def test_a_limited_run_is_the_same_from_limited_data(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = Recipe(epochs=1, batch_size=20, reduced=True, train_limit=20, test_limit=10)
    logs = [
        train.train(ROWS["vit/attention"], loaded, recipe, tmp_path / str(i), {})
        for i, loaded in enumerate(
            (data.load(folder, "cifar10"), data.load(folder, "cifar10", 20, 10))
        )
    ]
    assert logs[0]["data"] == logs[1]["data"]
    assert logs[0]["data"]["image_size"] == [32, 32]
    assert logs[0]["epochs"][0]["test_loss"] == logs[1]["epochs"][0]["test_loss"]


def test_smoothing() -> None:
    assert report.smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_rows_have_names_of_their_own() -> None:
    for rows in (*TABLES.values(), *(figure.all_rows() for figure in FIGURES.values())):
        assert all(ROWS[row.name] == row for row in rows)
    assert len(TABLES[1]) == 17
    assert len(TABLES[2]) == 8


def test_labels_of_swept_rows_begin_as_their_curve() -> None:
    for sweep in FIGURES[7].sweeps:
        for k, row in sweep.rows.items():
            swept = "" if k == 0 or row.name in {row.name for row in TABLES[2]} else f", k = {k}"
            assert row.label.removesuffix(", k = 9") == sweep.label + swept
    assert ROWS["vit/convnn-k1"].label == "ConvNN, all, k = 1"
    assert ROWS["vit/kvt-k1"].label == "KVT, k = 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --table, --figure, --rows, --list and --memory is needed"),
        (["--rows", "vgg16"], "--rows must be of those that --list prints, got vgg16"),
        (["--table", "3"], "invalid choice"),
        (["--table", "1", "--figure", "3"], "not allowed with argument"),
        (["--table", "1", "--as-run", "--as-written"], "not allowed with argument"),
        (["--memory", "--as-run"], "--memory is of the models as written, not allowed with"),
        (
            ["--table", "1", "--rows", "vit/local", "vgg11/conv2d"],
            "--rows must be of that table or figure, got vit/local",
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


_COUNT, _POSITIVE = "an integer of at least 1", "a positive number"


@pytest.mark.parametrize(
    ("option", "texts", "expected"),
    [
        ("--epochs", ("0", "-1", "1.5", "many"), _COUNT),
        ("--batch-size", ("0",), _COUNT),
        ("--threads", ("0", "-1"), _COUNT),
        ("--save-every", ("0",), _COUNT),
        ("--train-limit", ("0",), _COUNT),
        ("--test-limit", ("-1",), _COUNT),
        ("--lr", ("0", "-1", "nan", "inf", "fast"), _POSITIVE),
        ("--clip", ("0", "-1", "nan", "inf"), _POSITIVE),
        ("--weight-decay", ("-1", "nan", "inf"), "a number of at least 0"),
        ("--label-smoothing", ("-0.1", "1.1", "nan"), "a number from 0 to 1"),
        ("--device", ("foo", "cuda", "cuda:0", ""), "cpu, as there is no CUDA device"),
    ],
)
def test_numbers_and_devices_that_are_refused(
    option: str, texts: tuple[str, ...], expected: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for text in texts:
        with pytest.raises(SystemExit) as raised:
            command.parse(command.make_parser(), ["--rows", "vit/local", option, text])
        assert raised.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith(f"error: argument {option}: must be {expected}, got {text!r}")


def test_numbers_and_devices_that_are_accepted(monkeypatch, capsys) -> None:
    given = {"epochs": 1, "lr": 1e-9, "clip": 1e9, "weight_decay": 0, "label_smoothing": 1}
    given |= {"threads": 1, "device": "cuda:1"}
    flags = (f"--{name.replace('_', '-')}={value}" for name, value in given.items())
    arguments = ["--table", "1", *flags]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = vars(command.parse(command.make_parser(), arguments))
    assert given == {name: options[name] for name in given}
    with pytest.raises(SystemExit):
        command.parse(command.make_parser(), [*arguments, "--device", "cuda:2"])
    message = "argument --device: must be one of cpu, cuda, cuda:0, cuda:1, got 'cuda:2'"
    assert message in capsys.readouterr().err


def test_help_shows_the_defaults(capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    options = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    shown = {text.split()[0]: text for text in re.split(" (?=--)", options)}
    defaults = {**vars(Recipe()), "out": "paper_runs", "train_limit": "all", "test_limit": "all"}
    for name, default in defaults.items():
        if name not in ("as_run", "compile", "reduced", "device"):
            assert f"(default: {default})" in shown["--" + name.replace("_", "-")]
    assert shown["--no-training"] == "--no-training only print or draw rows trained so far"


def test_data_must_be_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CONVNN_DATA", raising=False)
    arguments = ["--rows", "vit/attention", "--out", str(tmp_path), "--reduced"]
    with pytest.raises(SystemExit, match="--data, or CONVNN_DATA, must name"):
        command.main(arguments)
    with pytest.raises(SystemExit, match="has neither cifar-10-batches-py nor folders train and"):
        command.main([*arguments, "--data", str(tmp_path / "none")])


STEPS = (
    memory.Step("vgg11/hybrid-0.5", 48, 2, reduced=True),
    memory.Step("vit/convnn-all", 384, 1, reduced=True),
)


@pytest.mark.parametrize(
    ("step", "matrix"),
    [
        (memory.Step("vgg11/hybrid-0.5", 32, 32), 4 * 32 * 1024 * 34**2),
        (memory.Step("vit/convnn-all", 224, 32), 4 * 32 * 197**2),
        (STEPS[1], 4 * (96**2 + 1) ** 2),
    ],
)
def test_size_of_a_matrix_of_similarities(step: memory.Step, matrix: int) -> None:
    assert memory.largest_matrix(step) == matrix


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.row)
def test_training_never_holds_a_matrix_of_similarities(step: memory.Step) -> None:
    """All of one step above the model is smaller than one such matrix."""
    peak = in_own_process([memory.__name__], memory._peak, step, False, "cpu", 1)
    assert 0 < peak < memory.largest_matrix(step)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_matrix_of_similarities_is_seen() -> None:
    """The control: the eager reference holds them."""
    (line,) = memory.measure("cpu", STEPS[:1])
    assert line["eager"] > line["matrix"] > line["ours"]
    assert f"| {line['eager'] / 1e6:,.0f} |" in memory.table([line])


ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "benchmarks" / "results" / "paper"


def test_the_recorded_run() -> None:
    """The loss of every kind of layer falls, over as many epochs for each."""
    result = json.loads((RECORDED / "cifar10-rows.json").read_text())
    kinds = {(ROWS[name].family, ROWS[name].options["layer"]) for name in result["logs"]}
    assert kinds == {*(("vgg11", x) for x in VGG_LAYERS), *(("vit", x) for x in VIT_LAYERS)}
    # The paper's numbers do not stand beside those of reduced models.
    assert all(line["paper"] is None and line["unlike_the_paper"] for line in result["rows"])
    recipes = [log["recipe"] for log in result["logs"].values()]
    assert all(recipe == recipes[0] for recipe in recipes)
    for name, log in result["logs"].items():
        assert len(log["epochs"]) == recipes[0]["epochs"], name
        losses = [epoch["train_loss"] for epoch in log["epochs"]]
        assert losses[-1] < losses[0], name
        assert max(losses) < 1.1 * losses[0], name
        assert log["epochs"][-1]["test_loss"] < log["epochs"][0]["test_loss"], name
        assert log["parts"][0]["stamp"]["commit"], name
        assert not any(part["stamp"]["dirty"] for part in log["parts"]), name


def test_the_readme_prints_what_was_recorded() -> None:
    readme = (ROOT / "README.md").read_text()
    result = json.loads((RECORDED / "cifar10-rows.json").read_text())
    assert result["command"] in " ".join(readme.replace("\\\n", " ").split())
    assert report.summary(result["rows"], result["logs"]) in readme
    assert "](benchmarks/results/paper/cifar10-rows.png)" in readme
    assert (RECORDED / "cifar10-rows.png").exists()
    assert memory.table(json.loads((RECORDED / "memory.json").read_text())["steps"]) in readme


class BasicBlock(nn.Module):
    """That of torchvision's ResNet-18 and -34."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


def resnet(blocks: tuple[int, ...], num_classes: int) -> nn.Module:
    """Torchvision's, an eighth as wide."""
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, 8, 7, 2, padding=3, bias=False),
        "maxpool": nn.MaxPool2d(3, 2, padding=1),
    }
    width = 8
    for i, count in enumerate(blocks):
        stage = []
        for j in range(count):
            stage.append(BasicBlock(width, 8 * 2**i, 2 if i and not j else 1))
            width = 8 * 2**i
        layers[f"layer{i + 1}"] = nn.Sequential(*stage)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.add_module("fc", nn.Linear(width, num_classes))
    return model


class DenseLayer(nn.Module):
    """That of torchvision's DenseNet, with a growth of 4."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 16, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 4, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.norm1(x).relu())
        return torch.cat([x, self.conv2(self.norm2(y).relu())], 1)


def densenet(num_classes: int) -> nn.Module:
    """The blocks of DenseNet-121, an eighth as wide."""
    features = nn.Sequential()
    features.add_module("conv0", nn.Conv2d(3, 8, 7, 2, padding=3, bias=False))
    width = 8
    for i, count in enumerate((6, 12, 24, 16)):
        block = nn.Sequential(*(DenseLayer(width + 4 * j) for j in range(count)))
        features.add_module(f"denseblock{i + 1}", block)
        width += 4 * count
        if i < 3:
            transition = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2))
            features.add_module(f"transition{i + 1}", transition)
            width //= 2
    model = nn.Sequential()
    model.add_module("features", features)
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.add_module("classifier", nn.Linear(width, num_classes))
    return model


PAGE_TEXT = (ROOT / "docs" / "paper.md").read_text()
PAGE = re.findall(r"```python\n(.*?)```", PAGE_TEXT, re.DOTALL)


def test_other_networks_of_the_page(monkeypatch, capsys) -> None:
    """Its code, with small networks of the same form and names in place of torchvision's."""
    models = types.SimpleNamespace(
        resnet18=functools.partial(resnet, (2, 2, 2, 2)),
        resnet34=functools.partial(resnet, (3, 4, 6, 3)),
        densenet121=densenet,
    )
    fake = types.ModuleType("torchvision")
    fake.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    torch.set_num_threads(1)
    for code, expected in (
        (PAGE[0].replace("resnet34", "resnet18"), (16, 3, 58, 58)),
        (PAGE[0], (32, 3, 58, 58)),
    ):
        scope: dict[str, Any] = {}
        exec(code, scope)
        lines = re.findall(r"(\d+) layers swapped, (\d+) left", capsys.readouterr().out)
        counts = [(int(swapped), int(left)) for swapped, left in lines]
        assert len(counts) == 8
        stages = [
            [sum(column) for column in zip(*half, strict=True)] for half in (counts[:4], counts[4:])
        ]
        assert (*stages[0], *stages[1]) == expected
        assert (
            f"This swaps 16 convolutions of ResNet-18, 32 of ResNet-34 and {expected[2]} of"
            in PAGE_TEXT
        )
    for model in (scope["resnet"], scope["densenet"]):
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
        loss = torch.nn.functional.cross_entropy(
            model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])
        )
        loss.backward()
        assert all(each.grad is not None for each in model.parameters())


def test_pixel_shuffle_of_the_page() -> None:
    scope: dict[str, Any] = {}
    exec(PAGE[1], scope)
    assert scope["y"].shape == (2, 32, 32, 32)
    assert (scope["layer"][1].in_channels, scope["layer"][1].out_channels) == (64, 128)
    assert len(PAGE) == 2


def test_the_tests_that_the_page_names() -> None:
    names = set(re.findall(r"`(test_\w+)`", PAGE_TEXT))
    files = ("test_models.py", "test_paper.py", "test_paper_fixtures.py")
    defined = "".join((ROOT / "tests" / name).read_text() for name in files)
    assert len(names) > 15
    assert [name for name in sorted(names) if f"def {name}(" not in defined] == []
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE_TEXT, re.MULTILINE)]
    rows = numbers[: numbers.index(3, 3)]  # before the table of figures
    assert rows == [*range(1, len(rows) + 1)]
