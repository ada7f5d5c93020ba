# SPDX-License-Identifier: MIT
"""``python -m convnn_kernels.show_neighbors IMAGE`` draws the neighbors that settings pick."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_kernels import functional
from convnn_kernels.nn import ConvNN2d, RandomCandidates, SpatialCandidates, positional

DESCRIPTION = """
Draws the k neighbors that six settings of ConvNN2d pick for some pixels of an image: by color (two
metrics), by color and position, by position alone (a convolution), and among random or spatial
candidates. Writes one picture and prints its name.
"""

# The defaults for an image that is large enough: neighbors, and candidates along an axis.
K, SIDE = 9, 8


def settings(k: int, r: int) -> dict[str, ConvNN2d]:
    """The layers to compare, by caption.

    Args:
        k: the number of neighbors; the last two layers have at most r.
        r: the number of candidates of the last two layers, a square number.
    """
    common: dict[str, Any] = {"projections": "identity", "rho": "ones"}
    placed = {**common, "positional_encoding": "similarity", "metric": "euclidean"}
    few = min(k, r)
    return {
        "color": ConvNN2d(3, 3, k, **common),
        "color, by distance": ConvNN2d(3, 3, k, metric="euclidean", **common),
        "color and position": ConvNN2d(3, 3, k, **placed),
        "position: a convolution": ConvNN2d(
            3, 3, k, coordinates="pixel", **{**placed, "projections": "coordinates"}
        ),
        "color, random candidates": ConvNN2d(3, 3, few, candidates=RandomCandidates(r), **common),
        "color, spatial candidates": ConvNN2d(3, 3, few, candidates=SpatialCandidates(r), **common),
    }


def title(caption: str, layer: ConvNN2d, tokens: int) -> str:
    """What a panel shows: the caption, k, the metric and the candidates among so many tokens."""
    r = getattr(layer.candidates, "r", tokens)
    among = f"{r} of {tokens}" if r < tokens else f"all {tokens}"
    return f"{caption}\nk = {layer.k}, {layer.metric}, among {among} pixels"


def neighbors(layer: ConvNN2d, image: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """The neighbors that a layer picks for some pixels.

    They are those of ``layer.neighbors``, which would search for all pixels: a hundred thousand
    times the work for a photograph.

    Args:
        layer: a layer of ``settings``.
        image: [3, H, W] in [0, 1]; the features are the colors minus their mean.
        pixels: rows and columns.

    Returns:
        [len(pixels), k, 2] int64: rows and columns.
    """
    shape, width = image.shape[1:], image.shape[2]
    parts = []
    if layer.projections != "coordinates":
        parts.append(centered(image))
    if layer.positional_encoding is not None:
        parts.append(positional.grid(shape, 0, layer.coordinates, image.dtype, image.device))
    tokens = torch.cat(parts, 1)  # [N, D]
    rows = torch.tensor([row * width + column for row, column in pixels])
    _, found = functional.select_neighbors(
        tokens[rows],
        tokens,
        layer.k,
        candidates=layer.candidates(shape, 0, image.device),
        self_indices=rows,
        metric=layer.metric,
    )
    return torch.stack([found // width, found % width], -1)


def centered(image: Tensor) -> Tensor:
    """[N, 3]: colors minus their mean. Colors are positive, so all their cosines are close to 1."""
    return (image - image.mean((1, 2), keepdim=True)).flatten(1).T


def degenerate(image: Tensor) -> str | None:
    """Why the panels that compare colors by their cosine say nothing; None if they do not."""
    colors = centered(image).double()
    _, second, first = torch.linalg.eigvalsh(colors.T @ colors / len(colors)).tolist()
    if first < 1e-10:
        return "all pixels have one color, so all are equally near, by cosine and by distance"
    if second < 1e-6 * first:
        return (
            "the colors of the image lie on one line, as gray does, so every cosine is 1 or -1 and "
            "the nearest pixels by cosine are just the first ones; metric='euclidean' or 'dot' "
            "tells them apart"
        )
    return None


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
    height, width = image.shape[1:]
    # The panels of a very long or flat image keep a readable width and height.
    size = (3.2 * columns, (3.2 * min(max(height / width, 0.2), 2.0) + 0.5) * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (caption, layer) in zip(axes.flat, layers.items(), strict=True):
        _report(f"{caption} ...")
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", alpha=0.75)
        axis.set_title(title(caption, layer, height * width), fontsize=9)
        axis.axis("off")
        for i, (pixel, found) in enumerate(
            zip(pixels, neighbors(layer, image, pixels).tolist(), strict=True)
        ):
            color = f"C{i}"
            for y, x in found:
                axis.plot([pixel[1], x], [pixel[0], y], color=color, linewidth=0.7)
                axis.plot(x, y, "s", color=color, markersize=4, markeredgecolor="white")
            axis.plot(pixel[1], pixel[0], "*", color=color, markersize=12, markeredgecolor="black")
    count = "a pixel (star)" if len(pixels) == 1 else f"{len(pixels)} pixels (stars)"
    figure.suptitle(
        f"The nearest pixels (squares) to {count}, of {height}x{width} pixels", fontsize=10
    )
    _report(f"writing {path} ...")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _report(text: str) -> None:
    """Progress, apart from what the program prints as its result."""
    print(text, file=sys.stderr, flush=True)


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


def choose(
    parser: argparse.ArgumentParser, options: argparse.Namespace, shape: tuple[int, int]
) -> tuple[list[tuple[int, int]], int, int]:
    """The pixels, k and r to draw: those that were given, else what fits into the image.

    Args:
        parser: reports what was given and does not fit.
        options: pixels, k and r, each None if it was not given.
        shape: the height and width of the scaled image.
    """
    height, width = shape
    tokens, shorter = height * width, min(shape)
    quarters = [(height * i // 4, width * j // 4) for i, j in ((1, 1), (1, 3), (3, 1), (3, 3))]
    pixels = options.pixels or list(dict.fromkeys(quarters))
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            parser.error(
                f"--pixels must lie in the scaled image of {height}x{width}, got {row},{column}"
            )
    r = min(SIDE, shorter) ** 2 if options.r is None else options.r
    if math.isqrt(r) ** 2 != r:
        parser.error(f"--r must be a square number, got {r}")
    if math.isqrt(r) > shorter and r < tokens:
        parser.error(
            f"--r must be at most {shorter**2} for the scaled image of {height}x{width}, got {r}"
        )
    k = min(K, tokens) if options.k is None else options.k
    if k > tokens:
        parser.error(f"--k must be at most {tokens}, the number of pixels, got {k}")
    if options.k is not None and options.r is not None and k > r:
        parser.error(f"--k must be at most {r}, the number of candidates, got {k}")
    return pixels, k, r


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
        help="longer side of the image after scaling it down (default: %(default)s)",
    )
    parser.add_argument(
        "--k",
        type=_at_least_one,
        help=f"neighbors per pixel (default: {K}, or as many as there are pixels or candidates)",
    )
    parser.add_argument(
        "--r",
        type=_at_least_one,
        help=f"random or spatial candidates, a square number (default: {SIDE**2}, or the largest "
        "that fits into the image)",
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
        parser.error("drawing needs matplotlib, as in the extra bench: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    endings = sorted(FigureCanvasAgg.filetypes)
    if options.out.suffix[1:].lower() not in endings:
        parser.error(f"--out must end in one of .{', .'.join(endings)}, got {options.out}")
    try:
        image = load(options.image, options.size)
    except OSError as error:
        parser.error(f"IMAGE cannot be read: {error}")
    shape = image.shape[1], image.shape[2]
    pixels, k, r = choose(parser, options, shape)
    if why := degenerate(image):
        _report(f"note: {why}")
    torch.manual_seed(options.seed)
    try:
        draw(image, pixels, k, r, options.out)
    except OSError as error:
        parser.error(f"--out cannot be written: {error}")
    print(options.out)


if __name__ == "__main__":
    main()
