# SPDX-License-Identifier: MIT
"""What tests that build something share."""

import shutil
import sys
from pathlib import Path


def tool(name: str) -> str:
    """Path of a program that a Python package brings, or one on PATH."""
    # Such packages put it beside the interpreter, which need not be on PATH.
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or name
