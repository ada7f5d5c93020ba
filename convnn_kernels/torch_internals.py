# SPDX-License-Identifier: MIT
"""The parts of PyTorch's private dispatcher interface that the operators need.

The public ``torch.library.register_autograd`` is not enough. What it registers fails under
``torch.func`` (test_func_grad) and drops forward-mode tangents silently (test_forward_mode_raises),
and no public function calls the next kernel from inside a kernel. Next to each private name is the
test that fails without it; all of them are in tests/test_torch_integration.py unless another file
is named.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function  # test_func_grad
from torch.autograd import forward_ad

from convnn_kernels import raised


# The base of ``torch.autograd.Function``. Under ``torch.func`` the dispatcher calls an Autograd
# kernel once for each level, as it does for PyTorch's own operators. ``Function.apply`` would start
# again at the outermost level.
class Node(torch.autograd.function._SingleLevelFunction):  # test_func_grad
    # Compiled autograd asks for it. Its graph reads the options from the node, and guards on them.
    _compiled_autograd_key = (
        torch.autograd.Function._compiled_autograd_key
    )  # test_compiled_autograd


BELOW_AUTOGRAD = torch._C._after_autograd_keyset  # every test that calls an operator
BELOW_BACKEND_SELECT = torch._C._dispatch_keyset_full_after(
    torch._C.DispatchKey.BackendSelect  # test_errors.py::test_backend_from_the_environment
)


def only_library(name: str) -> torch.library.Library:
    """The library through which Python adds kernels to the operators ``torch.ops.<name>``.

    PyTorch takes one kernel for each key, so an earlier import of the package in this process loses
    what it registered.
    """
    namespace = getattr(torch.ops, name)
    earlier = getattr(namespace, "python_library", None)
    if earlier is not None:
        earlier._destroy()  # test_imported_twice
    namespace.python_library = torch.library.Library(name, "FRAGMENT")
    return namespace.python_library


def needs_autograd(args: tuple[Any, ...]) -> bool:
    """Whether a call with ``args`` must be recorded, or may carry forward-mode tangents."""
    # There may be tangents wherever a forward-mode level is open. This is the cheapest test for it.
    return forward_ad._current_level >= 0 or (  # test_forward_mode_raises
        # Reading `requires_grad` would call the `__torch_function__` of modes and subclasses.
        torch.is_grad_enabled() and torch._C._any_requires_grad(*args)  # test_modes_see_calls_...
    )


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)``, without its Autograd kernel if that kernel has nothing to do.

    The kernel is written in Python: calling it from the dispatcher takes about 4 µs, a fifth of a
    small call.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        if (
            torch.is_inference_mode_enabled()  # the dispatcher skips the Autograd kernel itself
            or needs_autograd(args)
            or torch._C._are_functorch_transforms_active()  # test_functions_agree_with_operators
        ):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # no test: it is what saves the time
            return op(*args)
    except RuntimeError as error:
        if kept := raised.original(error):
            raise kept from None
        raise


def transforms_are_active() -> bool:
    """Whether a transform of ``torch.func`` is."""
    return torch._C._are_functorch_transforms_active()  # test_distributed.py::test_transforms_raise


def unwrapped(X: torch.Tensor) -> torch.Tensor:
    """The tensor that transforms of ``torch.func`` wrap, which has the storage."""
    # tests/test_storage.py::test_freed_storage_under_transforms_of_edge_index
    while torch._C._functorch.is_functorch_wrapped_tensor(X):
        X = torch._C._functorch.get_unwrapped(X)
    return X


def redispatcher(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """``op.redispatch`` without a Python method call, which takes 0.6 µs; no test needs it."""
    return op._handle.redispatch_boxed


def apply(node: Any, *args: Any) -> Any:
    """``node.apply`` of a subclass of ``Node``, for use inside an Autograd kernel."""
    if not torch._C._are_functorch_transforms_active():
        return node.apply(*args)
    with enable_single_level_autograd_function():
        return node.apply(*args)


def adds_without_none(ctx: Any) -> bool:
    """Whether a backward is part of a graph of compiled autograd, which ``ctx`` is then made for.

    Such a graph adds up gradients without asking whether one of them is None.
    """
    # tests/test_nn_transforms.py::test_compiled_autograd
    return not isinstance(ctx, torch.autograd.function.BackwardCFunction)


def redispatch(op: torch._ops.OpOverload, below: torch._C.DispatchKeySet, *args: Any) -> Any:
    """Calls the next kernel of ``op`` from the forward of a node applied by ``apply``.

    PyTorch disables gradients in that forward. Under ``torch.func`` they must be enabled again,
    because the outer levels run inside it.
    """
    if not torch._C._are_functorch_transforms_active():
        return op.redispatch(below, *args)
    # test_second_derivative_of_nested_func_grad_raises, test_forward_mode_of_torch_func_raises
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op.redispatch(below, *args)
