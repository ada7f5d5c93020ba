# SPDX-License-Identifier: MIT
"""The comparisons and the benchmark's gate with tensors of another device than the CPU's."""

from dataclasses import replace

import pytest
import torch
from cases import make_case
from other_device import DEVICE, OtherDevice
from torch import Tensor

import convnn_kernels  # noqa: F401
from benchmarks import devices, runner, suites
from benchmarks.workloads import Workload
from python_ref import assert_forward, assert_values


def test_tensors_of_two_devices_do_not_meet() -> None:
    """The control."""
    with OtherDevice():
        X, here = torch.zeros(2, device=DEVICE), torch.zeros(2)
        assert X.device == (X + 1).device == here.to(DEVICE).device == DEVICE
        assert here.device == X.cpu().device == torch.device("cpu")
        with pytest.raises(RuntimeError, match="same device"):
            X + here
        with pytest.raises(RuntimeError, match="same device"):
            assert_values("X", X, here.double(), X)


@pytest.mark.parametrize("seed", range(6))
def test_comparison(seed: int) -> None:
    case = make_case(seed)
    with OtherDevice():
        arguments = {
            name: X.to(DEVICE) if isinstance(X, Tensor) else X
            for name, X in case.arguments().items()
        }
        Y, _, _ = assert_forward(
            torch.ops.convnn.forward, **arguments, exact=case.exact, seed=case.seed
        )
        assert Y.device == DEVICE


class There(devices.Cpu):
    where = "cuda"


def small(workload: Workload) -> Workload:
    if workload.keys is not None:
        return replace(workload, tokens=64, keys=81, k=min(workload.k, 8))
    tokens = 17 if workload.tokens == 197 else 16
    return replace(workload, batch=2, tokens=tokens, channels=min(workload.channels, 16))


# What needs code for a device, or a package.
_NOT_HERE = ("mm", "copy", "sdpa-", "flashlib", "faiss", "cuvs", "keops", "host-", "graph-")


@pytest.mark.slow
def test_gate_of_the_gpu_suite() -> None:
    """Inputs, peers, and what they are checked with."""
    cases = {
        (case.peer, case.passes, case.workload.keys is None): case
        for group in suites.SUITES["gpu"].groups("cuda")
        for case in group.cases
        if not case.peer.startswith(_NOT_HERE) and not case.peer.endswith(("-triton", "-cuda"))
    }
    assert len(cases) > 15
    with OtherDevice():
        for case in cases.values():
            workload = replace(small(case.workload), dtype="float32")
            ready = runner.prepare("", replace(case, workload=workload), There())
            assert isinstance(ready, runner.Ready), (case, ready)
            assert all(leaf.device == DEVICE for leaf in ready.call.leaves.values()), case
