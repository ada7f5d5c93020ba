# SPDX-License-Identifier: MIT
"""Sizes that no memory can hold: computed where little is to be done, otherwise an error that says
what was too large or could not be allocated."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child import in_child
from torch import Tensor

from convnn_kernels.functional import select_neighbors

convnn = torch.ops.convnn

linux = pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")

ROWS = 2**52  # of no columns: they need no memory
INDICES = torch.tensor([[0, 5, ROWS - 1], [1, 1, 2]])


def neighbors() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0.5, 0.25, -torch.inf], [0.0, 1.0, 2.0]]), INDICES


def is_zero(grad: Tensor) -> bool:
    return bool(grad.eq(0).all())


def test_value_without_columns() -> None:
    value, weight, bias = torch.empty(ROWS, 0), torch.empty(2, 0, 3), torch.tensor([3.0, 4.0])
    output = convnn.aggregate(value, *neighbors(), weight, bias)
    assert output.tolist() == [[3, 4], [3, 4]]
    for given, channels in ((weight, 2), (torch.empty(0, 1, 3), 0), (None, 0)):
        grads = convnn.aggregate_backward(
            torch.ones(2, channels), value, *neighbors(), given, True, "softmax", 1.0, *[True] * 4
        )
        assert grads[0].shape == value.shape
        assert is_zero(grads[1])
        assert grads[2].numel() == 0
        assert grads[3].tolist() == [2.0] * channels


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_gradients_of_rows_without_columns(metric: str) -> None:
    query, key = torch.empty(2, 0), torch.empty(ROWS, 0)
    similarities, indices = neighbors()
    grads = convnn.select_backward(
        torch.ones(2, 3), query, key, similarities, indices, metric, True, True
    )
    assert [grad.shape for grad in grads] == [query.shape, key.shape]
    tensors = (query, key, torch.empty(ROWS, 0), None, similarities, indices)
    grads = convnn.forward_backward(
        torch.ones(2, 0), None, *tensors, False, metric, "softmax", 1.0, *[True] * 5
    )
    assert [grad.shape for grad in grads[:3]] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_more_rows_without_columns_than_can_be_searched(dtype: torch.dtype) -> None:
    query, key = torch.empty(2, 0, dtype=dtype), torch.empty(2**32, 0, dtype=dtype)
    text = "key must have at most 4294967295 rows that may be neighbors, got 4294967296"
    with pytest.raises(RuntimeError, match=text):
        convnn.select(query, key, 3)
    # A few candidates among them are found at once.
    similarities, indices = convnn.select(query, key, 2, torch.tensor([2**31, 7]))
    assert indices.tolist() == [[7, 2**31]] * 2
    assert is_zero(similarities)


def wrong_backward(op: str) -> Callable[[], Any]:
    """A call of a backward operator with 2^61 rows of no columns."""
    huge = torch.empty(2**61, 0)
    grads, options = torch.zeros(2, 3), [True, True, True, True]
    if op == "select_backward":
        tensors = {"query": torch.empty(2, 0), "key": huge}
        return lambda: convnn.select_backward(
            grads, *tensors.values(), *neighbors(), "cosine", True, True
        )
    if op == "aggregate_backward":
        return lambda: convnn.aggregate_backward(
            torch.ones(2, 0), huge, *neighbors(), None, False, "softmax", 1.0, *options
        )
    tensors = {"query": torch.empty(2, 0), "key": huge, "value": huge}
    return lambda: convnn.forward_backward(
        *(torch.ones(2, 0), None, *tensors.values(), None, *neighbors()),
        *(False, "cosine", "softmax", 1.0, True, *options),
    )


@pytest.mark.parametrize(
    ("op", "name"),
    [("select_backward", "key"), ("aggregate_backward", "value"), ("forward_backward", "key")],
)
def test_backward_of_too_many_rows(op: str, name: str) -> None:
    text = (
        rf"convnn::{op}: {name} must have at most 72057594037927936 elements, a size of 0 counted "
        r"as 1, got shape \[2305843009213693952, 0\]"
    )
    with pytest.raises(RuntimeError, match=text):
        wrong_backward(op)()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_query_and_a_large_k(device: str) -> None:
    """PyTorch has no tensors of sizes, 0 counted as 1, that exceed 64 bits."""
    query, key = torch.empty(0, 5, 4, device=device), torch.empty(0, 6, 4, device=device)
    for k in (2**56 // 5, 1):
        for found in convnn.select(query, key, k):
            assert found.shape == (0, 5, k)
    for k in (2**56 // 5 + 1, 2**62, 2**63 - 1):
        text = (
            r"convnn::select: k must give at most 72057594037927936 neighbors for query of shape "
            rf"\[0, 5, 4\], a size of 0 counted as 1, got {k}"
        )
        with pytest.raises(RuntimeError, match=text):
            convnn.select(query, key, k)
        with pytest.raises(RuntimeError, match=text):
            select_neighbors(query, key, k, metric="euclidean", within=1.5)


X, HUGE = torch.ones(1, 1), 2**45
NEIGHBORS = (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64))
# What cannot be allocated, in the address space of a process: the call, bytes, and what for.
TOO_LARGE: list[tuple[Callable[[], Any], str, str]] = [
    (
        lambda: convnn.select(X, X, 2**45),
        "140737488355328",
        r"similarities of shape \[1, 35184372088832\]",
    ),
    (
        lambda: convnn.select(X.double(), X.double(), 2**56),
        "576460752303423488",
        r"similarities of shape \[1, 72057594037927936\]",
    ),
    (
        lambda: convnn.forward(X, X, X, 1, torch.ones(1, 1, 1).expand(HUGE, 1, 1)),
        "140737488355328",
        r"a copy of weight of shape \[35184372088832, 1, 1\]",
    ),
    (
        lambda: convnn.select(X.expand(HUGE, 2), X.expand(5, 2), 1),
        "140737488355328",
        r"similarities of shape \[35184372088832, 1\]",
    ),
    (
        lambda: convnn.select(X.expand(4, HUGE), X.expand(5, HUGE), 1),
        "140737488355328",
        r"a copy of query of shape \[1, 35184372088832\]",
    ),
    (
        lambda: convnn.select(X.double().expand(99, 1), X.double().expand(HUGE, 1), 1),
        "281474976710656",
        "packed keys",
    ),
    (
        lambda: convnn.select(
            X.double(), X.double().expand(HUGE, 1), 1, key_mask=X[0].bool().expand(HUGE)
        ),
        "35184372088832",
        r"a copy of key_mask of shape \[35184372088832\]",
    ),
    (
        lambda: convnn.aggregate(X, *(each[:1].expand(HUGE, 3) for each in NEIGHBORS)),
        "422212465065984",
        r"a copy of similarities of shape \[35184372088832, 3\]",
    ),
    (
        lambda: convnn.aggregate_backward(
            *(torch.ones(4, 1), X.expand(HUGE, 1), *NEIGHBORS, None, False, "softmax", 1.0),
            *(True, False, False, False),
        ),
        "140737488355328",
        r"grad_value of shape \[35184372088832, 1\]",
    ),
    (
        lambda: convnn.select_backward(
            *(torch.ones(4, 3), X.expand(4, 1), X.expand(HUGE, 1), *NEIGHBORS),
            *("cosine", True, False),
        ),
        "281474976710656",
        "the norms of key",
    ),
]


@pytest.mark.parametrize(("call", "size", "what"), TOO_LARGE, ids=[each[2] for each in TOO_LARGE])
def test_memory_that_cannot_be_had(call: Callable[[], Any], size: str, what: str) -> None:
    text = rf"convnn::\w+: cannot allocate {size} bytes for {what}"
    with pytest.raises(RuntimeError, match=text):
        call()


def list_rows() -> None:
    """Select where the list of the rows that are not masked takes 0.5 GB."""
    torch.set_num_threads(1)
    rows = 2**26
    mask = torch.ones(rows, dtype=torch.bool)
    limit_memory(2**28)
    convnn.select(X.double(), X.double().expand(rows, 1), 1, key_mask=mask)


KEPT: list[Tensor] = []


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit_memory(more: int) -> None:
    """From now on this process gets so many bytes more."""
    before, blocks = address_space(), []
    while address_space() == before:  # what other tests left free in the heap would come first
        blocks.append(torch.empty(2**24, dtype=torch.uint8))
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + more, resource.RLIM_INFINITY))
    KEPT.extend(blocks)


def sums_of_rows() -> None:
    """The gradient of two rows of 16 MiB, whose sums take 64 MiB in each thread."""
    torch.set_num_threads(1)
    rows = torch.ones(2, 2**23, dtype=torch.float16)
    neighbors = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    limit_memory(2**25 + 2**24)
    convnn.select_backward(neighbors[0], rows, rows, *neighbors, "cosine", True, False)


@linux
def test_scratch_memory_of_a_thread_that_cannot_be_had() -> None:
    """The error leaves PyTorch's parallel region."""
    assert in_child(sums_of_rows) == (
        "RuntimeError: convnn::select_backward: cannot allocate 67108864 bytes for the scratch "
        "memory of a thread"
    )


