# SPDX-License-Identifier: MIT
"""Operators in a child that was forked after its parent had used threads.

The OpenMP threads of the parent do not exist in the child, where a parallel region waits for them
forever; PyTorch's own operators do.
"""

import threading

import pytest
import torch
from child import in_child
from torch import Tensor

import convnn_kernels  # noqa: F401, defines the operators

forward = torch.ops.convnn.forward


def run(X: Tensor) -> list[Tensor]:
    """Results of forward and backward, which are large enough for several threads."""
    X = X.detach().requires_grad_()
    results = forward(X, X, X, 9, torch.ones(32, 1, 9), metric="dot")
    results[0].square().sum().backward()
    assert X.grad is not None
    return [*results, X.grad]


def require_equal(X: Tensor, expected: list[Tensor]) -> None:
    assert all(map(torch.equal, run(X), expected)), "the results differ"


def test_child_after_threads(two_threads: None) -> None:
    X = torch.randn(2, 500, 32)
    expected = run(X)
    assert in_child(require_equal, X, expected, timeout=20) == ""
    # And a child of that child.
    assert in_child(in_grandchild, X, expected, timeout=40) == ""


def in_grandchild(X: Tensor, expected: list[Tensor]) -> None:
    require_equal(X, expected)
    assert in_child(require_equal, X, expected, timeout=20) == ""


def test_time_limit() -> None:
    """The negative control of `in_child`."""
    with pytest.raises(TimeoutError):
        in_child(threading.Event().wait, timeout=0.2)
    assert in_child(int, "x").startswith("ValueError: invalid literal")
