# SPDX-License-Identifier: MIT
"""The example of a model compiled ahead of time runs without the package, and without Python."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import tool

from convnn_kernels import native

EXAMPLE = Path(__file__).parent.parent / "examples" / "package"
pytestmark = pytest.mark.slow


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A package, and the output of its model without compilation."""
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    code = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLE.parent.parent)!r})
sys.argv = ["make_package.py", {str(path)!r}]
runpy.run_path({str(EXAMPLE / "make_package.py")!r}, run_name="__main__")
"""
    return path, numbers(output(sys.executable, "-c", code))


def numbers(text: str) -> torch.Tensor:
    return torch.tensor([[float(word) for word in line.split()] for line in text.splitlines()])


def test_in_python_with_only_the_library_loaded(package: tuple[Path, torch.Tensor]) -> None:
    path, expected = package
    printed = output(
        sys.executable,
        "-c",
        f"""
import sys, torch
torch.ops.load_library({str(native.library("cpu"))!r})
model = torch._inductor.aoti_load_package({str(path)!r})
assert "convnn_kernels" not in sys.modules
for row in model(torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)).tolist():
    print(*row)
""",
    )
    torch.testing.assert_close(numbers(printed), expected, atol=2e-6, rtol=1e-5)


def test_in_a_program_without_python(package: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path, expected = package
    output(
        *(tool("cmake"), "-S", EXAMPLE, "-B", tmp_path, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    )
    output(tool("cmake"), "--build", tmp_path, "--parallel", "1")
    printed = output(tmp_path / "run_package", native.library("cpu"), path)
    torch.testing.assert_close(numbers(printed), expected, atol=2e-6, rtol=1e-5)
