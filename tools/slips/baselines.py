# SPDX-License-Identifier: MIT
"""The tests without a slip: which pass, and how long they take; kept for each file of tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tools.slips import testing
from tools.slips.server import Server
from tools.slips.slip import digest, file_digest
from tools.slips.testing import Baseline, Ran, Stage
from tools.slips.tree import Tree

# What any test may depend on beside its own file and what was built.
_SHARED = ("convnn_kernels/**/*.py", "python_ref/*.py", "tests/[!t]*.py", "tests/*.cpp")


class Baselines:
    def __init__(self, server: Server, tree: Tree, folder: Path) -> None:
        self.server, self.tree, self.folder = server, tree, folder
        self._shared = tree.digest_of(_SHARED)

    def _stored_at(self, stage: Stage, tested: str, name: str) -> Path:
        settings = [stage.marks, stage.only, *(value for _, value in stage.environment)]
        parts = [self._shared, tested, name, file_digest(self.tree.root / name), *settings]
        return self.folder / f"{digest(chr(0).join(parts).encode())}.json"

    def of(self, stage: Stage, subject: str, tested: str) -> Baseline:
        """Runs those files of a stage that have not run for what is `tested`, a digest.

        Raises:
            SystemExit: if they cannot run at all.
        """
        files = {name: self._stored_at(stage, tested, name) for name in stage.files}
        missing = tuple(name for name, file in files.items() if not file.exists())
        if missing:
            part = Stage(stage.name, missing, stage.marks, stage.only, stage.environment)
            ran = testing.run(self.server, self.tree.root, part, subject, first_failure=False)
            if any("::" not in name for name in ran.failed) or ran.status not in (0, 1, 5):
                raise SystemExit(f"{missing} cannot run without a slip: {ran.output}")
            for name in missing:
                self._store(files[name], name, ran)
        return _together(json.loads(file.read_text()) for file in files.values())

    def _store(self, file: Path, name: str, ran: Ran) -> None:
        def of_file(tests: Iterable[str]) -> list[str]:
            return [test for test in tests if test.startswith(f"{name}::")]

        failed = of_file(ran.failed)
        result = {
            "file": name,
            "passed": [test for test in of_file(ran.passed) if test not in failed],
            "left_out": failed,
            "seconds": sum(ran.took[test] for test in of_file(ran.took)),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))


def _together(results: Iterable[dict]) -> Baseline:
    each = list(results)
    return Baseline(
        frozenset(test for result in each for test in result["passed"]),
        frozenset(test for result in each for test in result["left_out"]),
        sum(result["seconds"] for result in each),
    )
