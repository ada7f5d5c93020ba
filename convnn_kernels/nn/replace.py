# SPDX-License-Identifier: MIT
"""Replaces the layers of an existing model by ConvNN layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convnn_kernels.nn import settings
from convnn_kernels.nn.adapters import MultiheadAdapter, SelfAttentionAdapter, Target, layout_of
from convnn_kernels.nn.attention import ConvNNAttention
from convnn_kernels.nn.candidates import Candidates, require_maker
from convnn_kernels.nn.convnn import ConvNN1d, ConvNN2d
from convnn_kernels.nn.hybrid import HybridBranch2d
from convnn_kernels.nn.probe import require_attention
from convnn_kernels.nn.replaceable import (
    CannotReplaceError,
    require_plain_convolution,
    require_untouched,
    shared_parts,
)

ADAPTERS = (MultiheadAdapter, SelfAttentionAdapter)
OURS = (ConvNN1d, ConvNN2d, ConvNNAttention, HybridBranch2d, *ADAPTERS)

WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")

Builder = Callable[[Any], nn.Module]  # of a Conv2d or an attention layer


@dataclass
class Replaced:
    """The result of :func:`replace`; names are those of ``model.named_modules()``.

    Attributes:
        swapped: name of each layer that was swapped → type of the new layer.
        left: name of each convolution or attention layer that was left → the reason.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
        >>> print(replace(model, conv2d="convnn"))
        1 layers swapped, 1 left
        swapped 0: ConvNN2d
        left 1: a 1x1 kernel has no neighbors
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers swapped, {len(self.left)} left"]
        lines += [f"swapped {name}: {kind}" for name, kind in self.swapped.items()]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace(
    model: nn.Module,
    *,
    conv2d: str | Builder | None = None,
    attention: str | Builder | None = None,
    k: int | None = None,
    branch_ratio: float = 0.5,
    candidates: Callable[[], Candidates] | None = None,
) -> Replaced:
    """Swaps the Conv2d layers of a model, its attention layers, or both, in place.

    Convolutions are modules of type ``nn.Conv2d``, strided ones, too. Attention layers are
    ``nn.MultiheadAttention``, and self-attention with one or three linear projections, as in timm
    and transformers, causal or not. They are recognized by the names of their parts, and by what
    they compute: a copy of the layer, with random weights, must give what ConvNNAttention gives for
    k = N, metric="dot" and no weight. Other modules whose type is named attention are left, and the
    result says so.

    Layers are left, with the reason, where something would be lost: hooks, parametrizations,
    subclasses, a forward of the instance, parameters shared with other layers, further parameters,
    buffers and children. Functions given as conv2d or attention are called only for layers without
    hooks, parametrizations, shared or further parts, and a forward of their own; what else they
    leave is up to them. Layers are put in place at the end, so a model remains as it was if one of
    the functions raises, or `candidates`; a ValueError of the former is a reason to leave a layer.

    The new layers have the device, dtype and training mode of the old ones. Attention keeps its
    projections, frozen ones frozen. Convolutions start from fresh weights, because a tap no longer
    corresponds to a position; frozen ones are left. Create the optimizer afterwards: parameters of
    a fused projection and of convolutions are new, and names have changed.

    Args:
        model: a module that contains such layers.
        conv2d: "convnn": ConvNN2d as in the paper's VGG (no projections, rho="ones"); "hybrid":
            HybridBranch2d; or a function from the old layer to the new one, such as
            ``ConvNN2d.from_conv2d``, whose ValueError is the reason to leave a layer. If None, all
            convolutions are left.
        attention: "convnn": ConvNNAttention with its defaults (section 6.2); "kvt": with
            metric="dot" and no weight, which for k = N computes the same as before; or a function.
            If None, all attention layers are left.
        k: the number of neighbors. If None, the number of the kernel's taps, or 9 for attention.
        branch_ratio: the paper's λ, for conv2d="hybrid".
        candidates: a function that creates the candidates of one layer, such as
            ``lambda: RandomCandidates(32)``.

    Returns:
        Which layers were swapped, and which were left and why.

    Raises:
        ValueError: if an argument is wrong, if neither conv2d nor attention is given, or if the
            model itself is such a layer, or is wrapped, such as by DistributedDataParallel.

    Example:
        >>> layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> encoder = nn.TransformerEncoder(layer, 2)
        >>> replace(encoder, attention="convnn", k=9).swapped
        {'layers.0.self_attn': 'ConvNNAttention', 'layers.1.self_attn': 'ConvNNAttention'}
    """
    owner = "replace"
    settings.require(isinstance(model, nn.Module), owner, "model", "an nn.Module", model)
    for name, given, choices in (
        ("conv2d", conv2d, ("convnn", "hybrid")),
        ("attention", attention, ("convnn", "kvt")),
    ):
        is_valid = given is None or _is_builder(given)
        is_valid |= isinstance(given, str) and given in choices
        expected = f"{choices[0]!r}, {choices[1]!r} or a function from the old layer to the new one"
        settings.require(is_valid, owner, name, expected, given)
    if conv2d is None and attention is None:
        raise ValueError(
            "replace: conv2d or attention must say what to swap for, such as conv2d='hybrid' or "
            "attention='convnn', got neither"
        )
    if k is not None:
        settings.require_count(owner, "k", k)
    settings.require_between(owner, "branch_ratio", branch_ratio, 0, 1)
    require_maker(owner, candidates)
    if _is_convolution(model) or _is_attention(model):
        name = type(model).__name__
        raise ValueError(f"replace: model must contain the layers to swap, got {name} itself")
    for module in model.modules():
        if any(kind.__name__ in WRAPPERS for kind in type(module).__mro__):
            raise ValueError(
                f"replace: model must not be wrapped for several devices, which would not know the "
                f"new parameters (swap first, then wrap), got a {type(module).__name__}"
            )

    return _Replacement(model, conv2d, attention, k, branch_ratio, candidates).run()


