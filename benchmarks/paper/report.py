# SPDX-License-Identifier: MIT
"""Tables of trained rows beside the numbers of the paper, and its figures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.rows import MODELS, Figure, Row
from benchmarks.paper.train import Recipe

Logs = dict[str, dict[str, Any]]
# What both datasets have, and the settings that decide whether a recipe is the paper's.
_IMAGES = {"train": 50_000, "test": 10_000}
_IMAGE_SIZE = [32, 32]
_RECIPE = (
    *("batch_size", "optimizer", "lr", "weight_decay", "schedule", "clip"),
    *("label_smoothing", "augmentation", "amp"),
)
_WINDOW = 10


def differences(log: dict[str, Any]) -> list[str]:
    """In words, what a run has otherwise than the paper, which its numbers must not stand beside.

    Empty for the paper's recipe on full models and all images, after its last epoch.
    """
    recipe, data, papers = log["recipe"], log["data"], Recipe()
    found = ["reduced models"] if recipe["reduced"] else []
    for split, name in (("train", "training"), ("test", "test")):
        if data[split] != _IMAGES[split]:
            found.append(f"{data[split]} {name} images")
    size = data.get("image_size", _IMAGE_SIZE)
    if size != _IMAGE_SIZE:
        found.append(f"images of {size[0]}x{size[1]}")
    epochs = len(log["epochs"])
    if epochs != papers.epochs:
        found.append(f"{epochs} epoch{'s' if epochs > 1 else ''}")
    for name in _RECIPE:
        value = recipe.get(name, getattr(papers, name))
        if value != getattr(papers, name):
            found.append(f"{name.replace('_', ' ')} {value}")
    return found


def entry(row: Row, log: dict[str, Any] | None, dataset: str, reduced: bool) -> dict[str, Any]:
    """One line of a table: ours if the row was trained, and the paper's if they may be compared."""
    num_classes = {"cifar10": 10, "cifar100": 100}[dataset]
    is_trained = bool(log and log["epochs"])
    unlike = differences(log) if log and is_trained else ["reduced models"] * reduced
    line: dict[str, Any] = {
        "row": row.name,
        "label": row.label,
        "switches": row.switches(),
        "paper": None
        if row.paper is None or unlike
        else {
            "test_loss": row.paper.loss[dataset],
            "test_accuracy": row.paper.accuracy[dataset],
            "gflops": row.paper.gflops,
            "parameters": row.paper.parameters[dataset],
        },
        "gflops": row.gflops(num_classes, reduced),
        "parameters": row.parameters(num_classes, reduced),
        "epochs": 0,
        "unlike_the_paper": unlike,
    }
    if log and is_trained:
        last = log["epochs"][-1]
        seconds = sorted(each["seconds"] for each in log["epochs"])
        line |= {
            "epochs": last["epoch"],
            "train_loss": last["train_loss"],
            "test_loss": last["test_loss"],
            "test_accuracy": 100 * last["test_accuracy"],
            "best_test_accuracy": 100 * max(each["test_accuracy"] for each in log["epochs"]),
            "seconds_per_epoch": seconds[len(seconds) // 2],
        }
    return line


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; loss and accuracy are those after the last epoch."""
    head = (
        "layer",
        "loss (paper)",
        "loss",
        "accuracy (paper)",
        "accuracy",
        "GFLOPs (paper)",
        "GFLOPs",
        "parameters (paper)",
        "parameters",
        "epochs",
        "s/epoch",
    )
    body = []
    for line in lines:
        paper = line["paper"] or {}
        body.append(
            (
                line["label"],
                _number(paper.get("test_loss"), ".3f"),
                _number(line.get("test_loss"), ".3f"),
                _number(paper.get("test_accuracy"), ".2f"),
                _number(line.get("test_accuracy"), ".2f"),
                _number(paper.get("gflops"), ".3f"),
                _number(line["gflops"], ".3f"),
                paper.get("parameters", "–"),
                _number(line["parameters"], ","),
                str(line["epochs"]),
                _number(line.get("seconds_per_epoch"), ".1f"),
            )
        )
    has_papers = any(line["paper"] for line in lines)
    kept = [i for i, name in enumerate(head) if has_papers or not name.endswith("(paper)")]
    rows = [[row[i] for i in kept] for row in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def not_the_papers(lines: Sequence[dict[str, Any]]) -> str:
    """Why the paper's numbers are missing beside some rows; empty if they are not."""
    unlike = dict.fromkeys(each for line in lines for each in line["unlike_the_paper"])
    if not unlike:
        return ""
    return "The paper's numbers are left out where a run is unlike the paper's: " + ", ".join(
        unlike
    )


def recipe_switches(rows: Sequence[Row]) -> list[str]:
    """What --as-run changes beside the options of these rows."""
    has_vit = any(row.family == "vit" for row in rows)
    return [
        "seed 42, set after the weights are drawn",
        *["images of ViT-Tiny enlarged as bytes before they are normalized"] * has_vit,
        "normalized by constants",
        "losses and accuracies as means over batches",
    ]


def listing(rows: Sequence[Row]) -> str:
    """Every row with its label and, below it, how --as-run changes it."""
    lines = []
    for row in rows:
        lines += [f"{row.name:34}{row.label}", f"{'':4}as run: {', '.join(row.switches())}"]
    return "\n".join(lines)


def switches(rows: Sequence[Row], as_run: bool) -> str:
    """In which options rows as written and as the authors ran them differ; empty without rows.

    Args:
        rows: of either kind.
        as_run: of which kind they are.
    """
    if not rows:
        return ""
    head = (
        "As the authors ran them. The paper's text has these otherwise (docs/paper.md):"
        if as_run
        else "As the paper's text has them. The authors ran (--as-run, docs/paper.md):"
    )
    lines = [f"- {row.label}: {', '.join(row.switches())}" for row in rows]
    return "\n".join([head, *lines, f"- all: {'; '.join(recipe_switches(rows))}"])


def summary(lines: Sequence[dict[str, Any]], logs: Logs) -> str:
    """A Markdown table of the first and last losses, and the accuracy after the last epoch."""
    text = [
        "| layer | epochs | training loss, first → last | test loss, first → last "
        "| test accuracy, % |",
        "|---|--:|--:|--:|--:|",
    ]
    for line in lines:
        epochs = logs[line["row"]]["epochs"]
        if epochs:
            first, last = epochs[0], epochs[-1]
            model = MODELS[line["row"].split("/")[0]]
            losses = (f"{first[key]:.3f} → {last[key]:.3f}" for key in ("train_loss", "test_loss"))
            cells = (f"{model}, {line['label']}", str(last["epoch"]), *losses)
            text.append(f"| {' | '.join(cells)} | {100 * last['test_accuracy']:.1f} |")
    return "\n".join(text)


def what_was_run(logs: Logs) -> str:
    """Data, scale, recipe, devices and commits of the runs, with every distinct value."""
    runs = [log for log in logs.values() if log["epochs"]]

    def recipe(name: str) -> str:
        return _each(run["recipe"][name] for run in runs)

    def data(name: str) -> str:
        return _each(run["data"][name] for run in runs)

    stamps = [part["stamp"] for run in runs for part in run["parts"]]
    scale = _each("reduced models" if run["recipe"]["reduced"] else "full models" for run in runs)
    commits = _each(
        f"{(stamp['commit'] or 'none')[:12]}{' with changes' if stamp['dirty'] else ''}"
        for stamp in stamps
    )
    kind = "as the authors ran it, " if any(map(_is_as_run, runs)) else ""
    return (
        f"{kind}{recipe('dataset')} from {data('source')}, {data('train')} training and "
        f"{data('test')} test images, {scale}, batches of {recipe('batch_size')}, "
        f"learning rate {recipe('lr')}; "
        f"{_each(stamp['device'] for stamp in stamps)}, commit {commits}"
    )


def _each(values: Iterable[object]) -> str:
    return " and ".join(dict.fromkeys(str(value) for value in values)) or "nothing"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The moving average over the last `window` values."""
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / len(values[max(0, i + 1 - window) : i + 1])
        for i in range(len(values))
    ]


def draw(figure: Figure, logs: Logs, path: Path) -> None:
    """Draws a figure from the logs; rows without epochs are left out.

    Args:
        figure: which rows and how they are grouped.
        logs: by name of row.
        path: of the PNG.
    """
    # Imported here, because only plotting needs it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = list(dict.fromkeys(row.family for row in figure.rows))
    columns = 2 if families or figure.has_time else 1
    size = (5.0 * columns, 3.3 * max(len(families), 1) + 0.7)
    canvas, axes = plt.subplots(max(len(families), 1), columns, figsize=size, squeeze=False)
    if families:
        for family, panels in zip(families, axes, strict=True):
            _loss_curves([row for row in figure.rows if row.family == family], logs, panels)
    else:
        is_best = any(map(_is_as_run, logs.values()))
        name = "test accuracy (%), best epoch" if is_best else "test accuracy (%)"
        _sweep(figure, logs, axes[0][0], "test_accuracy", 100.0, name)
        if figure.has_time:
            _sweep(figure, logs, axes[0][1], "seconds", 1.0, "seconds per epoch")
    canvas.suptitle(_title(figure, logs), fontsize=10)
    canvas.supxlabel(textwrap.fill(what_was_run(logs), 110), fontsize=7, color="gray")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def _title(figure: Figure, logs: Logs) -> str:
    """The figure's, which is the paper's, only above runs that are like the paper's."""
    runs = [log for row in figure.all_rows() if (log := logs.get(row.name)) and log["epochs"]]
    if not any(differences(log) for log in runs):
        return figure.title
    return ": ".join(filter(None, (figure.title, "runs unlike the paper's, see below")))


def _loss_curves(rows: Sequence[Row], logs: Logs, axes: Any) -> None:
    for i, row in enumerate(rows):
        epochs = logs.get(row.name, {"epochs": []})["epochs"]
        if not epochs:
            continue
        # The paper smooths over 10 of 150 epochs; short runs are not smoothed.
        window = _WINDOW if len(epochs) >= 5 * _WINDOW else 1
        for axis, key in zip(axes, ("train_loss", "test_loss"), strict=True):
            values = smoothed([each[key] for each in epochs], window)
            # After ten colors, dashed lines.
            style = {"color": f"C{i % 10}", "linestyle": "--" if i >= 10 else "-", "marker": "."}
            axis.plot([each["epoch"] for each in epochs], values, label=row.label, **style)
    model = MODELS[rows[0].family]
    for axis, name in zip(axes, ("training loss", "test loss"), strict=True):
        axis.set(xlabel="epoch", ylabel=f"{name}, {model}")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)


def _is_as_run(log: dict[str, Any]) -> bool:
    return bool(log["epochs"]) and bool(log["recipe"].get("as_run"))


def _sweep(figure: Figure, logs: Logs, axis: Any, key: str, factor: float, name: str) -> None:
    for i, sweep in enumerate(figure.sweeps):
        points = {}
        for value, row in sweep.rows.items():
            epochs = logs.get(row.name, {"epochs": []})["epochs"]
            if epochs:
                values = sorted(each[key] for each in epochs)
                if key == "seconds":
                    chosen = values[len(values) // 2]
                else:
                    # The authors' figures show the best epoch, their tables the last one.
                    chosen = values[-1] if _is_as_run(logs[row.name]) else epochs[-1][key]
                points[value] = factor * chosen
        if set(points) == {0}:
            axis.axhline(points[0], color=f"C{i}", linestyle="--", label=sweep.label)
        elif points:
            axis.plot(*zip(*points.items(), strict=True), "o-", color=f"C{i}", label=sweep.label)
    axis.set(xlabel=figure.variable, ylabel=name)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
