# SPDX-License-Identifier: MIT
"""Trains one row with the paper's recipe, with a log and with checkpoints to resume from."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.paper.data import AS_RUN_SCALE, Dataset, Split, resized
from benchmarks.paper.rows import Row


@dataclass(frozen=True)
class Recipe:
    """The defaults are those of the paper's section 6.

    Attributes:
        as_run: the authors' code: seed 42 for everything but the weights, which they did not seed
            and `seed` does; images resized as bytes before they are normalized, and by constants;
            losses and accuracies as means over batches, of which the last one may be smaller.
        save_every: epochs between checkpoints; the log is written after every epoch.
    """

    epochs: int = 150
    batch_size: int = 256
    optimizer: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.01
    schedule: str = "none"
    clip: float = 1.0
    label_smoothing: float = 0.0
    augmentation: str = "none"
    seed: int = 0
    device: str = "cpu"
    amp: str = "none"
    compile: bool = False
    reduced: bool = False
    train_limit: int | None = None
    test_limit: int | None = None
    dataset: str = "cifar10"
    as_run: bool = False
    save_every: int = 1

    def fixed(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed."""
        free = {"epochs", "device", "compile", "save_every"}
        if self.schedule != "none":
            free.remove("epochs")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}

    def seed_of(self, epoch: int) -> int:
        """The seed of an epoch: a run that is resumed is like one without a break."""
        return (42 if self.as_run else self.seed) * 1_000_003 + epoch

    def lr_of(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 0."""
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return self.lr


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
}
SCHEDULES = ("none", "cosine")
AUGMENTATIONS = ("none", "flip-shift")


class DivergedError(RuntimeError):
    """The loss became NaN or infinite."""


class AnotherRunError(ValueError):
    """The folder holds a run with another recipe or other data."""


def train(
    row: Row, data: Dataset, recipe: Recipe, folder: Path, stamp: dict[str, Any]
) -> dict[str, Any]:
    """Trains a row, or resumes its training, until it has had its epochs.

    Args:
        row: the model; with recipe.as_run, that of ``Row.as_run``.
        data: images and labels.
        recipe: how to train.
        folder: of this row; holds "log.json" and "checkpoint.safetensors".
        stamp: of the machine, the versions and the commit.

    Returns:
        The log: "row"; "recipe"; "data", for training and tests; "parts", the stamp and the
        first epoch of each part of the run; and "epochs", a list with, for each, "epoch",
        "train_loss", "train_accuracy", "test_loss", "test_accuracy" (0 to 1) and "seconds" of
        training.

    Raises:
        AnotherRunError: if the folder holds a run with another recipe or other data.
        DivergedError: if the loss becomes NaN or infinite.
    """
    device = torch.device(recipe.device)
    torch.manual_seed(recipe.seed)
    model = row.build(data.num_classes, recipe.reduced).to(device)
    optimizer = OPTIMIZERS[recipe.optimizer](
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    data = data.limited(recipe.train_limit, recipe.test_limit)
    train_split, test_split = (
        Split(split.images.to(device), split.labels.to(device)) for split in (data.train, data.test)
    )
    scale = tuple(each.to(device) for each in _scale(data, recipe))
    size = row.image_size(recipe.reduced)
    log = _resume(folder, model, optimizer, recipe, _new_log(row, data, recipe))
    if len(log["epochs"]) < recipe.epochs:
        log["parts"].append({"first_epoch": len(log["epochs"]) + 1, "stamp": stamp})
        log["recipe"] = asdict(recipe)
    run = torch.compile(model) if recipe.compile else model

    for epoch in range(len(log["epochs"]), recipe.epochs):
        torch.manual_seed(recipe.seed_of(epoch))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_of(epoch)
        start = time.perf_counter()
        name = f"{row.name} {epoch + 1}/{recipe.epochs}"
        train_loss, train_accuracy = _train_epoch(
            run, optimizer, train_split, recipe, scale, size, name
        )
        seconds = time.perf_counter() - start
        if not math.isfinite(train_loss):
            raise DivergedError(f"{row.name}: training loss is {train_loss} in epoch {epoch + 1}")
        test_loss, test_accuracy = evaluate(run, test_split, recipe, scale, size)
        log["epochs"].append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "seconds": seconds,
            }
        )
        if (epoch + 1) % recipe.save_every == 0 or epoch + 1 == recipe.epochs:
            _save(folder, model, optimizer, log)
        _save_log(folder, log)
        tqdm.write(
            f"{row.name} {epoch + 1}/{recipe.epochs}: train {train_loss:.4f}, "
            f"test {test_loss:.4f}, {100 * test_accuracy:.2f}%, {seconds:.1f} s"
        )
    return log


def _new_log(row: Row, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """The log of a run that has not begun, on `data` as limited."""
    mean, deviation = _scale(data, recipe)
    return {
        "row": row.name,
        "recipe": asdict(recipe),
        "data": {
            "source": data.source,
            "train": len(data.train.labels),
            "test": len(data.test.labels),
            "image_size": list(data.train.images.shape[-2:]),
            "mean": mean.flatten().tolist(),
            "deviation": deviation.flatten().tolist(),
        },
        "parts": [],
        "epochs": [],
    }


def _scale(data: Dataset, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, [3, 1, 1] each."""
    if not recipe.as_run:
        return data.mean_and_deviation()
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in AS_RUN_SCALE[recipe.dataset])
    return mean, deviation


