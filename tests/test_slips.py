# SPDX-License-Identifier: MIT
"""The tool for mutation testing: `python -m tools.slips`."""

import io
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tools.slips import __main__ as command
from tools.slips import outcomes, table, testing
from tools.slips.building import BuildError, Product, Unit
from tools.slips.by_hand import SLIPS
from tools.slips.campaign import all_slips
from tools.slips.outcomes import Outcome
from tools.slips.relevant import stages
from tools.slips.rules import candidates, chosen
from tools.slips.slip import Slip, changed_part, file_digest
from tools.slips.sources import AREAS, CUDA, SOURCES, TRITON
from tools.slips.testing import STAGES, Ran, StaleBuild, killer
from tools.slips.tree import Tree

ROOT = Path(__file__).parent.parent

CPP = """\
// a < b in a comment
inline int count(int n) {
  for (int i = 0; i < n; ++i) {
    if (n == 3) continue;
  }
  return n * 2 + 1;  // n * 2
}
"""
PYTHON = '''\
def count(n, first=0):
    """a < b in a docstring"""
    if n is None or first:
        return True
    return n[-1] - 1
'''


def _changes(path: str, text: str) -> set[tuple[str, str]]:
    return {
        (slip.what, changed_part(slip.before, slip.after)[1]) for slip in candidates(path, text)
    }


def test_rules_for_cpp() -> None:
    changes = _changes("csrc/cpu/a.h", CPP)
    assert ("bound", "for (int i = 0; i <= n; ++i) {") in changes
    assert ("reset", "for (int i = 1; i < n; ++i) {") in changes
    assert ("comparison", "if (n != 3) continue;") in changes
    assert ("condition", "if (false && n == 3) continue;") in changes
    assert ("skip", "if (n == 3) ;") in changes
    assert ("stride", "return n + 2 + 1;  // n * 2") in changes
    assert ("off-by-one", "return n * 2;  // n * 2") in changes
    assert not any("comment" in after for _, after in changes)


def test_rules_for_python() -> None:
    changes = _changes("convnn_kernels/a.py", PYTHON)
    assert ("none", "if n is not None or first:") in changes
    assert ("logic", "if n is None and first:") in changes
    assert ("condition", "if False:") in changes
    assert ("flag", "return False") in changes
    assert ("dimension", "return n[-2] - 1") in changes
    assert ("default", "def count(n, first=1):") in changes
    assert not any("docstring" in after for _, after in changes)


def test_of_a_line_only_what_is_skipped_stays() -> None:
    text = "run(tasks * parts, double(n * k));\n"
    found = {slip.after for slip in candidates("csrc/a.h", text, r"double\([^)]*\)")}
    assert "run(tasks + parts, double(n * k));\n" in found
    assert all("double(n * k)" in after for after in found)


def test_places_are_chosen_by_a_fixed_seed_and_stay() -> None:
    path = "csrc/cpu/select.h"
    text = (ROOT / path).read_text()
    slips = chosen(path, text, 8)
    assert slips == chosen(path, text, 8)
    assert len({slip.line(text) for slip in slips}) == 8
    assert len({slip.what for slip in slips}) == 8
    # A line in front moves none of them.
    later = chosen(path, "// more\n" + text, 8)
    assert {slip.id for slip in slips} == {slip.id for slip in later}
    assert slips != chosen(path, text, 8, seed="another")


def test_a_text_that_occurs_twice_is_refused() -> None:
    slip = Slip("a.h", "x = 1;", "x = 2;", "")
    assert slip.apply("x = 1;\n") == "x = 2;\n"
    for text in ("x = 1; x = 1;", "y = 1;"):
        with pytest.raises(ValueError, match=r"must occur once in a\.h, found"):
            slip.apply(text)


@pytest.fixture(scope="module")
def slips() -> list[Slip]:
    return all_slips(ROOT)


def test_every_slip_of_the_campaign_applies_and_has_tests(slips: list[Slip]) -> None:
    assert len(slips) >= 300
    assert len({slip.id for slip in slips}) == len(slips)
    texts = {slip.path: (ROOT / slip.path).read_text() for slip in slips}
    for slip in slips:
        assert slip.apply(texts[slip.path]) != texts[slip.path]
    for path in texts:
        assert stages(path, ROOT)[0].files, path
    assert {source.path for source in SOURCES} <= texts.keys()
    assert {slip.path for slip in SLIPS} <= texts.keys()


