# SPDX-License-Identifier: MIT
"""Tables and figures of the study, with the spread over seeds and what stands out from it."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.rows import MODELS, Figure, Row
from benchmarks.paper.study_rows import BASELINES, FIGURES, POINTS, TABLES

Study = dict[str, Any]

# Student's t: within so many standard errors, by degrees of freedom, are 95% of the differences
# that chance makes.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
_CHANCE = 0.05
# The least number of standard errors that is mentioned.
_LEAST = 2.0
# So many rows are named in a sentence; of more, only the number is given.
_NAMED = 3


@dataclass(frozen=True)
class Difference:
    """Of two points, paired by seed: the mean, its standard error, and how many seeds both have."""

    mean: float
    error: float
    seeds: int

    @property
    def verdict(self) -> str:
        """ "yes", "perhaps" or "no": whether it is distinguishable from none."""
        if abs(self.mean) <= _LEAST * self.error:
            return "no"
        return "yes" if abs(self.mean) > _STUDENT[self.seeds - 1] * self.error else "perhaps"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.error:.1f}".replace("-", "−")


def values(study: Study, name: str, key: str = "test_accuracy") -> dict[str, float]:
    """A measure of a point by seed; accuracy in %."""
    runs = study["points"].get(name, {"runs": {}})["runs"]
    factor = 100.0 if key.endswith("accuracy") else 1.0
    return {seed: factor * run[key] for seed, run in runs.items()}


def difference(study: Study, name: str, other: str) -> Difference | None:
    """The accuracy of a point minus that of another; None if fewer than two seeds have both."""
    ours, theirs = values(study, name), values(study, other)
    each = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(each) < 2:
        return None
    error = statistics.stdev(each) / len(each) ** 0.5
    return Difference(statistics.fmean(each), error, len(each))


def pooled_deviation(study: Study, names: Iterable[str]) -> float:
    """The standard deviation over seeds, in points of accuracy, if it is the same for all names."""
    groups = [list(values(study, name).values()) for name in names]
    groups = [group for group in groups if len(group) > 1]
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return (squares / sum(len(group) - 1 for group in groups)) ** 0.5


def mean_and_deviation(numbers: Sequence[float], digits: int) -> str:
    if not numbers:
        return "–"
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f} (one seed)"
    return f"{statistics.fmean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def table(study: Study, names: Sequence[str]) -> str:
    """A Markdown table of points of one family, compared with its baselines.

    Loss and accuracy: mean ± standard deviation over seeds. The difference of accuracies: mean ±
    standard error, and whether it is distinguishable from none.
    """
    baselines = BASELINES[POINTS[names[0]].family]
    heads = [f"minus {baseline.label} | distinguishable" for baseline in baselines]
    text = [
        f"| layer | test loss | test accuracy, % | {' | '.join(heads)} |",
        "|---|--:|--:|" + "--:|---|" * len(baselines),
    ]
    for name in names:
        cells = [
            POINTS[name].label,
            mean_and_deviation(list(values(study, name, "test_loss").values()), 3),
            mean_and_deviation(list(values(study, name).values()), 1),
        ]
        for baseline in baselines:
            found = difference(study, name, baseline.name) if name != baseline.name else None
            cells += (str(found), found.verdict) if found else ("", "")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def conclusion(study: Study, names: Sequence[str]) -> str:
    """In words: how many points differ from the baselines, and which differences mean nothing."""
    family = POINTS[names[0]].family
    parts = [
        _compared(study, [name for name in names if name != baseline.name], baseline)
        for baseline in BASELINES[family]
    ]
    parts = [part for part in parts if part]
    if not parts:
        return "Too few runs are finished to compare any."
    deviation = pooled_deviation(study, [name for name in POINTS if POINTS[name].family == family])
    seeds = max(len(values(study, name)) for name in names)
    error = deviation * (2 / seeds) ** 0.5
    parts.append(
        f"Over all {MODELS[family]} rows of the study, seeds differ by a standard deviation of "
        f"{deviation:.1f} points of accuracy; two means of {seeds} seeds then differ by a standard "
        f"error of {error:.1f}, so that a difference below {_LEAST * error:.1f} says nothing."
    )
    return " ".join(parts)


def _compared(study: Study, names: Sequence[str], baseline: Row) -> str:
    """One sentence or two; empty if nothing can be compared."""
    found = {
        name: each for name in names if (each := difference(study, name, baseline.name)) is not None
    }

    def listed(verdict: str, sign: int) -> str:
        chosen = [
            POINTS[name].label
            for name, each in found.items()
            if each.verdict == verdict and sign * each.mean > 0
        ]
        names = f" ({'; '.join(chosen)})" if 0 < len(chosen) <= _NAMED else ""
        return f"{len(chosen) or 'none'}{names}"

    if not found:
        return ""
    return (
        f"Of {len(found)} rows, distinguishable from {baseline.label} are {listed('yes', 1)} above "
        f"and {listed('yes', -1)} below it, perhaps {listed('perhaps', 1)} above and "
        f"{listed('perhaps', -1)} below; chance alone would make {_CHANCE * len(found):.1f} "
        "distinguishable."
    )


def sweeps_table(study: Study) -> str:
    """A Markdown table of what sweeps do between their smallest and their largest value."""
    text = [
        "| figure | sweep | values | accuracy, first → last, % | last minus first "
        "| distinguishable | step, first → last, ms |",
        "|---|---|---|--:|--:|---|--:|",
    ]
    for number, figure in FIGURES.items():
        for sweep in figure.sweeps:
            names = [row.name for row in sweep.rows.values()]
            ends = [names[0], names[-1]] if len(names) > 1 else names
            accuracies = [list(values(study, name).values()) for name in ends]
            found = difference(study, names[-1], names[0]) if len(names) > 1 else None
            times = [median_time(study, name) for name in ends] if figure.has_time else []
            cells = [
                str(number),
                sweep.label,
                f"{figure.variable} = {', '.join(map(str, sweep.rows))}" if len(names) > 1 else "",
                " → ".join(mean_and_deviation(each, 1) for each in accuracies),
                *((str(found), found.verdict) if found else ("", "")),
                " → ".join("–" if each is None else f"{each:.0f}" for each in times),
            ]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def median_time(study: Study, name: str) -> float | None:
    """Of one training step, in ms; None if it was not timed."""
    steps = (study["times"] or {"steps": {}})["steps"].get(name)
    return statistics.median(steps) if steps else None


def what_was_run(study: Study) -> str:
    """Images, models, recipes, seeds and commits."""
    data, recipes = study["data"], study["recipes"]
    if not recipes:
        return "No run is finished."
    runs = [point["runs"] for point in study["points"].values()]
    seeds = sorted({len(each) for each in runs})
    rates = " and ".join(
        f"{recipe['lr']:g} for {MODELS[family]}" for family, recipe in recipes.items()
    )
    first = next(iter(recipes.values()))
    commits = " and ".join(
        f"{(each['commit'] or 'none')[:12]}{' with changes' if each['dirty'] else ''}"
        for each in study["commits"]
    )
    return (
        f"{sum(map(len, runs))} runs of {len(runs)} points with {' or '.join(map(str, seeds))} "
        f"seeds each: {data['train']:,} training and {data['test']:,} test images of CIFAR-10 "
        f"({data['source']}), {first['epochs']} epochs, batches of {first['batch_size']}, "
        f"AdamW with a cosine schedule from {rates}, reduced models, one CPU thread, "
        f"commit {commits}"
    )


def tables(study: Study) -> str:
    """All that the command prints: the tables, every figure's points, and the sweeps."""
    parts = [what_was_run(study)]
    for number, rows in TABLES.items():
        names = [row.name for row in rows]
        parts += [f"Table {number}", table(study, names), conclusion(study, names)]
    for number, figure in FIGURES.items():
        parts += [f"Figure {number}", table(study, [row.name for row in figure.all_rows()])]
    return "\n\n".join([*parts, "Sweeps", sweeps_table(study)])


