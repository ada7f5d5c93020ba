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


@pytest.mark.parametrize("caption", ["color", "color, by distance"])
def test_colors_find_the_same_color(caption: str) -> None:
    assert all(column % 3 == 1 for _, column in find(caption, (2, 4)))


def test_place_finds_the_window() -> None:
    window = [[i, j] for i in (1, 2, 3) for j in (3, 4, 5)]
    assert sorted(find("position: a convolution", (2, 4))) == window


def test_color_and_place_find_the_same_color_nearby() -> None:
    found = find("color and position", (4, 4))
    assert all(column % 3 == 1 for _, column in found)
    assert max(abs(row - 4) + abs(column - 4) for row, column in found) < 7


def test_spatial_candidates_lie_on_the_grid() -> None:
    found = find("color, spatial candidates", (3, 4))
    assert found[0] == [3, 4]
    assert all(row % 2 == 0 and column % 3 == 0 for row, column in found[1:])


@pytest.mark.parametrize("caption", show_neighbors.settings(9, 16))
def test_only_the_drawn_pixels_are_searched(caption: str) -> None:
    """With the result of the layer's own search, which is for all of them."""
    layer = show_neighbors.settings(9, 16)[caption]
    pixels = [(0, 0), (3, 7), (7, 11)]
    image = torch.rand(3, 8, 12)
    torch.manual_seed(1)
    found = show_neighbors.neighbors(layer, image, pixels)
    torch.manual_seed(1)
    _, indices = layer.neighbors((image - image.mean((1, 2), keepdim=True)).unsqueeze(0))
    expected = indices[0, [row * 12 + column for row, column in pixels]]
    assert torch.equal(found, torch.stack([expected // 12, expected % 12], -1))


def draw(image: np.ndarray, folder: Path, *options: str, saved: bool = True) -> list[str]:
    """The titles of the panels, as they are drawn; without `saved`, nothing is painted."""
    import matplotlib.axes
    import matplotlib.figure

    Image.fromarray(image).save(folder / "in.png")
    titles = []
    set_title = matplotlib.axes.Axes.set_title
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            matplotlib.axes.Axes,
            "set_title",
            lambda axis, text, **options: (titles.append(text), set_title(axis, text, **options)),
        )
        if not saved:
            patch.setattr(matplotlib.figure.Figure, "savefig", lambda *_, **__: None)
        show_neighbors.main([str(folder / "in.png"), "--out", str(folder / "out.png"), *options])
    if saved:
        assert (folder / "out.png").stat().st_size > 1000
    return titles


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width", "whole", "few"),
    [
        # 900x60 pixels become 48x3.
        (900, 60, "k = 9, cosine, among all 144 pixels", "k = 9, cosine, among 9 of 144 pixels"),
        (5, 5, "k = 9, cosine, among all 25 pixels", "k = 9, cosine, among all 25 pixels"),
        (1, 1, "k = 1, cosine, among all 1 pixels", "k = 1, cosine, among all 1 pixels"),
        (1, 300, "k = 9, cosine, among all 48 pixels", "k = 1, cosine, among 1 of 48 pixels"),
        (2, 3, "k = 6, cosine, among all 6 pixels", "k = 4, cosine, among 4 of 6 pixels"),
        (48, 48, "k = 9, cosine, among all 2304 pixels", "k = 9, cosine, among 64 of 2304 pixels"),
    ],
)
def test_defaults_fit_the_image(
    height: int, width: int, whole: str, few: str, tmp_path: Path
) -> None:
    titles = draw(noise(height, width), tmp_path)
    assert len(titles) == 6
    assert titles[0] == f"color\n{whole}"
    assert titles[4] == f"color, random candidates\n{few}"
    assert titles[5] == f"color, spatial candidates\n{few}"


def test_titles_say_what_is_drawn(tmp_path: Path) -> None:
    titles = draw(noise(20, 20), tmp_path, "--k", "5", "--r", "16")
    assert titles == [
        "color\nk = 5, cosine, among all 400 pixels",
        "color, by distance\nk = 5, euclidean, among all 400 pixels",
        "color and position\nk = 5, euclidean, among all 400 pixels",
        "position: a convolution\nk = 5, euclidean, among all 400 pixels",
        "color, random candidates\nk = 5, cosine, among 16 of 400 pixels",
        "color, spatial candidates\nk = 5, cosine, among 16 of 400 pixels",
    ]


@pytest.mark.quick_one_in(3)
@pytest.mark.parametrize(("k", "r", "few"), [("9", None, 9), ("70", None, 64), (None, "4", 4)])
def test_what_was_not_given_follows_what_was(
    k: str | None, r: str | None, few: int, tmp_path: Path
) -> None:
    options = [*(["--k", k] if k else []), *(["--r", r] if r else [])]
    titles = draw(noise(20, 20), tmp_path, *options, saved=False)
    assert titles[0] == f"color\nk = {k or 9}, cosine, among all 400 pixels"
    assert f"k = {few}, cosine, among {r or 64} of 400" in titles[4]


@pytest.mark.slow
def test_progress_and_result(tmp_path: Path, capsys) -> None:
    draw(noise(20, 20), tmp_path)
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out.png'}\n"
    lines = printed.err.splitlines()
    assert lines[0] == "color ..."
    assert len(lines) == 7


def two_colors() -> np.ndarray:
    image = np.full((20, 20, 3), (200, 30, 90), dtype=np.uint8)
    image[:10] = (10, 60, 70)
    return image


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize(
    ("image", "note"),
    [
        (noise(20, 20)[..., :1].repeat(3, 2), "the colors of the image lie on one line, as gray"),
        (two_colors(), "the colors of the image lie on one line"),
        (np.full((20, 20, 3), (200, 30, 90), dtype=np.uint8), "all pixels have one color"),
        (np.zeros((1, 1, 3), dtype=np.uint8), "all pixels have one color"),
        (noise(20, 20), None),
        # Almost gray, but not quite.
        (noise(20, 20)[..., :1].repeat(3, 2) // 2 + noise(20, 20) // 8, None),
    ],
    ids=["gray", "two", "flat", "one", "noise", "pale"],
)
def test_degenerate_colors_are_said(
    image: np.ndarray, note: str | None, tmp_path: Path, capsys
) -> None:
    draw(image, tmp_path, saved=False)
    printed = capsys.readouterr().err
    assert (f"note: {note}" in printed) if note else ("note:" not in printed)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_gray_files_are_degenerate(mode: str, tmp_path: Path) -> None:
    Image.fromarray(noise(90, 70)).convert(mode).save(tmp_path / "in.png")
    assert "metric='euclidean'" in (
        show_neighbors.degenerate(show_neighbors.load(tmp_path / "in.png", 48)) or ""
    )


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
        (["in.png", "--k", "401"], "--k must be at most 400, the number of pixels, got 401"),
        (
            ["in.png", "--k", "65", "--r", "64"],
            "--k must be at most 64, the number of candidates, got 65",
        ),
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
