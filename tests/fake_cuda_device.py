# SPDX-License-Identifier: MIT
"""CPU tensors that claim to be on a CUDA device, to test code for several devices without a GPU.

Within `FakeCudaDevice`, a call that mixes them with CPU tensors raises, as it would on a GPU,
unless the CPU tensors have no dimensions. New tensors are on the device that ``device`` names.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)


class _FakeCudaTensor(Tensor):
    pass


def _as_device(value: Any) -> torch.device | None:
    """The device that an argument names, if it names one."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"):
        return torch.device(value)
    return None


class FakeCudaDevice(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        any_cuda = any(isinstance(X, _FakeCudaTensor) for X in leaves)
        if func == Tensor.device.__get__:
            return DEVICE if any_cuda else torch.device("cpu")
        if func == Tensor.is_cuda.__get__:
            return any_cuda
        devices = [each for each in map(_as_device, leaves) if each is not None]
        to_cuda, moves = any_cuda, func in (Tensor.to, Tensor.cpu, Tensor.copy_)
        if devices:
            to_cuda = devices[0].type == "cuda"
            args, kwargs = tree_map(
                lambda X: torch.device("cpu") if _as_device(X) is not None else X,
                (args, kwargs),
            )
        elif func is Tensor.cpu:
            to_cuda = False
        elif moves:
            # To the device of the target; `to` with a dtype stays on the device.
            target = args[0] if func is Tensor.copy_ else args[-1]
            if isinstance(target, Tensor):
                to_cuda = isinstance(target, _FakeCudaTensor)
        any_cpu = any(
            isinstance(X, Tensor) and not isinstance(X, _FakeCudaTensor) and X.dim() for X in leaves
        )
        if any_cuda and any_cpu and not moves:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        inputs = {id(X) for X in leaves}

        def label(X: Any) -> Any:
            # An in-place operation returns its input.
            if not isinstance(X, Tensor) or (id(X) in inputs and not moves):
                return X
            return X.as_subclass(_FakeCudaTensor if to_cuda else Tensor)

        # tree_map would turn a torch.Size into a tuple.
        return result if isinstance(result, torch.Size) else tree_map(label, result)
