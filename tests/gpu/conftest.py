# SPDX-License-Identifier: MIT
"""Tests that need an NVIDIA GPU: `make gpu` runs them.

``CONVNN_GPU_TESTS=cpu`` runs those that can on CPU tensors instead, with ``TRITON_INTERPRET=1``: to
see that they do run.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from on_device import DEVICE, ON_CPU

import convnn_kernels
from convnn_kernels.backends import selection

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not ON_CPU and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
        elif ON_CPU and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="means nothing on CPU tensors"))


@pytest.fixture(autouse=True)
def _a_process_whose_gpu_is_broken_ends() -> Iterator[None]:
    """After an access out of bounds every later call fails, too: pytest-xdist begins a new process,
    and only the test at fault is counted."""
    yield
    if ON_CPU or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both backends of CUDA tensors, each forced."""
    reason = selection.available()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with convnn_kernels.backend(request.param):
        yield request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE
