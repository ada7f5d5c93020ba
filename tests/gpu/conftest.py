# SPDX-License-Identifier: MIT
"""Tests that need an NVIDIA GPU: `make gpu` runs them.

``CONVNN_GPU_TESTS=cpu`` with ``TRITON_INTERPRET=1`` rehearses most of them on CPU tensors.
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
            item.add_marker(pytest.mark.skip(reason="meaningless on CPU tensors"))


@pytest.fixture(autouse=True)
def _end_with_a_broken_gpu_context() -> Iterator[None]:
    """After an illegal access every later call fails, too. So the process ends; pytest-xdist starts
    another one, and only the test at fault fails.
    """
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
    """Forces each of the two backends for CUDA tensors."""
    reason = selection.available()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with convnn_kernels.backend(request.param):
        yield request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE
