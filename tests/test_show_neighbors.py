# SPDX-License-Identifier: MIT
"""`python -m convnn_kernels.show_neighbors`: what is drawn, and that it is drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnn_kernels import show_neighbors

STRIPES = torch.zeros(3, 8, 12)
STRIPES[0, :, ::3] = 1.0
STRIPES[1, :, 1::3] = 1.0
STRIPES[2, :, 2::3] = 1.0


def find(caption: str, pixel: tuple[int, int]) -> list[list[int]]:
    layer = show_neighbors.settings(k=9, r=16)[caption]
    return show_neighbors.neighbors(layer, STRIPES, [pixel])[0].tolist()


@pytest.mark.parametrize("caption", ["features (cosine)", "features (euclidean)"])
def test_features_find_the_same_color(caption: str) -> None:
    assert all(column % 3 == 1 for _, column in find(caption, (2, 4)))


def test_place_finds_the_window() -> None:
    window = [[i, j] for i in (1, 2, 3) for j in (3, 4, 5)]
    assert sorted(find("place: convolution", (2, 4))) == window


def test_features_and_place_find_the_same_color_nearby() -> None:
    found = find("features and place", (4, 4))
    assert all(column % 3 == 1 for _, column in found)
    assert max(abs(row - 4) + abs(column - 4) for row, column in found) < 7


def test_spatial_candidates_lie_on_the_grid() -> None:
    found = find("16 spatial candidates", (3, 4))
    assert found[0] == [3, 4]
    assert all(row % 2 == 0 and column % 3 == 0 for row, column in found[1:])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_an_image_is_drawn(mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "in.png")
    out = tmp_path / "out.png"
    show_neighbors.main([str(tmp_path / "in.png"), "--out", str(out), "--size", "16", "--r", "9"])
    with Image.open(out) as image:
        assert min(image.size) > 200
    assert show_neighbors.load(tmp_path / "in.png", 16).shape == (3, 11, 16)


def test_pixels_outside_are_named(tmp_path: Path, capsys) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "in.png")
    with pytest.raises(SystemExit):
        show_neighbors.main([str(tmp_path / "in.png"), "--pixels", "3,20"])
    assert "--pixels must lie in the scaled image of 20x20, got 3,20" in capsys.readouterr().err
