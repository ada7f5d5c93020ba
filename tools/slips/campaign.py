# SPDX-License-Identifier: MIT
"""The list of slips, and what runs one of them."""

from __future__ import annotations

import marshal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tools.slips import by_hand, outcomes, testing
from tools.slips.baselines import Baselines
from tools.slips.building import BuildError, Product, compile_commands, cpu_library, host_program
from tools.slips.outcomes import Outcome
from tools.slips.relevant import stages
from tools.slips.rules import chosen
from tools.slips.server import Server
from tools.slips.slip import Slip, changed_part, file_digest
from tools.slips.sources import SOURCES, area_of
from tools.slips.testing import Stage
from tools.slips.tree import Tree


def all_slips(checkout: Path) -> list[Slip]:
    """Those made by hand and those made by rule, ordered by file."""
    made = list(by_hand.SLIPS)
    for source in SOURCES:
        text = (checkout / source.path).read_text()
        made += chosen(source.path, text, source.wanted, source.skip)
    order = {source.path: i for i, source in enumerate(SOURCES)}
    made.sort(key=lambda slip: order.get(slip.path, len(order)))
    return list({(slip.path, slip.before, slip.after): slip for slip in made}.values())


@dataclass
class Campaign:
    """Runs slips in one copy of the checkout, whose builds are in a folder."""

    checkout: Path
    folder: Path
    isa: str
    killers: list[tuple[str, str]]  # what was noticed before: a file and the test
    tree: Tree = field(init=False)
    server: Server = field(init=False)
    products: dict[str, Product] = field(init=False)
    _digests: dict[str, str] = field(default_factory=dict)
    _baselines: Baselines = field(init=False)

    def __post_init__(self) -> None:
        self.tree = Tree(self.checkout, self.folder / "tree")
        # PyTorch's name of the instruction set says which ones the tests may expect.
        capability = {"portable": "default", "avx2": "avx2"}.get(self.isa, "avx512")
        self.server = Server({"CONVNN_CPU_ISA": self.isa, "ATEN_CPU_CAPABILITY": capability})

    def prepare(self, native: bool) -> None:
        """Copy the checkout and build what it has without slips; the host program if `native`."""
        self.tree.refresh()
        root, build = self.tree.root, self.folder / "cmake"
        commands = compile_commands(root, build)
        self.products = {"cpu": cpu_library(root, self.folder, commands, self.isa)}
        if native:
            self.products["cuda"] = host_program(root, self.folder, commands)
        for name, product in self.products.items():
            self._digests[name] = product.build_original()
        self._baselines = Baselines(self.server, self.tree, self.folder / "baselines.json")

    def run(self, slip: Slip, known: Sequence[str]) -> Outcome:
        """What the tests say about a slip. `known`: the stages that run."""
        start = time.monotonic()
        text = (self.checkout / slip.path).read_text()
        before, after = changed_part(slip.before, slip.after)
        outcome = Outcome(
            slip.id,
            file_digest(self.checkout / slip.path),
            area_of(slip.path),
            f"{slip.path}:{slip.line(text)}",
            f"{before} -> {after}",
            outcomes.SURVIVED,
        )
        to_run = [
            self._with_programs(slip.path, stage)
            for stage in stages(slip.path, self.tree.root)
            if stage.name in known and stage.files
        ]
        while True:
            stage = self._try(slip, to_run, outcome)
            if stage is None or self._passes(slip.path, outcome.by, stage):
                break
            outcome.status = outcomes.SURVIVED  # so far
            outcome.stage = outcome.by = outcome.how = ""
        if stage:
            self.killers.append((slip.path, outcome.by))
        elif outcome.status == outcomes.SURVIVED:
            outcome.stage = known[-1]
        outcome.seconds = round(time.monotonic() - start, 1)
        return outcome

    def _try(self, slip: Slip, to_run: list[Stage], outcome: Outcome) -> Stage | None:
        """Applies a slip and runs tests; returns the stage in which one noticed it."""
        with self.tree.slipped(slip) as path:
            try:
                with self._built(slip, path) as expected:
                    if expected is None:
                        outcome.status = outcomes.EQUIVALENT
                        return None
                    return self._test(slip, to_run, expected, outcome)
            except BuildError as error:
                outcome.status = outcomes.INVALID
                outcome.by = str(error).strip().partition("\n")[0][:200]
                return None

    def _test(
        self, slip: Slip, to_run: list[Stage], expected: str, outcome: Outcome
    ) -> Stage | None:
        for stage in to_run:
            ran = testing.run(
                self.server,
                self.tree.root,
                stage,
                self._subject(slip.path),
                left_out=self._baselines.broken,
                first=self._killers(slip.path),
            )
            by = testing.killer(ran, expected)
            if by:
                outcome.status, outcome.by = outcomes.KILLED, by
                outcome.stage = "slow" if stage.name == "slow" else "quick"
                outcome.how = "failed" if ran.failed else "timeout" if ran.timed_out else "crashed"
                return stage
        return None

    def _passes(self, path: str, test: str, stage: Stage) -> bool:
        """Whether a test passes without a slip."""
        kind = self._kind(path)
        tested = self._digests.get(kind) or file_digest(self.tree.root / path)
        return self._baselines.passes(test, stage, self._subject(path), tested)

    def _killers(self, path: str) -> list[str]:
        """The tests that have noticed most: those of this file first, then of its folder."""
        count: Counter[str] = Counter()
        for other, by in self.killers:
            count[by] += 100 * (other == path) + (Path(other).parent == Path(path).parent)
        return [by for by, _ in count.most_common(40)]

    # What is built, and how the tests see it

    def _kind(self, path: str) -> str:
        if path.startswith("csrc/cuda/"):
            return "cuda"
        return "cpu" if path.startswith("csrc/") else "python"

    def _subject(self, path: str) -> str:
        kind = self._kind(path)
        if kind == "python":
            return f"module:{Path(path).relative_to('convnn_kernels')}"
        file = self.products[kind].file
        return f"library:{file.name}" if kind == "cpu" else f"program:{file}"

    def _with_programs(self, path: str, stage: Stage) -> Stage:
        if self._kind(path) != "cuda":
            return stage
        added = (("CONVNN_HOST_CUDA", str(self.products["cuda"].file.parent)),)
        return Stage(stage.name, stage.files, stage.marks, stage.only, stage.environment + added)

    @contextmanager
    def _built(self, slip: Slip, path: Path) -> Iterator[str | None]:
        """The digest of what the tests must load, or None if the slip changes no code."""
        kind = self._kind(slip.path)
        if kind == "python":
            before = (self.checkout / slip.path).read_text()
            yield None if _same_bytecode(before, path.read_text()) else file_digest(path)
            return
        product = self.products[kind]
        try:
            yield product.build_slipped(slip.path)
        finally:
            product.restore()


def _same_bytecode(before: str, after: str) -> bool:
    try:
        codes = [marshal.dumps(compile(text, "module", "exec")) for text in (before, after)]
    except SyntaxError as error:
        raise BuildError(str(error)) from None
    return codes[0] == codes[1]
