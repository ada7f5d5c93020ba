# SPDX-License-Identifier: MIT
"""``python -m benchmarks.watched SUITE BACKEND DEVICE``: our calls of a suite, once each, for `ncu`
or compute-sanitizer to watch. Of the suite `time` it is the first group; the backend `fault` has a
write behind the end of a tensor instead, which a sanitizer must find.
"""

from __future__ import annotations

import sys

import torch

import convnn_kernels

from .peers import PEERS, gradient_mode, run_pass
from .suites import SUITES
from .workloads import make_inputs


def run(suite: str, backend: str, device: str) -> None:
    groups = [group for group in SUITES[suite].groups(device) if group.backend == backend]
    for group in groups[:1] if suite == "time" else groups:
        with convnn_kernels.backend(backend):
            for case in (each for each in group.cases if PEERS[each.peer].exacting):
                with gradient_mode(case.passes):
                    inputs = make_inputs(case.workload, device, case.passes != "forward")
                    run_pass(PEERS[case.peer].build(case.workload, inputs), case.passes)


def write_behind_the_end() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(p, N: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(p + 4096 + tl.arange(0, N), 1.0)

    kernel[(1,)](torch.zeros(4, device="cuda"), 32)


if __name__ == "__main__":
    if sys.argv[2] == "fault":
        write_behind_the_end()
    else:
        run(*sys.argv[1:])
    if sys.argv[3] == "cuda":
        torch.cuda.synchronize()
    print("it ran to its end", flush=True)
