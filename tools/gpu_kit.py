# SPDX-License-Identifier: MIT
"""The kit for a GPU machine without a network: both libraries, Triton's cache, flashlib.

``python -m tools.gpu_kit``, which is `make gpu-kit`, makes it on a machine without a GPU, with the
Python, PyTorch and Triton that the GPU machine has: Triton's keys depend on all three. What is
there and current is not made again. `python -m benchmarks.gpu` installs it.

To fill the cache, every operator runs on tensors without data for each group of the suites `right`
and `time`, and each launch compiles for sm_90 instead of running. A second process, with the cache
in another folder, must then find every kernel, or the kit is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "gpu-kit"
_MANIFEST = "manifest.json"
# Of the GPU machine.
_ARCH, _PYTHON = 90, (3, 12)
_LIMIT = 40 * 2**20

# What each part of the kit is made from.
_SOURCES = {
    "lib": ("csrc/**/*", "CMakeLists.txt"),
    "triton": ("convnn_kernels/**/*.py", "benchmarks/suites.py", "benchmarks/workloads.py"),
}
# What else a result may depend on: the kit does not, but its commit is then not that of the result.
_REST = ("benchmarks/**/*.py", "python_ref/*.py", "tests/**/*.py", "tools/*.py")


class Refused(Exception):
    """Nothing is to be run with this kit; the message says why in a line."""


def sources(part: str) -> str:
    digest = hashlib.sha256()
    patterns = _SOURCES.get(part, _REST)
    for path in sorted(p for pattern in patterns for p in REPOSITORY.glob(pattern)):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(REPOSITORY)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}


# On the GPU machine.


def install(folder: Path) -> str | None:
    """Puts the libraries in their place, and names the cache and flashlib in the environment.

    Returns the commit of the kit; None where there is no kit, and what is missing is compiled.
    Raises Refused where the sources are not those that it was made from, or it cannot be installed.
    """
    try:
        return _install(folder)
    except OSError as error:
        raise Refused(f"the kit in {folder} cannot be installed: {error}") from error


def _install(folder: Path) -> str | None:
    manifest = read_manifest(folder)
    if not manifest:
        print(f"there is no kit in {folder}: what is missing is compiled here", flush=True)
        return None
    if changed := [part for part in _SOURCES if manifest[part] != sources(part)]:
        raise Refused(
            f"the kit of {manifest['commit'][:12]} was made from other sources "
            f"({' and '.join(changed)}): commit, then make gpu-kit"
        )
    instead = {"lib": "libraries are those of the checkout", "triton": "kernels are compiled here"}
    for part in _SOURCES:
        if not (folder / part).exists():
            print(f"the kit has no {part}: {instead[part]}", flush=True)
    if (folder / "lib").exists():
        to = REPOSITORY / "convnn_kernels" / "lib"
        shutil.copytree(folder / "lib", to, dirs_exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="convnn-kit-"))
    if (folder / "triton").exists():
        unpack_cache(folder / "triton", scratch / "triton")
        os.environ["CONVNN_KIT_TRITON"] = manifest["triton key"]
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(scratch / "site")
    sys.path.append(str(scratch / "site"))
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(scratch / "site")])
    os.environ |= {
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    dirty = "" if manifest["rest"] == sources("rest") else "-dirty"
    commit = manifest["commit"].removesuffix("-dirty") + dirty
    os.environ.setdefault("CONVNN_COMMIT", commit)
    return commit


def unpack_cache(packed: Path, to: Path) -> None:
    """Copies a cache: Triton 3.6 keeps the paths of a kernel's files, which are others then."""
    shutil.copytree(packed, to)
    for path in to.glob("*/__grp__*"):
        files = json.loads(path.read_text())["child_paths"]
        moved = {name: str(path.parent / name) for name in files}
        path.write_text(json.dumps({"child_paths": moved}))


def compilations() -> list[str]:
    """A list that grows by a name with each kernel that Triton compiles from now on."""
    found: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        return found

    def listen(src: Any, cache_hit: bool, **rest: Any) -> None:
        found.extend([] if cache_hit else [src.name])

    knobs.compilation.listener = listen
    return found


def check_triton() -> str:
    """Whether the cache of the kit is for the Triton of this machine."""
    from triton.runtime.cache import triton_key

    wanted = os.environ.get("CONVNN_KIT_TRITON")
    if wanted not in (None, _digest(triton_key())):
        raise AssertionError("not the Triton of the kit: every kernel is compiled here")
    return "its cache fits" if wanted else "there is none"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# On the machine with the sources.


