# SPDX-License-Identifier: MIT
"""`python -m tools.count_hits`: threshold and queues, on rows whose hits are known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools import count_hits
from tools.count_hits import LAYOUTS, NEVER, Case, Layout, Sample

SM_90 = replace(LAYOUTS[90], advance=128)
SAMPLE = Sample(stride=1, own=0, groups=32, adjacent=False)


def row_of(similarities: dict[int, float], columns: int = 256) -> Tensor:
    """128 rows of S: the first has these similarities and -1 elsewhere, the others nothing."""
    S = torch.full((128, columns), NEVER)
    S[0] = -1.0
    for column, similarity in similarities.items():
        S[0, column] = similarity
    return S


def queues(
    S: Tensor, k: int, sample: Sample | None = SAMPLE, layout: Layout = SM_90, row: int = 0
) -> list[int]:
    """Hits in the queues of the first row."""
    return count_hits.count(Case(k, sample, layout), layout.tiles(S), row).queues[0].tolist()


@pytest.mark.parametrize(
    ("arch", "queue_of"),
    [
        (80, lambda column: (column >> 1) & 15),
        (90, lambda column: (column >> 1) & 3),
        (100, lambda column: (column % 64) >> 5),
    ],
)
def test_a_column_is_in_the_queue_that_the_sweep_has_for_it(arch, queue_of) -> None:
    layout = LAYOUTS[arch]
    columns = layout.columns()
    assert sorted(columns.flatten().tolist()) == list(range(layout.tile))
    for q in range(layout.queues):
        for c, column in enumerate(columns[q].tolist()):
            assert queue_of(column) == q
            decoded = c // layout.pair * (layout.queues * layout.pair) + q * layout.pair
            assert column == decoded + c % layout.pair


# Columns 0 and 1 are codes 0 and 1 of queue 0, column 2 and its like in the second tile, 130, are
# code 0 of queue 1.
FOUR = {0: 5.0, 1: 4.0, 2: 3.0, 130: 3.5}


def test_hits_of_a_row() -> None:
    S = row_of(FOUR)
    assert queues(S, 2) == [2, 0, 0, 0]
    assert queues(S, 3) == [2, 1, 0, 0]
    # Columns 2 and 130 are in one group, so the fourth maximum is -1.
    assert queues(S, 4) == [64, 64, 64, 64]
    assert queues(S, 4, None) == [2, 2, 0, 0]


def test_hits_with_a_sample() -> None:
    assert queues(row_of(FOUR), 3, replace(SAMPLE, stride=2)) == [2, 2, 0, 0]
    # Codes 0 to 3 of queue 0 are one group.
    assert queues(row_of(FOUR), 2, replace(SAMPLE, adjacent=True)) == [2, 1, 0, 0]
    # The own tile is the second one.
    own = replace(SAMPLE, stride=2, own=1)
    assert queues(row_of(FOUR), 3, own, row=128) == [2, 1, 0, 0]


def test_sampled_tiles() -> None:
    sample = Sample(stride=4, own=3, groups=32, adjacent=False)
    assert sample.tiles(SM_90, 16, 128 * 6).tolist() == [0, 4, 5, 6, 7, 8, 12]
    assert sample.tiles(SM_90, 16, 0).tolist() == [0, 1, 4, 8, 12]
    assert sample.tiles(SM_90, 16, None).tolist() == [0, 4, 8, 12]


def test_tiles_that_advance_by_less() -> None:
    S = row_of({124: 5.0}, 128)
    assert queues(S, 1) == [0, 0, 1, 0]
    assert queues(S, 1, layout=replace(SM_90, advance=124)) == [1, 0, 0, 0]
    tiles = replace(SM_90, advance=124).tiles(torch.arange(256.0)[None])
    assert tiles.shape == (1, 3, 4, 32)
    assert sorted(tiles[tiles > NEVER].tolist()) == list(range(256))


def test_tiles_that_are_rotated() -> None:
    # Column 2 of tile 1 takes the place of column 1, in the group of column 1 of tile 0.
    rotated = replace(SM_90, rotate=127)
    assert queues(row_of({1: 4.0, 130: 3.5, 0: 2.0}), 2, layout=rotated) == [3, 0, 0, 0]
    assert queues(row_of({1: 4.0, 130: 3.5, 0: 2.0}), 2) == [1, 1, 0, 0]
    tiles = rotated.tiles(torch.arange(300.0)[None])
    assert sorted(tiles[tiles > NEVER].tolist()) == list(range(300))


def test_turns_are_the_most_hits_of_a_lane() -> None:
    S = row_of(FOUR)
    case = Case(3, SAMPLE, SM_90)
    # Of 2 tiles and 16 times 8 rows, one word has 2 hits, and another 1.
    assert count_hits.count(case, SM_90.tiles(S), 0).turns == (2 + 1) / 32
    S[8] = S[0]
    assert count_hits.count(case, SM_90.tiles(S), 0).turns == 2 * (2 + 1) / 32


@pytest.mark.parametrize("arch", LAYOUTS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("adjacent", [False, True])
def test_threshold_is_at_most_the_kth_similarity(arch, ties, adjacent) -> None:
    torch.manual_seed(0)
    S = torch.randn(128, 1000)
    if ties:
        S = S.mul(4).round()
    tiles = LAYOUTS[arch].tiles(S)
    for stride, own, groups in ((1, 0, 32), (2, 1, 64), (4, 3, 64)):
        sample = Sample(stride, own, groups, adjacent)
        sampled = sample.tiles(LAYOUTS[arch], tiles.shape[1], 512)
        maxima = count_hits.group_maxima(tiles[:, sampled], sample)
        assert maxima.shape == (128, groups)
        for k in (1, 9, 16, 32):
            threshold = count_hits.kth_largest(maxima, k, k == 16)
            assert (threshold < S.topk(k, 1).values[:, -1]).all()
            case = Case(k, replace(sample, ties=k == 16), LAYOUTS[arch])
            hits = count_hits.count(case, tiles, 512).queues.sum(1)
            assert hits.equal(S.ge(threshold[:, None]).sum(1))
            assert (hits >= k).all()


def test_kth_largest_removes_all_that_are_equal() -> None:
    maxima = torch.tensor([[3.0, 3.0, 2.0, 1.0, NEVER]])
    lowered = 1 - 2**-20
    expected = [3 * lowered, 2 * lowered, lowered, NEVER]
    assert [count_hits.kth_largest(maxima, k).item() for k in (1, 2, 3, 4)] == expected
    assert count_hits.kth_largest(-torch.ones(1, 4), 1).item() < -1


def test_kth_largest_with_ties_removes_one() -> None:
    maxima = torch.tensor([[3.0, 2.0, 3.0, 1.0, NEVER]])
    lowered = 1 - 2**-20
    expected = [3 * lowered, 3 * lowered, 2 * lowered, lowered, NEVER]
    made = [count_hits.kth_largest(maxima, k, ties=True).item() for k in (1, 2, 3, 4, 5)]
    assert made == expected


def test_overflow_and_instructions() -> None:
    counts = count_hits.Counts(torch.tensor([[9, 0, 0, 0], [8, 8, 8, 12]]), 0.5, 8, 4.0)
    made = count_hits.summary(Case(9, SAMPLE, SM_90), [counts], caps=(8, 9, 11, 12))
    assert made["hits"] == (9 + 36) / 2
    assert made["turns"] == 0.5
    assert made["overflow"] == {8: 1.0, 9: 0.5, 11: 0.5, 12: 0.0}
    # Four sampled tiles of 4 elements for each thread and row, 8 rounds, 8 tiles, and the finish.
    fixed = 16 * 2.8 + 8 * 18 / 8 + 32 * (3.2 + 35 * 0.5 / 32) + 369
    # Queues of 12 have all hits: 36 - 32 more than the finish expects, in one of two rows.
    assert made["instructions"][12] == round(fixed + 8 * 4 / 2)
    # The exact path goes through all columns.
    columns = 8 * SM_90.advance
    assert made["instructions"][8] == round(fixed + 4.9 * columns)


def test_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    torch.manual_seed(0)
    sets = {"random": torch.randn(256, 16), "constant": torch.ones(256, 16)}
    monkeypatch.setattr(
        count_hits, "token_sets", lambda side, cifar: ((n, [t]) for n, t in sets.items())
    )
    monkeypatch.setattr(count_hits, "SIDES", (16,))
    monkeypatch.setattr(count_hits, "KS", (9,))
    output = tmp_path / "hits.json"
    monkeypatch.setattr("sys.argv", ["count_hits", "--output", str(output)])
    count_hits.main()
    printed = capsys.readouterr().out
    assert "no tokens of CIFAR-10" in printed
    records = json.loads(output.read_text())["tokens"]
    of_random, of_constant = (
        next(r for r in records if r["tokens"] == name and r["case"] == "sm_90") for name in sets
    )
    assert 9 <= of_random["hits"] < 20
    assert of_random["overflow"]["16"] == 0
    assert of_constant["hits"] == 256
    assert of_constant["overflow"]["32"] == 1
