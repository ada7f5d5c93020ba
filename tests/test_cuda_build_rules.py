# SPDX-License-Identifier: MIT
"""The build fails on kernels that would be slow or hang: small ones that do are planted."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
# Disassembled code of three warpgroups of which one keeps 80 registers and the others claim 216.
POOL = """
		Function : _Z18hopper_pool_kernelv
        /*0070*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xd8 ;  /* 0xd8000079c8 */
        /*0700*/                   USETMAXREG.DEALLOC.CTAPOOL 0x50 ;         /* 0x50000079c8 */
"""
ELF = """
.nv.info._Z18hopper_pool_kernelv
	<0x1>
	Attribute:	EIATTR_MAXREG_COUNT
	Format:	EIFMT_HVAL
	Value:	0xa8
	<0x6>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x180 0x1 0x1
	<0x7>
.nv.info._Z5otherv
	Attribute:	EIATTR_MAXREG_COUNT
"""
# Products in flight while their sums change, and in order.
PRODUCTS = """
#include <cstdint>
__device__ inline void product(float (&d)[4], uint64_t x) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(x));
}
__global__ void __launch_bounds__(128) hopper_products_kernel(float* out, uint64_t x) {
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  product(d, x);
  CHANGE
  product(d, x);
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; ++i) out[i] = d[i];
}
"""
REGISTERS = """
__global__ void __launch_bounds__(384, 1) hopper_pool_kernel(float* out) {
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 KEPT;");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    out[threadIdx.x] = 1;
  }
}
"""
# A sweep in a loop over items: products, in a loop of its own, with accesses of the stack that
# replace each of the instructions named here.
SWEEP = """
        Function : _Z19hopper_sweep_kernelv
        /*0000*/                   {before} ;
        /*0010*/                   {item} ;
        /*0020*/                   HGMMA.64x8x16.F32 R24, R4, gdesc[UR4] ;
        /*0030*/                   {sweep} ;
        /*0040*/              @P1 BRA 0x90 ;
        /*0050*/              @P0 BRA 0x20 ;
        /*0060*/                   {after} ;
        /*0070*/              @P2 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   {aside} ;
        /*00a0*/                   {turns} ;
        /*00b0*/              @P3 BRA 0xa0 ;
        /*00c0*/                   BRA 0x50 ;
"""
SERIALIZED = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are"
SPOTS = ("before", "item", "sweep", "after", "aside", "turns")
# A sum that has no register: the loop is around a product.
STACK = """
#include <cstdint>
__global__ void __launch_bounds__(128) NAME(float* out, uint64_t x, int n) {
  float d[4] = {}, a[16] = {};
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.fence.sync.aligned;");
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(x));
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    a[i * 7 % 16] += out[i];
  }
  for (int i = 0; i < 4; ++i) out[i] = d[i] + a[(n + i) % 16];
}
"""

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SOURCES))
    return importlib.import_module("hopper_rules")


def compile(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "kernel.cu").write_text(source)
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-c", "kernel.cu", "-o", "kernel.o"]
    return subprocess.run(
        [sys.executable, str(SOURCES / "checked_compile.py"), *command],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As the build does."""
    command = [str(SOURCES / "hopper_rules.py"), *options, str(folder / "kernel.o")]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("message", "definition", "fails"),
    [
        (SERIALIZED, "NDEBUG", True),
        ("ptxas info    : Used 168 registers", "NDEBUG", False),
        (SERIALIZED, "CONVNN_BOUNDED_WAITS", False),
    ],
)
def test_what_ptxas_says_of_serialized_products_is_an_error(
    message: str, definition: str, fails: bool, tmp_path: Path
) -> None:
    """Except in a build for debugging."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch kernel.o\necho '{message}' >&2\n")
    compiler.chmod(0o755)
    command = [str(compiler), f"-D{definition}", "-c", "-o", "kernel.o"]
    done = subprocess.run(
        [sys.executable, str(SOURCES / "checked_compile.py"), *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == fails
    assert message in done.stderr
    assert ("so this is an error" in done.stderr) == fails
    # What ninja would take for a result.
    assert (tmp_path / "kernel.o").exists() != fails


def test_a_failing_compiler_of_a_build_for_debugging() -> None:
    command = ["false", "-DCONVNN_BOUNDED_WAITS"]
    done = subprocess.run([sys.executable, str(SOURCES / "checked_compile.py"), *command])
    assert done.returncode == 1


def test_a_failing_compiler_fails() -> None:
    done = subprocess.run([sys.executable, SOURCES / "checked_compile.py", "false"])
    assert done.returncode == 1


def test_registers_that_a_block_does_not_have(rules: Any) -> None:
    threads = rules.threads_of_blocks(ELF)
    assert threads == {"_Z18hopper_pool_kernelv": 384}
    assert rules.pool_fault(POOL, 168, 384) == (
        "3 warpgroups have 504 registers for each thread of one, and want 2 x 216 + 80 = 512"
    )
    for kept, claimed in ((72, 216), (88, 208), (56, 224), (24, 240)):
        fits = POOL.replace("0xd8", f"0x{claimed:x}").replace("CTAPOOL 0x50", f"CTAPOOL 0x{kept:x}")
        assert rules.pool_fault(fits, 168, 384) == ""
    # Nothing is released; more registers than a multiprocessor has.
    assert rules.pool_fault(re.sub(r".*DEALLOC.*\n", "", POOL), 168, 384) != ""
    assert rules.pool_fault(POOL, 176, 384) != ""
    assert rules.pool_fault("EXIT ;", 168, 384) == ""
    assert rules.pool_fault(POOL, 168, 0) == "setmaxnreg needs __launch_bounds__"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("changes", [True, False])
def test_serialized_products(changes: bool, tmp_path: Path) -> None:
    done = compile(PRODUCTS.replace("CHANGE", "d[0] += 1;" if changes else ""), tmp_path)
    assert done.returncode == changes, done.stderr
    assert ("(C75xx, above)" in done.stderr) == changes


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("kept", [80, 72])
def test_register_pool(kept: int, tmp_path: Path) -> None:
    assert compile(REGISTERS.replace("KEPT", str(kept)), tmp_path).returncode == 0
    done = check(tmp_path)
    assert done.returncode == (kept == 80)
    assert ("hopper_pool_kernel: 3 warpgroups have 504" in done.stderr) == (kept == 80)
    # That would hang, not be slow.
    assert check(tmp_path, "--may-be-slow").returncode == (kept == 80)


@pytest.mark.parametrize("spot", SPOTS)
def test_stack_within_a_sweep(spot: str, rules: Any) -> None:
    """Not in what a turn of it does only sometimes."""
    lines = dict.fromkeys(SPOTS, "IADD3 R2, R2, 0x1, RZ")
    assert rules.stack_fault(SWEEP.format(**lines)) == ""
    for access in ("STL.64 [R1+0x8], R6", "@P0 LDL.LU R4, [R1]"):
        found = rules.stack_fault(SWEEP.format(**(lines | {spot: access})))
        expected = "1 accesses of the stack in every turn of a sweep"
        assert found == (expected if spot == "sweep" else "")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hopper_stack_kernel", "stack_kernel"])
def test_stack_of_a_kernel(name: str, tmp_path: Path) -> None:
    done = compile(STACK.replace("NAME", name), tmp_path)
    assert done.returncode == 0, done.stderr
    done = check(tmp_path)
    is_for_hopper = name.startswith("hopper")
    assert done.returncode == is_for_hopper
    assert ("accesses of the stack in every turn of a sweep" in done.stderr) == is_for_hopper
    assert check(tmp_path, "--may-be-slow").returncode == 0
