# SPDX-License-Identifier: MIT
"""Commands run in a checkout that was not built, beside an installed package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convnn_kernels import installed, native

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, without anything that a build leaves there."""
    folder = tmp_path / "checkout"
    built = shutil.ignore_patterns("*.so", "lib", "__pycache__")
    shutil.copytree(ROOT / "convnn_kernels", folder / "convnn_kernels", ignore=built)
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=built)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    return folder


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """A folder as an installation leaves it, from the build of this checkout."""
    folder = tmp_path / "site-packages"
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "convnn_kernels", folder / "convnn_kernels", ignore=ignored)
    shutil.copytree(native.FOLDER, folder / "convnn_kernels" / "lib")
    return folder


def run_in(checkout: Path, path: Path | str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )


def test_an_installed_package_works_from_the_checkout(checkout: Path, site_packages: Path) -> None:
    done = run_in(checkout, site_packages, "-m", "convnn_kernels.info", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backends"]["cpu"] is None
    assert report["build"]["cpu_instruction_sets"][0] == "portable"
    assert not (checkout / "convnn_kernels" / "lib").exists()


@pytest.mark.slow
def test_python_files_are_those_of_the_checkout(checkout: Path, site_packages: Path) -> None:
    """An edit there takes effect, whether installed with -e or not."""
    code = "import convnn_kernels as c; print(c.__file__, c.native.library('cpu'))"
    done = run_in(checkout, site_packages, "-c", code)
    assert done.returncode == 0, done.stderr
    package, library = done.stdout.split()
    assert Path(package).is_relative_to(checkout)
    assert Path(library).is_relative_to(site_packages)


@pytest.mark.slow
def test_other_sources_are_said_in_one_line(checkout: Path, site_packages: Path) -> None:
    change(checkout)
    done = run_in(checkout, site_packages, "-c", "import convnn_kernels")
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: convnn_kernels: the CPU library ")
    assert f"What was imported is the checkout {checkout}, which was not built, and " in message
    assert "was built from other C++ sources. Install the checkout:  pip install" in message


def change(checkout: Path) -> None:
    """As if another commit were checked out."""
    with (checkout / "csrc" / "schemas.h").open("a") as file:
        file.write("// another commit\n")


def test_the_build_has_the_digest_of_its_sources() -> None:
    """CMake computes the same digest."""
    assert native.build_report()["sources"] == installed.digest_of_sources(ROOT)


@pytest.fixture
def hidden(checkout: Path, site_packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installed package, in a process whose path is that of a command in the checkout."""
    monkeypatch.setattr(sys, "path", ["", str(checkout), str(site_packages)])
    monkeypatch.chdir(checkout)
    return site_packages / "convnn_kernels"


def test_the_hidden_package_is_found(checkout: Path, hidden: Path) -> None:
    assert installed.library_folder(checkout / "convnn_kernels") == (hidden / "lib", "")


def test_an_installed_package_uses_its_own_libraries(hidden: Path) -> None:
    # Some packages install a folder csrc beside it.
    (hidden.parent / "csrc").mkdir()
    assert installed.library_folder(hidden) == (hidden / "lib", "")
    shutil.rmtree(hidden / "lib")
    folder, fault = installed.library_folder(hidden)
    assert folder == hidden / "lib"
    assert fault == "Install the package again from a checkout:  pip install --no-build-isolation ."


def test_a_built_checkout_uses_its_own_libraries(checkout: Path, hidden: Path) -> None:
    own = checkout / "convnn_kernels" / "lib"
    shutil.copytree(native.FOLDER, own)
    assert installed.library_folder(checkout / "convnn_kernels") == (own, "")


def test_libraries_of_another_commit_are_found_out(checkout: Path, hidden: Path) -> None:
    package = checkout / "convnn_kernels"
    change(checkout)
    folder, fault = installed.library_folder(package)
    assert folder == package / "lib"
    assert f"the installed {hidden} was built from other C++ sources" in fault
    shutil.copytree(native.FOLDER, package / "lib")
    folder, fault = installed.library_folder(package)
    assert folder == package / "lib"
    assert f"{folder} were built from other C++ sources than {checkout / 'csrc'} has" in fault


def test_outdated_libraries_give_way_to_installed_ones(checkout: Path, hidden: Path) -> None:
    """After `pip install -e .`, then another commit, then `pip install .`."""
    package = checkout / "convnn_kernels"
    shutil.copytree(native.FOLDER, package / "lib")
    report = json.dumps(native.build_report() | {"sources": "of another commit"})
    (package / "lib" / "build.json").write_text(report)
    assert installed.library_folder(package) == (hidden / "lib", "")


def test_without_an_installed_package_the_message_says_so(
    checkout: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["", str(checkout)])
    folder, fault = installed.library_folder(checkout / "convnn_kernels")
    assert folder == checkout / "convnn_kernels" / "lib"
    assert f"the checkout {checkout}, which was not built, and no convnn_kernels is" in fault
    assert fault.endswith("Install the checkout:  pip install --no-build-isolation .")


def test_outdated_libraries_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FAULT", "the libraries are outdated")
    with pytest.warns(UserWarning, match="^convnn_kernels: the libraries are outdated$"):
        native.load.__wrapped__()
