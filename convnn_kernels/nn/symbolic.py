# SPDX-License-Identifier: MIT
"""Layers under ``torch.fx.symbolic_trace``, which calls them with stand-ins for tensors."""

from typing import Any

from torch import nn
from torch.fx import Proxy, Tracer


def is_symbolic(*args: Any) -> bool:
    """Whether one of the arguments of a forward stands in for a tensor."""
    return any(isinstance(arg, Proxy) for arg in args)


def symbolic_call(layer: nn.Module, *args: Any, **options: Any) -> Any:
    """Records a call of `layer` as one node, like a layer of PyTorch.

    What a layer computes depends on the sizes of its input, which are not known here.

    Args:
        layer: the layer whose forward was called.
        args: the arguments of forward; at least one of all is a Proxy.
        options: its keyword arguments.

    Returns:
        The Proxy of the output.

    Raises:
        ValueError: if the layer is the traced model itself; or if it has hooks, or a forward that
            is not this package's, which would run while tracing and again in the traced model.
    """
    owner = type(layer).__name__
    given = (*args, *options.values())
    tracer: Any = next(arg.tracer for arg in given if isinstance(arg, Proxy))
    if not isinstance(tracer, Tracer) or tracer.root is layer:
        raise ValueError(
            f"{owner}: torch.fx keeps the layer as one node of the model that has it; to trace it "
            f"alone, trace nn.Sequential(layer)"
        )
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise ValueError(f"{owner}: torch.fx cannot trace a layer with forward hooks; remove them")
    is_ours = type(layer).forward.__module__.startswith("convnn_kernels.nn.")
    if not is_ours or "forward" in vars(layer):
        raise ValueError(
            f"{owner}: torch.fx cannot trace a forward that calls the layer's; make the layer a "
            f"leaf by Tracer.is_leaf_module"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, options)
