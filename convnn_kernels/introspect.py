# SPDX-License-Identifier: MIT
"""What the native parts of convnn_kernels were built for, read from the files of the build.

The module of the same name that csrc/introspect.cpp builds with pybind11 comes first where it fits
the running Python: it was built for one version of Python, and the wheel is for all of them.
"""

import json

from convnn_kernels import native


def version() -> str:
    """Version of convnn_kernels that was built."""
    return native.build_report()["version"]


def compiler() -> str:
    """Name and version of the C++ compiler."""
    return native.build_report()["compiler"]


def cpu_instruction_sets() -> list[str]:
    """Instruction sets the CPU kernels were compiled for, the most basic first."""
    return _built("cpu")


def cuda_architectures() -> list[str]:
    """Architectures the CUDA kernels were compiled for; empty without the CUDA library."""
    return _built("cuda")


def cuda_kernels() -> dict[str, dict[str, int]]:
    """For each architecture and CUDA kernel: registers, local and shared bytes, and occupancy.

    Local bytes are stack and spilled registers; the occupancy is what registers and shared memory
    allow, in percent. Empty without the CUDA library, or if cuobjdump was not found when it was
    built.
    """
    try:
        return json.loads((native.FOLDER / "cuda_kernels.json").read_text())
    except FileNotFoundError:
        return {}


def _built(part: str) -> list[str]:
    built = native.build_report()[part].get("built", "")
    return built.split(", ") if built else []