def test_a_stale_build_is_no_kill() -> None:
    ran = Ran(failed=["test_a.py::test"], tested="without the slip", status=1)
    with pytest.raises(StaleBuild, match="loaded without the slip, not with it"):
        killer(ran, "with it")
    ran.tested = "with it"
    assert killer(ran, "with it") == "test_a.py::test"


def test_what_is_a_kill() -> None:
    def by(**values: object) -> str | None:
        return killer(Ran(tested="x", **values), "x")  # type: ignore[arg-type]

    assert by(passed=["test_a.py::test"]) is None
    assert by(failed=["test_a.py::test"], status=1) == "test_a.py::test"
    assert by(running="test_a.py::test", status=-11) == "test_a.py::test"
    assert by(running="test_a.py::test", timed_out=True) == "test_a.py::test"
    # A file of tests that cannot even be imported.
    assert by(failed=["tests/test_a.py"], status=2) == "tests/test_a.py"


def test_the_report_of_a_run() -> None:
    lines = [{"started": "a"}, {"passed": "a"}, {"started": "b"}, {"tested": "x"}]
    ran = testing.read_report("\n".join(map(json.dumps, lines)))
    assert (ran.passed, ran.failed, ran.running, ran.tested) == (["a"], [], "b", "x")


def _product(folder: Path) -> Product:
    (folder / "a.h").write_text("inline int number() { return 1; }\n")
    (folder / "a.cpp").write_text('#include "a.h"\nint main() { return number(); }\n')
    (folder / "b.cpp").write_text("int unused() { return 2; }\n")
    compiler = os.environ.get("CXX", "c++")
    units = [Unit(f"{name}.cpp", f"{name}.o", (compiler,)) for name in "ab"]
    return Product(folder, folder / "objects", units, [compiler], folder / "program")


def test_builds_compile_what_a_slip_reaches_and_no_more(tmp_path: Path) -> None:
    product = _product(tmp_path)
    original = product.build_original()
    assert original == file_digest(tmp_path / "program")
    assert product.reaches("a.h")
    assert not product.reaches("c.h")

    (tmp_path / "a.h").write_text("inline int number() { return 5; }\n")
    digest = product.build_slipped("a.h")
    assert digest == file_digest(tmp_path / "program") != original
    assert subprocess.run(tmp_path / "program").returncode == 5
    assert not (tmp_path / "objects" / "slipped" / "b.o").exists()

    # The same machine code: equivalent.
    (tmp_path / "a.h").write_text("inline int number() { return 2 - 1; }\n")
    assert product.build_slipped("a.h") is None
    (tmp_path / "a.h").write_text("inline int number() { return }\n")
    with pytest.raises(BuildError, match="expected"):
        product.build_slipped("a.h")
    product.restore()
    assert file_digest(tmp_path / "program") == original


def test_originals_are_built_again_when_a_header_changes(tmp_path: Path) -> None:
    product = _product(tmp_path)
    original = product.build_original()
    assert product.build_original() == original
    (tmp_path / "a.h").write_text("inline int number() { return 7; }\n")
    assert product.build_original() != original
    assert subprocess.run(tmp_path / "program").returncode == 7


def test_a_slip_is_undone(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "convnn_kernels").mkdir(parents=True)
    (checkout / "convnn_kernels" / "a.py").write_text("x = 1\n")
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    tree = Tree(checkout, tmp_path / "tree")
    tree.refresh()
    copy = tmp_path / "tree" / "convnn_kernels" / "a.py"
    bytecode = copy.parent / "__pycache__" / "a.cpython-311.pyc"
    bytecode.parent.mkdir()
    with tree.slipped(Slip("convnn_kernels/a.py", "x = 1", "x = 2", "")) as path:
        assert path == copy
        assert copy.read_text() == "x = 2\n"
        bytecode.touch()  # as of the same second and size
    assert copy.read_text() == "x = 1\n"
    assert not bytecode.exists()
    assert (checkout / "convnn_kernels" / "a.py").read_text() == "x = 1\n"

    (checkout / "convnn_kernels" / "a.py").unlink()
    tree.refresh()
    assert not copy.exists()


def _outcome(name: str, status: str, **more: str) -> Outcome:
    return Outcome(name, "digest", "kernels", f"{name}:1", "a -> b", status, **more)


