# SPDX-License-Identifier: MIT
"""Comparisons with the reference and the checks of the benchmark on another device than the CPU."""

from dataclasses import replace

import pytest
import torch
from cases import make_case
from fake_cuda_device import DEVICE, FakeCudaDevice
from torch import Tensor

import convnn_kernels  # noqa: F401
from benchmarks import devices, runner, suites
from benchmarks.workloads import Workload
from python_ref import assert_forward, assert_values


def test_mixed_devices_are_rejected() -> None:
    """The negative control."""
    with FakeCudaDevice():
        X, on_cpu = torch.zeros(2, device=DEVICE), torch.zeros(2)
        assert X.device == (X + 1).device == on_cpu.to(DEVICE).device == DEVICE
        assert on_cpu.device == X.cpu().device == torch.device("cpu")
        with pytest.raises(RuntimeError, match="same device"):
            X + on_cpu
        with pytest.raises(RuntimeError, match="same device"):
            assert_values("X", X, on_cpu.double(), X)


@pytest.mark.parametrize("seed", range(6))
def test_comparison(seed: int) -> None:
    case = make_case(seed)
    with FakeCudaDevice():
        arguments = {
            name: X.to(DEVICE) if isinstance(X, Tensor) else X
            for name, X in case.arguments().items()
        }
        Y, _, _ = assert_forward(
            torch.ops.convnn.forward, **arguments, exact=case.exact, seed=case.seed
        )
        assert Y.device == DEVICE


class FakeCuda(devices.Cpu):
    where = "cuda"


def small(workload: Workload) -> Workload:
    if workload.keys is not None:
        return replace(workload, tokens=64, keys=81, k=min(workload.k, 8))
    tokens = 17 if workload.tokens == 197 else 16
    return replace(workload, batch=2, tokens=tokens, channels=min(workload.channels, 16))


# Peers that need a GPU or a package.
NOT_HERE = ("mm", "copy", "sdpa-", "flashlib", "faiss", "cuvs", "keops", "host-", "graph-")


@pytest.mark.slow
def test_gpu_suite_passes_its_checks() -> None:
    """Inputs, peers and expected results are all on the device."""
    cases = {
        (case.peer, case.passes, case.workload.keys is None): case
        for group in suites.SUITES["gpu"].groups("cuda")
        for case in group.cases
        if not case.peer.startswith(NOT_HERE) and not case.peer.endswith(("-triton", "-cuda"))
    }
    assert len(cases) > 15
    with FakeCudaDevice():
        for case in cases.values():
            workload = replace(small(case.workload), dtype="float32")
            ready = runner.prepare("", replace(case, workload=workload), FakeCuda())
            assert isinstance(ready, runner.Ready), (case, ready)
            assert all(leaf.device == DEVICE for leaf in ready.call.leaves.values()), case
