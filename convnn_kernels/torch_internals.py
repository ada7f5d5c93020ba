# SPDX-License-Identifier: MIT
"""The one module that uses PyTorch's unpublished dispatcher interface.

``torch.library`` registers kernels for any dispatch key, but has no published way to go on with
the next one. The names used here are those that PyTorch's own ``register_autograd`` and
``register_autocast`` use.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

# What ``torch.autograd.Function`` is made of. Under ``torch.func`` the dispatcher already calls an
# Autograd kernel once for each level, as it does for PyTorch's own operators; ``Function.apply``
# would start over from the outermost level, and fail, so the node is of one level.
Node = torch.autograd.function._SingleLevelFunction

BELOW_AUTOGRAD = torch._C._after_autograd_keyset
BELOW_BACKEND_SELECT = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Autocast for this device switched off, without the bookkeeping of ``torch.autocast``."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def needs_autograd(args: tuple[Any, ...]) -> bool:
    """Whether a call with ``args`` must be recorded, or may carry forward-mode tangents."""
    # An open forward-mode level is the one sign of a tangent that costs nothing to read.
    return forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    )


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)``, past its Autograd kernel where that has nothing to do.

    That kernel is Python: without it, the dispatcher goes from here to C++ and back.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()  # the dispatcher leaves it out by itself
        or needs_autograd(args)
        or torch._C._are_functorch_transforms_active()
    ):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op._op(*args)  # what `op(*args)` calls


def redispatcher(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """``op.redispatch`` without the call of a Python method."""
    return op._handle.redispatch_boxed


def apply(node: Any, *args: Any) -> Any:
    """``node.apply``, of a subclass of ``Node``, for use inside a kernel of the Autograd key."""
    if not torch._C._are_functorch_transforms_active():
        return node.apply(*args)
    with enable_single_level_autograd_function():
        return node.apply(*args)


def redispatch(op: torch._ops.OpOverload, below: torch._C.DispatchKeySet, *args: Any) -> Any:
    """Goes on with ``op`` from the forward of a function applied by ``apply``.

    PyTorch runs that forward with gradients off, which outer levels of ``torch.func`` would take
    for their own.
    """
    if not torch._C._are_functorch_transforms_active():
        return op.redispatch(below, *args)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op.redispatch(below, *args)
