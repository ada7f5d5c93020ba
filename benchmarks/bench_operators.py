# SPDX-License-Identifier: MIT
"""Operators under pytest-benchmark: pytest benchmarks/bench_operators.py --benchmark-only

For a quick look while working on a kernel: --benchmark-save and --benchmark-compare keep times and
compare them with earlier ones. Ratios to other implementations need python -m benchmarks, which
times all of them in the same rounds.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import runner
from benchmarks.devices import DEVICES
from benchmarks.peers import PEERS, around, run_pass
from benchmarks.workloads import Workload

_OPERATORS = ("select", "aggregate", "convnn-all", "convnn-random")
_CASES = [
    runner.Case(Workload(batch, tokens, 64, 9), peer, passes)
    for batch, tokens in ((8, 1024), (1, 4096))
    for peer in _OPERATORS
    for passes in ("forward", "forward+backward")
    if passes in PEERS[peer].passes
]


@pytest.mark.parametrize("case", _CASES, ids=lambda c: f"{c.peer}-{c.passes}-{c.workload.tokens}")
def test_operator(case: runner.Case, benchmark: Any) -> None:
    device = DEVICES["cpu"]
    device.prepare(device.default_threads())
    ready = runner.prepare("operators", case, device)
    assert isinstance(ready, runner.Ready), ready["reason"]
    with around(ready.call, ready.passes):
        benchmark(run_pass, ready.call, ready.passes)
