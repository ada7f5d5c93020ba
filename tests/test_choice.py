# SPDX-License-Identifier: MIT
"""Which instruction set the CPU library uses: a switch, and what else decides."""

import threading
from collections.abc import Callable

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS

from convnn_kernels import native
from convnn_kernels.functional import select_neighbors


def test_the_usable_sets_are_those_of_the_processor() -> None:
    assert native.usable_cpu_instruction_sets() == INSTRUCTION_SETS[::-1]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_switch_holds_within_the_block(name: str) -> None:
    before = native.cpu_instruction_set()
    with native.use_cpu_instruction_set(name):
        assert native.cpu_instruction_set() == name
        with native.use_cpu_instruction_set(None):
            assert native.cpu_instruction_set() == before
        assert native.cpu_instruction_set() == name
        with pytest.raises(RuntimeError, match="own"), native.use_cpu_instruction_set("portable"):
            assert native.cpu_instruction_set() == "portable"
            raise RuntimeError("own")
        assert native.cpu_instruction_set() == name
    assert native.cpu_instruction_set() == before


@pytest.mark.parametrize("name", ["abacus", "", "AVX2"])
def test_a_set_that_cannot_run_changes_nothing(name: str) -> None:
    before = native.cpu_instruction_set()
    message = rf"run here \({', '.join(INSTRUCTION_SETS[::-1])}\), got '{name}'"
    with pytest.raises(ValueError, match=message), native.use_cpu_instruction_set(name):
        pass
    assert native.cpu_instruction_set() == before


def test_the_switch_reaches_every_thread_and_the_kernels() -> None:
    """Sums without fused multiply-adds, which only portable has, are rounded differently."""
    if len(INSTRUCTION_SETS) == 1:
        pytest.skip("one instruction set")
    x = torch.randn(200, 61)
    fused = select_neighbors(x, x, 9)[0]
    found = []
    with native.use_cpu_instruction_set("portable"):
        thread = threading.Thread(target=lambda: found.append(select_neighbors(x, x, 9)[0]))
        thread.start()
        thread.join()
        found.append(select_neighbors(x, x, 9)[0])
    assert torch.equal(*found)
    assert not torch.equal(found[0], fused)
    assert torch.equal(select_neighbors(x, x, 9)[0], fused)


def test_the_switch_comes_before_the_environment(run_python: Callable[..., str]) -> None:
    code = """
        from convnn_kernels import native
        with native.use_cpu_instruction_set("portable"):
            print(native.cpu_instruction_set())
        print(native.cpu_instruction_set() or "none")
    """
    assert run_python(code, CONVNN_CPU_ISA="abacus").split() == ["portable", "none"]
