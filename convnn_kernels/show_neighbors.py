# SPDX-License-Identifier: MIT
"""``python -m convnn_kernels.show_neighbors IMAGE``: which neighbors each setting picks.

For some pixels of an image, draws their k neighbors under several settings of ConvNN2d: by color,
by color and place, by place alone (a convolution), and among random or spatial candidates.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_kernels.nn import ConvNN2d, RandomCandidates, SpatialCandidates


def settings(k: int, r: int) -> dict[str, ConvNN2d]:
    """The layers that are compared, by their captions.

    Args:
        k: the number of neighbors.
        r: the number of candidates of the last two; a square number.
    """
    common: dict[str, Any] = {"k": k, "projections": "identity", "rho": "ones"}
    placed = {**common, "positional_encoding": "similarity"}
    by_place = {**placed, "projections": "coordinates", "metric": "euclidean"}
    return {
        "features (cosine)": ConvNN2d(3, 3, **common),
        "features (euclidean)": ConvNN2d(3, 3, metric="euclidean", **common),
        "features and place": ConvNN2d(3, 3, metric="euclidean", **placed),
        "place: convolution": ConvNN2d(3, 3, coordinates="pixel", **by_place),
        f"{r} random candidates": ConvNN2d(3, 3, candidates=RandomCandidates(r), **common),
        f"{r} spatial candidates": ConvNN2d(3, 3, candidates=SpatialCandidates(r), **common),
    }


def neighbors(layer: ConvNN2d, image: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """The neighbors of some pixels.

    Args:
        layer: without padding.
        image: [3, H, W] in [0, 1]; its features are the colors less their means.
        pixels: rows and columns.

    Returns:
        [len(pixels), k, 2] int64: rows and columns.
    """
    width = image.shape[-1]
    # All colors are positive and so are all cosines; about the mean they tell colors apart.
    centered = image - image.mean((1, 2), keepdim=True)
    _, indices = layer.neighbors(centered.unsqueeze(0))
    found = indices[0, [row * width + column for row, column in pixels]]
    return torch.stack([found // width, found % width], -1)


def load(path: Path, size: int) -> Tensor:
    """An image as [3, H, W] float32 in [0, 1], made smaller so that no side exceeds `size`."""
    import matplotlib.pyplot as plt

    pixels = torch.from_numpy(plt.imread(path).copy())
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    if pixels.dim() == 2:
        pixels = pixels.unsqueeze(-1).expand(-1, -1, 3)
    image = pixels[..., :3].permute(2, 0, 1).float()
    factor = size / max(image.shape[1:])
    if factor >= 1:
        return image
    shape = [max(1, round(side * factor)) for side in image.shape[1:]]
    return F.interpolate(image.unsqueeze(0), shape, mode="area").squeeze(0)


def draw(image: Tensor, pixels: Sequence[tuple[int, int]], k: int, r: int, path: Path) -> None:
    """Draws one panel for each setting and saves them as an image.

    Args:
        image: [3, H, W] in [0, 1].
        pixels: rows and columns of the queries.
        k: the number of neighbors.
        r: the number of random or spatial candidates.
        path: where to save.
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convnn_kernels.show_neighbors", description=__doc__
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, default=Path("neighbors.png"))
    parser.add_argument("--size", type=int, default=48, help="longer side after scaling down")
    parser.add_argument("--k", type=int, default=9, help="neighbors")
    parser.add_argument("--r", type=int, default=64, help="candidates, a square number")
    parser.add_argument("--seed", type=int, default=0, help="of the random candidates")
    parser.add_argument(
        "--pixels",
        type=_pixel,
        nargs="+",
        metavar="ROW,COLUMN",
        help="queries, after scaling down (default: four, evenly spaced)",
    )
    options = parser.parse_args(arguments)
    try:
        import matplotlib
    except ImportError:
        parser.error("drawing needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")

    image = load(options.image, options.size)
    height, width = image.shape[1:]
    pixels = options.pixels or [
        (height * i // 4, width * j // 4) for i, j in ((1, 1), (1, 3), (3, 1), (3, 3))
    ]
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            parser.error(
                f"--pixels must lie in the scaled image of {height}x{width}, got {row},{column}"
            )
    torch.manual_seed(options.seed)
    draw(image, pixels, options.k, options.r, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
