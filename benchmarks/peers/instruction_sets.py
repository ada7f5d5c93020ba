# SPDX-License-Identifier: MIT
"""Our operators with the kernels for AVX2, where those for AVX-512 run by default."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..workloads import Inputs, Workload
from . import convnn, dot
from .base import Build, Call, Unavailable


def _on_avx2(build: Build) -> Build:
    def on_avx2(workload: Workload, inputs: Inputs) -> Call:
        from convnn_kernels import native

        if inputs.query.device.type != "cpu":
            raise Unavailable("AVX2 is an instruction set of CPUs")
        default = native.cpu_instruction_set()
        if not default.startswith("avx512"):
            raise Unavailable(f"the kernels that run by default are for {default}, not AVX-512")
        block = partial(native.use_cpu_instruction_set, "avx2")
        try:
            with block():
                return replace(build(workload, inputs), block=block)
        except ValueError as error:
            raise Unavailable(str(error)) from error

    return on_avx2


PEERS = {
    f"{name}-avx2": replace(peer, label=f"{peer.label}, AVX2", build=_on_avx2(peer.build))
    for name, peer in (convnn.PEERS | dot.PEERS).items()
    if name in ("select", "select-dot", "convnn-all", "convnn-dot", "aggregate-dense")
}
