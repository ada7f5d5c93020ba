# SPDX-License-Identifier: MIT
"""The documentation: links, file names and modules exist, and the README's snippets run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

FOLDERS = (".ci", "benchmarks", "convnn_kernels", "csrc", "docs", "examples", "python_ref")
FOLDERS += ("tests", "tools")
PATHS = [path for path in ROOT.glob("*") if path.is_file()]
PATHS += [path for folder in FOLDERS for path in (ROOT / folder, *(ROOT / folder).rglob("*"))]


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def broken_links(document: Path) -> list[str]:
    broken = []
    without_code = re.sub(r"`[^`\n]*`", "", document.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_files(text: str) -> list[str]:
    """Names of source files and of paths in this repository, in backticks, that no file has.

    A name may leave out leading folders and may contain *.
    """
    missing = []
    for name in re.findall(r"`([\w./*-]+)`", text):
        is_source = re.search(r"\.(py|pyi|c|h|cpp|cu|cuh)$", name)
        if (is_source or name.startswith(tuple(f"{folder}/" for folder in FOLDERS))) and not any(
            path.match(name.rstrip("/")) for path in PATHS
        ):
            missing.append(name)
    return missing


def missing_modules(text: str) -> list[str]:
    """Modules of this repository that a command runs and that do not exist."""
    names = re.findall(r"python3? -m ([\w.]+)", text)
    files = [ROOT / name.replace(".", "/") for name in names if name.split(".")[0] in FOLDERS]
    return [
        file.relative_to(ROOT).as_posix().replace("/", ".")
        for file in files
        if not file.with_suffix(".py").exists() and not (file / "__main__.py").exists()
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "# A title\n[1](page.md#a-title) [2](page.md#other) [`3`](none.md) [4](#no) `f[i](x)`\n"
    )
    assert broken_links(document) == ["page.md#other", "none.md", "#no"]


# The changelog also has the names of files that are gone.
CURRENT = [document for document in DOCUMENTS if document.name != "CHANGELOG.md"]


@pytest.mark.parametrize("document", CURRENT, ids=lambda path: path.name)
def test_files_and_modules_exist(document: Path) -> None:
    text = document.read_text()
    assert missing_files(text) == []
    assert missing_modules(text) == []


def test_a_missing_file_or_module_is_found() -> None:
    files = "`tests/test_docs.py` `test_docs.py` `test_do*.py` `csrc/cpu/` `gone.cuh` `docs/gone`"
    assert missing_files(files + " `docs.py` `torch.mm` `tests/gone_*.py`") == [
        *("gone.cuh", "docs/gone", "docs.py", "tests/gone_*.py")
    ]
    modules = "`python -m benchmarks compare` `python3 -m tools.gone` `python -m benchmarks.paper`"
    assert missing_modules(modules + " `python -m venv`") == ["tools.gone"]


def test_snippets_of_the_readme_run(run_python: Callable[..., str]) -> None:
    assert len(SNIPPETS) >= 5
    printed = run_python(f"for snippet in {SNIPPETS!r}: exec(snippet, {{}})\nprint('all ran')")
    assert printed.endswith("all ran\n")
