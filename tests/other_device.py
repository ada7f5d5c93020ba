# SPDX-License-Identifier: MIT
"""A second device without one: tensors that say they are on "cuda" and must not meet others.

They are in the CPU's memory. Within `OtherDevice`, a call that takes both kinds raises, as it would
on a GPU, unless the other ones have no dimensions; new tensors are of the kind that ``device`` asks
for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)


class _There(Tensor):
    """A tensor on the other device."""


def _names_device(value: Any) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"):
        return torch.device(value)
    return None


class OtherDevice(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        there = [X for X in leaves if isinstance(X, _There)]
        if func == Tensor.device.__get__:
            return DEVICE if there else torch.device("cpu")
        if func == Tensor.is_cuda.__get__:
            return bool(there)
        named = [each for each in map(_names_device, leaves) if each is not None]
        is_there, moves = bool(there), func in (Tensor.to, Tensor.cpu, Tensor.copy_)
        if named:
            is_there = named[0].type == "cuda"
            args, kwargs = tree_map(
                lambda X: torch.device("cpu") if _names_device(X) is not None else X,
                (args, kwargs),
            )
        elif func is Tensor.cpu:
            is_there = False
        elif moves:
            is_there = isinstance(args[0 if func is Tensor.copy_ else -1], _There) or (
                func is Tensor.to and not isinstance(args[-1], Tensor) and bool(there)
            )
        tensors = [X for X in leaves if isinstance(X, Tensor)]
        here = [X for X in tensors if not isinstance(X, _There) and X.dim()]
        if there and here and not moves:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        given = {id(X) for X in leaves}

        def label(X: Any) -> Any:
            # An operation in place returns what it was given.
            if not isinstance(X, Tensor) or (id(X) in given and not moves):
                return X
            return X.as_subclass(_There if is_there else Tensor)

        # A torch.Size is no container of results.
        return result if isinstance(result, torch.Size) else tree_map(label, result)
