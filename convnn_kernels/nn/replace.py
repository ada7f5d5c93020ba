# SPDX-License-Identifier: MIT
"""Replaces the layers of an existing model by ConvNN layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from convnn_kernels.nn import settings
from convnn_kernels.nn.attention import ConvNNAttention
from convnn_kernels.nn.candidates import Candidates, require_maker
from convnn_kernels.nn.convnn import ConvNN2d
from convnn_kernels.nn.hybrid import HybridBranch2d

Builder = Callable[[nn.Module], nn.Module]


@dataclass
class Replaced:
    """The result of :func:`replace`; names are those of ``model.named_modules()``.

    Attributes:
        swapped: name of each layer that was swapped → type of the new layer.
        left: name of each convolution or attention layer that was left → the reason.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers swapped, {len(self.left)} left"]
        lines += [f"swapped {name}: {kind}" for name, kind in self.swapped.items()]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


class CannotReplaceError(ValueError):
    """A layer does something that its replacement cannot; the message is the reason."""


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

    Convolutions are modules of type ``nn.Conv2d``. Attention layers are ``nn.MultiheadAttention``,
    as in torchvision, and modules with ``qkv``, ``proj`` and ``num_heads``, as in timm. Other
    modules whose type is named attention are left, and the result says so.

    The new layers have the device, dtype and training mode of the old ones. Attention keeps its
    projections; convolutions start from fresh weights, because a tap no longer corresponds to a
    position.

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
            model itself is such a layer.
    """
    owner = "replace"
    for name, given, choices in (
        ("conv2d", conv2d, ("convnn", "hybrid")),
        ("attention", attention, ("convnn", "kvt")),
    ):
        is_valid = given is None or given in choices or _is_builder(given)
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

    def make_candidates() -> Candidates | None:
        return None if candidates is None else candidates()

    def new_convolution(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.Conv2d)
        _require_plain_convolution(old)
        common: dict[str, Any] = {
            "bias": old.bias is not None,
            "k": old.kernel_size[0] ** 2 if k is None else k,
            "padding": old.kernel_size[0] // 2,
            "candidates": make_candidates(),
            "device": old.weight.device,
            "dtype": old.weight.dtype,
        }
        channels = (old.in_channels, old.out_channels)
        if conv2d == "hybrid":
            return HybridBranch2d(*channels, old.kernel_size[0], branch_ratio, **common)
        return ConvNN2d(*channels, projections="identity", rho="ones", **common)

    def new_attention(old: nn.Module) -> nn.Module:
        adapt = _Multihead if isinstance(old, nn.MultiheadAttention) else _FusedQkv
        return adapt(old, 9 if k is None else k, attention == "kvt", make_candidates())

    done = Replaced()
    memo: dict[nn.Module, nn.Module] = {}
    for parent_name, parent, child_name, child in list(_children(model)):
        name = f"{parent_name}.{child_name}" if parent_name else child_name
        if child in memo:
            setattr(parent, child_name, memo[child])
            continue
        if _is_convolution(child) and conv2d is not None:
            build = new_convolution if isinstance(conv2d, str) else conv2d
        elif _is_attention(child) and attention is not None:
            build = new_attention if isinstance(attention, str) else attention
        elif attention is not None and _is_unknown_attention(child):
            done.left[name] = "not nn.MultiheadAttention, nor of qkv, proj and num_heads"
            continue
        else:
            continue
        try:
            if isinstance(parent, nn.TransformerDecoderLayer) and child_name == "self_attn":
                raise CannotReplaceError("the self-attention of a decoder is masked")
            memo[child] = build(child).train(child.training)
        except ValueError as reason:
            done.left[name] = str(reason)
            continue
        setattr(parent, child_name, memo[child])
        done.swapped[name] = type(_layer_of(memo[child])).__name__
    _avoid_fast_path(model)
    return done


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every module with its parent; a module with several parents comes once for each."""
    for parent_name, parent in model.named_modules():
        # An attention layer is swapped as a whole, so its parts are not visited.
        if parent is model or not _is_attention(parent):
            for child_name, child in parent._modules.items():
                if child is not None:
                    yield parent_name, parent, child_name, child


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or (
        isinstance(getattr(module, "qkv", None), nn.Linear)
        and isinstance(getattr(module, "proj", None), nn.Linear)
        and isinstance(getattr(module, "num_heads", None), int)
    )


