# SPDX-License-Identifier: MIT
"""A copy of the checkout in which slips are applied."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.slips.slip import Slip, digest

# Built files without which the copy is not a checkout that was built.
_BUILT = ("introspect*.so", "lib/build.json")


class Tree:
    def __init__(self, checkout: Path, root: Path) -> None:
        self.checkout, self.root = checkout, root

    def refresh(self) -> None:
        """Copy what has changed in the checkout, and delete what it no longer has."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=self.checkout,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        wanted = {Path(name) for name in listed.split("\0") if name}
        package = self.checkout / "convnn_kernels"
        for pattern in _BUILT:
            wanted |= {path.relative_to(self.checkout) for path in package.glob(pattern)}
        wanted = {name for name in wanted if (self.checkout / name).is_file()}
        for name in wanted:
            source, copy = self.checkout / name, self.root / name
            if not copy.exists() or copy.read_bytes() != source.read_bytes():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy)
                _forget_bytecode(copy)
        for copy in self.root.rglob("*"):
            name = copy.relative_to(self.root)
            kept = name in wanted or copy.suffix in (".so", ".pyc")
            if copy.is_file() and not kept and name.parts[0] != "build":
                copy.unlink()

    def digest_of(self, patterns: tuple[str, ...]) -> str:
        """One digest of all files that match."""
        files = sorted({path for pattern in patterns for path in self.root.glob(pattern)})
        return digest("".join(f"{path}{digest(path.read_bytes())}" for path in files).encode())

    @contextmanager
    def slipped(self, slip: Slip) -> Iterator[Path]:
        """The slip applied to the copy, and its file, within the context."""
        path = self.root / slip.path
        text = (self.checkout / slip.path).read_text()
        try:
            path.write_text(slip.apply(text))
            _forget_bytecode(path)
            yield path
        finally:
            path.write_text(text)
            _forget_bytecode(path)


def _forget_bytecode(path: Path) -> None:
    # Python tells stale bytecode by the source's size and the second of its last change.
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()