def draw(study: Study, number: int, path: Path) -> None:
    """Draws a figure: means with bars, or bands, of one standard deviation over seeds.

    Times have bars from the lower to the upper quartile of the steps. Points without runs are left
    out.
    """
    # Imported here, because only plotting needs it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = FIGURES[number]
    columns = 2 if figure.has_time else 1
    canvas, axes = plt.subplots(1, columns, figsize=(5.6 * columns, 4.4), squeeze=False)
    _accuracies(study, figure, axes[0][0])
    if figure.has_time:
        _times(study, figure, axes[0][1])
    canvas.suptitle(f"Figure {number}, reduced: {figure.title}", fontsize=10)
    bars = "Bars and bands: one standard deviation over seeds"
    bars += "; of times, quartiles. " if figure.has_time else ". "
    note = textwrap.fill(bars + what_was_run(study), 95 * columns)
    canvas.supxlabel(note, fontsize=6.5, color="gray", y=0.01)
    canvas.tight_layout(rect=(0, 0.02, 1, 1))
    canvas.savefig(path, dpi=100)
    plt.close(canvas)


def _accuracies(study: Study, figure: Figure, axis: Any) -> None:
    curves = [sweep for sweep in figure.sweeps if set(sweep.rows) != {0}]
    lines = [sweep for sweep in figure.sweeps if set(sweep.rows) == {0}]
    for i, sweep in enumerate(curves):
        points = {at: list(values(study, row.name).values()) for at, row in sweep.rows.items()}
        points = {at: each for at, each in points.items() if each}
        # Shifted a little, so that bars of different curves do not hide each other.
        shift = 1 + 0.025 * (i - (len(curves) - 1) / 2)
        axis.errorbar(
            [at * shift for at in points],
            [statistics.fmean(each) for each in points.values()],
            [statistics.stdev(each) if len(each) > 1 else 0.0 for each in points.values()],
            fmt="o-",
            color=f"C{i}",
            capsize=3,
            markersize=4,
            label=sweep.label,
        )
    for i, sweep in enumerate(lines):
        each = list(values(study, sweep.rows[0].name).values())
        if not each:
            continue
        color = _line_color(i, len(curves), len(lines))
        mean, deviation = statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0
        axis.axhline(mean, color=color, linestyle="--", label=sweep.label)
        axis.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.1, linewidth=0)
    _finish(axis, figure, "test accuracy (%)")


