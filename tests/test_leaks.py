# SPDX-License-Identifier: MIT
"""No call keeps memory, not even the few bytes of a name: counted in what malloc has given out."""

import gc
from collections.abc import Callable

import pytest
import torch

from tools.nightly.leaks import in_use

convnn = torch.ops.convnn
X, V = torch.randn(2, 6, 4), torch.randn(2, 6, 4, requires_grad=True)
SIMILARITIES, INDICES = convnn.select(X, X, 2)


def wrong() -> None:
    with pytest.raises(RuntimeError):
        convnn.select(X, X, 2, metric="cosines")


CALLS: dict[str, Callable[[], object]] = {
    "select": lambda: convnn.select(X, X, 2, metric="euclidean", order="index"),
    "aggregate": lambda: convnn.aggregate(X, SIMILARITIES, INDICES, rho="similarity"),
    "forward": lambda: convnn.forward(X, X, X, 2, key_mask=torch.ones(2, 6).bool()),
    "strides": lambda: convnn.select(X.mT.contiguous().mT, X[:, ::2], 2),
    "gradients": lambda: convnn.forward(X, V, V, 2)[0].sum().backward(),
    "wrong": wrong,
}
COUNT = 400


@pytest.mark.skipif(in_use() == 0, reason="needs glibc's mallinfo2")
@pytest.mark.parametrize("name", CALLS)
def test_calls_keep_no_memory(name: str, one_thread: None) -> None:
    def growth(count: int) -> int:
        gc.collect()
        before = in_use()
        for _ in range(count):
            CALLS[name]()
        gc.collect()
        return in_use() - before

    growth(COUNT // 4)
    # Something else may grow once, but not each time.
    assert min(growth(COUNT) for _ in range(3)) < 8 * COUNT
