# SPDX-License-Identifier: MIT
"""The operators as the C++ library defines them, and what an import adds to them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from convnn_kernels import native, schemas


def test_operators_run_without_the_package(run_forked: Callable[..., str]) -> None:
    printed = run_forked(f"""
import sys, torch
torch.ops.load_library({str(native.library("cpu"))!r})
x = torch.arange(12.0).reshape(6, 2)
y, similarities, indices = torch.ops.convnn.forward(x, x, x, 2, metric="dot", rho="ones")
assert indices.tolist() == [[5, 4]] * 6 and y.tolist() == [[18.0, 20.0]] * 6
similarities, indices = torch.ops.convnn.select(x, x, 3)
assert torch.ops.convnn.aggregate(x, similarities, indices).shape == (6, 2)
print("convnn_kernels" in sys.modules)
""")
    assert printed == "False\n"


def test_every_operator_of_the_library_has_its_arguments_by_name() -> None:
    defined = {
        name.partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("convnn::")
    }
    assert defined == set(schemas.OPERATORS)
    forward = schemas.arguments("convnn::forward")
    assert forward._fields[:4] == ("query", "key", "value", "k")
    assert forward._field_defaults["metric"] == "cosine"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["purge", "reload"])
def test_imported_twice(how: str, run_forked: Callable[..., str]) -> None:
    again = {
        "purge": """
for name in [*sys.modules]:
    if name.partition(".")[0] == "convnn_kernels":
        del sys.modules[name]
import convnn_kernels
""",
        "reload": "importlib.reload(convnn_kernels.schemas); importlib.reload(convnn_kernels.ops)",
    }[how]
    run_forked(f"""
import importlib, sys, torch
import convnn_kernels, convnn_kernels.schemas, convnn_kernels.ops

def check(functional):
    x = torch.randn(5, 3, requires_grad=True)
    y = functional.convnn(x, x, x, 2)
    y.sum().backward()
    assert x.grad is not None
    mapped = torch.vmap(lambda each: functional.convnn(each, each, each, 2))
    assert torch.equal(mapped(x.detach()[None])[0], y)

first = convnn_kernels.functional
check(first)
{again}
check(convnn_kernels.functional)
check(first)  # objects of the first import still work
torch.library.opcheck(torch.ops.convnn.select.default, (torch.randn(5, 3), torch.randn(5, 3), 2))
""")


def test_another_copy_of_the_library(tmp_path: Path, run_forked: Callable[..., str]) -> None:
    """Loading a second one would end the process."""
    copy = tmp_path / native.library("cpu").name
    shutil.copy(native.library("cpu"), copy)
    printed = run_forked(f"""
import torch
torch.ops.load_library({str(copy)!r})
try:
    import convnn_kernels
except ImportError as error:
    print(error)
""")
    assert printed.startswith(f"convnn_kernels: cannot load {native.library('cpu')}, because")
    assert f"already loaded {copy}. Restart Python" in printed
