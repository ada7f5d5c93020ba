# SPDX-License-Identifier: MIT
"""How much memory operators take, by the tensors that they make."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The bytes of tensors that operators have made and that are still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: Any = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for X in tree_leaves((args, kwargs)):
            if isinstance(X, torch.Tensor):
                # Of what there was before, views may be made.
                self.seen.add(X.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for X in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(X, torch.Tensor) and X.untyped_storage() not in self.seen:
                storage = X.untyped_storage()
                self.seen.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def free(self, size: int) -> None:
        self.bytes -= size
