# SPDX-License-Identifier: MIT
"""``python -m tools.aot``: compile every Triton kernel as the host side launches it, without a
GPU, and write down what the compiler made of it.

The operators run with launches recorded, for each architecture, dtype and
configuration. Every distinct launch (types, constants, divisibility) is then compiled to machine
code for that architecture. The table, ``tools/aot_tables/triton-<version>.json``, has for
each launch registers, stack, shared memory, matrix instructions and what its main loop consists of.
A launch whose row is there is not compiled again unless a source has changed, so a run may be
stopped and resumed.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from convnn_kernels.triton import backend as triton_backend
from convnn_kernels.triton import hardware
from convnn_kernels.triton.launch import KERNELS, OPTIONS, Launch, Plan, Pointers, forget_plans
from tools import aot_table

# Rows of a program that are so few that their offsets are of the order of one row's.
FEW = 16
# Columns that a program may use, on sm_100.
TENSOR_MEMORY = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.bool: "*i1",
}

Variant = dict[str, Any]


def _variant(launch: Launch, pointers: Pointers) -> Variant:
    """What Triton would compile for a launch."""
    kernel = launch.kernel
    numbers = dict(zip(kernel.names[len(kernel.pointers) :], launch.values, strict=True))
    signature, constants, divisible = {}, {}, []
    for i, parameter in enumerate(kernel.jit.params):
        name, general = parameter.name, parameter.do_not_specialize
        value = numbers[name] if name in numbers else pointers.tensor(launch.pointers[i])
        is_one = type(value) is int and value == 1 and not general
        if parameter.is_constexpr or value is None or is_one:
            # Triton, too, compiles an argument of None or 1 as a constant.
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            # Memory that is new or a user's begins at a multiple of 16 bytes.
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(i)
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not general:
                divisible.append(i)
        else:
            signature[name] = "fp32"
    return {
        "kernel": kernel.name,
        "signature": signature,
        "constants": constants,
        "divisible": divisible,
        **({"num_warps": 4, "num_stages": 3} | launch.options),
    }


def kernels() -> dict[str, Any]:
    """All kernels by name."""
    triton_backend.operators()
    return KERNELS


def operator(name: str) -> Any:
    """The function of the Triton backend that runs an operator."""
    return triton_backend.operators()[f"convnn::{name}"]


def record(arch: int, dtype: torch.dtype, calls: list[Any]) -> list[Variant]:
    """What Triton compiles for `calls` on an architecture, each variant once."""
    found: list[Variant] = []

    def take(plan: Plan, pointers: Pointers) -> None:
        found.extend(_variant(launch, pointers) for launch in plan.launches)

    kernels()
    forget_plans()
    with (
        mock.patch.object(Plan, "launch", take),
        mock.patch.object(hardware, "architecture", return_value=arch),
    ):
        for call in calls:
            call(dtype)
    distinct = {json.dumps(each, sort_keys=True): each for each in found}
    return list(distinct.values())


def run_both_ways(
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
    with_self: bool = False,
    order: str = "similarity",
    lead: tuple[int, ...] = (2,),
    M: int = 0,
    R: int = 0,
    itself: bool = False,
    backward: bool = True,
    of_similarities: bool = False,
    only: torch.dtype | None = None,
    ranges: bool = False,
    exclude_self: bool = False,
    for_each: bool = False,
) -> None:
    """`forward` and its backward, or else `select`, of which only the launches matter.

    M is N, and R is M, if it is 0. `itself`: key is query. `of_similarities`: they have a gradient,
    too, or with `select` their only one. `for_each`: candidates, self and ranges are those of each
    batch element.
    """
    if only not in (None, dtype):
        return
    M = M or N
    with torch.device("meta"):
        query, key, value = (
            torch.empty(*lead, *shape, dtype=dtype) for shape in ((N, D), (M, D), (M, C))
        )
        key = query if itself else key
        shapes = {"dense": (O, C, k), "depthwise": (C, 1, k)}
        W = None if weight == "none" else torch.empty(shapes[weight], dtype=dtype)
        bias = torch.empty(O if weight == "dense" else C, dtype=dtype)
        mask = torch.empty(*lead, M, dtype=torch.bool) if masked else None
        of_batch = lead if for_each else ()
        rows, keys, ends = (
            torch.empty(*of_batch, *shape, dtype=torch.int64) for shape in ((N,), (R or M,), (N, 2))
        )
    rows_or_none = keys if candidates else None, rows if with_self else None
    restrictions = ends if ranges else None, exclude_self
    if not backward:
        s, I = operator("select")(query, key, k, *rows_or_none, mask, metric, order, *restrictions)
        if of_similarities:
            operator("select_backward")(s, query, key, s, I, metric, True, True)
        return
    Y, s, I = operator("forward")(
        query, key, value, k, W, bias, *rows_or_none, mask, metric, rho, 1.0, order, *restrictions
    )
    operator("forward_backward")(
        Y,
        s if of_similarities else None,
        query,
        key,
        value,
        W,
        s,
        I,
        True,
        metric,
        rho,
        1.0,
        *[True] * 5,
        None if for_each else rows_or_none[0],
    )


def configurations(quick: bool) -> list[Any]:
    """Calls that together reach every kernel and, unless `quick`, every configuration."""

    def call(**options: Any) -> Any:
        return lambda dtype: run_both_ways(dtype, **options)

    plain = {"N": 3000, "D": 64, "C": 64, "O": 64, "k": 9}
    calls = [call(**plain, weight="dense", masked=True)]
    calls += [call(**plain | {"N": 1024}, weight="depthwise", with_self=True)]
    if quick:
        return calls
    select = {**plain, "weight": "none", "backward": False}
    calls += [call(**plain | {"D": 256, "k": 40}, weight="none", metric="dot")]
    calls += [call(**select, of_similarities=True)]
    calls += [call(**plain | {"k": 3}, weight="depthwise", of_similarities=True)]
    calls += [call(**select | {"D": 3}, only=torch.float32)]
    calls += [call(**select, itself=True)]
    options = {"candidates": True, "with_self": True, "masked": True, "order": "index"}
    euclidean = {"weight": "none", "metric": "euclidean", "rho": "similarity"}
    calls += [call(**plain | {"N": 4096}, **euclidean, **options)]
    # Columns that are not divided, and many of them; lists of many lengths.
    calls += [call(**select | {"N": 4096, "D": 128, "k": 40}, lead=(64,))]
    calls += [call(**select | {"N": 2**18, "k": 16})]
    # A backward that is divided.
    calls += [call(**plain | {"N": 4096, "k": 300}, weight="depthwise", lead=(4,))]
    # Few columns: all in one launch, and all columns scored; passes of many neighbors.
    for N, k, lead in ((197, 9, (512,)), (500, 32, (64,))):
        calls += [call(**select | {"N": N, "k": k}, lead=lead)]
    of_dot = {"metric": "dot", "masked": True, "order": "index"}
    calls += [call(**select | {"N": 64}, **of_dot, with_self=True)]
    calls += [call(**select | {"N": 300, "k": 12}, candidates=True, itself=True, lead=(1,), M=200)]
    calls += [call(**select | {"N": 197}, rho="ones", **options)]
    calls += [call(**select | {"N": 300}, rho="ones", **options, M=40)]
    calls += [call(**plain | {"N": 197}, weight="depthwise")]
    tiny = {"N": 197, "D": 192, "C": 192, "weight": "depthwise"}
    calls += [call(**plain | tiny)]
    calls += [call(**plain | tiny, M=32, candidates=True, with_self=True)]
    # Few queries; single elements; every option at once.
    for N, M in ((25, 197), (16, 40)):
        calls += [call(**plain | {"N": N}, weight="depthwise", M=M)]
    calls += [call(**plain | {"N": 197, "D": 40, "C": 40, "k": 15}, weight="depthwise")]
    everything = {"with_self": True, "masked": True, "order": "index", "weight": "depthwise"}
    calls += [call(**plain | {"N": 197, "k": 15}, **everything)]
    # Few tokens: blocks of channels that are not full, and the longest rows of slots; other parts.
    image: dict[str, Any] = {"N": 197, "D": 192, "C": 192, "lead": (256,)}
    calls += [call(**plain | image, weight="depthwise")]
    few = {"N": 49, "D": 40, "C": 24, "k": 16, "metric": "dot", "rho": "similarity"}
    calls += [call(**plain | few, weight="none", of_similarities=True)]
    calls += [call(**plain | {"N": 16, "k": 1}, weight="depthwise", rho="ones")]
    # Few candidates: full blocks of channels, and others.
    few_columns: dict[str, Any] = {"candidates": True, "with_self": True, "lead": (64,)}
    wide = {"N": 197, "D": 192, "C": 192, "R": 32, "weight": "depthwise"}
    calls += [call(**plain | wide | few_columns)]
    other = {"N": 49, "R": 10, "k": 16, "metric": "dot", "weight": "none"}
    calls += [call(**plain | other | few_columns, of_similarities=True)]
    calls += [call(**select | {"N": 197, "k": 64}, only=torch.float16)]
    calls += [call(**select | {"N": 512, "k": 300}, with_self=True)]
    for C, O in ((3, 16), (128, 256)):
        calls += [call(**plain | {"C": C, "O": O}, weight="dense", rho="similarity")]
    # Triton makes a constant of a number of channels that is 1.
    ones = {"D": 1, "C": 1, "O": 1}
    calls += [call(**plain | ones, weight="dense", only=torch.float16)]
    calls += [call(**plain | ones | {"N": 197}, weight="none", only=torch.float16)]
    for C, O in ((1, 64), (64, 1)):
        calls += [call(**plain | {"C": C, "O": O}, weight="dense", only=torch.float16)]
    # Of images: blocks of three sizes, and few channels.
    images: dict[str, Any] = {"weight": "dense", "rho": "ones", "lead": (256,)}
    for N, C, O in ((256, 3, 64), (64, 128, 256), (16, 512, 512), (4, 512, 512)):
        calls += [call(**plain | images | {"N": N, "D": C, "C": C, "O": O, "k": min(9, N)})]
    calls += [call(**plain | images | {"N": 64, "rho": "softmax", "C": 256, "O": 256})]
    # Some hundred columns in one launch, with each option.
    many: dict[str, Any] = {"N": 1024, "D": 16, "lead": (256,)}
    calls += [call(**plain | images | many | {"D": 3, "C": 3})]
    calls += [call(**select | many | {"k": 15}, **of_dot)]
    calls += [call(**select | many | {"N": 300}, masked=True)]
    # Few keys in 16 bits, in blocks of 256 of them; single elements; constants.
    few_keys: dict[str, Any] = {"N": 256, "weight": "dense", "lead": (64,)}
    for O, rho in ((128, "ones"), (128, "softmax"), (40, "softmax")):
        calls += [call(**plain | few_keys | {"O": O, "rho": rho})]
    calls += [call(**plain | few_keys | ones, only=torch.float16)]
    calls += [call(**select | options) for options in restrictions()]
    # Pairs, rows and strides beyond 32 bits. Tiles do not depend on them.
    huge = {"N": 2**18, "k": 64, "lead": (3, 100), "only": torch.float16}
    calls += [call(**plain | huge, weight="dense")]
    return calls


def restrictions() -> list[dict[str, Any]]:
    """Options of calls with ranges of keys, the token itself excluded, and what is given for each
    batch element."""
    ranges: dict[str, Any] = {"ranges": True, "lead": (64,), "N": 4096}
    own: dict[str, Any] = {"for_each": True, "with_self": True}
    return [
        # Many columns, divided and not, in the blocks that have the most registers.
        {"ranges": True, **own, "masked": True},
        {**ranges, "D": 128},
        {**ranges, "k": 40},
        {**ranges, "D": 256, "with_self": True, "exclude_self": True},
        {**ranges, **own, "metric": "euclidean"},
        {**own, "candidates": True, "exclude_self": True, "R": 2000},
        # One tile of columns, with most of the options that it has room for.
        {"ranges": True, "N": 197, "D": 192},
        {"ranges": True, "N": 64, **own, "masked": True, "order": "index", "metric": "dot"},
        {"ranges": True, "N": 197, **own, "masked": True, "k": 15},
        {**own, "ranges": True, "N": 197, "R": 40, "candidates": True},
        {**own, "N": 197, "exclude_self": True, "masked": True},
        {"ranges": True, "N": 197, "D": 40},
        # All columns, long lists, and passes.
        {**own, "N": 300, "k": 20, "ranges": True, "candidates": True, "masked": True},
        {**own, "N": 300, "ranges": True, "exclude_self": True},
        {"N": 500, "k": 100, "ranges": True, "metric": "dot", "order": "index"},
        {"N": 500, "k": 300, "ranges": True, "with_self": True},
    ]


def _compiler_input(variant: Variant) -> ASTSource:
    kernel = kernels()[variant["kernel"]].jit
    attributes = {(i,): [["tt.divisibility", 16]] for i in variant["divisible"]}
    names = list(kernel.arg_names)
    constants = {(names.index(name),): value for name, value in variant["constants"].items()}
    return ASTSource(kernel, variant["signature"], constants, attributes)


def intermediate(variant: Variant, arch: int) -> str:
    """Triton's own representation of a variant, of which no machine code is made."""
    source, target = _compiler_input(variant), GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": variant["num_warps"]})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def narrow_offsets(text: str) -> list[str]:
    """The lines of Triton's representation that compute an offset of a pointer in 32 bits.

    An offset is a sum of products. A product of two variables, such as a row and a stride, must
    have 64 bits; what has a constant factor is a number of a row or a column, which fits in 32. So
    does one of FEW rows times what is not a stride; strides have 64 bits.
    """
    lines: dict[str, str] = {}
    operands: dict[str, set[str]] = {}
    roots = []
    # Regions side by side may have the same names: each is known by how often it has been defined.
    count: collections.Counter[str] = collections.Counter()

    def names(text: str) -> list[str]:
        return [f"{name} {count[name]}" for name in re.findall(r"%\w+", text)]

    for line in text.splitlines():
        line = line.split(" loc(")[0]
        found = re.match(r"\s*(%\w+)(?::\d+)? = (.*)", line)
        if not found:
            continue
        rest = found[2]
        begins = [
            (variable, *names(begin)) for variable, begin in re.findall(r"(%\w+) = (%\w+)", rest)
        ]
        used = names(rest)
        count.update([found[1], *(variable for variable, _ in begins)])
        (name,) = names(found[1])
        lines[name], operands[name] = line, set(used)
        for variable, begin in begins:
            operands.setdefault(names(variable)[0], set()).add(begin)
        if rest.startswith("tt.addptr"):
            roots += used[1:]

    def constant(name: str) -> bool:
        line = lines.get(name, "")
        if re.search(r"tt\.(expand_dims|broadcast)|arith\.(divsi|remsi)", line):
            return any(map(constant, operands[name]))
        ends = re.search(r"tt\.make_range \{end = (\d+)", line)
        return "arith.constant" in line or (ends is not None and int(ends[1]) <= FEW)

    todo, seen, narrow = list(roots), set(roots), []
    while todo:
        name = todo.pop()
        line = lines.get(name, "")
        if "tt.load" in line:
            continue
        if re.search(r"arith\.muli .*(: i32|xi32>)$", line) and not any(
            map(constant, operands[name])
        ):
            narrow.append(line.strip())
        new = operands.get(name, set()) - seen
        seen |= new
        todo += new
    return narrow


