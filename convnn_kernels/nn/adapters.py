# SPDX-License-Identifier: MIT
"""ConvNNAttention with the interface of other attention layers."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convnn_kernels.functional import window_ranges
from convnn_kernels.nn import settings
from convnn_kernels.nn.attention import ConvNNAttention
from convnn_kernels.nn.candidates import Candidates
from convnn_kernels.nn.ranges import Visible, read_mask
from convnn_kernels.nn.replaceable import CannotReplaceError, require_linear, require_no_extras
from convnn_kernels.nn.symbolic import is_symbolic, symbolic_call

# What attributes are called in timm and transformers.
PROJECTIONS = (
    ("qkv",),
    ("c_attn",),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)
OUTPUTS = ("proj", "o_proj", "out_proj", "out_lin", "c_proj")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
SCALES = ("scale", "scaling")
DROPOUTS = ("attn_drop", "attn_dropout", "attention_dropout", "dropout", "dropout_prob")
OUTPUT_DROPOUTS = ("proj_drop", "resid_dropout")
MASKS = ("attn_mask", "attention_mask")
# Arguments of forward, beside tokens and mask, that leave the result as it is while they are None
# or False.
UNUSED = (
    "is_causal",
    "cache",
    "cache_position",
    "causal_attention_mask",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "head_mask",
    "key_value_states",
    "layer_head_mask",
    "output_attentions",
    "past_key_value",
    "past_key_values",
)
CACHES = ("cache", "past_key_value", "past_key_values")
# What encoders pass on as options to layers that return no cache and no hidden states.
WITHOUT_EFFECT = ("output_hidden_states", "return_dict", "use_cache")

OWNER = "swapped attention"

Draw = Callable[..., Tensor]


class Target(NamedTuple):
    """What attention is swapped for.

    Attributes:
        k: the number of neighbors.
        is_plain: whether the layer has metric="dot" and no weight, as attention, in place of the
            defaults of ConvNNAttention.
        candidates: the candidates of the layer; all tokens if None.
    """

    k: int
    is_plain: bool
    candidates: Candidates | None = None


class Mask(NamedTuple):
    """A kind of mask.

    Attributes:
        name: the argument of forward.
        is_bool: whether it is bool rather than float.
        over_pairs: whether it differs between queries.
        is_causal: whether is_causal=True, which then has no effect, is given beside it.
    """

    name: str
    is_bool: bool
    over_pairs: bool
    is_causal: bool


class Probe(NamedTuple):
    """A call on which an adapter is compared with the old layer.

    Attributes:
        keys: the number of keys.
        args: the arguments of forward.
        options: its keyword arguments.
        mask: the mask among them, of a kind that the layer need not take.
    """

    keys: int
    args: tuple[Tensor, ...]
    options: dict[str, Any]
    mask: Mask | None = None


class Layout(NamedTuple):
    """The names of the parts of a self-attention layer: its one or three input projections, ..."""

    projections: tuple[str, ...]
    output: str | None
    heads: str


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a self-attention layer; None if the module is none that we know."""
    heads = _first(HEADS, lambda name: isinstance(getattr(module, name, None), int))
    output = _first(OUTPUTS, lambda name: _has_part(module, name))
    for projections in PROJECTIONS:
        if heads is not None and all(_has_part(module, name) for name in projections):
            return Layout(projections, output, heads)
    return None


def _first(names: tuple[str, ...], fits: Callable[[str], bool]) -> str | None:
    return next(filter(fits, names), None)


def _has_part(module: nn.Module, name: str) -> bool:
    return module._modules.get(name) is not None


