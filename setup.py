# SPDX-License-Identifier: MIT
"""Runs CMake. CMakeLists.txt says what is built, and from which sources.

Environment variables: ``CONVNN_CUDA`` (1 requires the CUDA library, 0 skips it; by default it is
built if PyTorch has CUDA and nvcc is found), ``TORCH_CUDA_ARCH_LIST`` (as in PyTorch),
``CONVNN_BOUNDED_WAITS`` (1 builds CUDA kernels for debugging, whose waits end in a report),
``CONVNN_WERROR`` (1 turns warnings into errors), ``MAX_JOBS`` (parallel compilers), and those that
CMake reads, such as ``CXX`` and ``CXXFLAGS``.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        "convnn_kernels: setuptools is too old. Upgrade it:  pip install 'setuptools>=77'"
    ) from None

# Memory of one compiler process, in bytes; limits how many run in parallel.
CXX_JOB = 1.5e9
NVCC_JOB = 2e9


def find_tool(name: str) -> str:
    """Path of ``cmake`` or ``ninja``: from its Python package, or else on PATH."""
    try:
        package = importlib.import_module(name)
        folder = getattr(package, "CMAKE_BIN_DIR", None) or package.BIN_DIR
        return str(Path(folder) / name)
    except ImportError:
        found = shutil.which(name)
    if found is None:
        raise SystemExit(f"convnn_kernels: {name} was not found. Install it:  pip install {name}")
    return found


def run_tool(*command: str) -> None:
    """Runs a build step. If it fails, its output explains why, so there is no traceback."""
    if subprocess.run(command).returncode != 0:
        raise SystemExit("convnn_kernels: the build failed; see the output above.")


def available_memory() -> float:
    """Available memory in bytes as reported by Linux, within the container's limit."""
    limits = [float("inf")]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(float(line.split()[1]) * 1024)
        limits.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass
    return min(limits)


def parallel_jobs(job_memory: float) -> int:
    """``MAX_JOBS``, or as many compilers as cores and memory allow."""
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise SystemExit(f"convnn_kernels: MAX_JOBS must be a positive number, got '{wanted}'")
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return int(max(1, min(cores, available_memory() // job_memory)))


class Build(build):
    def run(self) -> None:
        # Modules left over from an earlier build would end up in the wheel.
        shutil.rmtree(Path(self.build_lib) / "convnn_kernels", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        source = Path(__file__).parent.resolve()
        folder = source / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # An editable install puts the results into the checkout, other builds into the wheel.
        target = source if self.inplace else Path(self.build_lib).resolve()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        configured_for = json.dumps(
            # Not sys.executable: an environment has its Python under several names.
            [str(folder), sys.prefix]
            + [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CUDACXX", "CUDAFLAGS")]
        )
        stamp = folder / "configured-for.json"
        # CMake caches what it found first, but every isolated build has a new Python.
        fresh = stamp.exists() and stamp.read_text() != configured_for
        # Also if that fails: CMake has cached flags of a compiler that refuses them.
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(configured_for)
        run_tool(
            *(cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja"),
            *(["--fresh"] if fresh else []),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCONVNN_WERROR={os.environ.get('CONVNN_WERROR') or 0}",
        )
        report = json.loads((folder / "build.json").read_text())
        jobs = parallel_jobs(NVCC_JOB if "built" in report["cuda"] else CXX_JOB)
        run_tool(cmake, "--build", str(folder), "--parallel", str(jobs))
        # What an earlier build put there would not fit this one.
        for name in ("libconvnn_cuda.so", "cuda_kernels.json"):
            (target / "convnn_kernels" / "lib" / name).unlink(missing_ok=True)
        run_tool(cmake, "--install", str(folder), "--prefix", str(target))
        for part in ("cpu", "cuda", "introspect"):
            for outcome, detail in report[part].items():
                text = f"{part} ({detail})" if outcome == "built" else f"{part}: {detail}"
                print(f"convnn_kernels: {outcome} {text}", flush=True)


class BuildWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # The libraries do not depend on Python. `introspect` does, but a Python that it was not
        # built for imports introspect.py in its place.
        return ("py3", "none", super().get_tag()[2])


setup(
    # Declares what CMake builds, so that the wheel is tagged for this platform.
    ext_modules=[Extension("convnn_kernels.introspect", ["csrc/introspect.cpp"])],
    cmdclass={"build": Build, "build_ext": CMakeBuild, "bdist_wheel": BuildWheel},
)
