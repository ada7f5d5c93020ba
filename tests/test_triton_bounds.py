# SPDX-License-Identifier: MIT
"""What Triton kernels read and write lies within their tensors and buffers: every access of every
kernel is checked, in Triton's interpreter.

It needs a process of its own, started with ``TRITON_INTERPRET=1``, as those of test_triton.py.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

import convnn_kernels
from convnn_kernels.triton import backend, configs
from convnn_kernels.triton.launch import Launch, Pointers, forget_plans

pytestmark = in_interpreter


def extent(X: Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last one."""
    last = sum((size - 1) * stride for size, stride in zip(X.shape, X.stride(), strict=True))
    begin = X.data_ptr()
    return begin, begin + (last + 1) * X.element_size() if X.numel() else begin


class Accesses:
    """Notes which kernels access what is not theirs."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.outside: set[str] = set()
        self._name, self._extents = "", np.empty((0, 2), np.int64)

    def begin(self, launch: Launch, pointers: Pointers) -> None:
        self._name = launch.kernel.name
        self.kernels.add(self._name)
        tensors = map(pointers.tensor, launch.pointers)
        found = [extent(X) for X in tensors if X is not None]
        self._extents = np.array(found, np.int64).reshape(-1, 2)

    def check(self, addresses: Any, mask: Any, size: int) -> None:
        of_all = np.broadcast_arrays(addresses, mask)
        used = of_all[0][of_all[1].astype(bool)].astype(np.int64)[:, None]
        inside = (used >= self._extents[:, 0]) & (used + size <= self._extents[:, 1])
        if not inside.any(1).all():
            self.outside.add(self._name)


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accesses]:
    """Of what runs in the test."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    found = Accesses()
    by_triton, load, store = (
        Launch.by_triton,
        Builder.create_masked_load,
        Builder.create_masked_store,
    )

    def launch(self: Launch, pointers: Pointers) -> Any:
        found.begin(self, pointers)
        return by_triton(self, pointers)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        found.check(pointers.data, mask.data, size)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        found.check(pointers.data, mask.data, size)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(Launch, "by_triton", launch)
    monkeypatch.setattr(Builder, "create_masked_load", masked_load)
    monkeypatch.setattr(Builder, "create_masked_store", masked_store)
    forget_plans()
    with convnn_kernels.backend("triton"):
        yield found
    monkeypatch.undo()
    forget_plans()


def run(
    weight: str,
    dtype: torch.dtype,
    rho: str = "softmax",
    metric: str = "cosine",
    N: int = 5,
    M: int = 7,
    D: int = 20,
    C: int = 3,
    O: int = 18,
    k: int = 4,
    candidates: bool = False,
) -> None:
    """`forward` and all gradients, of which one batch element has fewer keys than neighbors."""
    shapes = {"dense": (O, C, k), "depthwise": (C, 1, k)}
    q, key, value = (torch.randn(2, n, c).to(dtype) for n, c in ((N, D), (M, D), (M, C)))
    W = torch.randn(shapes[weight]).to(dtype) if weight != "none" else None
    bias = torch.randn(O if weight == "dense" else C).to(dtype)
    mask = torch.ones(2, M, dtype=torch.bool)
    mask[1, 3:] = False
    rows = (
        (torch.arange(M).flip(0)[: max(k, M - 2)], torch.arange(N) % M)
        if candidates
        else (None, None)
    )
    tensors = [X.requires_grad_() for X in (q, key, value, W, bias) if X is not None]
    Y, s, _ = torch.ops.convnn.forward(q, key, value, k, W, bias, *rows, mask, metric, rho)
    outputs = [Y] if rho == "ones" else [Y, s]
    torch.autograd.grad(outputs, tensors, [*map(torch.ones_like, outputs)], allow_unused=True)


CALLS: dict[str, dict[str, Any]] = {
    "few_channels": {"weight": "dense"},
    "few_channels_as_they_are": {"weight": "dense", "rho": "ones"},
    "dense": {"weight": "dense", "rho": "similarity", "C": 33, "M": 40, "N": 37},
    "few_tokens_on_tensor_cores": {"weight": "depthwise", "C": 224, "N": 21, "M": 19, "k": 9},
    "few_tokens": {"weight": "depthwise", "C": 37, "N": 21, "M": 19, "k": 9},
    "one_channel": {"weight": "none", "C": 1, "N": 2, "M": 2, "k": 3, "metric": "dot"},
    "candidates": {"weight": "depthwise", "N": 21, "M": 19, "candidates": True},
    "many_neighbors": {"weight": "depthwise", "C": 20, "M": 30, "k": 20, "metric": "euclidean"},
    "sweep": {"weight": "none", "N": 35, "M": 201},
    "one_launch": {"weight": "depthwise", "C": 37, "D": 35, "N": 21, "M": 97},
}


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_accesses_are_inside(call: str, dtype: torch.dtype, accesses: Accesses) -> None:
    run(dtype=dtype, **CALLS[call])
    assert accesses.kernels
    assert accesses.outside == set()


