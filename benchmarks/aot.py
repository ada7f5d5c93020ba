# SPDX-License-Identifier: MIT
"""``python -m benchmarks.aot``: compile every Triton kernel as the host side launches it, without a
GPU, and write down what the compiler made of it.

The operators run with a recorder in the place of the kernels, for each architecture, dtype and
configuration. Every distinct launch (types, constants, divisibility) is then compiled to machine
code for that architecture. The table goes to ``benchmarks/results/aot-triton-<version>.json``: per
launch the registers, shared memory, stack and spill bytes, and the matrix instructions found.
"""

import argparse
import concurrent.futures
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convnn_kernels.backends import triton as host

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RESULTS = Path(__file__).parent / "results"
# Bytes of shared memory that one program may use.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MOST_SPILLED = 64

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}

Launch = dict[str, Any]


class _Recorder:
    """Takes the place of a kernel and writes down with what it would be compiled."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._record

    def _record(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        values = {**dict(zip(self.kernel.arg_names, args, strict=False)), **named}
        signature, constants, divisible = {}, {}, []
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1):
                # Triton, too, compiles an argument of 1 as a constant.
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
                divisible.append(i)
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(i)
            else:
                signature[parameter.name] = "fp32"
        self.launches.append(
            {
                "kernel": self.kernel.__name__,
                "signature": signature,
                "constants": constants,
                "divisible": divisible,
                "num_warps": num_warps,
                "num_stages": num_stages,
            }
        )


def kernels() -> dict[str, Any]:
    """All kernels by name."""
    return {name: k for name, k in vars(host._kernels()).items() if name.endswith("_kernel")}


def source_hash(kernel: Any) -> str:
    """A hash of the file of a kernel and of the device code it imports."""
    folder = Path(inspect.getfile(kernel.fn)).parent
    seen: set[str] = set()
    todo = [Path(inspect.getfile(kernel.fn)).stem]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            source = (folder / f"{name}.py").read_text()
            todo += re.findall(r"^from \.(\w+) import", source, re.MULTILINE)
    text = "".join((folder / f"{name}.py").read_text() for name in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record(arch: int, dtype: torch.dtype, calls: list[Any]) -> list[Launch]:
    """The distinct launches of `calls` on an architecture."""
    launches: list[Launch] = []
    real = vars(host._kernels())
    fake = SimpleNamespace(
        **{
            name: _Recorder(value, launches) if name.endswith("_kernel") else value
            for name, value in real.items()
        }
    )
    before = host._kernels, host._arch
    vars(host).update(_kernels=lambda: fake, _arch=lambda tensor: arch)
    try:
        for call in calls:
            call(dtype)
    finally:
        host._kernels, host._arch = before
    distinct = {json.dumps(launch, sort_keys=True): launch for launch in launches}
    return list(distinct.values())


def _both_ways(
    dtype: torch.dtype,
    N: int,
    D: int,
    C: int,
    O: int,
    k: int,
    weight: str,
    metric: str = "cosine",
    rho: str = "softmax",
    masked: bool = False,
    candidates: bool = False,
    own: bool = False,
    order: str = "similarity",
    lead: tuple[int, ...] = (2,),
) -> None:
    """Forward and backward, of which only the launches matter."""
    with torch.device("meta"):
        query, key = torch.empty(*lead, N, D, dtype=dtype), torch.empty(*lead, N, D, dtype=dtype)
        value = torch.empty(*lead, N, C, dtype=dtype)
        shapes = {"dense": (O, C, k), "depthwise": (C, 1, k)}
        W = None if weight == "none" else torch.empty(shapes[weight], dtype=dtype)
        bias = torch.empty(O if weight == "dense" else C, dtype=dtype)
        mask = torch.empty(*lead, N, dtype=torch.bool) if masked else None
        rows = torch.empty(N, dtype=torch.int64)
    Y, s, I = host._forward(
        query,
        key,
        value,
        k,
        W,
        bias,
        rows if candidates else None,
        rows if own else None,
        mask,
        metric,
        rho,
        1.0,
        order,
    )
    host._aggregate_backward(Y, value, s, I, W, True, rho, 1.0, True, True, True, True)
    host._select_backward(s, query, key, s, I, metric, True, True)


def configurations(quick: bool) -> list[Any]:
    """Calls that together reach every kernel and, unless `quick`, every configuration."""

    def call(**options: Any) -> Any:
        return lambda dtype: _both_ways(dtype, **options)

    plain = {"N": 1024, "D": 64, "C": 64, "O": 64, "k": 9}
    calls = [call(**plain, weight="dense", masked=True), call(**plain, weight="depthwise")]
    if quick:
        return calls
    options = {"candidates": True, "own": True, "masked": True, "order": "index"}
    select = {**plain, "weight": "none"}
    for metric, D in (("cosine", 3), ("cosine", 256), ("dot", 64)):
        calls += [call(**select | {"D": D}, metric=metric)]
    calls += [call(**select, metric="euclidean", rho="similarity", **options)]
    # All columns: few of them, and passes of many neighbors.
    calls += [call(**select | {"N": 197}, rho="ones", **options)]
    calls += [call(**select | {"N": 512, "k": 300}, own=True)]
    for k in (1, 32, 256):
        calls += [call(**select | {"N": 2**14 if k < 256 else 2**15, "k": k})]
    for C, O in ((3, 16), (128, 256)):
        calls += [call(**plain | {"C": C, "O": O}, weight="dense", rho="similarity")]
    calls += [call(**plain | {"C": 192}, weight="depthwise", rho="ones")]
    return calls


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """What the compiler says of one launch."""
    kernel = kernels()[launch["kernel"]]
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch["divisible"]}
    names = list(kernel.arg_names)
    constants = {(names.index(name),): value for name, value in launch["constants"].items()}
    source = ASTSource(kernel, launch["signature"], constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]},
    )
    ptx = compiled.asm["ptx"]
    usage = _resource_usage(compiled.asm["cubin"])
    matrix = sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx)))
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spilled": usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "matrix_instructions": matrix,
        "wide_offsets": "mul.wide" in ptx or "mul.lo.s64" in ptx or "mad.lo.s64" in ptx,
    }


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def _row(job: tuple[Launch, int, str]) -> dict[str, Any]:
    launch, arch, dtype = job
    began = time.perf_counter()
    try:
        outcome = compile_launch(launch, arch)
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}"[:500]}
    return {
        "kernel": launch["kernel"],
        "arch": arch,
        "dtype": dtype,
        "source": source_hash(kernels()[launch["kernel"]]),
        "constants": launch["constants"],
        "num_warps": launch["num_warps"],
        "num_stages": launch["num_stages"],
        "seconds": round(time.perf_counter() - began, 1),
        **outcome,
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["stack"] > MOST_SPILLED:
        found.append(f"{row['stack']} bytes of stack")
    if row["shared"] > SHARED_MEMORY[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory")
    return found


def jobs(
    architectures: tuple[int, ...], dtypes: tuple[torch.dtype, ...], quick: bool, only: str
) -> Iterator[tuple[Launch, int, str]]:
    for arch in architectures:
        for dtype in dtypes:
            for launch in record(arch, dtype, configurations(quick)):
                if re.search(only, launch["kernel"]):
                    yield launch, arch, str(dtype).removeprefix("torch.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel")
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100; default all")
    parser.add_argument("--dtype", action="append", help="float16, ...; default all three")
    parser.add_argument("--only", default="", help="a pattern in the name of the kernel")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    options = parser.parse_args()
    architectures = tuple(options.arch or ARCHITECTURES)
    dtypes = tuple(getattr(torch, name) for name in options.dtype or ()) or DTYPES
    todo = list(jobs(architectures, dtypes, options.quick, options.only))
    rows, wrong = [], 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(_row, todo, chunksize=4):
            rows.append(row)
            found = faults(row)
            wrong += bool(found)
            facts = [f"{row.get(name)} {name}" for name in ("registers", "stack", "shared")]
            print(
                f"{row['kernel']:<28} sm_{row['arch']:<4}{row['dtype']:<9}"
                f"{row['seconds']:5.1f} s  {', '.join(facts)}, "
                f"{' '.join(row.get('matrix_instructions', []))}  {'; '.join(found)}",
                flush=True,
            )
    print(f"{len(rows)} compiled with Triton {triton.__version__}, {wrong} with faults")
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"aot-triton-{triton.__version__}.json"
        lines = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
