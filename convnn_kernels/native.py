# SPDX-License-Identifier: MIT
"""Loads the C++ libraries, which define the ``convnn`` operators and implement them."""

import ctypes
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "lib"
_HOW_TO_BUILD = "Build it from the checkout:  pip install -e . --no-build-isolation"
_CHECKOUT = FOLDER.parent.parent
if (_CHECKOUT / "csrc").is_dir():
    _HOW_TO_BUILD = (
        f"What was imported is the checkout {_CHECKOUT}, not an installed package. {_HOW_TO_BUILD}"
    )


def library(name: str) -> Path:
    """The path of the library of backend ``name`` ("cpu" or "cuda"), whether built or not."""
    return FOLDER / f"libconvnn_{name}.so"


def build_report() -> dict[str, str | dict[str, str]]:
    """What was built: for each part, ``{"built": detail}`` or ``{"skipped": reason}``.

    Empty if there was no build.
    """
    try:
        return json.loads((FOLDER / "build.json").read_text())
    except FileNotFoundError:
        return {}


@functools.cache
def load() -> dict[str, str]:
    """Loads the libraries, once per process.

    Returns:
        For "cpu" and "cuda", an empty string if the library was loaded, otherwise the reason why
        not. The CUDA library is optional, because Triton can run CUDA tensors, too.

    Raises:
        ImportError: if the CPU library, which is required, is missing or cannot be loaded.
    """
    path = library("cpu")
    if not path.exists():
        raise ImportError(f"convnn_kernels: the CPU library {path} is missing. {_HOW_TO_BUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"convnn_kernels: PyTorch {torch.__version__} cannot load {path}, which needs PyTorch "
            f"2.11 or newer. {_HOW_TO_BUILD}\n{error}"
        ) from error
    return {"cpu": "", "cuda": _load_cuda()}


def cpu_instruction_set() -> str:
    """The instruction set of the CPU kernels that run on this machine.

    The best one by default; the environment variable ``CONVNN_CPU_ISA`` names another. Empty if the
    one it names cannot run here.
    """
    # Not cached, because the variable may change.
    return (_instruction_set_question()() or b"").decode()


@functools.cache
def _instruction_set_question() -> Callable[[], bytes | None]:
    """The function of the CPU library that answers; cached, so that the library is opened once."""
    ask = ctypes.CDLL(str(library("cpu"))).convnn_cpu_instruction_set
    ask.restype = ctypes.c_char_p
    return ask


def _load_cuda() -> str:
    path = library("cuda")
    if not path.exists():
        part = build_report().get("cuda", {})
        reason = part.get("skipped") if isinstance(part, dict) else None
        return f"not built: {reason}" if reason else "not built"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} has no CUDA"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # PyTorch's own message names only the file; the cause says what is wrong.
        return f"PyTorch {torch.__version__} cannot load {path}: {error.__cause__ or error}"
    return ""