def _is_unknown_attention(module: nn.Module) -> bool:
    """Named attention, not one of ours, and not merely a container of attention layers."""
    return (
        _is_named_attention(module)
        and not isinstance(module, ConvNNAttention)
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
    return module.layer if isinstance(module, _Multihead | _FusedQkv) else module


def _avoid_fast_path(model: nn.Module) -> None:
    """Keeps nn.TransformerEncoder from passing the first layer's weights to a fused kernel."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(each, _Multihead) for each in module.modules()
        ):
            module.use_nested_tensor = False


def _require_plain_convolution(conv: nn.Conv2d) -> None:
    height, width = conv.kernel_size
    for problem, reason in (
        (type(conv) is not nn.Conv2d, f"{type(conv).__name__} is more than a Conv2d"),
        (any(step != 1 for step in conv.stride), f"stride {tuple(conv.stride)}"),
        (any(step != 1 for step in conv.dilation), f"dilation {tuple(conv.dilation)}"),
        (conv.groups != 1, f"groups {conv.groups}"),
        (conv.kernel_size == (1, 1), "a 1x1 kernel has no neighbors"),
        (height != width or height % 2 == 0, f"kernel {height}x{width} is not square and odd"),
        (conv.padding_mode != "zeros", f"padding mode {conv.padding_mode!r}"),
        (
            conv.padding not in ("same", (height // 2, width // 2)),
            f"padding {conv.padding} changes the size of the map",
        ),
    ):
        if problem:
            raise CannotReplaceError(reason)


def _require_no_extras(module: nn.Module, replaced: tuple[str, ...]) -> None:
    """Raises if an attention layer has parts that would be lost, such as a position bias."""
    extras = [
        name
        for name, part in module.named_children()
        if name not in replaced and not isinstance(part, nn.Identity)
    ]
    extras += [name for name, _ in module.named_parameters(recurse=False)]
    if extras:
        raise CannotReplaceError(f"its {', '.join(extras)} would be lost")


def _set_linear(linear: nn.Linear | None, weight: Tensor, bias: Tensor | None) -> None:
    assert linear is not None
    linear.weight = nn.Parameter(weight.detach().clone())
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))


def _attention_layer(
    width: int,
    num_heads: int,
    k: int,
    dropout: float,
    scale: float | None,
    candidates: Candidates | None,
    qkv: tuple[Tensor, Tensor | None],
    out: nn.Linear,
) -> ConvNNAttention:
    """A layer with the given projections; with metric "dot" and no weight if scale is given."""
    layer = ConvNNAttention(
        width,
        num_heads,
        k,
        dropout,
        metric="cosine" if scale is None else "dot",
        scale=scale,
        aggregation="depthwise" if scale is None else "sum",
        candidates=candidates,
        device=out.weight.device,
        dtype=out.weight.dtype,
    )
    weights = qkv[0].chunk(3)  # [3E, E] → three of [E, E]
    biases = (None,) * 3 if qkv[1] is None else qkv[1].chunk(3)
    inputs = (layer.query_projection, layer.key_projection, layer.value_projection)
    for linear, weight, bias in zip(inputs, weights, biases, strict=True):
        _set_linear(linear, weight, bias)
    _set_linear(layer.output_projection, out.weight, out.bias)
    return layer


class _Multihead(nn.Module):
    """ConvNNAttention with the interface of nn.MultiheadAttention."""

    # nn.TransformerEncoderLayer reads this attribute; None disables its fused path.
    in_proj_bias = None

    def __init__(self, old: nn.Module, k: int, plain: bool, candidates: Candidates | None) -> None:
        super().__init__()
        assert isinstance(old, nn.MultiheadAttention)
        if type(old) is not nn.MultiheadAttention:
            raise CannotReplaceError(f"{type(old).__name__} is more than a MultiheadAttention")
        if old.in_proj_weight is None:
            raise CannotReplaceError("keys or values of another width")
        if old.bias_k is not None or old.add_zero_attn:
            raise CannotReplaceError("tokens added to keys and values")
        self.batch_first = old.batch_first
        self.num_heads = old.num_heads
        self.layer = _attention_layer(
            old.embed_dim,
            old.num_heads,
            k,
            old.dropout,
            old.head_dim**-0.5 if plain else None,
            candidates,
            (old.in_proj_weight, old.in_proj_bias),
            old.out_proj,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Same as nn.MultiheadAttention, but without masks over pairs; the weights are None.

        A float key_padding_mask masks keys where it is -inf and has no other effect.
        """
        _refuse_masks(attn_mask, is_causal)
        key_mask = None
        if key_padding_mask is not None:
            masked = (
                key_padding_mask.isneginf()
                if key_padding_mask.is_floating_point()
                else key_padding_mask
            )
            key_mask = ~masked  # [B, M], or [M] without a batch
        is_batched = query.dim() == 3
        is_self = key is query and value is query
        if not is_batched:
            query, key, value = (each.unsqueeze(0) for each in (query, key, value))
            key_mask = None if key_mask is None else key_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        # query [B, N, E], key and value [B, M, E]
        y = self.layer(query, *((None, None) if is_self else (key, value)), key_mask)
        if not is_batched:
            return y.squeeze(0), None
        return y if self.batch_first else y.transpose(0, 1), None


class _FusedQkv(nn.Module):
    """ConvNNAttention with the interface of a layer with one linear for query, key and value."""

    def __init__(self, old: nn.Module, k: int, plain: bool, candidates: Candidates | None) -> None:
        super().__init__()
        _require_no_extras(old, ("qkv", "proj", "attn_drop", "proj_drop"))
        qkv, proj, num_heads = old.qkv, old.proj, old.num_heads
        assert isinstance(qkv, nn.Linear)
        assert isinstance(proj, nn.Linear)
        assert isinstance(num_heads, int)
        width = qkv.in_features
        if (qkv.out_features, proj.in_features, proj.out_features) != (3 * width, width, width):
            raise CannotReplaceError("heads whose widths do not add up to that of the tokens")
        dropout = getattr(old, "attn_drop", None)
        self.layer = _attention_layer(
            width,
            num_heads,
            k,
            dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
            float(getattr(old, "scale", (width // num_heads) ** -0.5)) if plain else None,
            candidates,
            (qkv.weight, qkv.bias),
            proj,
        )
        self.proj_drop = getattr(old, "proj_drop", nn.Identity())

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, E] → [B, N, E]."""
        _refuse_masks(attn_mask, is_causal)
        return self.proj_drop(self.layer(x))


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        got = "is_causal=True" if attn_mask is None else f"shape {list(attn_mask.shape)}"
        raise ValueError(f"attn_mask must be None: masks over pairs are not supported, got {got}")