def _train_epoch(
    run: nn.Module | Any,
    optimizer: torch.optim.Optimizer,
    split: Split,
    recipe: Recipe,
    scale: tuple[Tensor, ...],
    size: int,
    name: str,
) -> tuple[float, float]:
    """Mean loss, and accuracy from 0 to 1."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    device = split.images.device
    count = len(split.labels)
    batches = torch.randperm(count).to(device).split(recipe.batch_size)
    run.train()
    total, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    for rows in tqdm(batches, desc=name, leave=False):
        images, labels = _inputs(split, rows, scale, size, recipe, is_training=True)
        with _autocast(recipe):
            logits = run(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        weight = _weight(rows, batches, recipe)
        total += loss.detach() * len(rows) * weight
        correct += (logits.argmax(1) == labels).sum() * weight
    # Reading the sums waits for the device, so that the time includes all its work.
    return total.item() / count, correct.item() / count


def _weight(rows: Tensor, batches: Sequence[Tensor], recipe: Recipe) -> float:
    """How often an image of the batch `rows` counts in the mean over all."""
    if not recipe.as_run:
        return 1
    return sum(map(len, batches)) / (len(batches) * len(rows))


@torch.no_grad()
def evaluate(
    model: nn.Module | Any, split: Split, recipe: Recipe, scale: tuple[Tensor, ...], size: int
) -> tuple[float, float]:
    """Mean loss, and accuracy from 0 to 1."""
    model.eval()
    total, correct = 0.0, 0.0
    batches = torch.arange(len(split.labels), device=split.labels.device).split(recipe.batch_size)
    for rows in batches:
        images, labels = _inputs(split, rows, scale, size, recipe)
        with _autocast(recipe):
            logits = model(images).float()
        weight = _weight(rows, batches, recipe)
        total += F.cross_entropy(logits, labels, reduction="sum").item() * weight
        correct += int((logits.argmax(1) == labels).sum()) * weight
    return total / len(split.labels), correct / len(split.labels)


def _inputs(
    split: Split,
    rows: Tensor,
    scale: tuple[Tensor, ...],
    size: int,
    recipe: Recipe,
    is_training: bool = False,
) -> tuple[Tensor, Tensor]:
    mean, deviation = scale
    images = split.images[rows]
    is_resized = images.shape[-2:] != (size, size)
    if recipe.as_run and is_resized:
        images = resized(images, size)
    images = (images.float() / 255 - mean) / deviation
    if is_training and recipe.augmentation == "flip-shift":
        images = _flip_and_shift(images)
    if is_resized and not recipe.as_run:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=False)
    return images, split.labels[rows]


def _flip_and_shift(images: Tensor) -> Tensor:
    """Mirrors each image or not, and shifts it by up to 4 pixels each way, padded with zeros."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    y, x = torch.randint(0, 9, (2, count, 1), device=images.device)
    rows = y + torch.arange(height, device=images.device)  # [count, height] of the padded image
    columns = x + torch.arange(width, device=images.device)
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    each = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[each, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _autocast(recipe: Recipe) -> AbstractContextManager[object]:
    if recipe.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(recipe.device).type, dtype=getattr(torch, recipe.amp))


# Checkpoints: one file with model and optimizer, replaced atomically.


def _resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    new_log: dict[str, Any],
) -> dict[str, Any]:
    """Loads the checkpoint in the folder and returns its log, or the new log if there is none."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return new_log
    with safe_open(path, framework="pt") as file:
        log = json.loads(file.metadata()["log"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    # Logs of older runs lack settings that have been added.
    wanted, before = recipe.fixed(), {**asdict(Recipe()), **log["recipe"]}
    pairs = {name: (before[name], value) for name, value in wanted.items()}
    # Logs of older runs have no size of the images.
    pairs |= {
        name: (log["data"].get(name, value), value) for name, value in new_log["data"].items()
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise AnotherRunError(
                f"{folder} holds a run with another {name}: {old!r}, now {new!r}; "
                "choose another folder or remove it"
            )
    model.load_state_dict(_part(tensors, "model."))
    names = [name for name, _ in model.named_parameters()]
    state = {
        i: _part(tensors, f"optimizer.{name}.")
        for i, name in enumerate(names)
        if any(key.startswith(f"optimizer.{name}.") for key in tensors)
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return log


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, log: dict[str, Any]
) -> None:
    tensors = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / "checkpoint.safetensors") as path:
        save_file(tensors, path, metadata={"log": json.dumps(log)})


def _save_log(folder: Path, log: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / "log.json") as path:
        path.write_text(json.dumps(log, indent=1) + "\n")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields a path to write to; that file then replaces `path` atomically, or not at all."""
    temporary = path.with_name(path.name + ".new")
    yield temporary
    os.replace(temporary, path)
