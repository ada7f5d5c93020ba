# SPDX-License-Identifier: MIT
"""Imports run one way: nn -> functional -> ops -> backends -> (triton | native)."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "convnn_kernels"

# What each part of the package may import of the others, itself apart. A new part is to be added
# here, with its place in the order.
ALLOWED = {
    "": {"functional", "native", "nn", "backends", "version"},
    "nn": {"functional"},
    "functional": {"torch_internals", "ops"},
    "ops": {"autograd", "backends", "checks", "flops", "schemas", "transforms"},
    "autograd": {"schemas", "torch_internals"},
    "transforms": {"schemas"},
    "flops": {"schemas"},
    "schemas": set(),
    "torch_internals": set(),
    "backends": {"checks", "schemas", "torch_internals", "native", "triton"},
    "triton": {"checks"},
    "checks": set(),
    "native": set(),
    "introspect": set(),
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


def test_which_parts_import_checks() -> None:
    assert {part for part, allowed in ALLOWED.items() if "checks" in allowed} == {
        "ops",
        "backends",
        "triton",
    }


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