def compile_launch(variant: Variant, arch: int) -> dict[str, Any]:
    """What the compiler says of one variant."""
    compiled = triton.compile(
        _compiler_input(variant),
        target=GPUTarget("cuda", arch, 32),
        options={name: variant[name] for name in OPTIONS if name in variant},
    )
    if (columns := getattr(compiled.metadata, "tmem_size", 0)) > TENSOR_MEMORY:
        # Triton has made a kernel that stops at once.
        raise RuntimeError(f"{columns} columns of tensor memory")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _cuobjdump("-res-usage", "-sass", file.name)
    usage = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "shared": compiled.metadata.shared,
        "narrow_offsets": len(narrow_offsets(compiled.asm["ttir"])),
        **aot_table.machine_code(text),
    }


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _row(job: tuple[Variant, int, str]) -> aot_table.Row:
    variant, arch, dtypes = job
    try:
        outcome = compile_launch(variant, arch)
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {
        "kernel": variant["kernel"],
        "arch": arch,
        "dtype": dtypes,
        "launch": _fingerprint(variant),
        "configuration": " ".join(
            f"{name}={value}"
            for name, value in [
                *variant["constants"].items(),
                *((name, variant[name]) for name in OPTIONS if name in variant),
            ]
            if name.isupper() or name in OPTIONS
        ),
        **outcome,
    }


