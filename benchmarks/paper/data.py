# SPDX-License-Identifier: MIT
"""CIFAR-10 and CIFAR-100 as torchvision stores them, or folders of images by class."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm


class NoDataError(ValueError):
    """The folder does not hold the dataset; the message says why."""


_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@dataclass
class Split:
    """images, [N, 3, H, W] uint8, and labels, [N] int64."""

    images: Tensor
    labels: Tensor

    def limited(self, count: int | None) -> Split:
        """The first images of every class, `count` in all; classes differ by at most one."""
        if count is None or count >= len(self.labels):
            return self
        order = torch.argsort(self.labels, stable=True)
        labels = self.labels[order]
        first = torch.searchsorted(labels, labels)
        rank = torch.arange(len(labels)) - first
        kept = order[torch.argsort(rank, stable=True)[:count]]
        return Split(self.images[kept], self.labels[kept])


@dataclass
class Dataset:
    """source: the format that was read, such as "class folders of .jpg images"."""

    train: Split
    test: Split
    num_classes: int
    source: str

    def limited(self, train: int | None, test: int | None) -> Dataset:
        """With so many images at most; see ``Split.limited``."""
        return replace(self, train=self.train.limited(train), test=self.test.limited(test))

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Per channel, of the training images scaled to [0, 1]: [3, 1, 1] float32."""
        pixels = self.train.images.transpose(0, 1).flatten(1)
        counts = torch.stack([torch.bincount(row, minlength=256) for row in pixels]).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        weights = counts / counts.sum(1, keepdim=True)
        mean = weights @ values
        deviation = (weights @ values.square() - mean.square()).clamp(min=1e-12).sqrt()
        return mean.float().view(3, 1, 1), deviation.float().view(3, 1, 1)


# The mean and standard deviation by which the authors' code normalizes, in place of those of the
# images that are used.
AS_RUN_SCALE = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def resized(images: Tensor, size: int) -> Tensor:
    """Images as Pillow resizes them, bilinearly, first along rows and then along columns.

    Args:
        images: [N, 3, H, W] uint8.
        size: height and width of the result.

    Returns:
        [N, 3, size, size] float32, with whole numbers: each of the two steps is rounded.
    """
    rows = _rounded(images.float(), (images.shape[2], size))
    return _rounded(rows, (size, size))


def _rounded(images: Tensor, size: tuple[int, int]) -> Tensor:
    return (F.interpolate(images, size, mode="bilinear", antialias=True) + 0.5).floor()


def load(
    folder: Path, dataset: str, train_limit: int | None = None, test_limit: int | None = None
) -> Dataset:
    """Reads a dataset, and of folders of images only those that are needed.

    Args:
        folder: holds "cifar-10-batches-py" or "cifar-100-python", as torchvision unpacks them, or
            "train" and "test" with one folder of images for every class.
        dataset: "cifar10" or "cifar100"; how many classes folders of images must have.
        train_limit: the number of training images; all if None. See ``Split.limited``.
        test_limit: the number of test images.

    Raises:
        NoDataError: if the folder holds none of these, a file cannot be read, images differ in
            size, or the number of classes is wrong.
    """
    num_classes = {"cifar10": 10, "cifar100": 100}[dataset]
    pickled = folder / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[dataset]
    if pickled.is_dir():
        if dataset == "cifar10":
            train = [pickled / f"data_batch_{i}" for i in range(1, 6)]
            test = [pickled / "test_batch"]
        else:
            train, test = [pickled / "train"], [pickled / "test"]
        loaded = Dataset(_batches(train), _batches(test), num_classes, pickled.name)
        return loaded.limited(train_limit, test_limit)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
        if len(classes) != num_classes:
            raise NoDataError(
                f"{dataset} has {num_classes} classes, but {folder / 'train'} has {len(classes)}"
            )
        files = (path for name in classes for path in _files(folder / "train" / name))
        suffixes = sorted({path.suffix.lower() for path in files})
        return Dataset(
            _images(folder / "train", classes, train_limit),
            _images(folder / "test", classes, test_limit),
            num_classes,
            f"class folders of {', '.join(suffixes)} images",
        )
    raise NoDataError(f"{folder} has neither {pickled.name} nor folders train and test")


class _Unpickler(pickle.Unpickler):
    """Unpickles only what the arrays of CIFAR consist of; a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a CIFAR file")


def _batches(paths: list[Path]) -> Split:
    images, labels = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = _Unpickler(file, encoding="latin1").load()
            images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels += batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
        except (OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
            raise NoDataError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    return Split(torch.from_numpy(np.concatenate(images)), torch.tensor(labels))


def _images(folder: Path, classes: list[str], limit: int | None) -> Split:
    files = [
        (rank, label, path)
        for label, name in enumerate(classes)
        for rank, path in enumerate(_files(folder / name))
    ]
    if limit is not None and limit < len(files):
        # The files, and their order, of Split.limited.
        files = sorted(files)[:limit]
    if not files:
        raise NoDataError(f"{folder} has no images in the folders {classes}")
    images: list[np.ndarray[Any, Any]] = []
    for _, _, path in tqdm(files, desc=f"{folder.name} images", unit="image", leave=False):
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise NoDataError(f"cannot read {path}: {error}") from error
        if images[-1].shape != images[0].shape:
            raise NoDataError(
                f"{path} is {images[-1].shape[:2]}, but the first image is "
                f"{images[0].shape[:2]}: all must have one size"
            )
    return Split(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([label for _, label, _ in files]),
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.glob("*")) if path.suffix.lower() in _SUFFIXES)
