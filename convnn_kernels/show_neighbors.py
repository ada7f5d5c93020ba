# SPDX-License-Identifier: MIT
"""``python -m convnn_kernels.show_neighbors IMAGE`` draws the neighbors that settings pick."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_kernels.nn import ConvNN2d, RandomCandidates, SpatialCandidates

DESCRIPTION = """
Draws the k neighbors that six settings of ConvNN2d pick for some pixels of an image: by color (two
metrics), by color and position, by position alone (a convolution), and among random or spatial
candidates. Writes one picture and prints its name.
"""


def settings(k: int, r: int) -> dict[str, ConvNN2d]:
    """The layers to compare, by caption.

    Args:
        k: the number of neighbors.
        r: the number of candidates of the last two layers, a square number.
    """
    common: dict[str, Any] = {"k": k, "projections": "identity", "rho": "ones"}
    placed = {**common, "positional_encoding": "similarity"}
    by_place = {**placed, "projections": "coordinates", "metric": "euclidean"}
    return {
        "features (cosine)": ConvNN2d(3, 3, **common),
        "features (euclidean)": ConvNN2d(3, 3, metric="euclidean", **common),
        "features and position": ConvNN2d(3, 3, metric="euclidean", **placed),
        "position: convolution": ConvNN2d(3, 3, coordinates="pixel", **by_place),
        f"{r} random candidates": ConvNN2d(3, 3, candidates=RandomCandidates(r), **common),
        f"{r} spatial candidates": ConvNN2d(3, 3, candidates=SpatialCandidates(r), **common),
    }


def neighbors(layer: ConvNN2d, image: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """The neighbors that a layer picks for some pixels.

    Args:
        layer: a layer without padding.
        image: [3, H, W] in [0, 1]; the features are the colors minus their mean.
        pixels: rows and columns.

    Returns:
        [len(pixels), k, 2] int64: rows and columns.
    """
    width = image.shape[-1]
    # Colors are positive, so all their cosines are close to 1. Subtracting the mean separates them.
    centered = image - image.mean((1, 2), keepdim=True)
    _, indices = layer.neighbors(centered.unsqueeze(0))
    found = indices[0, [row * width + column for row, column in pixels]]
    return torch.stack([found // width, found % width], -1)


def load(path: Path, size: int) -> Tensor:
    """Loads an image as [3, H, W] float32 in [0, 1], scaled down so that no side exceeds `size`.

    Raises:
        OSError: if the file does not exist or cannot be read as an image.
    """
    from PIL import Image

    with Image.open(path) as file:
        pixels = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
        image = pixels.view(file.height, file.width, 3).permute(2, 0, 1) / 255
    factor = size / max(image.shape[1:])
    if factor >= 1:
        return image
    shape = [max(1, round(side * factor)) for side in image.shape[1:]]
    return F.interpolate(image.unsqueeze(0), shape, mode="area").squeeze(0)


def draw(image: Tensor, pixels: Sequence[tuple[int, int]], k: int, r: int, path: Path) -> None:
    """Draws one panel per setting and saves the picture.

    Args:
        image: [3, H, W] in [0, 1].
        pixels: rows and columns of the queries.
        k: the number of neighbors.
        r: the number of random or spatial candidates.
        path: the file to write.
    """
    import matplotlib.pyplot as plt

    layers = settings(k, r)
    columns = 3
    rows = -(-len(layers) // columns)
    height = 3.2 * image.shape[1] / image.shape[2] + 0.4
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns, height * rows), squeeze=False
    )
    for axis, (caption, layer) in zip(axes.flat, layers.items(), strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", alpha=0.75)
        axis.set_title(caption, fontsize=9)
        axis.axis("off")
        for i, (pixel, found) in enumerate(
            zip(pixels, neighbors(layer, image, pixels).tolist(), strict=True)
        ):
            color = f"C{i}"
            for y, x in found:
                axis.plot([pixel[1], x], [pixel[0], y], color=color, linewidth=0.7)
                axis.plot(x, y, "s", color=color, markersize=4, markeredgecolor="white")
            axis.plot(pixel[1], pixel[0], "*", color=color, markersize=12, markeredgecolor="black")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pixel(text: str) -> tuple[int, int]:
    row, column = text.split(",")
    return int(row), int(column)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# argparse uses the names in its messages: "invalid ROW,COLUMN value: ...".
_pixel.__name__ = "ROW,COLUMN"
_at_least_one.__name__ = "positive number"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convnn_kernels.show_neighbors", description=DESCRIPTION
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a photograph: PNG, JPEG, ...")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("neighbors.png"),
        help="the picture to write (default: %(default)s, in the current folder)",
    )
    parser.add_argument(
        "--size",
        type=_at_least_one,
        default=48,
        help="longer side of the image after scaling it down (default: %(default)s); the time "
        "grows with its fourth power",
    )
    parser.add_argument(
        "--k", type=_at_least_one, default=9, help="neighbors per pixel (default: %(default)s)"
    )
    parser.add_argument(
        "--r",
        type=_at_least_one,
        default=64,
        help="random or spatial candidates, a square number (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random candidates (default: %(default)s)"
    )
    parser.add_argument(
        "--pixels",
        type=_pixel,
        nargs="+",
        metavar="ROW,COLUMN",
        help="pixels of the scaled image whose neighbors to draw (default: four, evenly spaced)",
    )
    options = parser.parse_args(arguments)
    try:
        import matplotlib
        import PIL  # noqa: F401
    except ImportError:
        parser.error("drawing needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    endings = sorted(FigureCanvasAgg.filetypes)
    if options.out.suffix[1:].lower() not in endings:
        parser.error(f"--out must end in one of .{', .'.join(endings)}, got {options.out}")
    try:
        image = load(options.image, options.size)
    except OSError as error:
        parser.error(f"IMAGE cannot be read: {error}")
    height, width = image.shape[1:]
    pixels = options.pixels or [
        (height * i // 4, width * j // 4) for i, j in ((1, 1), (1, 3), (3, 1), (3, 3))
    ]
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            parser.error(
                f"--pixels must lie in the scaled image of {height}x{width}, got {row},{column}"
            )
    if math.isqrt(options.r) ** 2 != options.r:
        parser.error(f"--r must be a square number, got {options.r}")
    if math.isqrt(options.r) > min(height, width) and options.r < height * width:
        parser.error(
            f"--r must be at most {min(height, width) ** 2} for the scaled image of "
            f"{height}x{width}, got {options.r}"
        )
    most = min(options.r, height * width)
    if options.k > most:
        parser.error(f"--k must be at most {most}, the number of candidates, got {options.k}")
    torch.manual_seed(options.seed)
    try:
        draw(image, pixels, options.k, options.r, options.out)
    except OSError as error:
        parser.error(f"--out cannot be written: {error}")
    print(options.out)


if __name__ == "__main__":
    main()
