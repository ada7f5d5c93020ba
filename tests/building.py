# SPDX-License-Identifier: MIT
"""Helpers of tests that build something."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tool(name: str) -> str:
    """Path of a program that a Python package installs, or of one on PATH."""
    # Packages install programs next to the interpreter, in a folder that may not be on PATH.
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or name


def build(folder: Path, *targets: str) -> None:
    """Build targets of CMakeLists.txt that are built only on request, without the CUDA library."""
    configure = [
        *(tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DCONVNN_CUDA=0", "-DCONVNN_WERROR=1"),
    ]
    for command in (configure, [tool("cmake"), "--build", str(folder), "--target", *targets]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
