# SPDX-License-Identifier: MIT
"""The machine, versions and commit that a result was measured with."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# The CPU flags that decide which kernels can run.
_CPU_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16"),
)
# Variables that keep these libraries from using the widest instructions of the processor:
# convnn_kernels, PyTorch, oneDNN, MKL, and FAISS of newer and older versions.
_FORCING = (
    *("CONVNN_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"),
    *("FAISS_SIMD_LEVEL", "FAISS_OPT_LEVEL"),
)
_PACKAGES = ("torch", "triton", "numpy", "scikit-image", "faiss-cpu", "pykeops", "flashlib")


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    numbers: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name":
            model = value
        elif name in ("cpu family", "model"):
            numbers[name.removeprefix("cpu ")] = value
        elif name in ("flags", "Features"):
            flags.update(value.split())
    cores, memory = None, None
    with contextlib.suppress(ImportError):  # a GPU machine may lack it
        import psutil

        cores, memory = psutil.cpu_count(logical=False), psutil.virtual_memory().total
    return {
        "model": model,
        # Tells generations apart where a virtual machine hides the name.
        "family": ", ".join(f"{name} {value}" for name, value in numbers.items()),
        "architecture": platform.machine(),
        "cores": cores or os.cpu_count(),
        "logical_cores": os.cpu_count(),
        "memory_bytes": memory,
        "pytorch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "convnn_instruction_set": _our_instruction_set(),
        "features": [feature for feature in _CPU_FEATURES if feature in flags],
    }


def _our_instruction_set() -> str | None:
    """The default of the CPU kernels; None without the CPU library."""
    try:
        from convnn_kernels import native

        return native.cpu_instruction_set() or None
    except (ImportError, OSError):
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> dict[str, Any]:
    """Where the checkout has no git history, CONVNN_COMMIT supplies the hash, with a trailing
    "-dirty" if there were changes, as in `git describe --always --dirty --abbrev=40`.
    """
    head = _git("rev-parse", "--verify", "HEAD")
    if head is None and (given := os.environ.get("CONVNN_COMMIT")):
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    # New result files do not change what the next run measures.
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {
        "commit": head.strip() if head else None,
        "dirty": None if changes is None else bool(changes.strip()),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def make_stamp(device: str, threads: int, gpu: dict[str, Any] | None = None) -> dict[str, Any]:
    """The "stamp" of a result file.

    commit and dirty are None outside a git checkout, the version of a missing package is None.
    """
    # convnn_kernels need not be installed.
    source = (REPOSITORY / "convnn_kernels" / "version.py").read_text()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "threads": threads,
        "cpu": _cpu(),
        "forced": {name: os.environ[name] for name in _FORCING if os.environ.get(name)},
        "gpu": gpu,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            "convnn_kernels": re.findall(r'__version__ = "(.*)"', source)[0],
            **{name: _version(name) for name in _PACKAGES},
        },
        **_commit(),
    }
