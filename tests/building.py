# SPDX-License-Identifier: MIT
"""Helpers of tests that build something."""

import shutil
import sys
from pathlib import Path


def tool(name: str) -> str:
    """Path of a program that a Python package installs, or of one on PATH."""
    # Packages install programs next to the interpreter, in a folder that may not be on PATH.
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or name