def _fingerprint(variant: Variant) -> str:
    return hashlib.sha256(json.dumps(variant, sort_keys=True).encode()).hexdigest()[:12]


def _row_key(job: tuple[Variant, int, str]) -> tuple[int, str, str]:
    """Architecture, fingerprint and dtypes: by these, the tables know a launch."""
    variant, arch, dtypes = job
    return arch, _fingerprint(variant), dtypes


def jobs(
    architectures: tuple[int, ...], dtypes: tuple[torch.dtype, ...], quick: bool, only: str
) -> list[tuple[Variant, int, str]]:
    """Launches, architecture and, joined by "+", the dtypes that have the variant in common."""
    found: dict[tuple[int, str], tuple[Variant, list[str]]] = {}
    for arch in architectures:
        for dtype in dtypes:
            for variant in record(arch, dtype, configurations(quick)):
                if re.search(only, variant["kernel"]):
                    same = found.setdefault((arch, _fingerprint(variant)), (variant, []))
                    same[1].append(str(dtype).removeprefix("torch."))
    return [(variant, arch, "+".join(names)) for (arch, _), (variant, names) in found.items()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel")
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100; default all")
    parser.add_argument("--dtype", action="append", help="float16, ...; default all three")
    parser.add_argument("--only", default="", help="a pattern in the name of the kernel")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="stop after this time; a later run goes on")
    parser.add_argument("--write", action="store_true", help="write the table to tools/aot_tables")
    options = parser.parse_args()
    architectures = tuple(options.arch or aot_table.ARCHITECTURES)
    dtypes = tuple(getattr(torch, name) for name in options.dtype or ()) or DTYPES
    todo = jobs(architectures, dtypes, options.quick, options.only)
    sources = aot_table.source_hashes()
    path = aot_table.RESULTS / f"triton-{triton.__version__}.json"
    kept, launches = [], len(todo)
    if options.write:
        # Also of a run for some kernels only, the table says how many launches there are in all.
        wanted = {_row_key(job) for job in jobs(aot_table.ARCHITECTURES, DTYPES, False, "")}
        launches = len(wanted)
        kept = aot_table.up_to_date(aot_table.read(path))
        kept = [row for row in kept if (row["arch"], row["launch"], row["dtype"]) in wanted]
    have = {(row["arch"], row["launch"], row["dtype"]) for row in kept}
    todo = [job for job in todo if _row_key(job) not in have]
    # A run that is stopped early has seen every kernel once, for each architecture and dtype.
    count = collections.Counter((row["kernel"], row["arch"], row["dtype"]) for row in kept)
    order = {}
    for job in todo:
        of_kernel = job[0]["kernel"], job[1], job[2]
        count[of_kernel] += 1
        order[_row_key(job)] = count[of_kernel]
    todo.sort(key=lambda job: order[_row_key(job)])

    rows, wrong, began = [], 0, time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for start in range(0, len(todo), 8 * options.jobs):
            if options.seconds is not None and time.monotonic() - began > options.seconds:
                break
            for row in pool.map(_row, todo[start : start + 8 * options.jobs]):
                rows.append(row)
                found = aot_table.faults(row)
                wrong += bool(found)
                facts = [f"{row.get(name)} {name}" for name in ("registers", "stack", "shared")]
                print(
                    f"{row['kernel']:<28} sm_{row['arch']:<4}{row['dtype']:<9} "
                    f"{', '.join(facts)}, {row.get('matrix', '')}  {'; '.join(found)}",
                    flush=True,
                )
            if options.write:
                aot_table.write(path, triton.__version__, [*kept, *rows], sources, launches)
    left = len(todo) - len(rows)
    print(
        f"{len(rows)} compiled with Triton {triton.__version__}, {wrong} with faults, {left} left"
    )
    return 1 if wrong or left else 0


if __name__ == "__main__":
    sys.exit(main())
