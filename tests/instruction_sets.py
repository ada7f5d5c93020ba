# SPDX-License-Identifier: MIT
"""The instruction sets of the CPU library that this machine has."""

import platform
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from convnn_kernels import introspect


def _instruction_sets() -> list[str]:
    """From narrow to wide. CONVNN_CPU_ISA chooses one when the library is loaded."""
    available = ["portable"]
    if platform.machine() == "x86_64":
        capability = torch.backends.cpu.get_cpu_capability()
        if capability in ("AVX2", "AVX512"):
            available.append("avx2")
        if capability == "AVX512":
            available.append("avx512")
            if torch.cpu._is_vnni_supported():
                available.append("avx512vnni")
                built = introspect.cpu_instruction_sets()  # not by every compiler for AMX
                if "amx" in built and torch.cpu._is_amx_tile_supported():
                    available.append("amx")
    return available


INSTRUCTION_SETS = _instruction_sets()


def quick_last(names: Sequence[str]) -> list[Any]:
    """Parameters of a test, of which only the last, the default, is among the quick tests."""
    return [*(pytest.param(name, marks=pytest.mark.slow) for name in names[:-1]), *names[-1:]]
