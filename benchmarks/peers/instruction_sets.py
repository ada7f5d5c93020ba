# SPDX-License-Identifier: MIT
"""Our operators with the kernels for AVX2, where those for AVX-512 or AMX run by default, and with
those for AVX-512, where those for AMX do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..workloads import Inputs, Workload
from . import convnn, dot
from .base import Build, Call, Unavailable


def _on(instruction_set: str, wider: tuple[str, ...], build: Build) -> Build:
    """Builds with the kernels for this set, if what runs by default is one of those in `wider`."""

    def on_set(workload: Workload, inputs: Inputs) -> Call:
        from convnn_kernels import native

        if inputs.query.device.type != "cpu":
            raise Unavailable(f"{instruction_set} is an instruction set of CPUs")
        default = native.cpu_instruction_set()
        if default not in wider:
            raise Unavailable(
                f"the kernels that run by default are for {default}, not {' or '.join(wider)}"
            )
        block = partial(native.use_cpu_instruction_set, instruction_set)
        try:
            with block():
                return replace(build(workload, inputs), block=block)
        except ValueError as error:
            raise Unavailable(str(error)) from error

    return on_set


def _on_avx2(build: Build) -> Build:
    return _on("avx2", ("avx512", "avx512vnni", "amx"), build)


def _on_avx512(build: Build) -> Build:
    return _on("avx512vnni", ("amx",), build)


_OURS = convnn.PEERS | dot.PEERS
PEERS = {
    f"{name}-avx2": replace(
        _OURS[name], label=f"{_OURS[name].label}, AVX2", build=_on_avx2(_OURS[name].build)
    )
    for name in ("select", "select-dot", "convnn-all", "convnn-dot", "aggregate-dense")
} | {
    # Aggregation has no kernels of its own for AMX.
    f"{name}-avx512": replace(
        _OURS[name], label=f"{_OURS[name].label}, AVX-512", build=_on_avx512(_OURS[name].build)
    )
    for name in ("select", "select-dot", "convnn-all", "convnn-dot")
}
