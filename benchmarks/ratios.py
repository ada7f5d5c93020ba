# SPDX-License-Identifier: MIT
"""Ratios of times measured in the same rounds, and which rows are divided by which.

A layer is compared with other layers on the same tokens, a search with other searches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .peers import PEERS

Row = dict[str, Any]
# Median, 20th and 80th percentile.
Ratio = tuple[float, float, float]

# By name, so that results of peers that no longer exist can be read.
_OURS = (
    *("convnn", "select", "aggregate", "functional", "vgg11-hybrid", "vgg11-convnn", "vit-convnn"),
    *("host-triton", "host-cuda", "graph-triton", "graph-cuda"),
)
_SEARCHES = ("select", "matmul", "faiss", "flashlib", "keops")
_RATES = ("mm", "copy")

# Titles of the columns in a table.
TITLES = (
    *("÷ eager", "÷ original", "÷ SDPA", "÷ Conv2d", "÷ FAISS"),
    *("÷ flashlib", "÷ matmul", "÷ bfloat16", "÷ AVX-512"),
)


def is_ours(row: Row) -> bool:
    return row["peer"].startswith(_OURS)


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the name of their group, in the order in which they were measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def ratio(row: Row, other: Row | None) -> Ratio | None:
    """Time divided by time within each round; None if one of them was not timed."""
    if other is None or row["seconds"] is None or other["seconds"] is None:
        return None
    ours, theirs = (np.array(each["seconds"]["samples"]) for each in (row, other))
    rounds = min(len(ours), len(theirs))
    p20, median, p80 = np.percentile(ours[:rounds] / theirs[:rounds], [20, 50, 80])
    return float(median), float(p20), float(p80)


def fastest(row: Row, rows: Sequence[Row], names: Sequence[str], *same: str, **other: str) -> Any:
    """The fastest of these peers in the same pass, on a workload that agrees in the fields `same`,
    or has the values `other`.
    """
    wanted = {name: row["workload"][name] for name in same} | other
    found = [
        each
        for each in rows
        if each["peer"] in names
        and each["pass"] == row["pass"]
        and each["seconds"]
        and wanted.items() <= each["workload"].items()
    ]
    return min(found, key=lambda each: each["seconds"]["median"], default=None)


def on_avx512(row: Row, rows: Sequence[Row]) -> Row | None:
    """What a row on AVX2 is divided by: the row on AVX-512, or else the default."""
    same = ("batch", "tokens", "channels", "keys", "k", "source", "candidates", "outputs", "dtype")
    default = row["peer"].removesuffix("-avx2")
    on_set = fastest(row, rows, [f"{default}-avx512"], *same)
    return on_set or fastest(row, rows, [default], *same)


def _others(row: Row, rows: Sequence[Row]) -> dict[str, Sequence[str]]:
    """For each title the names of the peers that `row` is compared with on the same tokens."""
    name = row["peer"]
    if name in _RATES:
        return {}
    if name.startswith(_SEARCHES):
        found = {"÷ FAISS": ["faiss"], "÷ flashlib": ["flashlib"], "÷ matmul": ["matmul"]}
    elif name.startswith(("host-", "graph-")):
        found = {"÷ SDPA": [f"{name.partition('-')[0]}-sdpa"]}
    elif name.startswith("aggregate"):
        found = {"÷ Conv2d": ["conv2d"]}
    else:
        sdpa = [each["peer"] for each in rows if each["peer"].partition("-")[0] == "sdpa"]
        found = {"÷ SDPA": sdpa, "÷ Conv2d": ["conv2d"]}
    return {title: names for title, names in found.items() if name not in names}


def references(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """The rows of the group that `row` is divided by, by title."""
    tokens = ("batch", "tokens", "channels", "keys")
    found = {
        title: fastest(row, rows, names, *tokens, "dtype")
        for title, names in _others(row, rows).items()
    }
    peer = PEERS.get(row["peer"])
    if peer and peer.baseline not in (None, row["peer"]):
        title = "÷ original" if peer.computes == "model" else "÷ eager"
        found[title] = fastest(row, rows, [peer.baseline or ""], *tokens, "dtype", "source")
    same = (*tokens, "k", "source", "candidates", "outputs")
    if row["peer"].endswith("-avx2"):
        found["÷ AVX-512"] = on_avx512(row, rows)
    if is_ours(row) and row["workload"]["dtype"] == "float32":
        found["÷ bfloat16"] = fastest(row, rows, [row["peer"]], *same, dtype="bfloat16")
    return {title: found[title] for title in TITLES if found.get(title)}


def share_of_rate(row: Row, rate: Row | None) -> float | None:
    """Flops per second divided by those of torch.mm within each round; None if one of them was not
    timed.
    """
    inverse = ratio(row, rate)
    if inverse is None or rate is None:
        return None
    return float(row["flops"] / rate["flops"] / inverse[0])


def bound(row: Row, rows: Sequence[Row]) -> float | None:
    """The least seconds that flops and bytes allow, at the rates measured in the same group."""
    if row["flops"] is None or row["bytes"] is None:
        return None
    rates: dict[str, float] = {}
    for name, quantity in (("mm", "flops"), ("copy", "bytes")):
        found = [
            each[quantity] / each["seconds"]["median"]
            for each in rows
            if each["peer"] == name
            and each["seconds"]
            and (name == "copy" or each["workload"]["dtype"] == row["workload"]["dtype"])
        ]
        if found:
            rates[quantity] = max(found)
    if "flops" not in rates:
        return None
    return max(row[quantity] / rate for quantity, rate in rates.items())


def ours(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Ratio]]]:
    """Each timed row of this project with its ratios, by title."""
    for members in groups(rows).values():
        for row in filter(is_ours, members):
            pairs = {title: ratio(row, each) for title, each in references(row, members).items()}
            if row["seconds"]:
                yield row, {title: value for title, value in pairs.items() if value}


def sums_of_layers(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    """The layers of VGG-11, one group each: the sum of our median times divided by the sum of
    Conv2d's, by peer, pass and source of the tokens.
    """
    sums: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    layers = {name: each for name, each in groups(rows).items() if "VGG-11 layer" in name}
    for members in layers.values():
        for row in filter(is_ours, members):
            other = references(row, members).get("÷ Conv2d")
            if other and row["seconds"]:
                key = row["peer"], row["pass"], row["workload"]["source"]
                pair = row["seconds"]["median"], other["seconds"]["median"]
                sums.setdefault(key, []).append(pair)
    return {
        key: math.fsum(a for a, _ in pairs) / math.fsum(b for _, b in pairs)
        for key, pairs in sums.items()
        if len(pairs) == len(layers)
    }