def query_gradient_of_many_pairs() -> None:
    torch.set_num_threads(1)
    n, k = 2**20, 8
    x, similarities = torch.ones(n, 1), torch.ones(n, k)
    indices = torch.zeros(n, k, dtype=torch.int64)
    limit_memory(40 * 2**20)
    convnn.forward_backward(
        *(x, similarities, x, x, x, None, similarities, indices, False, "cosine", "ones", 1.0),
        *(True, False, False, False, False),
    )


@linux
def test_the_gradient_of_query_needs_no_list_of_pairs() -> None:
    """Which would take 64 MiB."""
    assert in_child(query_gradient_of_many_pairs) == ""


def one_query_of_each_batch_element() -> None:
    torch.set_num_threads(1)
    batch, D = 2**18, 64
    query, key = torch.ones(batch, 2, D)[:, :1], torch.ones(4, D).expand(batch, 4, D)
    limit_memory(40 * 2**20)
    convnn.select(query, key, 1)


@linux
def test_queries_of_shared_keys_are_read_in_place() -> None:
    """A copy of them would take 64 MiB."""
    assert in_child(one_query_of_each_batch_element) == ""


@linux
def test_list_that_cannot_be_allocated() -> None:
    """A list of C++, where a bare std::bad_alloc would be all that is known."""
    assert in_child(list_rows) == (
        "RuntimeError: convnn::select: cannot allocate 536870920 bytes for the rows of key that "
        "may be neighbors"
    )
