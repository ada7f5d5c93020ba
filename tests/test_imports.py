# SPDX-License-Identifier: MIT
"""Imports run one way: nn -> functional -> ops -> backends -> (triton | native).

And the arguments of `forward` are listed in few files.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from convnn_kernels import schemas

ROOT = Path(__file__).parent.parent
PACKAGE = "convnn_kernels"

# The other parts that each part of the package imports; "" is its __init__.py. A new part and a new
# import are added here, and what is no longer imported is removed.
ALLOWED = {
    "": {"functional", "nn", "backends", "version"},
    "nn": {"functional"},
    # Beside nn; with the operators themselves, because every rank must first hear of a wrong call.
    "distributed": {
        "arguments",
        "checks",
        "functional",
        "schemas",
        "torch_internals",
        "transforms",
    },
    "functional": {"arguments", "key_ranges", "torch_internals", "ops"},
    "key_ranges": {"arguments"},
    "arguments": {"checks", "torch_internals"},
    "ops": {"autograd", "backends", "checks", "flops", "schemas", "transforms"},
    "autograd": {"raised", "schemas", "torch_internals"},
    "transforms": {"schemas"},
    "flops": {"schemas"},
    "schemas": {"native", "torch_internals"},
    "torch_internals": {"raised"},
    "raised": set(),
    "backends": {
        "checks",
        "known_searches",
        "native",
        "raised",
        "schemas",
        "torch_internals",
        "triton",
    },
    "triton": {"known_searches"},
    "known_searches": set(),
    "checks": set(),
    "native": {"installed"},
    "installed": set(),
    "introspect": {"native"},
    "version": set(),
    "show_neighbors": {"functional", "nn"},
    "info": {"backends", "introspect", "native", "version"},
}


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The full names of the modules, and of the names in them, that `source` imports anywhere."""
    parts = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = node.level - 1 if is_package else node.level
                base = ".".join([*parts[: len(parts) - above], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str:
    """The part of the package that a module is of: "nn" for convnn_kernels.nn.attention."""
    return [*name.split("."), ""][1]


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, as the module of that name, imports and may not."""
    found = []
    for name in imports(source, module, is_package):
        top = name.split(".")[0]
        if module.split(".")[0] == "python_ref":
            allowed = top in {"torch", "python_ref"} or top in sys.stdlib_module_names
        elif top == PACKAGE:
            part, of = part_of(module), part_of(name)
            # What is no part is a name that the package itself defines, such as `__version__`.
            allowed = of == part or of in ALLOWED[part] or (of not in ALLOWED and part == "")
        else:
            allowed = top not in {"python_ref", "tests", "benchmarks", "conftest", "cases"}
        if not allowed:
            found.append(name)
    return found


def modules(folder: str) -> list[tuple[str, Path]]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path)
        for path in paths
    ]


@pytest.mark.parametrize(
    ("module", "path"),
    [pytest.param(*each, id=each[0]) for each in (*modules(PACKAGE), *modules("python_ref"))],
)
def test_imports(module: str, path: Path) -> None:
    assert part_of(module) in ALLOWED or module.startswith("python_ref")
    assert not faults(path.read_text(), module, path.name == "__init__.py")


def test_every_allowed_import_is_made() -> None:
    used: dict[str, set[str]] = {part: set() for part in ALLOWED}
    for module, path in modules(PACKAGE):
        part = part_of(module)
        for name in imports(path.read_text(), module, path.name == "__init__.py"):
            if name.split(".")[0] == PACKAGE:
                used[part].add(part_of(name))
    assert {part: of & (ALLOWED.keys() - {part}) for part, of in used.items()} == ALLOWED


def test_order_has_no_cycle() -> None:
    remaining = dict(ALLOWED)
    while remaining:
        lowest = [part for part, of in remaining.items() if not of & remaining.keys()]
        assert lowest, f"cycle among {sorted(remaining)}"
        for part in lowest:
            del remaining[part]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("convnn_kernels.ops", "from convnn_kernels import functional"),
        ("convnn_kernels.ops", "import convnn_kernels.functional as f"),
        ("convnn_kernels.ops", "from convnn_kernels.nn.attention import ConvNNAttention"),
        ("convnn_kernels.ops", "from . import functional"),
        ("convnn_kernels.backends.selection", "from .. import ops"),
        ("convnn_kernels.backends.selection", "from convnn_kernels.ops import forward"),
        ("convnn_kernels.functional", "from convnn_kernels import checks"),
        ("convnn_kernels.functional", "def f():\n    from convnn_kernels import native"),
        ("convnn_kernels.native", "from convnn_kernels.version import __version__"),
        ("convnn_kernels.nn.hybrid", "from convnn_kernels import ops"),
        ("convnn_kernels.functional", "import python_ref.convnn"),
        ("convnn_kernels.info", "from benchmarks import stamp"),
        ("convnn_kernels.checks", "from tests.cases import CASES"),
        ("python_ref.convnn", "import numpy as np"),
        ("python_ref.convnn", "from convnn_kernels import functional"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("convnn_kernels.nn.hybrid", "from convnn_kernels.functional import convnn\nimport torch"),
        ("convnn_kernels.nn.hybrid", "from .convnn import ConvNN2d"),
        ("convnn_kernels.backends.selection", "from ..native import load"),
        ("python_ref.compare", "import math\nfrom torch import Tensor\nfrom . import convnn"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    assert not faults(source, module)


FORWARD = [*schemas.arguments("convnn::forward")._fields]


def lists_of_forward(source: str) -> Iterator[str]:
    """Where `source` has the arguments of `forward` one after the other.

    That is in a signature, a call, a sequence or the keys of a dictionary, the fields of a class,
    or a text such as a schema.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        label = type(node).__name__
        match node:
            case ast.FunctionDef(name=name, args=args):
                names, label = [arg.arg for arg in args.args + args.kwonlyargs], f"def {name}"
            case ast.Call(func=func, args=positional, keywords=keywords):
                names = [*map(_word, positional), *(str(each.arg) for each in keywords)]
                label = f"{ast.unparse(func)}(...)"
            case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Dict(keys=elements):
                names = [*map(_word, elements)]
            case ast.ClassDef(name=name, body=body):
                fields = [each.target for each in body if isinstance(each, ast.AnnAssign)]
                names, label = [*map(_word, fields)], f"class {name}"
            case ast.Constant(value=str(text)):
                names, label = re.findall(r"\w+", text), "text"
        if [name for name in names if name in FORWARD] == FORWARD:
            yield label


def _word(node: ast.expr | None) -> str:
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word) | ast.Constant(value=str(word)):
            return word
    return ""


def test_arguments_of_forward_are_listed_once() -> None:
    """All other code passes them on as they are, or by name: a new argument is added to these.

    The schema, csrc/schemas.h, is the definition. functional.py has the signature that users see,
    and its call of the operator, as distributed/functions.py has; triton/forward.py the signature
    of the implementation, which a type checker reads. python_ref imports nothing of the package,
    so its function and the comparison with it have signatures of their own.
    """
    found = {
        (str(path.relative_to(ROOT)), label)
        for folder in (PACKAGE, "python_ref", "benchmarks", "tools")
        for _, path in modules(folder)
        for label in lists_of_forward(path.read_text())
    }
    assert found == {
        (f"{PACKAGE}/functional.py", "def convnn"),
        (f"{PACKAGE}/functional.py", "_call(...)"),
        (f"{PACKAGE}/distributed/functions.py", "def convnn"),
        (f"{PACKAGE}/distributed/functions.py", "Tuple"),
        (f"{PACKAGE}/triton/forward.py", "def forward"),
        ("python_ref/convnn.py", "def forward"),
        ("python_ref/compare.py", "def assert_forward"),
    }


@pytest.mark.parametrize(
    "source",
    [
        "def f(op, {}): pass",
        "f(0, {})",
        "x = [{}]",
        "x = a, {}",
        "def f({}, more=None): pass",
        "class C:\n    " + "\n    ".join(f"{name}: int" for name in FORWARD),
        "x = {{" + ", ".join(f"'{name}': 1" for name in FORWARD) + "}}",
        "f(" + ", ".join(f"{name}=a.{name}" for name in FORWARD) + ")",
        "'f({})'",
    ],
)
def test_a_list_of_the_arguments_is_found(source: str) -> None:
    assert [*lists_of_forward(source.format(", ".join(FORWARD)))]
