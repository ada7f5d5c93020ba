# SPDX-License-Identifier: MIT
"""``python -m benchmarks.gpu_epochs``: seconds of a training epoch of the paper's models on a GPU,
beside those of the layers that they replace and of the eager reference.

CONVNN_DATA names the dataset: a folder as `benchmarks.paper.data` reads it, or an archive of one.
The second epoch counts, because the first one compiles. The eager reference sorts every row of the
similarity matrix: it has some of the images only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import python_ref
from convnn_kernels import functional

from .paper import data
from .paper.rows import ROWS
from .paper.train import Recipe, train
from .stamp import make_stamp


@dataclass(frozen=True)
class Epoch:
    row: str
    amp: str = "none"
    eager: bool = False
    images: int | None = None


EPOCHS = (
    Epoch("vgg11/hybrid-0.5"),
    Epoch("vgg11/conv2d"),
    Epoch("vit/convnn-all"),
    Epoch("vit/attention"),
    Epoch("vit/convnn-random-32"),
    Epoch("vgg11/hybrid-0.5", eager=True, images=5120),
    Epoch("vit/convnn-all", eager=True, images=5120),
    *(
        Epoch(row, "bfloat16")
        for row in ("vgg11/hybrid-0.5", "vgg11/conv2d", "vit/convnn-all", "vit/attention")
    ),
    Epoch("vit/convnn-random-32", "bfloat16"),
)


def _eager(*args: Any, **options: Any) -> torch.Tensor:
    return python_ref.forward(*args, **options)[0]


@contextmanager
def _implementation(eager: bool) -> Iterator[None]:
    before = functional.convnn
    functional.convnn = _eager if eager else before
    try:
        yield
    finally:
        functional.convnn = before


def measure(
    epoch: Epoch, images: data.Dataset, device: str, stamp: Any, **recipe: Any
) -> dict[str, Any]:
    """Two epochs; the log's last one, and what it was."""
    settings = Recipe(epochs=2, device=device, amp=epoch.amp, train_limit=epoch.images, **recipe)
    with tempfile.TemporaryDirectory() as folder, _implementation(epoch.eager):
        log = train(ROWS[epoch.row], images, settings, Path(folder), stamp)
    count = log["data"]["train"]
    last = log["epochs"][-1]
    return {
        "row": epoch.row,
        "implementation": "python_ref" if epoch.eager else "kernels",
        "amp": epoch.amp,
        "images": count,
        "images_per_second": count / last["seconds"],
        "source": log["data"]["source"],
        "first_epoch_seconds": log["epochs"][0]["seconds"],
        **last,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all measured. 1: some were not. 2: no data."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_epochs", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dataset", default="cifar10", choices=["cifar10", "cifar100"])
    parser.add_argument("--reduced", action="store_true", help="small models, for a CPU")
    parser.add_argument("--batch-size", type=int, default=Recipe().batch_size)
    options = parser.parse_args(arguments)
    path = Path(os.environ.get("CONVNN_DATA", "no-data"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if path.is_file():
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
            path = Path(folder)
            inside = list(path.iterdir())
            path = inside[0] if len(inside) == 1 else path
        try:
            dataset = data.load(path, options.dataset)
        except data.NoDataError as error:
            print(f"benchmarks.gpu_epochs: CONVNN_DATA must name the dataset: {error}")
            return 2
    seconds = time.monotonic() - began
    print(f"{len(dataset.train.labels)} images read in {seconds:.0f} s", flush=True)
    stamp = make_stamp(options.device, torch.get_num_threads())
    if options.device == "cuda":
        stamp["gpu"] = {"name": torch.cuda.get_device_name(0)}
    result: dict[str, Any] = {"stamp": stamp, "epochs": []}
    failed = False
    for epoch in EPOCHS:
        try:
            line = measure(
                epoch,
                dataset,
                options.device,
                stamp,
                reduced=options.reduced,
                batch_size=options.batch_size,
                dataset=options.dataset,
            )
            print(
                f"{epoch.row}, {line['implementation']}, amp {epoch.amp}: {line['images']} images "
                f"in {line['seconds']:.1f} s, test accuracy {100 * line['test_accuracy']:.1f}%",
                flush=True,
            )
        except Exception as error:
            failed = True
            line = {"row": epoch.row, "amp": epoch.amp, "eager": epoch.eager}
            line["reason"] = f"{type(error).__name__}: {error}"[:1000]
            print(f"{epoch.row}: {line['reason']}", flush=True)
        result["epochs"].append(line)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
