# SPDX-License-Identifier: MIT
"""`python -m benchmarks.paper.study`: its points, its runs at a tiny scale, and its statistics."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import figures
from benchmarks.paper import study, study_report, train
from benchmarks.paper.rows import MODELS, ROWS, Row
from benchmarks.paper.rows import TABLES as THE_PAPERS
from benchmarks.paper.study_rows import (
    BASELINES,
    FIGURES,
    OPTIONS,
    POINTS,
    RECIPES,
    SEEDS,
    TABLES,
    TIMED,
)

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "benchmarks" / "results" / "paper"
PAIR = ["vit/attention", "vit/convnn-random-32"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for label in range(10):
            path = tmp_path / "data" / split / f"class{label}"
            path.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Recipes of two steps in each of two epochs."""
    for family, recipe in RECIPES.items():
        small = dataclasses.replace(recipe, epochs=2, batch_size=10, train_limit=20, test_limit=10)
        monkeypatch.setitem(RECIPES, family, small)


def run(folder: Path, out: Path, *arguments: str) -> None:
    study.main(["--data", str(folder), "--out", str(out), *arguments])


def described(row: Row) -> dict[str, Any]:
    """Options that can be compared; two functools.partial never are equal."""
    made = row.options.get("candidates")
    return {**row.options, **OPTIONS[row.family], "candidates": made and (made.func, made.args)}


def test_points() -> None:
    """All rows of the tables and figures, and one model to a name, as in the paper's command."""
    rows = [row for table in TABLES.values() for row in table]
    rows += [row for figure in FIGURES.values() for row in figure.all_rows()]
    assert {row.name for row in rows} == set(POINTS)
    for number, table in TABLES.items():
        assert {row.name for row in THE_PAPERS[number]} <= {row.name for row in table}
    for row in rows:
        assert described(row) == described(POINTS[row.name]), row.name
        assert described(row) == described(ROWS.get(row.name, row)), row.name
        assert POINTS[row.name].options.items() >= OPTIONS[row.family].items()
    assert set(BASELINES) == set(RECIPES) == set(OPTIONS) == set(MODELS)
    assert set(TIMED) <= set(POINTS)
    random, spatial = (set(sweep.rows) for sweep in FIGURES[5].sweeps[:2])
    assert random == spatial == {16, 64, 144, 256, 576, 1024}


def test_the_ends_of_every_sweep_run() -> None:
    """A kernel may be even, and r must be a square number for spatial candidates of maps."""
    sweeps = [list(sweep.rows.values()) for each in FIGURES.values() for sweep in each.sweeps]
    for name in {row.name for sweep in sweeps for row in (sweep[0], sweep[-1])}:
        model = POINTS[name].build(10, reduced=True).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, 32, 32)).isfinite().all(), name