class MultiheadAdapter(nn.Module):
    """ConvNNAttention with the interface of nn.MultiheadAttention."""

    # nn.TransformerEncoderLayer reads this attribute; None disables its fused path.
    in_proj_bias = None
    outputs = 2
    masks: tuple[Mask, ...] = ()
    is_causal = reads_is_causal = ignores_positions = False

    def __init__(self, old: nn.Module, target: Target) -> None:
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
            old.num_heads,
            target,
            old.dropout,
            old.head_dim**-0.5,
            _split(old.in_proj_weight, old.in_proj_bias),
            require_linear(old, "out_proj"),
        )

    @staticmethod
    def probes(old: nn.Module, draw: Draw) -> list[Probe]:
        assert isinstance(old, nn.MultiheadAttention)
        query, keys = draw(2, 5, old.embed_dim), draw(2, 7, old.embed_dim)
        if not old.batch_first:
            query, keys = query.transpose(0, 1), keys.transpose(0, 1)
        return [Probe(7, (query, keys, keys), {"need_weights": False})]

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
        """Same as nn.MultiheadAttention, but the weights are None.

        A float key_padding_mask masks keys where it is -inf and has no other effect. attn_mask must
        be one of ranges; see :func:`ranges.read_mask`. It is not read if is_causal says what it is.
        """
        if is_symbolic(query, key, value, key_padding_mask, attn_mask):
            return symbolic_call(
                self,
                *(query, key, value, key_padding_mask, need_weights),
                *(attn_mask, average_attn_weights, is_causal),
            )
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
        sizes = (query.shape[0], query.shape[1], key.shape[1])
        seen = self._visible(attn_mask, is_causal, *sizes, query.device)
        if key_mask is None or seen.key_mask is None:
            key_mask = seen.key_mask if key_mask is None else key_mask
        else:
            key_mask = key_mask & seen.key_mask
        keys = (None, None) if is_self else (key, value)
        y = self.layer(query, *keys, key_mask, seen.key_range)
        if not is_batched:
            return y.squeeze(0), None
        return y if self.batch_first else y.transpose(0, 1), None

    def _visible(
        self,
        mask: Tensor | None,
        is_causal: bool,
        batch: int,
        queries: int,
        keys: int,
        device: torch.device,
    ) -> Visible:
        """What attn_mask, True or -inf where a key is hidden, or is_causal lets each query see."""
        if is_causal:  # of the first queries and keys
            return Visible(None, window_ranges(queries, causal=True, device=device).clamp(max=keys))
        if mask is None:
            return Visible()
        shapes = ([queries, keys], [batch * self.num_heads, queries, keys])
        if list(mask.shape) not in shapes:
            raise ValueError(
                f"attn_mask must be None or have shape {shapes[0]} or {shapes[1]}, "
                f"got {list(mask.shape)}"
            )
        mask = ~mask if mask.dtype == torch.bool else mask
        # [B, heads, N, M] or [1, 1, N, M]
        sizes = (batch, self.num_heads)
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, sizes)
        return read_mask("attn_mask", mask, batch, queries)


