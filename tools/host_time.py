# SPDX-License-Identifier: MIT
"""``python -m tools.host_time``: what a call in bfloat16 costs on the host, up to its kernels.

On a machine without a GPU, over a CUDA driver that does nothing (null_driver/libcuda.c): everything
runs as for CUDA tensors, from the dispatcher to Triton's own launcher, but tensors are in the
memory of the CPU and no kernel runs. Kernels are compiled for sm_90. What remains to be added on a
GPU are the driver's launches and PyTorch's CUDA allocator.

With ``--hopper``, calls that go to the CUDA C++ kernels for Hopper, over kernels that do nothing
(way_in.py).
"""

import argparse
import atexit
import cProfile
import ctypes
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_SOURCE = Path(__file__).parent / "null_driver" / "libcuda.c"
_ARCH = 90
# Of compiled kernels, for those who have not chosen another one.
CACHE = str(Path(tempfile.gettempdir()) / "convnn-host-time")


def install_null_driver() -> ctypes.CDLL:
    """Has Triton launch through the driver that does nothing. To be called before any launch.

    Returns the driver. Its `convnn_launches()` is the number of launches so far.
    """
    folder = Path(tempfile.mkdtemp(prefix="convnn-null-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "libcuda.so.1"
    options = ("-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    subprocess.run(["cc", *options, str(_SOURCE), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # Triton asks the loader for it by name, and gets the one that is loaded.
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    class NullDriver(CudaDriver):
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", _ARCH, 32)

    # What GPUDriver takes from torch.cuda.
    with mock.patch.multiple("torch.cuda", is_available=lambda: True):
        made = NullDriver()
    made.get_device_capability = lambda device=0: divmod(_ARCH, 10)
    made.get_current_device = lambda: 0
    made.get_current_stream = lambda device: 0
    driver.set_active(made)
    return loaded


def take_cpu_tensors() -> None:
    """Registers what runs for CUDA tensors for those of the CPU."""
    from convnn_kernels import schemas
    from convnn_kernels.backends import selection
    from convnn_kernels.triton import hardware

    hardware.architecture = lambda X: _ARCH
    selection.choose = lambda call: ("triton", "this program says so")
    # On a GPU, index values are not read.
    selection._check_values = lambda name, arguments: None
    warnings.filterwarnings("ignore", "Warning only once for all operators")
    for op in schemas.OPERATORS.values():
        schemas.LIBRARY.impl(op, selection.cuda_kernel(op), "CPU", allow_override=True)


def measure(call: Callable[[], Any], rounds: int = 300, calls: int = 10) -> tuple[float, float]:
    """Microseconds of a call: the least of the rounds, and their median; in time of this thread.

    The least is what repeats where others use the machine, too.
    """
    call()
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - begin) / calls)
    return 1e6 * min(times), 1e6 * statistics.median(times)


# Queries and keys; small, because PyTorch's own operations do run.
_SHAPES = {"few tokens": (32, 32), "many keys": (32, 1100)}


def calls(N: int, M: int, weight: str) -> dict[str, Callable[[], Any]]:
    """Forward without and with gradients, and backward."""
    D, k, dtype = 32, 9, torch.bfloat16
    inputs = [torch.randn(1, n, D, dtype=dtype, requires_grad=True) for n in (N, M, M)]
    shape = (D, D, k) if weight == "dense" else (D, 1, k)
    inputs.append(torch.randn(shape, dtype=dtype, requires_grad=True))
    query, key, value, W = inputs

    def forward() -> Any:
        return torch.ops.convnn.forward(query, key, value, k, W)

    output = forward()[0]
    grad = torch.zeros_like(output)

    def backward() -> Any:
        return torch.autograd.grad(output, inputs, grad, retain_graph=True)

    return {"forward, no_grad": torch.no_grad()(forward), "forward": forward, "backward": backward}


def hopper_calls() -> dict[str, Callable[[], Any]]:
    """A forward that the Hopper kernels run, each way to call it, and one of SDPA."""
    from convnn_kernels import functional
    from convnn_kernels.backends import hopper
    from tools import way_in

    # Large memory comes from what was freed, as from PyTorch's CUDA allocator: M_MMAP_THRESHOLD,
    # M_TRIM_THRESHOLD.
    for option in (-3, -1):
        ctypes.CDLL(None).mallopt(option, 1 << 30)
    way_in.install()
    hopper.faults = lambda device, kind: []  # type: ignore[assignment, misc]
    dtype = torch.bfloat16
    Q, K, V = (torch.randn(4, 4096, 16, dtype=dtype) for _ in range(3))
    weight = torch.randn(16, 1, 9, dtype=dtype)
    with_gradient = [X.clone().requires_grad_() for X in (Q, K, V)]
    x = torch.randn(1, 4, 32, 16, dtype=dtype)

    def operator() -> Any:
        return torch.ops.convnn.forward(Q, K, V, 9, weight)

    return {
        "operator, inference": torch.inference_mode()(operator),
        "operator, no_grad": torch.no_grad()(operator),
        "function, no_grad": torch.no_grad()(lambda: functional.convnn(Q, K, V, 9, weight)),
        "operator, gradients": lambda: torch.ops.convnn.forward(*with_gradient, 9, weight),
        "SDPA, small, no_grad": torch.no_grad()(
            lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x)
        ),
    }


def _profile(call: Callable[[], Any]) -> None:
    with cProfile.Profile() as profile:
        for _ in range(2000):
            call()
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.host_time", description=__doc__)
    profiled = ("forward, no_grad", "forward", "backward")
    parser.add_argument("--profile", choices=profiled, help="a call of which to show the parts")
    parser.add_argument("--hopper", action="store_true", help="the CUDA C++ kernels for Hopper")
    options = parser.parse_args()
    if options.hopper:
        torch.set_num_threads(1)
        for name, call in hopper_calls().items():
            least, median = measure(call)
            print(f"{name:<22} {least:6.1f} us, median {median:.1f}", flush=True)
        return 0
    os.environ.setdefault("TRITON_CACHE_DIR", CACHE)
    install_null_driver()
    take_cpu_tensors()
    torch.set_num_threads(1)
    for shape, (N, M) in _SHAPES.items():
        for weight in ("depthwise", "dense"):
            for name, call in calls(N, M, weight).items():
                least, median = measure(call)
                what = f"{shape:<14} {weight:<10} {name:<17}"
                print(f"{what} {least:6.0f} us, median {median:.0f}", flush=True)
                if name == options.profile:
                    _profile(call)
    return 0


if __name__ == "__main__":
    sys.exit(main())