@pytest.mark.slow
def test_a_study_is_resumed_where_it_was_interrupted(
    folder: Path, tmp_path: Path, tiny: None, capsys
) -> None:
    only = ["--only", *PAIR, "--seed", "1"]
    run(folder, tmp_path / "whole", *only)
    out = tmp_path / "runs"
    save = train._save_log

    def save_and_stop(to: Path, log: dict[str, Any]) -> None:
        save(to, log)
        if to == out / PAIR[1] / "seed1":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_save_log", save_and_stop)
        with pytest.raises(SystemExit, match="interrupted; the same command resumes"):
            run(folder, out, *only)
    first, second = ((out / name / "seed1" / "log.json") for name in PAIR)
    assert [len(json.loads(each.read_text())["epochs"]) for each in (first, second)] == [2, 1]
    before = first.stat().st_mtime_ns
    capsys.readouterr()
    run(folder, out, *only)
    printed = capsys.readouterr().out
    assert f"1/1 {PAIR[1]}, seed 1: " in printed
    assert PAIR[0] not in printed
    assert first.stat().st_mtime_ns == before
    log, whole = (
        json.loads((base / PAIR[1] / "seed1" / "log.json").read_text())
        for base in (out, tmp_path / "whole")
    )
    assert [part["first_epoch"] for part in log["parts"]] == [1, 2]
    for ours, theirs in zip(log["epochs"], whole["epochs"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_run_of_another_recipe_is_not_taken_for_a_finished_one(
    folder: Path, tmp_path: Path, tiny: None, monkeypatch
) -> None:
    only = ["--only", PAIR[0], "--seed", "0"]
    run(folder, tmp_path, *only)
    monkeypatch.setitem(RECIPES, "vit", dataclasses.replace(RECIPES["vit"], lr=0.5))
    with pytest.raises(SystemExit, match=r"another lr: 0\.002, now 0\.5"):
        run(folder, tmp_path, *only)


@pytest.mark.slow
def test_what_is_collected(folder: Path, tmp_path: Path, tiny: None, monkeypatch) -> None:
    for seed in SEEDS[:2]:
        run(folder, tmp_path, "--only", PAIR[0], "--seed", str(seed))
    monkeypatch.setattr(study, "TIMED", PAIR)
    study.main(["--out", str(tmp_path), "--times", "0"])
    study.main(["--out", str(tmp_path), "--times", "0"])
    study.main(["--out", str(tmp_path), "--no-training"])
    text = (tmp_path / "study.json").read_text()
    result = json.loads(text)
    assert str(tmp_path) not in text
    assert list(result["points"]) == [PAIR[0]]
    assert list(result["points"][PAIR[0]]["runs"]) == ["0", "1"]
    for seed, found in result["points"][PAIR[0]]["runs"].items():
        log = json.loads((tmp_path / PAIR[0] / f"seed{seed}" / "log.json").read_text())
        assert found["test_loss"] == pytest.approx(log["epochs"][-1]["test_loss"], abs=1e-6)
        assert found["test_accuracy"] == log["epochs"][-1]["test_accuracy"]
    assert result["data"]["train"] == 20
    assert result["recipes"]["vit"]["epochs"] == 2
    assert result["stamp"].keys() >= {"commit", "cpu", "versions"}
    assert len(result["commits"]) == 1
    # Two rounds of each part, of which the first is left out.
    assert [len(steps) for steps in result["times"]["steps"].values()] == [2, 2]


@pytest.mark.slow
def test_workers_train_the_same(folder: Path, tmp_path: Path, tiny: None) -> None:
    logs = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        run(folder, out, "--only", *PAIR, "--seed", "0", "--workers", workers)
        logs.append([json.loads((out / n / "seed0" / "log.json").read_text()) for n in PAIR])
    for ours, theirs in zip(*logs, strict=True):
        assert ours["epochs"][-1]["test_loss"] == theirs["epochs"][-1]["test_loss"]


def made(accuracies: dict[str, list[float]]) -> dict[str, Any]:
    """A study with these accuracies, in %, by point and seed."""
    points = {
        name: {
            "label": POINTS[name].label,
            "runs": {
                str(seed): {"test_loss": 2.0 + seed, "test_accuracy": each / 100}
                for seed, each in enumerate(found)
            },
        }
        for name, found in accuracies.items()
    }
    recipe = {"epochs": 4, "batch_size": 50, "lr": 1e-3}
    return {
        "data": {"source": "images", "train": 2000, "test": 1000, "image_size": [32, 32]},
        "recipes": {"vgg11": recipe, "vit": recipe},
        "commits": [{"commit": "0123456789abcdef", "dirty": False}],
        "points": points,
        "times": {"steps": {name: [10.0, 11.0, 30.0] for name in TIMED}},
    }


@pytest.mark.parametrize(
    ("ours", "mean", "error", "verdict"),
    [
        # Differences of 4, 5, 6: a deviation of 1, so an error of 1 / √3, and 5 is 8.7 of these.
        ([34.0, 36.0, 38.0], 5.0, 0.57735, "yes"),
        ([24.0, 26.0, 28.0], -5.0, 0.57735, "yes"),
        # Differences of 1, 2, 3: 2 is 3.5 errors, which three seeds make too often.
        ([31.0, 33.0, 35.0], 2.0, 0.57735, "perhaps"),
        ([30.0, 32.0, 34.0], 1.0, 0.57735, "no"),
        ([30.0, 31.0, 32.0], 0.0, 0.0, "no"),
    ],
)
def test_differences(ours: list[float], mean: float, error: float, verdict: str) -> None:
    found = study_report.difference(
        made({"vit/attention": [30.0, 31.0, 32.0], "vit/kvt-9": ours}),
        "vit/kvt-9",
        "vit/attention",
    )
    assert found is not None
    assert (found.mean, found.error) == (pytest.approx(mean), pytest.approx(error, abs=1e-5))
    assert found.verdict == verdict


def test_seeds_are_paired_and_missing_ones_left_out() -> None:
    content = made({"vit/attention": [30.0, 40.0, 50.0], "vit/kvt-9": [31.0, 43.0]})
    found = study_report.difference(content, "vit/kvt-9", "vit/attention")
    # 2 is 2 errors of two seeds, which a t of 12.7 does not let pass.
    assert found == study_report.Difference(pytest.approx(2.0), pytest.approx(1.0), 2)
    assert study_report.difference(content, "vit/sparse", "vit/attention") is None
    names = ["vit/attention", "vit/kvt-9"]
    # Variances of 100 and 72 with 2 and 1 degrees of freedom.
    assert study_report.pooled_deviation(content, names) == pytest.approx((272 / 3) ** 0.5)


def test_tables_and_conclusion() -> None:
    content = made(
        {
            "vit/attention": [30.0, 31.0, 32.0],
            "vit/kvt-9": [34.0, 36.0, 38.0],
            "vit/local": [28.0, 28.0, 30.0],
            "vit/sparse": [30.0, 32.0, 34.0],
        }
    )
    names = [row.name for row in TABLES[2]]
    lines = study_report.table(content, names).splitlines()
    assert "| Attention | 3.000 ± 1.000 | 31.0 ± 1.0 |  |  |" in lines
    assert "| KVT, k = 9 | 3.000 ± 1.000 | 36.0 ± 2.0 | +5.0 ± 0.6 | yes |" in lines
    assert "| Local attention | 3.000 ± 1.000 | 28.7 ± 1.2 | −2.3 ± 0.3 | yes |" in lines
    assert "| Sparse attention | 3.000 ± 1.000 | 32.0 ± 2.0 | +1.0 ± 0.6 | no |" in lines
    assert "| KVT, k = 100 | – | – |  |  |" in lines
    text = study_report.conclusion(content, names)
    assert text.startswith(
        "Of 3 rows, distinguishable from Attention are 1 (KVT, k = 9) above and "
        "1 (Local attention) below it, perhaps none above and none below; chance alone would make "
        "0.2 distinguishable. "
    )
    # Variances of 1, 4, 4/3 and 4.
    deviation = ((1 + 4 + 4 / 3 + 4) / 4) ** 0.5
    assert f"deviation of {deviation:.1f} points" in text
    assert f"below {2 * deviation * (2 / 3) ** 0.5:.1f} says nothing" in text
    assert study_report.conclusion(made({}), names) == "Too few runs are finished to compare any."


def test_a_table_with_two_baselines() -> None:
    content = made(
        {
            "vgg11/conv2d": [30.0, 31.0, 32.0],
            "vgg11/hybrid-0": [32.0, 33.0, 35.0],
            "vgg11/hybrid-0.5": [29.0, 30.0, 32.0],
        }
    )
    names = [row.name for row in TABLES[1]]
    lines = study_report.table(content, names).splitlines()
    assert lines[0].endswith("| minus Conv2D | distinguishable | minus λ = 0 | distinguishable |")
    assert "| Conv2D | 3.000 ± 1.000 | 31.0 ± 1.0 |  |  | −2.3 ± 0.3 | yes |" in lines
    assert "| λ = 0 | 3.000 ± 1.000 | 33.3 ± 1.5 | +2.3 ± 0.3 | yes |  |  |" in lines
    last = "| λ = 0.5 | 3.000 ± 1.000 | 30.3 ± 1.5 | −0.7 ± 0.3 | no | −3.0 ± 0.0 | yes |"
    assert last in lines


@pytest.mark.slow
@pytest.mark.parametrize("number", sorted(FIGURES))
def test_drawing(number: int, tmp_path: Path, monkeypatch) -> None:
    """Means and deviations of the curves, without the point that was not run, and medians."""
    from matplotlib.axes import Axes

    names = [row.name for row in FIGURES[number].all_rows()]
    content = made({name: [30.0 + i, 31.0 + i, 33.5 + i] for i, name in enumerate(names[1:])})
    drawn, errorbar = [], Axes.errorbar

    def record(axes: Axes, x: Any, y: Any, error: Any, **style: Any) -> Any:
        drawn.append((style["label"], list(y), error))
        return errorbar(axes, x, y, error, **style)

    monkeypatch.setattr(Axes, "errorbar", record)
    path = tmp_path / "figure.png"
    study_report.draw(content, number, path)
    curves = [sweep for sweep in FIGURES[number].sweeps if len(sweep.rows) > 1]
    for sweep, (label, means, deviations) in zip(curves, drawn, strict=False):
        rows = [row for row in sweep.rows.values() if row.name != names[0]]
        assert label == sweep.label
        assert means == pytest.approx([30.5 + names.index(row.name) for row in rows])
        assert deviations == pytest.approx([3.25**0.5] * len(rows))
    if FIGURES[number].has_time:
        for sweep, (_, medians, _) in zip(curves, drawn[len(curves) :], strict=True):
            assert medians == [11.0] * len(sweep.rows)
    else:
        assert len(drawn) == len(curves)
    with Image.open(path) as image:
        assert image.width > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "vgg16"], "--only must be of those that --list prints, got vgg16"),
        (["--workers", "0"], "argument --workers: must be an integer of at least 1, got '0'"),
        (["--times", "nan"], "argument --times: must be a number of at least 0, got 'nan'"),
        (["--seed", "3"], "invalid choice: 3"),
        ([], "--data, or CONVNN_DATA, must name the folder of the dataset"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.delenv("CONVNN_DATA", raising=False)
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert message in capsys.readouterr().err


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has neither cifar-10-batches-py nor folders train and"):
        run(tmp_path, tmp_path / "runs", "--workers", "2")


def test_the_recorded_study() -> None:
    """Complete, from one commit, by the recipes of today, and as its page shows it."""
    text = (RECORDED / "study.json").read_text()
    assert len(text) < 300_000
    result = json.loads(text)
    assert set(result["points"]) == set(POINTS)
    for name, point in result["points"].items():
        assert set(point["runs"]) == {str(seed) for seed in SEEDS}, name
    for family, recipe in result["recipes"].items():
        now = {**dataclasses.asdict(RECIPES[family]), "seed": None}
        assert recipe.items() <= now.items()
    assert result["options"] == OPTIONS
    assert set(result["times"]["steps"]) == set(TIMED)
    (commit,) = result["commits"]
    assert commit["commit"]
    assert not commit["dirty"]
    # One of ten classes is right by chance.
    for baseline in (each for family in BASELINES.values() for each in family):
        assert min(study_report.values(result, baseline.name).values()) > 20
    page = (ROOT / "docs" / "study.md").read_text()
    for part in ("study", "study sweeps", *(f"study table {number}" for number in TABLES)):
        assert f"<!-- paper: {part} -->\n{figures.paper_table(part)}<!-- end -->" in page
    for number in FIGURES:
        assert f"](../benchmarks/results/paper/figure-{number}.png)" in page
        with Image.open(RECORDED / f"figure-{number}.png") as image:
            assert image.width > 500
