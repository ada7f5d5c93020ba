# SPDX-License-Identifier: MIT
"""What the host code of csrc/cuda launches for a call, and the machine code of those kernels.

Needs g++ and nvcc, no GPU. The host code is compiled with tools/cuda_plan, where a launch is a line
of output; so nothing here says which kernels there are, or with how many blocks. Results are kept
in build/predict by a digest of what they are made from.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

from tools import sass

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
PLAN = ROOT / "tools" / "cuda_plan"
HOST = ROOT / "tests" / "host_cuda"
CACHE = ROOT / "build" / "predict"
# As CMakeLists.txt compiles, for machine code of sm_90a.
NVCC = ("nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3", "-DNDEBUG")


class NotHere(Exception):
    """What a compiler that is missing says."""


@dataclass(frozen=True)
class Launch:
    kernel: str
    instance: str  # with the arguments of a template
    blocks: int
    threads: int
    numbers: dict[str, int] = field(hash=False)


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    if done.returncode:
        errors = "\n".join((done.stdout + done.stderr).splitlines()[:20])
        raise RuntimeError(f"{' '.join(map(str, command))}\n{errors}")
    return done.stdout


def _digest(*texts: str) -> str:
    """Of the texts, and of all that is compiled."""
    found = hashlib.sha256("\0".join(texts).encode())
    folders = (SOURCES.parent, SOURCES, PLAN, HOST)
    for path in sorted(path for folder in folders for path in folder.glob("*.*")):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            found.update(f"{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()[:32]


def needs(program: str) -> None:
    if not shutil.which(program):
        raise NotHere(f"{program} is not here")


@functools.cache
def _plan_program() -> tuple[Path, dict[int, str]]:
    """The program, and its kernels by address."""
    needs("g++")
    program = CACHE / f"plan-{_digest()}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        compiler = ("g++", "-std=c++17", "-w", f"-I{PLAN}", f"-I{HOST}")
        with tempfile.TemporaryDirectory() as folder:
            objects = []
            for source in (*sorted(SOURCES.glob("*.cu")), PLAN / "plan.cpp"):
                objects.append(Path(folder) / f"{source.name}.o")
                first = [PLAN / name for name in ("execution.h", f"{source.stem}_numbers.h")]
                includes = [arg for each in first if each.exists() for arg in ("-include", each)]
                _run([*compiler, *includes, "-x", "c++", "-c", source, "-o", objects[-1]])
            made = Path(folder) / "plan"
            # What only kernels call is not there. A fixed address, as nm prints it.
            link = ("-no-pie", "-Wl,--unresolved-symbols=ignore-all", "-o", made)
            _run(["g++", *objects, *link])
            shutil.move(made, program)
    kernels: dict[int, str] = {}
    for line in _run(["nm", "-C", program]).splitlines():
        if found := re.match(r"(\w+) [WTtw] (?:void )?(convnn::cuda::\w+_kernel\b.*)", line):
            kernels.setdefault(int(found[1], 16), found[2])
    return program, kernels


def launches(operator: str, **numbers: int | str) -> list[Launch]:
    """operator: select, forward, or forward_backward, which is the backward alone."""
    program, kernels = _plan_program()
    arguments = (f"{name}={value}" for name, value in numbers.items())
    found = []
    for line in _run([program, operator, *arguments]).splitlines():
        told = json.loads(line)
        instance = _without_parameters(kernels[told.pop("at")])
        of = (told.pop(name) for name in ("kernel", "blocks", "threads"))
        name, blocks, threads = of
        found.append(Launch(name, instance, blocks, threads, told))
    return found


def _without_parameters(signature: str) -> str:
    """Of a function: its name, with the arguments of a template."""
    depth = 0
    for i, each in enumerate(signature):
        depth += (each == "<") - (each == ">")
        if each == "(" and not depth:
            return signature[:i]
    return signature


def arguments_of(instance: str) -> list[str]:
    """Those of a template, without the namespace."""
    inside = instance.partition("<")[2].removesuffix(">")
    found = [each.strip() for each in inside.split(",")] if inside else []
    return [re.sub(r"\([\w:]+\)|convnn::(cuda::)?", "", each) for each in found]


def header_of(kernel: str) -> Path:
    """The file that defines it."""
    for path in sorted(SOURCES.glob("*.cuh")):
        if re.search(rf"\b{kernel}\(", path.read_text()) and "__global__" in path.read_text():
            return path
    raise FileNotFoundError(f"no header of csrc/cuda has {kernel}")


def constant(header: str, name: str) -> int:
    """A number that a header of csrc/cuda gives."""
    found = re.findall(rf"\b{name} = (\d+)[;,]", (SOURCES / header).read_text())
    if len(found) != 1:
        raise ValueError(f"{header} gives {len(found)} numbers for {name}")
    return int(found[0])


@functools.cache
def machine_code(kernel: str, instance: str) -> sass.Program:
    needs("nvcc")
    source = f'#include "{header_of(kernel)}"\nconst auto at = &{instance};\n'
    source += "const void* instance() { return reinterpret_cast<const void*>(at); }\n"
    text = CACHE / f"{kernel}-{_digest(source, *NVCC)}.sass"
    if not text.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        with tempfile.TemporaryDirectory() as folder:
            file, cubin = Path(folder) / "instance.cu", Path(folder) / "instance.cubin"
            file.write_text(source)
            _run([*NVCC, "-lineinfo", "-cubin", file, "-o", cubin])
            text.write_text(function(_run([tool, "-gi", "-c", cubin]), kernel))
    return sass.parse(text.read_text())


def function(text: str, kernel: str) -> str:
    """What nvdisasm prints of one kernel; the file may have others, which are no templates."""
    parts = re.split(r"^(?=//-+ \.text\.)", text, flags=re.MULTILINE)
    wanted = [each for each in parts if re.match(rf"//-+ \.text\.\w*{len(kernel)}{kernel}\w", each)]
    if len(wanted) != 1:
        raise ValueError(f"{len(wanted)} functions are {kernel}")
    return wanted[0]
