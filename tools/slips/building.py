# SPDX-License-Identifier: MIT
"""Incremental builds of the CPU library and of the host program of the CUDA kernels.

CMake says how each source is compiled; it is done here, optimized less, for one instruction set,
and only for the sources that a slip reaches.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.slips.slip import digest, file_digest

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512vnni", "amx")
# The library cannot be without these kernels. They stay as they are, and the tests run another set.
_NOT_TESTED = "kernels_portable"


class BuildError(Exception):
    """A source does not compile or link."""


def _tool(name: str) -> str:
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    return beside or shutil.which(name) or name


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(done.stderr[-2000:] or done.stdout[-2000:])


def compile_commands(tree: Path, folder: Path) -> list[list[str]]:
    """The commands by which CMake compiles the sources of a tree."""
    configure = [_tool("cmake"), "-S", str(tree), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DCONVNN_CUDA=0", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    _run(configure, tree)
    listed = json.loads((folder / "compile_commands.json").read_text())
    return [shlex.split(each["command"]) for each in listed]


@dataclass(frozen=True)
class Unit:
    """One source and how it becomes an object."""

    source: str  # relative to the tree
    name: str  # of its object
    command: tuple[str, ...]  # without the source and the object


def _argument(command: Sequence[str], option: str) -> str:
    return command[command.index(option) + 1]


def _unit(command: Sequence[str], tree: Path, change: re.Pattern[str]) -> Unit:
    source, target = _argument(command, "-c"), _argument(command, "-o")
    kept = [part for part in command if part not in ("-c", "-o", source, target)]
    # Products and sums become one instruction at -O1, too, by the second option.
    fast = ["-O3"] if "host_execution" in target else ["-O1", "-fexpensive-optimizations"]
    kept = [part for part in kept if part != "-O3" and not change.fullmatch(part)] + fast
    name = target.replace("CMakeFiles/", "").replace("/", "_").replace("..", "")
    return Unit(str(Path(source).relative_to(tree)), name, tuple(kept))


class Product:
    """A library or program that is linked from units."""

    def __init__(
        self, tree: Path, objects: Path, units: list[Unit], link: list[str], file: Path
    ) -> None:
        self.tree, self.objects, self.units = tree, objects, units
        self.link, self.file = link, file

    def _object(self, unit: Unit, slipped: bool = False) -> Path:
        return self.objects / ("slipped" if slipped else "original") / unit.name

    def _compile(self, unit: Unit, slipped: bool) -> None:
        target = self._object(unit, slipped)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        output = ["-MMD", "-MF", f"{target}.d", "-o", str(target), "-c", unit.source]
        _run([*unit.command, *output], self.tree)

    def dependencies(self, unit: Unit) -> set[str]:
        """The files of the tree that the original object of a unit was made of."""
        listed = Path(f"{self._object(unit)}.d").read_text().replace("\\\n", " ").split()[1:]
        paths = {Path(os.path.normpath(self.tree / name)) for name in listed}
        return {
            str(path.relative_to(self.tree)) for path in paths if path.is_relative_to(self.tree)
        }

    def _state(self, unit: Unit) -> str:
        files = sorted(self.dependencies(unit))
        text = [f"{name} {file_digest(self.tree / name)}" for name in files]
        return digest("\n".join([*unit.command, *text]).encode())

    def _is_current(self, unit: Unit) -> bool:
        stamp = Path(f"{self._object(unit)}.state")
        return stamp.exists() and stamp.read_text() == self._state(unit)

    def build_original(self, jobs: int = 1) -> str:
        """Compile what has changed since the last time, link, and return the digest of the file."""
        old = [unit for unit in self.units if not self._is_current(unit)]

        def one(unit: Unit) -> None:
            self._compile(unit, slipped=False)
            Path(f"{self._object(unit)}.state").write_text(self._state(unit))

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, old))
        original = self.objects / self.file.name
        if old or not original.exists():
            self._link(original, set())
        self.restore()
        return file_digest(original)

    def restore(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.unlink(missing_ok=True)
        shutil.copy(self.objects / self.file.name, self.file)

    def _link(self, target: Path, slipped: set[Unit]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process may still have the old one mapped
        objects = [str(self._object(unit, unit in slipped)) for unit in self.units]
        _run([*self.link[:1], "-o", str(target), *objects, *self.link[1:]], self.tree)

    def reaches(self, path: str) -> bool:
        """Whether the product is made of this file."""
        return any(path in self.dependencies(unit) for unit in self.units)

    def build_slipped(self, path: str) -> str | None:
        """Compile the units that read a changed file, and link.

        Returns: the digest of the linked file, or None if no object differs from the original.

        Raises:
            BuildError: what does not compile.
        """
        units = [
            unit
            for unit in self.units
            if path in self.dependencies(unit) and _NOT_TESTED not in unit.name
        ]
        for unit in units:
            self._compile(unit, slipped=True)
        different = {
            unit
            for unit in units
            if self._object(unit, True).read_bytes() != self._object(unit).read_bytes()
        }
        if not different:
            return None
        self._link(self.file, different)
        return file_digest(self.file)


def cpu_library(tree: Path, folder: Path, commands: list[list[str]], isa: str) -> Product:
    # Most kernels for AMX are those for VNNI.
    sets = ("portable", "avx512vnni", "amx") if isa == "amx" else ("portable", isa)
    others = "|".join(name.upper() for name in INSTRUCTION_SETS if name not in sets)
    change = re.compile(rf"-DCONVNN_WITH_({others})")
    parts = ("cpu_operators.dir", "convnn_cpu.dir", *(f"kernels_{name}.dir" for name in sets))
    units = [
        _unit(command, tree, change)
        for command in commands
        if any(part in _argument(command, "-o") for part in parts)
    ]
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    libraries = Path(torch.origin).parent / "lib"
    link = [commands[0][0], "-shared", f"-L{libraries}", "-ltorch_cpu", "-pthread", "-Wl,-z,defs"]
    file = tree / "convnn_kernels" / "lib" / "libconvnn_cpu.so"
    return Product(tree, folder / "cpu", units, link, file)


def host_program(tree: Path, folder: Path, commands: list[list[str]]) -> Product:
    change = re.compile("-g1")
    parts = ("host_cuda.dir", "host_execution.dir")
    units = [
        _unit(command, tree, change)
        for command in commands
        if any(f"/{part}/" in _argument(command, "-o") for part in parts)
    ]
    # The execution of threads of a GPU calls AddressSanitizer.
    sanitizers = {part for unit in units for part in unit.command if "-fsanitize=" in part}
    link = [commands[0][0], "-pthread", *sorted(sanitizers)]
    return Product(tree, folder / "host_cuda", units, link, folder / "program" / "host_cuda")
