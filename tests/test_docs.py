# SPDX-License-Identifier: MIT
"""The documentation: links, file names and modules exist, and snippets and examples run."""

import doctest
import importlib
import inspect
import io
import pkgutil
import pydoc
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import convnn_kernels
import convnn_kernels.backends.selection
import convnn_kernels.distributed.functions
import convnn_kernels.key_ranges

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = {
    # Not those with >>>, which show what is printed.
    name: re.findall(r"```python\n(?!>>>)(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    for name in ("README.md", "docs/graphs.md", "docs/layers.md")
}

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


def _is_program(module: Path) -> bool:
    return module.exists() and 'if __name__ == "__main__":' in module.read_text()


def missing_modules(text: str) -> list[str]:
    """Modules of this repository that a command runs and that do not exist, or do nothing then."""
    names = re.findall(r"python3? -m ([\w.]+)", text)
    files = [ROOT / name.replace(".", "/") for name in names if name.split(".")[0] in FOLDERS]
    return [
        file.relative_to(ROOT).as_posix().replace("/", ".")
        for file in files
        if not (file / "__main__.py").exists() and not _is_program(file.with_suffix(".py"))
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


@pytest.mark.parametrize(
    ("name", "least"), [("README.md", 5), ("docs/graphs.md", 3), ("docs/layers.md", 1)]
)
def test_snippets_run(name: str, least: int, run_forked: Callable[..., str]) -> None:
    assert len(SNIPPETS[name]) >= least
    printed = run_forked(
        f"for snippet in {SNIPPETS[name]!r}: exec(snippet, {{}})\nprint('all ran')"
    )
    assert printed.endswith("all ran\n")


def test_the_shapes_in_the_page_on_graphs() -> None:
    """The comments at its edge lists; that edges are right is tested in test_functional.py."""
    results = []
    for snippet in SNIPPETS["docs/graphs.md"]:
        scope: dict[str, Any] = {}
        exec(snippet, scope)
        results.append(scope)
    one, without_self, near, packed, ragged = results
    assert one["edges"].shape == (2, 16000)
    assert one["of_edges"].shape == (16000,)
    assert without_self["edges"].shape == (2, 16000)
    assert without_self["distances"].shape == (16000,)
    assert without_self["distances"].min() > 0
    lengths = (near["points"][near["edges"][0]] - near["points"][near["edges"][1]]).norm(dim=-1)
    assert 0 < lengths.max() < 0.1001
    assert near["edges"][1].bincount().max() <= 16
    assert packed["ranges"].shape == (177, 2)
    assert packed["edges"].unique().numel() == 177
    assert packed["edges"].shape == (2, 50 * 8 + 7 * 7 + 120 * 8)
    assert ragged["x"].shape == (177, 3)
    assert ragged["padded"].shape == (3, 120, 3)
    assert ragged["edges"].unique().numel() == 177
    assert ragged["edges"].shape == (2, 50 * 8 + 7 * 7 + 120 * 8)


# Modules of which every callable in __all__ has an example.
PUBLIC = (
    convnn_kernels,
    convnn_kernels.distributed,
    convnn_kernels.functional,
    convnn_kernels.nn,
)
SUBMODULES = [module.name for module in pkgutil.iter_modules(convnn_kernels.nn.__path__)]
MODULES = [
    *(convnn_kernels, convnn_kernels.functional, convnn_kernels.backends.selection),
    *(convnn_kernels.distributed, convnn_kernels.distributed.functions, convnn_kernels.native),
    convnn_kernels.key_ranges,
    *(importlib.import_module(f"convnn_kernels.nn.{name}") for name in SUBMODULES),
]
EXAMPLES = {
    test.name: test
    for module in MODULES
    for test in doctest.DocTestFinder().find(module)
    if test.examples
}


def public_callables() -> list[str]:
    """The full names of public functions and classes, and of their methods.

    Methods that every layer of PyTorch has, such as forward, are left out.
    """
    names = []
    for module in PUBLIC:
        for each in (getattr(module, name) for name in module.__all__):
            if inspect.isclass(each) or inspect.isfunction(each):
                names.append(f"{each.__module__}.{each.__qualname__}")
            if inspect.isclass(each):
                members = inspect.getmembers(each, lambda member: inspect.isroutine(member))
                names += [
                    f"{method.__module__}.{method.__qualname__}"
                    for name, method in members
                    if not name.startswith("_")
                    and not hasattr(torch.nn.Linear, name)
                    and getattr(method, "__module__", "").startswith("convnn_kernels")
                ]
    return sorted(set(names))


def test_public_callables_are_found() -> None:
    assert {
        "convnn_kernels.backends.selection.backend",
        "convnn_kernels.functional.edge_index",
        "convnn_kernels.functional.warmup",
        "convnn_kernels.nn.convnn.ConvNN2d",
        "convnn_kernels.nn.convnn.ConvNN2d.from_conv2d",
        "convnn_kernels.nn.replace.replace",
    } <= set(public_callables())


@pytest.mark.parametrize("name", public_callables())
def test_public_callables_have_examples(name: str) -> None:
    assert name in EXAMPLES, "no example in the docstring"


def assert_passes(test: doctest.DocTest) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    assert not runner.run(test, out=report.write).failed, report.getvalue()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    assert_passes(EXAMPLES[name])


def test_the_session_in_the_page_on_layers() -> None:
    text = (ROOT / "docs/layers.md").read_text()
    (session,) = re.findall(r"```python\n(>>>.*?)```", text, re.DOTALL)
    assert_passes(doctest.DocTestParser().get_doctest(session, {}, "layers.md", None, 0))


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_all_is_complete(module: types.ModuleType) -> None:
    """What a public module defines without an underscore is public, and is listed."""
    own = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert own <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", ["forward", "select", "aggregate"])
def test_operators_have_docstrings(name: str) -> None:
    """With the schema, the shapes and the function that documents the arguments."""
    packet = getattr(torch.ops.convnn, name)
    text = pydoc.plain(pydoc.render_doc(packet))
    assert str(packet.default._schema) in text
    assert "[..., N, " in text
    (function,) = re.findall(r"convnn_kernels\.functional\.(\w+)", text)
    arguments = [each.name for each in packet.default._schema.arguments]
    of_python = ["within"] if name == "select" else []
    assert [*arguments, *of_python] == [
        *inspect.signature(getattr(convnn_kernels.functional, function)).parameters
    ]
    assert packet.default.__doc__ == packet.__doc__