class SelfAttentionAdapter(nn.Module):
    """ConvNNAttention with the interface of a self-attention layer of timm or transformers.

    Args:
        old: the layer; see :func:`layout_of`.
        target: what it is swapped for.

    Attributes:
        outputs: the length of the tuple that forward returns; 0 if it returns a tensor.
        masks: the kinds of masks that forward takes.
        is_causal: whether a query sees no key behind it where no mask is given.
        reads_is_causal: whether forward has an argument is_causal that says so in its place.
        ignores_positions: whether position_ids, which forward takes, have no effect.
    """

    def __init__(self, old: nn.Module, target: Target) -> None:
        super().__init__()
        layout = layout_of(old)
        assert layout is not None
        linears = [require_linear(old, name) for name in layout.projections]
        out = None if layout.output is None else require_linear(old, layout.output)
        num_heads = getattr(old, layout.heads)
        width = linears[0].in_features
        parts = {"q_norm", "k_norm", "attn_drop", "attn_dropout", "dropout", *OUTPUT_DROPOUTS}
        parts.add(layout.output or "")
        require_no_extras(old, {*layout.projections, *parts})
        widths = {linear.out_features * len(linears) for linear in linears}
        if out is not None:
            widths |= {3 * out.in_features, 3 * out.out_features}
        if num_heads < 1:
            raise CannotReplaceError(f"{layout.heads} {num_heads}")
        if widths != {3 * width} or width % num_heads:
            raise CannotReplaceError("heads whose widths do not add up to that of the tokens")
        if getattr(old, "is_decoder", False):
            raise CannotReplaceError("it is part of a decoder, which may pass it other keys")
        self.arguments = _arguments(old)
        self.outputs = 0
        self.masks: tuple[Mask, ...] = ()
        self.is_causal = self.reads_is_causal = self.ignores_positions = False
        dropout = dropout_of(old)
        self.layer = _attention_layer(
            num_heads,
            target,
            dropout if isinstance(dropout, float) else dropout.p,
            _scale(old, width // num_heads),
            linears if len(linears) == 3 else _split(linears[0].weight, linears[0].bias),
            out,
            (_norm(old, "q_norm"), _norm(old, "k_norm")),
        )
        if isinstance(dropout, nn.Dropout):
            self.layer.dropout = dropout  # which may be in another mode than the layer
        drops = (old._modules.get(name) for name in OUTPUT_DROPOUTS)
        self.proj_drop = next(filter(None, drops), nn.Identity())

    @staticmethod
    def probes(old: nn.Module, draw: Draw) -> list[Probe]:
        layout = layout_of(old)
        assert layout is not None
        width = require_linear(old, layout.projections[0]).in_features
        few, many = draw(2, 5, width), draw(1, 50, width)
        probes = [Probe(5, (few,), {}), Probe(50, (many,), {})]
        padding = torch.ones(2, 1, 1, 5, dtype=torch.bool, device=few.device)
        padding[1, ..., 3:] = False
        # Queries see the past and, in the other batch element, themselves and the next token.
        whole = torch.ones(5, 5, dtype=torch.bool, device=few.device)
        pairs = torch.stack([whole.tril(), whole.triu() & whole.tril(1)]).unsqueeze(1)
        for name in filter(MASKS.__contains__, _arguments(old)):
            for allowed in (padding, pairs):
                lowest = torch.finfo(few.dtype).min
                added = torch.zeros_like(allowed, dtype=few.dtype).masked_fill(~allowed, lowest)
                for mask in (added, allowed):
                    kind = Mask(name, mask is allowed, allowed is pairs, False)
                    probes.append(Probe(5, (few,), {name: mask}, kind))
                    options = {name: mask, "is_causal": True}
                    probes.append(Probe(5, (few,), options, kind._replace(is_causal=True)))
        return probes

    def forward(self, *args: Any, **options: Any) -> Tensor | tuple[Tensor | None, ...]:
        """[B, N, E] → [B, N, E], in a tuple if the old layer returned one.

        Takes the arguments of the old layer. A mask (attn_mask or attention_mask) must be the same
        for all heads, of keys or of ranges, and of a kind that the old layer took; see
        :func:`read_masks`. Without one, a layer may be causal, by itself or by is_causal.

        Raises:
            ValueError: for another mask, and for any other argument that is not None or False,
                except those that have no effect, such as use_cache.
            TypeError: if an argument is missing, given twice or one too many.
        """
        given = self._bind(args, options)
        if is_symbolic(*given.values()):
            named = (given.pop(name, None) for name in self.arguments)
            return symbolic_call(self, *named, **given)
        x = given.pop(self.arguments[0])
        settings.require_shape(OWNER, self.arguments[0], x, ("B", "N", self.layer.embed_dim))
        is_causal = given.pop("is_causal", None)
        masks = [
            self._visible(name, mask, x, bool(is_causal))
            for name, mask in given.items()
            if mask is not None
        ]
        seen = masks[0] if masks else Visible()
        if not masks and (self.is_causal if is_causal is None else is_causal):
            seen = Visible(None, window_ranges(x.shape[1], causal=True, device=x.device))
        y = self.proj_drop(self.layer(x, key_mask=seen.key_mask, key_range=seen.key_range))
        return (y, *[None] * (self.outputs - 1)) if self.outputs else y

    def _bind(self, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """The tokens, masks and is_causal by name. All other arguments must have no effect."""
        names = self.arguments
        if len(args) > len(names):
            counts = f"takes {len(names)} positional arguments but {len(args)} were given"
            raise TypeError(f"{OWNER} {counts}")
        given = dict(zip(names, args, strict=False))
        twice = [name for name in given if name in options]
        if twice:
            raise TypeError(f"{OWNER} got several values for the argument {twice[0]}")
        given |= options
        if names[0] not in given:
            raise TypeError(f"{OWNER} is missing the argument {names[0]}")
        kept = [names[0], *(mask.name for mask in self.masks)]
        kept += ["is_causal"] if self.reads_is_causal else []
        ignored = (*WITHOUT_EFFECT, *["position_ids"] * self.ignores_positions)
        for name, value in given.items():
            default = self.is_causal if name == "is_causal" else False
            is_unused = value is None or value is default or name in ignored
            expected = f"None or {default}"
            expected += " (call the model with use_cache=False)" if name in CACHES else ""
            settings.require(is_unused or name in kept, OWNER, name, expected, value)
        return {name: value for name, value in given.items() if name in kept}

    def _visible(self, name: str, mask: Any, x: Tensor, is_causal: bool) -> Visible:
        """What a mask, of a kind that the old layer took, lets each query see."""
        settings.require(isinstance(mask, Tensor), OWNER, name, "None or a tensor", mask)
        is_bool = mask.dtype == torch.bool
        kinds = [kind for kind in self.masks if (kind.name, kind.is_bool) == (name, is_bool)]
        if not kinds:
            raise ValueError(
                f"{OWNER}: {name} must be None or {'float' if is_bool else 'bool'}, as the old "
                f"layer read other masks in another way, got {mask.dtype}"
            )
        kinds = [kind for kind in kinds if kind.is_causal == is_causal]
        settings.require(bool(kinds), OWNER, "is_causal", f"None or False with {name}", is_causal)
        seen = read_masks(name, mask, x.shape[0], x.shape[1], x.shape[1])
        if (seen.key_range is not None) not in {kind.over_pairs for kind in kinds}:
            same = "for every query" if seen.key_range is not None else "not for every query"
            raise ValueError(
                f"{OWNER}: {name} must mask the same keys {same}, as the old layer read other "
                f"masks in another way, got one of shape {list(mask.shape)}"
            )
        return seen


def read_masks(name: str, mask: Tensor, batch: int, queries: int, keys: int) -> Visible:
    """A mask of scaled_dot_product_attention for all heads, as ranges and a key mask.

    Args:
        name: the argument's name, for errors.
        mask: [N or 1, M] or [B or 1, 1, N or 1, M]: bool, True where a key may be attended to; or
            float, 0 there, and -10000 or less elsewhere.
        batch: B.
        queries: N.
        keys: M.

    Raises:
        ValueError: for any other mask; see :func:`ranges.read_mask`.
    """
    shape = list(mask.shape)
    if mask.dim() == 2:
        mask = mask[None, None]
    fits = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[3] == keys
    if not fits or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, queries):
        expected = f"[{queries} or 1, {keys}] or [{batch} or 1, 1, {queries} or 1, {keys}]"
        raise ValueError(f"{name} must be None or have shape {expected}, got {shape}")
    return read_mask(name, mask, batch, queries)


def _arguments(old: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a layer's forward: the tokens first."""
    parameters = inspect.signature(old.forward).parameters.values()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [each.name for each in parameters if each.kind not in variable]
    unknown = [name for name in names[1:] if name not in (*MASKS, *UNUSED)]
    if unknown or not names:
        raise CannotReplaceError(f"its forward takes {', '.join(unknown) or 'no tokens'}")
    return tuple(names)


def dropout_of(old: nn.Module) -> float | nn.Dropout:
    """The dropout of the attention weights: a probability, or the module."""
    for name in DROPOUTS:
        value = getattr(old, name, 0.0)
        if isinstance(value, nn.Module) and type(value) not in (nn.Dropout, nn.Identity):
            raise CannotReplaceError(f"its {name} is a {type(value).__name__}, not a Dropout")
        if isinstance(value, nn.Dropout) or (isinstance(value, float) and value > 0):
            return value
    return 0.0


def _scale(old: nn.Module, width: int) -> float:
    for value in (getattr(old, name, None) for name in SCALES):
        if isinstance(value, int | float):
            return float(value)
    return float(width**-0.5)


def _norm(old: nn.Module, name: str) -> nn.Module | None:
    norm = old._modules.get(name)
    return None if isinstance(norm, nn.Identity) else norm


def _split(weight: Tensor, bias: Tensor | None) -> list[nn.Linear]:
    """Three linear layers of [E, E] from one of [3E, E]; frozen where it is."""

    def part(fused: Tensor, i: int) -> nn.Parameter:
        chunk = fused.detach().chunk(3)[i].clone()
        return nn.Parameter(chunk, requires_grad=fused.requires_grad)

    linears = []
    for i in range(3):
        linear = nn.Linear(weight.shape[1], weight.shape[0] // 3, bias is not None, device="meta")
        linear.weight = part(weight, i)
        if bias is not None:
            linear.bias = part(bias, i)
        linears.append(linear)
    return linears


def _attention_layer(
    num_heads: int,
    target: Target,
    dropout: float,
    scale: float,
    projections: list[nn.Linear],
    out: nn.Linear | None,
    norms: tuple[nn.Module | None, nn.Module | None] = (None, None),
) -> ConvNNAttention:
    """A layer with the given projections: the modules themselves, so that they remain frozen."""
    query, key, value = projections
    layer = ConvNNAttention(
        query.in_features,
        num_heads,
        target.k,
        dropout,
        metric="dot" if target.is_plain else "cosine",
        scale=scale if target.is_plain else None,
        aggregation="sum" if target.is_plain else "depthwise",
        output_projection=out is not None,
        candidates=target.candidates,
        device="meta",  # where the projections that are replaced below draw no random numbers
        dtype=query.weight.dtype,
        query_norm=norms[0],
        key_norm=norms[1],
    )
    layer.query_projection, layer.key_projection, layer.value_projection = query, key, value
    layer.output_projection = out
    if layer.weight is not None:
        # The weight is new, but a layer that is frozen as a whole remains so.
        learns = any(linear.weight.requires_grad for linear in projections)
        ones = torch.ones_like(layer.weight, device=query.weight.device)
        layer.weight = nn.Parameter(ones, requires_grad=learns)
    return layer