@pytest.mark.parametrize("candidates", [[0, 3], [3, 3, 5], [-1, 5, 19, 2**40]], ids=str)
def test_accesses_with_wrong_candidates_are_inside(
    candidates: list[int], accesses: Accesses
) -> None:
    """Of the backward: few, the same twice, or none at all."""
    q, key, value, Y = (torch.randn(2, n, 18).half() for n in (21, 19, 19, 21))
    s, I = torch.randn(2, 21, 4), torch.randint(19, (2, 21, 4))
    backend.operators()["convnn::forward_backward"](
        *(Y, s, q, key, value, torch.randn(18, 1, 4).half(), s, I, True, "cosine", "softmax", 1.0),
        *([True] * 5),
        torch.tensor(candidates),
    )
    assert "key_side_candidates_kernel" in accesses.kernels
    assert accesses.outside == set()


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(
    ("M", "k", "kernel"), [(19, 4, "select_network"), (40, 17, "exact_topk"), (200, 4, "sweep")]
)
def test_accesses_with_wrong_restrictions_are_inside(
    M: int, k: int, kernel: str, exclude_self: bool, accesses: Accesses
) -> None:
    """Ranges before the first key, behind the last, from their end to their begin, and beyond 32
    bits; tokens and candidates that are no keys, others for each batch element."""
    ends = [-5, -1, 0, 1, M - 1, M, M + 1, 2**31, 2**32 + 3, -(2**40)]
    pairs = torch.cartesian_prod(torch.tensor(ends), torch.tensor(ends))
    N = len(pairs)
    query, key, value = (torch.randn(2, n, 18).half() for n in (N, M, M))
    own = torch.stack([pairs[:, 0], pairs[:, 1]])
    forward = backend.operators()["convnn::forward"]
    options = ("dot", "softmax", 1.0, "similarity", torch.stack([pairs, pairs.flip(0)]))
    candidates = torch.arange(M - 1).repeat(2, 1)
    candidates[1, ::3] = torch.tensor(ends).repeat(M)[: candidates[1, ::3].numel()]
    for rows in (None, candidates):
        _, s, I = forward(query, key, value, k, None, None, rows, own, None, *options, exclude_self)
        allowed = (pairs[:, 1].clamp(max=M) - pairs[:, 0].clamp(min=0)).clamp(min=0)
        assert ((s[0] > -torch.inf).sum(-1) <= allowed).all()
        assert ((I >= 0) & (I < M)).all()
    assert f"{kernel}_kernel" in accesses.kernels
    assert accesses.outside == set()


@pytest.mark.parametrize("weight", ["depthwise", "none"])
def test_accesses_of_shared_keys_are_inside(weight: str, accesses: Accesses) -> None:
    """Queries of three batch elements in one block, and rows of no batch element behind them."""
    query, value = torch.randn(2, 3, 7, 21).half(), torch.randn(2, 3, 30, 20).half()
    key = torch.randn(30, 21).half().expand(2, 3, 30, 21)
    W = torch.randn(20, 1, 4).half() if weight == "depthwise" else None
    torch.ops.convnn.forward(query, key, value, 4, W)
    assert accesses.kernels == {"select_network_kernel"}
    assert accesses.outside == set()


@pytest.mark.parametrize("left", [1, 300])
def test_accesses_of_some_hundred_columns_are_inside(
    left: int, accesses: Accesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ties and rows that are not numbers; every program has rows of two batch elements."""
    monkeypatch.setattr(configs, "BUSY", 1)
    query, key = torch.randn(5, 37, 3).half(), torch.randn(5, 300, 3).half()
    key[1], query[2, 7] = 1.0, torch.nan
    mask = torch.arange(300).expand(5, 300) < left
    torch.ops.convnn.select(query, key, 9, None, None, mask)
    assert accesses.kernels == {"select_medium_kernel"}
    assert accesses.outside == set()


def test_an_access_outside_is_seen(accesses: Accesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last element of everything were not there."""

    whole = extent

    def shorter(X: Tensor) -> tuple[int, int]:
        begin, end = whole(X)
        return begin, end - X.element_size()

    monkeypatch.setitem(globals(), "extent", shorter)
    run(dtype=torch.float16, **CALLS["few_tokens"])
    assert accesses.outside == accesses.kernels
