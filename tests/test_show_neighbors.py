# SPDX-License-Identifier: MIT
"""`python -m convnn_kernels.show_neighbors`: the neighbors it finds and the image it writes."""

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
    assert sorted(find("position: convolution", (2, 4))) == window


def test_features_and_place_find_the_same_color_nearby() -> None:
    found = find("features and position", (4, 4))
    assert all(column % 3 == 1 for _, column in found)
    assert max(abs(row - 4) + abs(column - 4) for row, column in found) < 7


def test_spatial_candidates_lie_on_the_grid() -> None:
    found = find("16 spatial candidates", (3, 4))
    assert found[0] == [3, 4]
    assert all(row % 2 == 0 and column % 3 == 0 for row, column in found[1:])


def test_an_image_is_drawn(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    out = tmp_path / "out.png"
    show_neighbors.main([str(tmp_path / "in.png"), "--out", str(out), "--size", "16", "--r", "9"])
    with Image.open(out) as image:
        assert min(image.size) > 200


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
def test_every_image_mode_is_read(mode: str, tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, 30:] = 255
    Image.fromarray(pixels).convert(mode).save(tmp_path / "in.png")
    image = show_neighbors.load(tmp_path / "in.png", 60)
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert show_neighbors.load(tmp_path / "in.png", 16).shape == (3, 11, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "IMAGE cannot be read: [Errno 2] No such file or directory: 'none.png'"),
        (["."], "IMAGE cannot be read"),
        (["text.png"], "IMAGE cannot be read: cannot identify image file"),
        (["half.png"], "IMAGE cannot be read"),
        (["in.png", "--pixels", "3,20"], "--pixels must lie in the scaled image of 20x20, got 3"),
        (["in.png", "--pixels", "3;4"], "argument --pixels: invalid ROW,COLUMN value: '3;4'"),
        (["in.png", "--k", "0"], "argument --k: invalid positive number value: '0'"),
        (["in.png", "--k", "65"], "--k must be at most 64, the number of candidates, got 65"),
        (["in.png", "--r", "60"], "--r must be a square number, got 60"),
        (["wide.png", "--r", "64"], "--r must be at most 36 for the scaled image of 6x20, got 64"),
        (["in.png", "--size", "-1"], "argument --size: invalid positive number value: '-1'"),
        (["in.png", "--out", "none/out.png"], "--out cannot be written"),
        (["in.png", "--out", "out.what"], "--out must end in one of"),
        (["in.png", "--out", "out"], "--out must end in one of"),
    ],
)
def test_error_messages(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save("in.png")
    Image.fromarray(noise[:6]).save("wide.png")
    Path("half.png").write_bytes(Path("in.png").read_bytes()[:600])
    Path("text.png").write_text("not an image")
    with pytest.raises(SystemExit):
        show_neighbors.main(arguments)
    assert f"error: {message}" in capsys.readouterr().err


def test_help_is_plain_text(capsys) -> None:
    with pytest.raises(SystemExit):
        show_neighbors.main(["--help"])
    text = capsys.readouterr().out
    assert "`" not in text
    assert "neighbors.png" in text
