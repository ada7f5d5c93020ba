# SPDX-License-Identifier: MIT
"""Where the built libraries are.

They are in the package. But commands that run in a checkout import its package, not the installed
one, and unless it was installed with ``-e``, it has no libraries. It then uses those of the
installed package, if they were built from the checkout's C++ sources.
"""

import hashlib
import importlib.machinery
import json
import sys
from pathlib import Path
from typing import Any

_INSTALL = "pip install --no-build-isolation ."


def library_folder(package: Path) -> tuple[Path, str]:
    """The folder of the libraries of ``package``, and what is wrong with it, or an empty string."""
    own, checkout = package / "lib", package.parent
    built = (own / "libconvnn_cpu.so").exists()
    if not (checkout / "csrc" / "introspect.cpp").exists():
        return own, "" if built else f"Install the package again from a checkout:  {_INSTALL}"
    digest = digest_of_sources(checkout)
    if built and build_report(own).get("sources", digest) == digest:
        return own, ""
    hidden = _hidden_package(checkout)
    if hidden and build_report(hidden / "lib").get("sources") == digest:
        return hidden / "lib", ""
    if built:
        return own, (
            f"the libraries in {own} were built from other C++ sources than {checkout / 'csrc'} "
            "has. Build them again:  pip install --no-build-isolation -e ."
        )
    what = f"What was imported is the checkout {checkout}, which was not built"
    if hidden:
        return own, (
            f"{what}, and the installed {hidden} was built from other C++ sources. "
            f"Install the checkout:  {_INSTALL}"
        )
    return own, f"{what}, and no convnn_kernels is installed. Install the checkout:  {_INSTALL}"


def build_report(folder: Path) -> dict[str, Any]:
    """What was built into a folder of libraries; empty if there was no build."""
    try:
        return json.loads((folder / "build.json").read_text())
    except FileNotFoundError:
        return {}


def digest_of_sources(checkout: Path) -> str:
    """SHA-256 of what the libraries are built from, as CMakeLists.txt computes it."""
    names = ["CMakeLists.txt"]
    for suffix in ("cpp", "cu", "cuh", "h"):
        names += [
            path.relative_to(checkout).as_posix()
            for path in (checkout / "csrc").rglob(f"*.{suffix}")
        ]
    listing = ""
    for name in sorted(names):
        listing += f"{hashlib.sha256((checkout / name).read_bytes()).hexdigest()} {name}\n"
    return hashlib.sha256(listing.encode()).hexdigest()


def _hidden_package(checkout: Path) -> Path | None:
    """The convnn_kernels that would be imported if ``checkout`` were not on the path."""
    path = [entry for entry in sys.path if Path(entry).resolve() != checkout.resolve()]
    spec = importlib.machinery.PathFinder.find_spec("convnn_kernels", path)
    return Path(spec.origin).parent if spec and spec.origin else None