def _line_color(i: int, curves: int, lines: int) -> str:
    """A curve's, where every curve has its own line; else one of those that are left."""
    return f"C{i}" if curves == lines and lines > 2 else f"C{curves + i}"


def _times(study: Study, figure: Figure, axis: Any) -> None:
    steps = (study["times"] or {"steps": {}})["steps"]
    for i, sweep in enumerate(figure.sweeps):
        points = {at: steps[row.name] for at, row in sweep.rows.items() if row.name in steps}
        if set(points) == {0}:
            median = statistics.median(points[0])
            axis.axhline(median, color=f"C{i}", linestyle="--", label=sweep.label)
        elif points:
            medians = [statistics.median(each) for each in points.values()]
            quartiles = [statistics.quantiles(each, n=4) for each in points.values()]
            bars = [
                [median - each[0] for median, each in zip(medians, quartiles, strict=True)],
                [each[2] - median for median, each in zip(medians, quartiles, strict=True)],
            ]
            axis.errorbar(
                list(points),
                medians,
                bars,
                fmt="o-",
                color=f"C{i}",
                capsize=3,
                markersize=4,
                label=sweep.label,
            )
    _finish(axis, figure, "one training step (ms)")
    axis.set_ylim(bottom=0)


def _finish(axis: Any, figure: Figure, name: str) -> None:
    swept = sorted({at for sweep in figure.sweeps for at in sweep.rows} - {0})
    axis.set_xlim(0.9 * swept[0], 1.1 * swept[-1])
    axis.set_xscale("log")
    axis.set_xticks(swept, map(str, swept))
    axis.minorticks_off()
    axis.set(xlabel=figure.variable, ylabel=name)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