class _Replacement:
    """One call of replace."""

    def __init__(
        self,
        model: nn.Module,
        conv2d: str | Builder | None,
        attention: str | Builder | None,
        k: int | None,
        branch_ratio: float,
        candidates: Callable[[], Candidates] | None,
    ) -> None:
        self.model = model
        self.conv2d = conv2d
        self.attention = attention
        self.k = k
        self.branch_ratio = branch_ratio
        self.candidates = candidates
        self.done = Replaced()
        # By the name of the layer: its parent, its name there, and itself. They are swapped at the
        # end, so that an error of a function leaves the model as it was.
        self.places: dict[str, tuple[nn.Module, str, nn.Module]] = {}
        self.kept: set[nn.Module] = set()
        self.made: list[Candidates] = []
        self.failure: ValueError | None = None  # of the function that creates candidates
        # A module with several parents is swapped once, and remains shared.
        self.new: dict[nn.Module, nn.Module] = {}
        self.visited: set[nn.Module] = set()
        self.shared = shared_parts(model)

    def run(self) -> Replaced:
        self._visit(self.model, "")
        for name, (parent, child_name, old) in self.places.items():
            if old in self.kept:
                self.done.left[name] = "it is shared with a place where it is left"
            else:
                setattr(parent, child_name, self.new[old])
                self.done.swapped[name] = type(_layer_of(self.new[old])).__name__
        _avoid_fast_path(self.model)
        return self.done

    def _visit(self, parent: nn.Module, prefix: str) -> None:
        if parent in self.visited or isinstance(parent, OURS):
            return
        self.visited.add(parent)
        for child_name, child in list(parent._modules.items()):
            if child is None:
                continue
            name = prefix + child_name
            try:
                new = self._swapped(parent, child_name, child)
            except ValueError as reason:
                if reason is self.failure:
                    raise
                self.done.left[name] = str(reason)
                self.kept.add(child)
                new = None
            if new is None:
                self._visit(child, f"{name}.")
            else:
                self.new[child] = new
                self.places[name] = (parent, child_name, child)

    def _swapped(self, parent: nn.Module, child_name: str, child: nn.Module) -> nn.Module | None:
        """The layer that takes the place of `child`; None if it is not to be swapped."""
        if _is_convolution(child) and self.conv2d is not None:
            build = self._convolution if isinstance(self.conv2d, str) else self.conv2d
        elif _is_attention(child) and self.attention is not None:
            build = self._attention if isinstance(self.attention, str) else self.attention
        elif _is_unknown_attention(child) and self.attention is not None:
            raise CannotReplaceError("not an attention layer of a known form")
        else:
            return None
        if child_name == "_orig_mod":
            raise CannotReplaceError("it is compiled: swap first, then compile")
        if child in self.new:
            return self.new[child]
        require_untouched(child, self.shared)
        modes = [(part, part.training) for part in child.modules()]
        new = build(child)
        if not isinstance(new, nn.Module):
            raise CannotReplaceError(f"its function returned a {type(new).__name__}, not a module")
        new.train(child.training)
        for part, training in modes:  # some are parts of the new layer, too
            part.training = training
        return new

    def _make_candidates(self) -> Candidates | None:
        if self.candidates is None:
            return None
        try:
            candidates = self.candidates()
            is_new = isinstance(candidates, Candidates) and candidates not in self.made
            expected = "a function that returns new Candidates for each layer"
            settings.require(is_new, "replace", "candidates", expected, candidates)
        except ValueError as error:
            self.failure = error
            raise
        self.made.append(candidates)
        return candidates

    def _convolution(self, old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.Conv2d)
        require_plain_convolution(old)
        common: dict[str, Any] = {
            "bias": old.bias is not None,
            "k": old.kernel_size[0] ** 2 if self.k is None else self.k,
            "padding": old.kernel_size[0] // 2,
            "stride": old.stride[0],
            "candidates": self._make_candidates(),
            "device": old.weight.device,
            "dtype": old.weight.dtype,
        }
        channels = (old.in_channels, old.out_channels)
        if self.conv2d == "hybrid":
            return HybridBranch2d(*channels, old.kernel_size[0], self.branch_ratio, **common)
        return ConvNN2d(*channels, projections="identity", rho="ones", **common)

    def _attention(self, old: nn.Module) -> nn.Module:
        adapter = (
            MultiheadAdapter if isinstance(old, nn.MultiheadAttention) else SelfAttentionAdapter
        )
        seen = require_attention(old, adapter)
        k = 9 if self.k is None else self.k
        new = adapter(old, Target(k, self.attention == "kvt", self._make_candidates()))
        seen.give(new)
        return new


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or layout_of(module) is not None


def _is_unknown_attention(module: nn.Module) -> bool:
    """Named attention, not one of ours, and not merely a container of attention layers."""
    return (
        _is_named_attention(module)
        and not isinstance(module, OURS)
        and not any(
            _is_attention(each) or _is_named_attention(each)
            for each in module.modules()
            if each is not module
        )
    )


def _is_named_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _is_builder(given: object) -> bool:
    """Whether `given` creates modules. A module is callable, too, but does not."""
    return callable(given) and not isinstance(given, nn.Module)


def _layer_of(module: nn.Module) -> nn.Module:
    return module.layer if isinstance(module, ADAPTERS) else module


def _avoid_fast_path(model: nn.Module) -> None:
    """Keeps nn.TransformerEncoder from passing the first layer's weights to a fused kernel."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(each, MultiheadAdapter) for each in module.modules()
        ):
            module.use_nested_tensor = False