def test_outcomes_are_found_again(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.jsonl"
    assert outcomes.read(file) == {}
    outcomes.append(file, _outcome("a.h", "survived"))
    outcomes.append(file, _outcome("b.h", "survived"))
    outcomes.append(file, _outcome("a.h", "killed", stage="quick"))
    with file.open("a") as interrupted:
        interrupted.write('{"id": "c')
    found = outcomes.read(file)
    assert {name: outcome.status for (name, _), outcome in found.items()} == {
        "a.h": "killed",
        "b.h": "survived",
    }
    outcomes.write(file, found.values())
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        asdict(outcome) for outcome in found.values()
    ]


@pytest.mark.parametrize(
    ("status", "stage", "finished"),
    [
        ("killed", "quick", ["first", "quick", "processes", "slow"]),
        ("equivalent", "", ["first", "quick", "processes", "slow"]),
        ("survived", "quick", ["first", "quick"]),
        ("survived", "slow", ["first", "quick", "processes", "slow"]),
    ],
)
def test_survivors_are_finished_when_all_tests_have_run(
    status: str, stage: str, finished: list[str]
) -> None:
    outcome = _outcome("a", status, stage=stage)
    assert [each for each in STAGES if outcomes.is_finished(outcome, each)] == finished
    assert not outcomes.is_finished(None, "first")


def test_the_latest_outcome_is_that_of_the_same_file_if_there_is_one() -> None:
    found = [_outcome("a", "killed"), _outcome("a", "survived"), _outcome("b", "killed")]
    found[1].source, found[2].source = "later", "other"
    known = {outcome.key: outcome for outcome in found}
    assert outcomes.latest(known, "a", "digest") == found[0]
    assert outcomes.latest(known, "a", "another") == found[1]
    assert outcomes.latest(known, "c", "digest") is None


def test_the_table_counts_what_was_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reasons = tmp_path / "survivors.json"
    reasons.write_text('{"d": "only speed"}')
    monkeypatch.setattr(table, "SURVIVORS", reasons)
    found = [_outcome("a", "killed", stage="quick"), _outcome("b", "killed", stage="slow")]
    found += [_outcome("c", "equivalent"), _outcome("d", "survived", stage="slow")]
    found += [_outcome("e", "invalid"), _outcome("f", "survived", stage="first")]
    sources = dict.fromkeys("abcdefg", "digest") | {"a": "another"}
    lines = table.summary(found, sources).splitlines()
    assert "| kernels | 4 | 1 | 1 | 1 | 1 | 1 | 1 | 25.0% | 50.0% |" in lines
    assert "| d:1 | `a -> b` | slow | only speed |" in lines
    assert "| f:1 | `a -> b` | first |  |" in lines
    assert any(line.startswith("6 of 7 slips have run, 1 of these") for line in lines)


def test_the_documentation_has_the_table_of_the_results(slips: list[Slip]) -> None:
    """And a reason for each survivor."""
    known = outcomes.read(table.RESULTS)
    found = [outcomes.latest(known, each.id, file_digest(ROOT / each.path)) for each in slips]
    run = [each for each in found if each and each.status in (outcomes.KILLED, outcomes.SURVIVED)]
    assert {each.id for each in run if each.status == outcomes.SURVIVED} <= table.reasons().keys()
    page = (ROOT / "docs" / "tested.md").read_text()
    rows = {area: {area} for area in AREAS}
    rows |= {"all": set(AREAS), "those that `make test` runs": set(AREAS) - {TRITON, CUDA}}
    for area, areas in rows.items():
        of_area = [each for each in run if each.area in areas]
        killed = [each for each in of_area if each.status == outcomes.KILLED]
        counts = sum(each.stage == "quick" for each in killed), len(killed)
        cells = [f"{count} ({100 * count / len(of_area):.1f}%)" for count in counts]
        row = f"| {area} | {len(of_area)} | {' | '.join(cells)} | {len(of_area) - len(killed)} |"
        assert row in page.splitlines()


def test_reasons_are_of_slips_that_there_are(slips: list[Slip]) -> None:
    assert table.reasons().keys() <= {slip.id for slip in slips}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--only", "["], "--only: '[' is no regular expression"),
        (["--only", "no such slip"], "no slip has such an id and area"),
        (["--rerun", "kiled"], "--rerun: invalid choice: 'kiled'"),
        (["--isa", "sse"], "--isa: invalid choice: 'sse'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--write", "--only", "select"], "--write is for all slips"),
    ],
)
def test_wrong_commands(wrong: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["slips", "--list", *wrong])
    printed = io.StringIO()
    monkeypatch.setattr("sys.stderr", printed)
    with pytest.raises(SystemExit) as error:
        command.main()
    assert message in printed.getvalue() + str(error.value)
