# SPDX-License-Identifier: MIT
"""Takes CPU tensors by the way that CUDA tensors go to the Hopper kernels, without a GPU.

`install` puts a library in the place of libconvnn_cuda.so (way_in/library.cpp) for the rest of the
process. It has the same code before the kernels: dispatch, checks, the choice, allocations. Its
kernels do nothing but tell that they ran, and Triton's are never chosen.
"""

import atexit
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from convnn_kernels import native, schemas
from convnn_kernels.backends import cuda, hopper, selection

_ROOT = Path(__file__).parent.parent
_SOURCES = (_ROOT / "tools/way_in/library.cpp", _ROOT / "csrc/cuda/choice.cpp")


def build(folder: Path) -> Path:
    library = folder / "libconvnn_cuda.so"
    torch_folder = Path(torch.__file__).parent
    command = ["c++", "-std=c++17", "-O3", "-DNDEBUG", "-shared", "-fPIC", "-DCONVNN_HOPPER"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{torch_folder / 'include'}"]
    command += [*map(str, _SOURCES), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def install() -> None:
    folder = Path(tempfile.mkdtemp(prefix="convnn-way-in-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = build(folder)
    # PyTorch tells that the kernels for CPU tensors are replaced.
    torch.ops.load_library(library)
    native.load = lambda: {"cpu": "", "cuda": ""}  # type: ignore[assignment]
    real = native.library
    native.library = lambda name: library if name == "cuda" else real(name)
    torch.cuda.is_current_stream_capturing = lambda: False
    hopper.can_run = lambda name, device: name in hopper.OPERATORS
    cuda.unavailable = lambda: None  # type: ignore[assignment]
    cuda.refuses = lambda device: None
    hopper.route(is_forced=False)
    for name in hopper.OPERATORS:
        selection.register(schemas.OPERATORS[name], "CPU")


if __name__ == "__main__":
    sys.exit("a module for tools.host_time and tests/test_cuda_way_in.py")
