# SPDX-License-Identifier: MIT
"""Whether anything of a layer would be lost if another took its place."""

from collections import Counter
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.utils import parametrize

HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_state_dict_pre_hooks": "state_dict pre-hooks",
    "_state_dict_hooks": "state_dict hooks",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hooks",
    "_load_state_dict_post_hooks": "load_state_dict hooks",
}
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
# nn.MultiheadAttention has a subclass of Linear, to keep its projection from quantization.
LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
MULTIHEAD_PARTS = {
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
    *("bias_k", "bias_v", "out_proj"),
}
# The parts of layers of PyTorch, to which a user may have added others.
PARTS: dict[type[nn.Module], Collection[str]] = {
    nn.Conv2d: ("weight", "bias"),
    nn.MultiheadAttention: MULTIHEAD_PARTS,
    **dict.fromkeys(LINEARS, ("weight", "bias")),
}


class CannotReplaceError(ValueError):
    """A layer does something that its replacement cannot; the message is the reason."""


def shared_parts(model: nn.Module) -> set[int]:
    """The ``id`` of each parameter of several modules, and of each module of several parents."""
    uses = Counter(
        id(part)
        for module in model.modules()
        for part in {*module._parameters.values(), *module._modules.values()}
        if part is not None
    )
    return {part for part, count in uses.items() if count > 1}


def require_untouched(layer: nn.Module, shared: Collection[int]) -> None:
    """Raises if something was added to a layer, or to its parts, that a new layer would not have.

    Args:
        layer: the layer to be swapped.
        shared: see :func:`shared_parts`.
    """
    for path, module in layer.named_modules():
        its = f"its {path}" if path else "it"
        if parametrize.is_parametrized(module):
            raise CannotReplaceError(f"{its} is parametrized")
        if "forward" in vars(module):
            raise CannotReplaceError(f"{its} has a forward of its own instance")
        if module._compiled_call_impl is not None:
            raise CannotReplaceError(f"{its} is compiled: swap first, then compile")
        for attribute, hooks in HOOKS.items():
            if getattr(module, attribute, None):
                whose = f"the {hooks} of its {path}" if path else f"its {hooks}"
                raise CannotReplaceError(f"{whose} would be lost")
        if path and id(module) in shared and next(module.parameters(), None) is not None:
            raise CannotReplaceError(f"{its} is shared with another module")
        if type(module) in PARTS:
            require_no_extras(module, PARTS[type(module)], prefix=f"{path}." if path else "")
    for path, parameter in layer.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise CannotReplaceError(f"its {path} is a {type(parameter).__name__}")
        if any(getattr(parameter, attribute, None) for attribute in PARAMETER_HOOKS):
            raise CannotReplaceError(f"the hooks of its {path} would be lost")
        if id(parameter) in shared:
            raise CannotReplaceError(f"its {path} is shared with another layer")


def require_plain_convolution(conv: nn.Conv2d) -> None:
    """Raises unless conv, dense and padded by half its odd kernel, could be a ConvNN2d."""
    height, width = conv.kernel_size
    for problem, reason in (
        (type(conv) is not nn.Conv2d, f"{type(conv).__name__} is more than a Conv2d"),
        (not conv.weight.is_floating_point(), f"dtype {conv.weight.dtype}"),
        (conv.stride[0] != conv.stride[1], f"stride {tuple(conv.stride)}"),
        (any(step != 1 for step in conv.dilation), f"dilation {tuple(conv.dilation)}"),
        (conv.groups != 1, f"groups {conv.groups}"),
        (conv.kernel_size == (1, 1), "a 1x1 kernel has no neighbors"),
        (height != width or height % 2 == 0, f"kernel {height}x{width} is not square and odd"),
        (conv.padding_mode != "zeros", f"padding mode {conv.padding_mode!r}"),
        (
            conv.padding not in ("same", (height // 2, width // 2)),
            f"padding {conv.padding} is not half the kernel",
        ),
        (
            "weight" not in conv._parameters  # but a tensor, which does not learn either
            or not all(parameter.requires_grad for parameter in conv.parameters()),
            "its weights are frozen, and new ones would be random",
        ),
    ):
        if problem:
            raise CannotReplaceError(reason)


def require_linear(layer: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name, which may not be of a subclass, such as one with LoRA.

    A Conv1D of transformers, as in GPT-2, is a linear layer with a transposed weight; a Linear with
    copies of its parameters is returned.
    """
    linear = layer.get_submodule(name)
    if _is_conv1d(linear):
        return _transposed(linear, name)
    if type(linear) not in LINEARS:
        raise CannotReplaceError(f"its {name} is a {type(linear).__name__}, not a Linear")
    assert isinstance(linear, nn.Linear)
    return linear


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def _transposed(conv: nn.Module, name: str) -> nn.Linear:
    """The linear layer that equals a Conv1D, frozen where it is."""
    require_no_extras(conv, ("weight", "bias"), prefix=f"{name}.")
    weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")  # [in, out], [out]
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    for part, values in (("weight", weight.detach().T), ("bias", bias.detach())):
        learns = conv.get_parameter(part).requires_grad
        copied = values.clone(memory_format=torch.contiguous_format)
        setattr(linear, part, nn.Parameter(copied, requires_grad=learns))
    return linear


def require_no_extras(layer: nn.Module, kept: Collection[str], prefix: str = "") -> None:
    """Raises if a layer has parts other than `kept`, such as a position bias.

    Args:
        layer: the layer.
        kept: the names of the parts that it may have.
        prefix: the path of the layer, which the reason puts before the names.
    """
    parts: dict[str, object] = {**layer._modules, **layer._parameters, **layer._buffers}
    # The probe shows where a softmax is not the one of attention.
    extras = [
        prefix + name
        for name, part in parts.items()
        if name not in kept and part is not None and not isinstance(part, nn.Identity | nn.Softmax)
    ]
    if extras:
        raise CannotReplaceError(f"its {', '.join(extras)} would be lost")
