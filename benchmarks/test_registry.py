# SPDX-License-Identifier: MIT
"""The registry under pytest-benchmark: pytest benchmarks --benchmark-only

    pytest benchmarks --benchmark-only --benchmark-save=before
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:30%

Its cases are timed one after the other, not in turn: for ratios use python -m benchmarks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import runner
from benchmarks.devices import DEVICES
from benchmarks.peers import gradient_mode, run_pass


def test_case(case: tuple[runner.Group, runner.Case], benchmark: Any, request: Any) -> None:
    group, what = case
    device = DEVICES[request.config.getoption("--device")]
    if (reason := device.why_not()) is not None:
        pytest.skip(reason)
    device.prepare(device.default_threads())
    ready = runner.prepare(group.name, what, device)
    if not isinstance(ready, runner.Ready):
        if ready["status"] == "skipped":
            pytest.skip(ready["reason"])
        pytest.fail(f"{ready['status']}: {ready['reason']}")
    if ready.call.sample is not None:
        pytest.skip("runs in a process of its own, which python -m benchmarks times")

    def run() -> None:
        run_pass(ready.call, ready.passes)
        if device.where != "cpu":
            torch.cuda.synchronize(device.where)

    benchmark.group = f"{group.name}, {what.passes}"
    benchmark.extra_info |= {"flops": ready.row["flops"], "checked": ready.row["checked"]}
    with gradient_mode(ready.passes):
        benchmark(run)