class _StandIn:
    """In the place of Triton's driver, on a machine without a GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)


def _compile(launch: Any, pointers: Any) -> Any:
    """Compiles a launch and what calls it; runs nothing, now or at the next launch of the variant.

    It stands in for `Launch.by_triton`, which is called for each new variant.
    """
    from triton.backends.nvidia.driver import CudaLauncher

    grid = (launch.programs,)
    arguments = (*map(pointers.tensor, launch.pointers), *launch.values)
    compiled = launch.kernel.jit.run(*arguments, grid=grid, warmup=True, **launch.options)
    _for_each_linkage(lambda: CudaLauncher(compiled.src, compiled.metadata))
    return lambda *arguments: None, None, None


def _for_each_linkage(build_library: Callable[[], Any]) -> None:
    """Builds a C library of Triton under both keys that it may have on the GPU machine.

    The key depends on whether the program `file` is installed there.
    """
    from triton.runtime import build

    for linkage in ("ELF", ""):
        key = f"x86_64,Linux,64bit,{linkage}"
        with mock.patch.object(build, "platform_key", return_value=key):
            build_library()


def trace(part: int, parts: int) -> dict[str, list[str]]:
    """Compiles what every `parts`-th group launches.

    Returns the folders of the cache that this needs, and the kernels that were not in it.
    """
    from triton import knobs
    from triton.backends.nvidia.driver import CudaUtils
    from triton.runtime import cache

    used: set[str] = set()

    class Recorded(cache.FileCacheManager):
        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            used.add(key)
            super().__init__(key, override, dump)

    # Launchers call the driver's library, which is not here: its functions are bound when called.
    sys.setdlopenflags(os.RTLD_LAZY)
    knobs.cache.manager_class, missed = Recorded, compilations()
    _for_each_linkage(lambda: CudaUtils().__init__())
    run_groups(part, parts)
    return {"used": sorted(used), "missed": missed}


def run_groups(part: int, parts: int) -> None:
    """Runs the operators of every `parts`-th group; each new variant goes to `_compile`."""
    import torch
    from triton.runtime.driver import driver

    from benchmarks.peers import PEERS
    from benchmarks.suites import SUITES
    from benchmarks.workloads import make_inputs
    from convnn_kernels.triton import hardware
    from convnn_kernels.triton.launch import Launch

    driver.set_active(_StandIn())
    groups = [g for s in ("right", "time") for g in SUITES[s].groups("cuda")]
    groups = [g for g in groups if g.backend == "triton"]
    with (
        mock.patch.object(Launch, "by_triton", _compile),
        mock.patch.object(hardware, "architecture", return_value=_ARCH),
        torch.device("meta"),
    ):
        for case in (case for group in groups[part::parts] for case in group.cases):
            if PEERS[case.peer].exacting:
                _run_operators(case, PEERS[case.peer].computes, make_inputs(case.workload, "meta"))


def _run_operators(case: Any, computes: str, X: Any) -> None:
    """What the peer of a case runs, and its backward, on tensors without data.

    The backward operators of `select` and `aggregate` sort pairs differently from that of
    `forward`; they run as well, for the tests.
    """
    import torch

    from convnn_kernels.triton import backend

    def run(name: str, *args: Any) -> Any:
        return backend.operators()[f"convnn::{name}"](*args)

    w = case.workload
    weight = X.dense_weight if "dense" in case.peer else X.weight
    candidates = self_indices = None
    if "random" in case.peer:
        candidates = torch.empty(min(w.candidates, w.rows), dtype=torch.int64)
        self_indices = torch.empty(w.tokens, dtype=torch.int64)
    restrictions = (candidates, self_indices, None)
    if computes in ("select", "aggregate"):
        s, I = run("select", X.query, X.key, w.k, *restrictions, "cosine", "similarity")
        if computes == "select":
            return
        Y = run("aggregate", X.value, s, I, weight, None, "softmax", 1.0)
    else:
        options = ("cosine", "softmax", 1.0)
        tensors = (X.query, X.key, X.value)
        Y, s, I = run("forward", *tensors, w.k, weight, None, *restrictions, *options, "similarity")
        needed = [*[True] * 4, False]
        of_output = (Y, None, *tensors, weight, s, I, False)
        run("forward_backward", *of_output, *options, *needed, candidates)
        run("select_backward", s, X.query, X.key, s, I, "cosine", True, True)
    needed = [True] * 3
    run("aggregate_backward", Y, X.value, s, I, weight, False, "softmax", 1.0, *needed, False)


def _run(*command: str, **environment: str) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, **environment}
    if subprocess.run(command, cwd=REPOSITORY, env=environment).returncode:
        raise SystemExit(f"gpu-kit: this failed: {' '.join(command)}")


def _trace(cache: Path, parts: int) -> dict[str, list[str]]:
    """`trace` in processes of their own with that cache, taken together."""
    with tempfile.TemporaryDirectory() as empty:
        # What launchers are linked to: a library of that name, without content.
        library = f"{empty}/libcuda.so.1"
        command = ["cc", "-shared", "-x", "c", "/dev/null", "-o", library]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
        environment = os.environ | {
            "TRITON_CACHE_DIR": str(cache),
            "TRITON_STORE_BINARY_ONLY": "1",
            "TRITON_LIBCUDA_PATH": empty,
            "LD_LIBRARY_PATH": empty,
        }
        command = [sys.executable, "-m", "tools.gpu_kit", "--trace", str(parts)]
        options: dict[str, Any] = {"cwd": REPOSITORY, "env": environment, "stdout": subprocess.PIPE}
        processes = [subprocess.Popen([*command, str(i)], **options) for i in range(parts)]
        printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("gpu-kit: the kernels could not be compiled")
    found = [json.loads(text.splitlines()[-1]) for text in printed]
    return {name: sorted({x for each in found for x in each[name]}) for name in found[0]}


def make(folder: Path) -> None:
    if sys.version_info[:2] != _PYTHON:
        raise SystemExit("gpu-kit: needs Python {}.{}: make gpu-kit PYTHON=...".format(*_PYTHON))
    before, work = read_manifest(folder), REPOSITORY / "build" / "gpu-kit"
    folder.mkdir(exist_ok=True)
    if before.get("lib") != sources("lib"):
        settings = (f"-DPython_EXECUTABLE={sys.executable}", "-GNinja")
        architecture = {"CONVNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
        _run("cmake", "-S", ".", "-B", str(work), *settings, **architecture)
        _run("cmake", "--build", str(work), "--parallel", os.environ.get("MAX_JOBS", "2"))
        _run("cmake", "--install", str(work), "--prefix", str(work / "installed"))
        shutil.rmtree(folder / "lib", ignore_errors=True)
        shutil.copytree(work / "installed" / "convnn_kernels" / "lib", folder / "lib")
    if not (REPOSITORY / "convnn_kernels" / "lib" / "libconvnn_cpu.so").exists():
        # The package does not import without it.
        shutil.copytree(folder / "lib", REPOSITORY / "convnn_kernels" / "lib", dirs_exist_ok=True)
    if before.get("triton") != sources("triton"):
        print("compiling the Triton kernels, which takes some minutes", flush=True)
        # What an earlier kit had compiled is still in that cache; this one takes what it needs.
        used = _trace(work / "triton", 2)["used"]
        shutil.rmtree(folder / "triton", ignore_errors=True)
        for name in used:
            shutil.copytree(work / "triton" / name, folder / "triton" / name)
        with tempfile.TemporaryDirectory() as scratch:
            unpack_cache(folder / "triton", Path(scratch) / "triton")
            if missed := _trace(Path(scratch) / "triton", 1)["missed"]:
                raise SystemExit(f"gpu-kit: {len(missed)} kernels are not found again: {missed}")
    if not list(folder.glob("flashlib-*.whl")):
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "-c", "constraints.txt")
        _run(*pip, "--dest", str(folder), "flashlib", PIP_CONSTRAINT="")
    current = all(before.get(part) == sources(part) for part in _SOURCES)
    print("gpu-kit: " + ("it was up to date" if current else "made") + f", {_describe(folder)}")


def _describe(folder: Path) -> str:
    """Writes what is in the kit, and says it; refuses one that is too large to be carried."""
    import torch
    import triton
    from triton.runtime.cache import triton_key

    git = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    commit = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = [path for path in folder.rglob("*") if path.is_file()]
    kernels = len(list((folder / "triton").glob("*/*.cubin")))
    manifest = {
        "commit": commit.strip(),
        **{part: sources(part) for part in (*_SOURCES, "rest")},
        "triton key": _digest(triton_key()),
        "holds": {
            "lib": "the libraries of CPU and CUDA C++, sm_90",
            "triton": f"{kernels} kernels and their launchers, sm_90",
            "*.whl": "flashlib, to compare with",
        },
        "made with": f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, "
        f"Triton {triton.__version__}",
        "bytes": sum(path.stat().st_size for path in files),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    packed = shutil.make_archive(str(REPOSITORY / "build" / "gpu-kit"), "gztar", folder)
    size = Path(packed).stat().st_size
    if size > _LIMIT:
        raise SystemExit(f"gpu-kit: more than {_LIMIT / 2**20:.0f} MiB packed")
    return f"{kernels} kernels, {size / 2**20:.1f} MiB packed, commit {manifest['commit']}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_kit", description=__doc__)
    parser.add_argument("--trace", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trace:
        parts, part = options.trace
        print(json.dumps(trace(part, parts)))
    else:
        make(FOLDER)


if __name__ == "__main__":
    main()
