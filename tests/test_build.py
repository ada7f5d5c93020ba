# SPDX-License-Identifier: MIT
"""The build: its results, its messages, and its errors if something is missing."""

import importlib.metadata
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import tool
from packaging.requirements import Requirement

import convnn_kernels
from convnn_kernels import introspect, native

ROOT = Path(__file__).parent.parent
CMake = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CMake:
    """Configures the checkout in a separate folder, with the given environment."""

    def run(
        *options: str, python: str = sys.executable, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        command = [
            *(tool("cmake"), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={python}",
        ]
        # Whatever the working directory is.
        return subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)

    return run


def _message(done: subprocess.CompletedProcess[str]) -> str:
    """The error message of CMake, without its line breaks."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_missing_compiler_says_what_to_install(configure: CMake) -> None:
    message = _message(configure(CXX="/nonexistent/c++"))
    assert "no C++ compiler was found (CXX='/nonexistent/c++')" in message
    assert "apt install g++" in message
    assert "dnf install gcc-c++" in message


def test_compiler_that_refuses_its_flags_is_quoted(configure: CMake) -> None:
    """CMake only reports that a language is missing, unless it is asked to enable it."""
    message = _message(configure(CXXFLAGS="-fno-such-flag"))
    assert "is not able to compile a simple test program" in message
    assert re.search(r"(error|warning): .*-fno-such-flag", message)
    assert "no C++ compiler was found" not in message


def test_missing_torch_says_what_to_install(configure: CMake, tmp_path: Path) -> None:
    # Without the site module, an interpreter sees no installed package.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    message = _message(configure(python=str(python)))
    assert f"PyTorch is not installed for {python}" in message
    assert "pip install 'torch>=2.11'" in message


def test_forced_cuda_says_what_is_missing(configure: CMake) -> None:
    message = _message(configure(CONVNN_CUDA="1", CUDACXX="/nonexistent/nvcc"))
    assert "CONVNN_CUDA=1, but the CUDA library cannot be built: " in message
    assert "nvcc was not found" in message


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_that_refuses_its_flags_is_quoted(configure: CMake) -> None:
    message = _message(configure(CONVNN_CUDA="1", CUDAFLAGS="--no-such-flag"))
    assert "is not able to compile a simple test program" in message
    assert re.search(r"error: .*--no-such-flag", message)


@pytest.mark.slow
def test_cuda_can_be_left_out(configure: CMake) -> None:
    done = configure(CONVNN_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "skipping cuda: CONVNN_CUDA=0" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA PyTorch")
def test_cuda_is_skipped_beside_a_cpu_pytorch(
    configure: CMake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONVNN_CUDA", raising=False)
    done = configure()
    assert done.returncode == 0, done.stderr
    assert "skipping cuda: this PyTorch has no CUDA (CONVNN_CUDA=1 builds" in done.stdout


def test_wrong_setting_is_refused(configure: CMake) -> None:
    assert "CONVNN_CUDA must be 0, 1 or empty, got 'yes'" in _message(configure(CONVNN_CUDA="yes"))


# In the place of cmake: notes how it is called, and reports that CUDA was skipped.
FAKE_CMAKE = """#!/bin/sh
echo "$@" >> "$LOG"
[ "$CXXFLAGS" = refused ] && exit 1
[ "$1" = -S ] && echo '{"cpu": {}, "cuda": {"skipped": ""}, "introspect": {}}' > "$4/build.json"
exit 0
"""


@pytest.fixture
def build_in_place(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs setup.py in a copy with a Python, and returns how it called cmake."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "cmake.py").write_text(f"BIN_DIR = {str(tmp_path)!r}")
    (tmp_path / "ninja.py").write_text(f"BIN_DIR = {str(tmp_path)!r}")
    (tmp_path / "cmake").write_text(FAKE_CMAKE)
    (tmp_path / "cmake").chmod(0o755)
    (tmp_path / "convnn_kernels" / "lib").mkdir(parents=True)
    log = tmp_path / "log"

    def build(python: str, **environment: str) -> list[str]:
        log.write_text("")
        environment = {**os.environ, "LOG": str(log), "PYTHONPATH": str(tmp_path), **environment}
        command = [python, "setup.py", "build_ext", "--inplace"]
        folder = tmp_path / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)  # as cmake does
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert (done.returncode != 0) == (environment.get("CXXFLAGS") == "refused"), done.stderr
        return log.read_text().splitlines()

    return build


def test_another_name_of_the_same_python_compiles_nothing_again(
    build_in_place: Callable[..., list[str]], tmp_path: Path
) -> None:
    """`python -m pip` runs `python`, and the script `pip` of the same environment `python3`."""
    other = Path(sys.executable).with_name("python3")
    if not other.exists() or str(other) == sys.executable:
        pytest.skip("needs a Python of two names")
    assert not any("--fresh" in line for line in build_in_place(sys.executable))
    assert not any("--fresh" in line for line in build_in_place(str(other)))
    stamp = next((tmp_path / "build").glob("*/configured-for.json"))
    stamp.write_text("another environment")
    assert "--fresh" in build_in_place(sys.executable)[0]


def test_flags_that_the_compiler_refused_are_forgotten(
    build_in_place: Callable[..., list[str]],
) -> None:
    """CMake keeps them, also where configuring failed."""
    build_in_place(sys.executable, CXXFLAGS="refused")
    assert "--fresh" in build_in_place(sys.executable, CXXFLAGS="")[0]


def test_a_build_without_cuda_leaves_no_cuda_library(
    build_in_place: Callable[..., list[str]], tmp_path: Path
) -> None:
    library = tmp_path / "convnn_kernels" / "lib" / "libconvnn_cuda.so"
    library.touch()
    build_in_place(sys.executable)
    assert not library.exists()


def test_report_agrees_with_introspect() -> None:
    report = native.build_report()
    assert report["cpu"] == {"built": ", ".join(introspect.cpu_instruction_sets())}
    assert introspect.cpu_instruction_sets()[0] == "portable"
    built = bool(introspect.cuda_architectures())
    assert built == ("built" in report["cuda"])
    assert built == native.library("cuda").exists()
    assert re.fullmatch(r"\w+ \d+(\.\d+)*", introspect.compiler())


def test_introspect_is_the_same_for_every_python() -> None:
    """The pybind11 module fits one version of Python; introspect.py stands in for it elsewhere."""
    if introspect.__file__.endswith(".py"):
        pytest.skip("the pybind11 module was not built for this Python")
    path = Path(native.__file__).with_name("introspect.py")
    spec = importlib.util.spec_from_file_location("introspect_of_files", path)
    assert spec
    assert spec.loader
    of_files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(of_files)
    questions = [name for name, of in vars(of_files).items() if inspect.isfunction(of)]
    questions = [name for name in questions if not name.startswith("_")]
    assert len(questions) == 5
    for name in questions:
        assert getattr(of_files, name)() == getattr(introspect, name)(), name


def test_one_version_number() -> None:
    versions = {
        convnn_kernels.__version__,
        importlib.metadata.version("convnn_kernels"),
        introspect.version(),
        native.build_report()["version"],
    }
    assert len(versions) == 1


def test_missing_library_says_how_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "_FAULT", "Install it.")
    with pytest.raises(ImportError, match=r"libconvnn_cpu\.so is missing\. Install it\.$"):
        native.load.__wrapped__()


def test_unloadable_library_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libconvnn_cpu.so").write_text("not a library")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "_require_only_copy", lambda path: None)  # this process has one
    with pytest.raises(ImportError, match=r"which needs PyTorch 2\.11 or newer"):
        native.load.__wrapped__()


def _lines(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_library_has_no_search_path() -> None:
    dynamic = _lines("readelf", "--dynamic", str(native.library("cpu")))
    assert not [line for line in dynamic if "RPATH" in line or "RUNPATH" in line]


def test_library_needs_only_the_stable_abi() -> None:
    """It uses only C functions of PyTorch, which are stable across versions."""
    symbols = _lines("nm", "--dynamic", "--undefined-only", str(native.library("cpu")))
    names = {line.split()[-1].partition("@")[0] for line in symbols}
    assert not [name for name in names if re.search(r"(2at|3c10|5torch)", name)]
    assert [name for name in names if name.startswith(("aoti_torch_", "torch_"))]


@pytest.mark.slow
@pytest.mark.skipif(
    "avx2" not in introspect.cpu_instruction_sets(), reason="built for one instruction set"
)
def test_wide_instructions_stay_in_their_namespaces() -> None:
    """Code outside ``avx2``, ``avx512*`` and ``amx`` runs on every machine, so it must not use AVX.

    The linker keeps one copy of an inline function that all of them use: the portable one.
    """
    function, wide = "", set()
    for line in _lines("objdump", "-d", "-C", "--no-show-raw-insn", str(native.library("cpu"))):
        if line.endswith(">:"):
            function = line
        elif re.search(r"\tv[a-z]|%[yzt]mm", line):
            wide.add(function)
    assert wide, "the kernels use no AVX at all"
    # objdump leaves some names as they are: _ZN6convnn4avx29transpose...
    of_a_set = re.compile(r"convnn(::|\d+)(avx2|avx512|avx512vnni|amx)(::|\d)")
    assert not [name for name in wide if not of_a_set.search(name)]


def test_sources_need_no_header_newer_than_pytorch_2_11() -> None:
    """Functions that later headers added, and 2.11, the oldest supported version, lacks."""
    newer = ("STABLE_TORCH_ERROR_CODE_CHECK",)
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"]
    assert sources
    for path in sources:
        assert not [name for name in newer if name in path.read_text()], path


def test_pip_says_that_python_is_too_old() -> None:
    """It resolves what an old Python cannot have before it reads `requires-python`."""
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.10"
    for names in (project["build-system"]["requires"], project["project"]["dependencies"]):
        (torch,) = (of for of in map(Requirement, names) if of.name == "torch")
        assert torch.marker
        assert not torch.marker.evaluate({"python_version": "3.9"})
        assert torch.marker.evaluate({"python_version": "3.10"})
