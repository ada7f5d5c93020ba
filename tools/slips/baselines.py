# SPDX-License-Identifier: MIT
"""The tests without a slip: whether one that notices a slip passes without it."""

from __future__ import annotations

import json
from pathlib import Path

from tools.slips import testing
from tools.slips.server import Server
from tools.slips.slip import digest, file_digest
from tools.slips.testing import Stage
from tools.slips.tree import Tree

# What any test may depend on beside its own file and what was built.
_SHARED = ("convnn_kernels/**/*.py", "python_ref/*.py", "tests/[!t]*.py", "tests/*.cpp")


class Baselines:
    """Answers are kept in a file: each test is asked about once, until something changes."""

    def __init__(self, server: Server, tree: Tree, file: Path) -> None:
        self.server, self.tree, self.file = server, tree, file
        self._shared = tree.digest_of(_SHARED)
        self._known: dict[str, bool] = json.loads(file.read_text()) if file.exists() else {}
        self.broken: set[str] = set()  # what does not pass without a slip

    def passes(self, test: str, stage: Stage, subject: str, tested: str) -> bool:
        """Runs a test of a stage without a slip, on what has this digest."""
        source = file_digest(self.tree.root / test.partition("::")[0])
        parts = [self._shared, tested, source, test, stage.marks, stage.only]
        key = digest("\0".join(parts).encode())
        if key not in self._known:
            # Where not even the collection succeeded, there is no name of a test.
            files = stage.files if test == "collection" else (test,)
            alone = Stage(stage.name, files, stage.marks, stage.only, stage.environment)
            ran = testing.run(
                self.server, self.tree.root, alone, subject, collect_only="::" not in test
            )
            fits = ran.tested == tested and not ran.failed and ran.status in (0, 5)
            self._known[key] = fits and ("::" not in test or test in ran.passed)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self._known))
        if not self._known[key]:
            self.broken.add(test)
        return self._known[key]
