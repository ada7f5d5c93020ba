# SPDX-License-Identifier: MIT
"""Loads the C++ libraries, which define the ``convnn`` operators and implement them."""

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from convnn_kernels import installed

FOLDER, _FAULT = installed.library_folder(Path(__file__).parent)


def library(name: str) -> Path:
    """The path of the library of backend ``name`` ("cpu" or "cuda"), whether built or not."""
    return FOLDER / f"libconvnn_{name}.so"


def build_report() -> dict[str, Any]:
    """What was built: versions, and each part, ``{"built": detail}`` or ``{"skipped": reason}``.

    Empty if there was no build.
    """
    return installed.build_report(FOLDER)


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
        raise ImportError(f"convnn_kernels: the CPU library {path} is missing. {_FAULT}".rstrip())
    if _FAULT:
        warnings.warn(f"convnn_kernels: {_FAULT}", stacklevel=2)
    _require_only_copy(path)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"convnn_kernels: PyTorch {torch.__version__} cannot load {path}, which needs PyTorch "
            f"2.11 or newer.\n{error}"
        ) from error
    return {"cpu": "", "cuda": _load_cuda()}


def _require_only_copy(path: Path) -> None:
    """Raises if the process has loaded another copy of a library.

    Each copy defines the operators, and PyTorch ends the process when they are defined again.
    """
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        loaded = Path(line.partition("/")[2].removesuffix(" (deleted)"))
        if loaded.name == path.name and Path("/", loaded) != path.resolve():
            raise ImportError(
                f"convnn_kernels: cannot load {path}, because the process has already loaded "
                f"/{loaded}. Restart Python, and import or load only one of them"
            )


def cpu_instruction_set() -> str:
    """The instruction set of the CPU kernels that run on this machine.

    The fastest here by default, which `cpu_choice` explains; the environment variable
    ``CONVNN_CPU_ISA`` names another. Empty if the one it names cannot run here.
    """
    # Not cached, because the variable may change.
    return (_cpu_library().convnn_cpu_instruction_set() or b"").decode()


def cpu_can_run() -> bool:
    """Whether there is an instruction set for the CPU kernels, without choosing one."""
    return _cpu_library().convnn_cpu_can_choose()


def cpu_choice() -> dict[str, Any]:
    """How the instruction set was chosen, outside of all blocks of `use_cpu_instruction_set`.

    Chooses if nothing has been chosen yet.

    Returns:
        "source": "requested" by ``CONVNN_CPU_ISA``, "only" one, "measured" now, "remembered" from
        an earlier measurement, or "default", if measuring failed.

        "instruction_set": its name.

        "picoseconds": the time per similarity with each set, by name; empty unless measured or
        remembered.

        "milliseconds": the CPU time that measuring took, or None.

        "file", "is_kept": where the times are remembered, or None; and whether they are.

        Empty if the set that ``CONVNN_CPU_ISA`` names cannot run here.
    """
    text = _cpu_library().convnn_cpu_describe_choice()
    if text is None:
        return {}
    lines = dict(line.split(" ", 1) for line in text.decode().splitlines())
    times = lines.get("picoseconds", "").split()
    return {
        "source": lines["source"],
        "instruction_set": lines["instruction_set"],
        "picoseconds": dict(zip(times[::2], map(int, times[1::2]), strict=True)),
        "milliseconds": int(lines["microseconds"]) / 1000 if "microseconds" in lines else None,
        "file": lines.get("file") or lines.get("file!"),
        "is_kept": "file" in lines,
    }


def usable_cpu_instruction_sets() -> list[str]:
    """The instruction sets of the CPU library that run on this machine, preferred first."""
    return _cpu_library().convnn_cpu_usable_instruction_sets().decode().split(",")


@contextlib.contextmanager
def use_cpu_instruction_set(name: str | None) -> Iterator[None]:
    """Has the process use one instruction set on the CPU, within a ``with`` block.

    It holds for all threads, from the next operator that each of them calls, and takes precedence
    over ``CONVNN_CPU_ISA``. Blocks may be nested, but not overlap between threads: the last one to
    be left decides what is used then.

    Args:
        name: one of `usable_cpu_instruction_sets`, or None for what is used outside all blocks.

    Raises:
        TypeError: if it is neither a string nor None.
        ValueError: if it cannot run on this machine.

    Example:
        >>> import torch
        >>> from convnn_kernels import native
        >>> from convnn_kernels.functional import convnn
        >>> x = torch.randn(2, 64, 16)
        >>> with native.use_cpu_instruction_set("portable"):
        ...     y = convnn(x, x, x, k=9)
    """
    if not isinstance(name, str | None):
        raise TypeError(f"name must be a string or None, got {type(name).__name__}")
    use = _cpu_library().convnn_cpu_use_instruction_set
    before = ctypes.c_char_p()
    if not use(None if name is None else name.encode(), ctypes.byref(before)):
        can = ", ".join(usable_cpu_instruction_sets())
        raise ValueError(
            f"name must be one of the instruction sets that run here ({can}), got {name!r}"
        )
    try:
        yield
    finally:
        use(before.value, ctypes.byref(ctypes.c_char_p()))


@functools.cache
def _cpu_library() -> ctypes.CDLL:
    """The CPU library, for its functions that are not operators; cached, so it is opened once."""
    opened = ctypes.CDLL(str(library("cpu")))
    opened.convnn_cpu_instruction_set.restype = ctypes.c_char_p
    opened.convnn_cpu_usable_instruction_sets.restype = ctypes.c_char_p
    opened.convnn_cpu_use_instruction_set.restype = ctypes.c_bool
    opened.convnn_cpu_can_choose.restype = ctypes.c_bool
    opened.convnn_cpu_describe_choice.restype = ctypes.c_char_p
    return opened


def _load_cuda() -> str:
    path = library("cuda")
    if not path.exists():
        reason = build_report().get("cuda", {}).get("skipped")
        return f"not built: {reason}" if reason else "not built"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} has no CUDA"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # PyTorch's own message names only the file; the cause says what is wrong.
        return f"PyTorch {torch.__version__} cannot load {path}: {error.__cause__ or error}"
    return ""
