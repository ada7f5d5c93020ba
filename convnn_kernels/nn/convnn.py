# SPDX-License-Identifier: MIT
"""ConvNN layers for sequences and maps: Algorithm 1, sections 4.1, 4.2.1 and 4.2.2."""

import functools
import math
import types
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from convnn_kernels import functional
from convnn_kernels.functional import Metric, Order, Rho
from convnn_kernels.nn import positional, settings
from convnn_kernels.nn.candidates import Candidates, require_candidates
from convnn_kernels.nn.from_convolution import as_convolution
from convnn_kernels.nn.searching import Search, convolve, select
from convnn_kernels.nn.symbolic import is_symbolic, symbolic_call

# "coordinates": query and key are the coordinates alone, value is the input (section 5.1).
Projections: TypeAlias = Literal["identity", "learned", "value", "coordinates"]
PROJECTIONS = get_args(Projections)


_Layer = TypeVar("_Layer", bound="_ConvNN")


def require_settings(
    owner: str,
    *,
    in_channels: int,
    padding: int,
    projections: Projections,
    positional_encoding: settings.PositionalEncoding,
    standardize: bool,
    coordinate_order: settings.CoordinateOrder,
    causal: bool = False,
    **common: Any,
) -> tuple[int, int, int]:
    """Checks the settings of a layer over a sequence or a map; errors name `owner`.

    Args:
        common: the other arguments of ``settings.require_common``.

    Returns:
        in_channels, k and padding, which may have been numbers of NumPy, as ints.
    """
    in_channels = settings.require_count(owner, "in_channels", in_channels)
    padding = settings.require_count(owner, "padding", padding, least=0)
    k = settings.require_common(
        owner,
        projections=projections,
        allowed_projections=PROJECTIONS,
        positional_encoding=positional_encoding,
        **common,
    )
    settings.require_choice(owner, "coordinate_order", coordinate_order, settings.COORDINATE_ORDERS)
    settings.require_flag(owner, "standardize", standardize)
    settings.require_flag(owner, "causal", causal)
    for needs, setting in (
        (projections == "coordinates", "projections='coordinates'"),
        (standardize, "standardize=True"),
    ):
        settings.require(
            not needs or positional_encoding in ("similarity", "both"),
            owner,
            "positional_encoding",
            f"'similarity' or 'both' with {setting}",
            positional_encoding,
        )
    settings.require(
        not standardize or projections != "coordinates",
        owner,
        "standardize",
        "False with projections='coordinates', which does not compare features",
        standardize,
    )
    settings.require(
        not (standardize and causal),
        owner,
        "standardize",
        "False with causal=True, since the deviation is that of all tokens",
        standardize,
    )
    return in_channels, k, padding


def value_width(
    in_channels: int,
    dimensions: int,
    projections: Projections,
    positional_encoding: settings.PositionalEncoding,
) -> int:
    """The number of value channels; a value projection has in_channels outputs by default."""
    is_projected = projections in ("learned", "value")
    is_placed = positional_encoding in ("aggregation", "both")
    return in_channels + dimensions * (is_placed and not is_projected)


class _ConvNN(nn.Module):
    """The layer behind ConvNN1d and ConvNN2d, which differ in `_dimensions` only."""

    _dimensions: int
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    # For modules that were pickled before there were these settings.
    causal: bool = False
    standardize: bool = False
    coordinate_order: settings.CoordinateOrder = "yx"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int = 9,
        *,
        padding: int = 0,
        stride: int = 1,
        projections: Projections = "learned",
        key_channels: int | None = None,
        value_channels: int | None = None,
        projection_bias: bool = False,
        rho: Rho = "softmax",
        metric: Metric = "cosine",
        scale: float = 1.0,
        order: Order = "similarity",
        aggregation: settings.Aggregation = "dense",
        bias: bool = True,
        positional_encoding: settings.PositionalEncoding = None,
        coordinates: settings.Coordinates = "unit",
        coordinate_order: settings.CoordinateOrder = "yx",
        standardize: bool = False,
        candidates: Candidates | None = None,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.in_channels, self.k, self.padding = require_settings(
            owner,
            in_channels=in_channels,
            k=k,
            padding=padding,
            projections=projections,
            rho=rho,
            metric=metric,
            scale=scale,
            order=order,
            aggregation=aggregation,
            positional_encoding=positional_encoding,
            coordinates=coordinates,
            coordinate_order=coordinate_order,
            standardize=standardize,
            causal=causal,
        )
        self.out_channels = settings.require_count(owner, "out_channels", out_channels)
        self.stride = settings.require_count(owner, "stride", stride)
        self.projections = projections
        self.rho = rho
        self.metric = metric
        self.scale = float(scale)
        self.order = order
        self.aggregation = aggregation
        self.positional_encoding = positional_encoding
        self.coordinates, self.coordinate_order = coordinates, coordinate_order
        self.standardize, self.causal = bool(standardize), bool(causal)
        self.candidates = require_candidates(owner, candidates)
        options = settings.require_options(owner, device, dtype)
        settings.require_flag(owner, "bias", bias)
        settings.require_flag(owner, "projection_bias", projection_bias)
        self._create_projections(key_channels, value_channels, projection_bias, options)
        self._create_convolution(bias, options)

    def _create_projections(
        self,
        key_channels: int | None,
        value_channels: int | None,
        has_bias: bool,
        options: dict[str, Any],
    ) -> None:
        owner = type(self).__name__
        learns_key = self.projections == "learned"
        learns_value = self.projections in ("learned", "value")
        for name, given, learned in (
            ("key_channels", key_channels, learns_key),
            ("value_channels", value_channels, learns_value),
        ):
            if given is not None:
                settings.require(learned, owner, name, "None where nothing is projected", given)
                settings.require_count(owner, name, given)
        settings.require(
            learns_value or not has_bias,
            owner,
            "projection_bias",
            "False where nothing is projected",
            has_bias,
        )

        def projection(role: str, outputs: int | None) -> nn.Linear:
            inputs = self.in_channels + self._dimensions * self._encodes(role)
            outputs = self.in_channels if outputs is None else int(outputs)
            return nn.Linear(inputs, outputs, bias=has_bias, **options)

        self.query_projection = projection("similarity", key_channels) if learns_key else None
        self.key_projection = projection("similarity", key_channels) if learns_key else None
        self.value_projection = projection("aggregation", value_channels) if learns_value else None

    def _create_convolution(self, has_bias: bool, options: dict[str, Any]) -> None:
        if self.value_projection is not None:
            channels = self.value_projection.out_features
        else:
            channels = value_width(
                self.in_channels, self._dimensions, self.projections, self.positional_encoding
            )
        settings.require(
            self.aggregation == "dense" or self.out_channels == channels,
            type(self).__name__,
            "out_channels",
            f"the {channels} channels of the values with aggregation='{self.aggregation}'",
            self.out_channels,
        )
        shape = {
            "dense": (self.out_channels, channels, self.k),
            "depthwise": (channels, 1, self.k),
            "sum": None,
        }[self.aggregation]
        self.weight = None if shape is None else nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(self.out_channels, **options)) if has_bias else None
        self._reset_convolution()

    def reset_parameters(self) -> None:
        """Reinitializes all weights, as ``nn.Conv1d`` and ``nn.Linear`` do."""
        for projection in (self.query_projection, self.key_projection, self.value_projection):
            if projection is not None:
                projection.reset_parameters()
        self._reset_convolution()

    def _reset_convolution(self) -> None:
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            inputs = self.k * (1 if self.weight is None else self.weight.shape[1])
            nn.init.uniform_(self.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        if is_symbolic(x):
            return symbolic_call(self, x)
        shape = self._shape(x)
        try:
            return self._convolved(x, shape)
        except RuntimeError:
            settings.require_as_parameters(self, input=x)
            raise

    def _convolved(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        # The queries are N tokens of x [B, C, *shape]; the keys are the M of the padded map.
        tokens = self._tokens(x)
        value = self._value(tokens, shape)  # [B, M, C]
        if self.projections == "coordinates":
            similarities, indices = self._neighbors_by_position(x, shape)  # [B, N, k]
            y = functional.aggregate_neighbors(
                value, similarities, indices, self.weight, self.bias, self.rho, self.scale
            )
        else:
            query, key = self._query_and_key(x, tokens, shape)  # [B, N, D] and [B, M, D]
            search = self._search(shape, x.device)
            y = convolve(query, key, value, self.weight, self.bias, search, self.rho, self.scale)
        # [B, N, C'] → [B, C', *shape], whose strides are those of channels_last.
        y = y.unflatten(1, self._output_shape(shape)).movedim(-1, 1)
        # Not y.contiguous(), which keeps the strides of channels_last where sizes are 1.
        return y if _is_channels_last(x) else y.clone(memory_format=torch.contiguous_format)

    def neighbors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the neighbors that the layer picks.

        Random candidates are drawn anew, so they differ from those of any forward.

        Args:
            x: an input of forward.

        Returns:
            similarities, [B, N, k] float32 (float64 if the input is), and indices, [B, N, k]
            int64: rows of the padded map's tokens. See ``functional.select_neighbors``.

        Example:
            >>> layer = ConvNN2d(16, 32, k=9, padding=1)
            >>> similarities, indices = layer.neighbors(torch.randn(2, 16, 8, 8))
            >>> indices.shape
            torch.Size([2, 64, 9])
        """
        shape = self._shape(x)
        if self.projections == "coordinates":
            return self._neighbors_by_position(x, shape)
        try:
            query, key = self._query_and_key(x, self._tokens(x), shape)
        except RuntimeError:
            settings.require_as_parameters(self, input=x)
            raise
        return select(query, key, self._search(shape, x.device))

    def _shape(self, x: Tensor) -> Sequence[int]:
        sizes = ("L",) if self._dimensions == 1 else ("H", "W")
        settings.require_input(type(self).__name__, "input", x, ("B", self.in_channels, *sizes))
        return x.shape[2:]

    def _output_shape(self, shape: Sequence[int]) -> Sequence[int]:
        return shape if self.stride == 1 else [-(-size // self.stride) for size in shape]

    def _queries(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """[N]: the rows of the queries among the padded map's tokens."""
        return positional.interior(shape, self.padding, device, self.stride)

    def _tokens(self, x: Tensor) -> Tensor:
        """[B, M, C] of the padded map, contiguous: each operator would copy them for itself."""
        padded = F.pad(x, (self.padding,) * (2 * self._dimensions)) if self.padding else x
        return padded.flatten(2).mT.contiguous()

    def _encodes(self, role: str) -> bool:
        return self.positional_encoding in (role, "both")

    def _query_and_key(
        self, x: Tensor, tokens: Tensor, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """[B, N, D] and [B, M, D]."""
        key = query = tokens  # [B, M, C]
        if self._encodes("similarity"):
            # Padding tokens have zero features, but they do have coordinates.
            features = self._standardized(tokens) if self.standardize else tokens
            key = query = self._with_coordinates(features, shape)  # [B, M, C + dimensions]
        if self.padding or self.stride > 1:
            if self._encodes("similarity"):
                query = key[:, self._queries(shape, x.device)]
            else:
                query = positional.strided(x, self._dimensions, self.stride).flatten(2).mT
        if self.query_projection is not None and self.key_projection is not None:
            query, key = self.query_projection(query), self.key_projection(key)
        return query, key

    def _value(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        """[B, M, C]."""
        value = tokens
        if self._encodes("aggregation"):
            value = self._with_coordinates(tokens, shape)
        return value if self.value_projection is None else self.value_projection(value)

    def _standardized(self, tokens: Tensor) -> Tensor:
        """[B, M, C], divided by the standard deviation over all numbers of a map."""
        if tokens.numel() == 0:  # torch.std would warn
            return tokens
        # A map of a single number has the deviation 0, and an unbiased estimate is 0 / 0.
        correction = int(self.in_channels > 1 or tokens.shape[1] > 1)
        deviation = tokens.std((1, 2), correction=correction, keepdim=True)  # [B, 1, 1]
        return tokens / (deviation + 1e-6)

    def _with_coordinates(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        """[B, M, C] → [B, M, C + dimensions]."""
        grid = self._grid(shape, tokens.dtype, tokens.device)
        return torch.cat([tokens, grid.expand(tokens.shape[0], -1, -1)], dim=-1)

    def _grid(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """[M, dimensions]: the coordinates of the padded map's tokens."""
        return positional.grid(
            shape, self.padding, self.coordinates, dtype, device, self.coordinate_order
        )

    def _search(self, shape: Sequence[int], device: torch.device) -> Search:
        candidates = self.candidates
        names_self = candidates.include_self or candidates.exclude_self
        queries = self._queries(shape, device) if names_self or self.causal else None  # [N]
        key_range = None
        if self.causal and queries is not None:
            key_range = torch.stack([torch.zeros_like(queries), queries + 1], -1)  # [N, 2]
        return Search(
            self.k,
            candidates(shape, self.padding, device),
            queries if names_self else None,
            candidates.self_similarity,
            self.metric,
            self.order,
            candidates.exclude_self,
            key_range=key_range,
        )

    def _neighbors_by_position(self, x: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Similarities and indices, [B, N, k] each, from one search that serves the whole batch."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = self._grid(shape, dtype, x.device)  # [M, 1 or 2]
        query = key[self._queries(shape, x.device)]  # [N, 1 or 2]
        neighbors = select(query, key, self._search(shape, x.device))
        # [N, k] → [B, N, k]
        similarities, indices = (each.expand(x.shape[0], -1, -1) for each in neighbors)
        return similarities, indices

    def _take_over(self, conv: nn.Conv1d | nn.Conv2d) -> Self:
        assert self.weight is not None
        with torch.no_grad():
            self.weight.copy_(conv.weight.flatten(2))  # [C', C, 3, 3] → [C', C, 9]
            if self.bias is not None and conv.bias is not None:
                self.bias.copy_(conv.bias)
                self.bias.requires_grad_(conv.bias.requires_grad)
        self.weight.requires_grad_(conv.weight.requires_grad)
        return self.train(conv.training)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, k={self.k}"]
        parts += [f"padding={self.padding}"] if self.padding else []
        parts += [f"stride={self.stride}"] if self.stride > 1 else []
        parts += ["causal=True"] if self.causal else []
        parts += [f"projections={self.projections!r}, rho={self.rho!r}, metric={self.metric!r}"]
        parts += [f"scale={self.scale}"] if self.scale != 1.0 else []
        parts += [f"order={self.order!r}"] if self.order != "similarity" else []
        parts += [f"aggregation={self.aggregation!r}"]
        parts += ["bias=False"] if self.bias is None else []
        if self.positional_encoding is not None:
            parts += [f"positional_encoding={self.positional_encoding!r}"]
            parts += [f"coordinates={self.coordinates!r}"]
            order = self.coordinate_order
            parts += [f"coordinate_order={order!r}"] if order != "yx" else []
            parts += ["standardize=True"] if self.standardize else []
        return ", ".join(parts)


_ARGUMENTS = """
    Args:
        in_channels: C.
        out_channels: C'.
        k: the number of neighbors. Where there are fewer key tokens or candidates, places are
            missing: they add nothing, and the last taps of the weight are not used.
        padding: number of zero tokens added on every side as keys and values. They are never
            queries.
        stride: the step between queries along each axis, starting with the first token: the output
            has ⌈L / stride⌉ tokens along an axis of L, as that of a strided convolution. All tokens
            are keys and values.
        projections: f_Q, f_K and f_V of section 4.1. "learned": linear layers; "identity": none;
            "value": only f_V is learned; "coordinates": query and key are the coordinates alone
            and f_V is the identity (section 5.1).
        key_channels: h, the width of learned queries and keys; in_channels if None.
        value_channels: v, the width of learned values; in_channels if None.
        projection_bias: whether learned projections have a bias.
        rho: "softmax", "ones" or "similarity": how neighbors are weighted. "ones" gives query and
            key no gradient and is rejected if their projections are learned.
        metric: "cosine", "dot" or "euclidean".
        scale: factor of the similarities in the softmax.
        order: "similarity": the nearest neighbor meets the first tap of the weight; "index":
            neighbors meet the taps in the order of their position.
        aggregation: "dense": weight [C', C, k]; "depthwise": weight [C, 1, k], for C' = C; "sum":
            no weight. Here C is the number of value channels.
        bias: whether the aggregation has a bias, [C'].
        positional_encoding: where coordinates are concatenated before the projections (section
            4.2.1): None, "similarity", "aggregation" or "both".
        coordinates: "unit": each axis of the padded input goes from -1 to 1; "pixel": the position
            itself, exact in 16-bit dtypes up to 256 (bfloat16) or 2048 (float16).
        coordinate_order: the order of the two coordinates of a map: "yx" or "xy". A sequence has
            one coordinate.
        standardize: whether the features that are compared are divided by their standard deviation
            before coordinates are concatenated: of all channels and key tokens of a map together,
            padding included, unbiased, plus 1e-6. It needs positional_encoding="similarity" or
            "both"; values are never divided. In float16, a map of almost equal numbers, without
            padding, overflows.
        candidates: which tokens may be neighbors (section 4.2.2): AllCandidates (if None),
            RandomCandidates or SpatialCandidates.
        causal: whether a token sees itself and the tokens before it only: its neighbors are the k
            nearest of those (of a map, row by row). The first tokens have fewer than k. Padding
            tokens before the first token are seen by all, those behind the last by none. Candidates
            are picked as ever, and a token sees those that are not behind it. Coordinates of "unit"
            depend on the length of the input, those of "pixel" do not. Not with standardize.
        device: device of the parameters.
        dtype: dtype of the parameters; the input must have the same, unless autocast is on.

    Raises:
        ValueError: if an argument is wrong, or the input's shape, or its dtype is not a
            floating-point one; the message names it, what was expected and what was passed.
        RuntimeError: in forward, if the input has not the dtype and device of the parameters.
"""


def _with_own_functions(cls: type[_Layer]) -> type[_Layer]:
    """The class with copies of the functions of `_ConvNN`, so that Python's errors name the class.

    Those for an unknown or a missing argument would begin with "_ConvNN.__init__()".
    """
    for name in ("__init__", "forward", "neighbors", "reset_parameters"):
        base = vars(_ConvNN)[name]
        own = types.FunctionType(
            base.__code__, base.__globals__, name, base.__defaults__, base.__closure__
        )
        own.__kwdefaults__ = base.__kwdefaults__
        functools.update_wrapper(own, base)
        vars(own).pop("__wrapped__")
        own.__qualname__ = f"{cls.__qualname__}.{name}"
        setattr(cls, name, own)
    return cls


@_with_own_functions
class ConvNN1d(_ConvNN):
    __doc__ = f"""Convolutional Nearest Neighbors over a sequence: Algorithm 1, section 4.1.

    [B, C, L] → [B, C', ⌈L / stride⌉], same dtype as the input (under autocast, the autocast dtype).
    {_ARGUMENTS}
    Examples:
        >>> layer = ConvNN1d(16, 32, k=9)
        >>> layer(torch.randn(2, 16, 100)).shape
        torch.Size([2, 32, 100])
    """

    _dimensions = 1

    @classmethod
    def from_conv1d(cls, conv: nn.Conv1d) -> "ConvNN1d":
        """Creates a layer that equals a convolution, with its weights (section 5.1).

        The k tokens nearest in position, in the order of their positions, are the kernel's taps.

        Args:
            conv: a convolution, but not of a subclass, of any odd kernel size and any stride, with
                dilation 1, zero padding of half the kernel, and groups 1 or a depthwise kernel.

        Returns:
            A layer with copies of weight and bias, on the same device and with the same dtype.
            Frozen parameters remain frozen.

        Raises:
            ValueError: if conv cannot be expressed; the message names the setting.

        Examples:
            >>> conv = nn.Conv1d(16, 32, 3, padding=1)
            >>> x = torch.randn(2, 16, 50)
            >>> torch.allclose(ConvNN1d.from_conv1d(conv)(x), conv(x), atol=1e-5)
            True
        """
        return cls(**as_convolution("from_conv1d", conv))._take_over(conv)


@_with_own_functions
class ConvNN2d(_ConvNN):
    __doc__ = f"""Convolutional Nearest Neighbors over a map: sections 4.1 and 4.2.

    [B, C, H, W] → [B, C', H, W], or with a stride [B, C', ⌈H / stride⌉, ⌈W / stride⌉], same dtype
    as the input (under autocast, the autocast dtype). The memory format is as for Conv2d: a
    channels_last input gives a channels_last output, any other a contiguous one. The map is
    flattened row by row, and the result unflattened.
    {_ARGUMENTS}
    Examples:
        >>> layer = ConvNN2d(16, 32, k=9, padding=1)
        >>> x = torch.randn(2, 16, 8, 8)
        >>> layer(x).shape
        torch.Size([2, 32, 8, 8])
    """

    _dimensions = 2

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d) -> "ConvNN2d":
        """Creates a layer that equals a convolution, with its weights (section 5.1).

        The 9 or 25 tokens nearest in Euclidean distance on the pixel grid, row by row, are the taps
        of a 3×3 or 5×5 kernel. The taps of a 7×7 kernel are not the 49 nearest tokens: its corners
        are at distance √18, farther away than the tokens at (4, 0).

        Args:
            conv: a 1×1, 3×3 or 5×5 convolution, but not of a subclass, with one stride for both
                axes, dilation 1, zero padding of half the kernel, and groups 1 or a depthwise
                kernel.

        Returns:
            A layer with copies of weight and bias, on the same device and with the same dtype.
            Frozen parameters remain frozen.

        Raises:
            ValueError: if conv cannot be expressed; the message names the setting.

        Examples:
            >>> conv = nn.Conv2d(16, 32, 3, padding=1)
            >>> x = torch.randn(2, 16, 8, 8)
            >>> torch.allclose(ConvNN2d.from_conv2d(conv)(x), conv(x), atol=1e-5)
            True
        """
        return cls(**as_convolution("from_conv2d", conv))._take_over(conv)


def _is_channels_last(x: Tensor) -> bool:
    """Whether nn.Conv2d would give a channels_last output: strides ascend from C to W, H and B.

    With sizes of 1, memory may have both formats; strides then tell which one is meant.
    """
    if x.dim() != 4 or x.numel() == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        stride, size = x.stride(axis), x.shape[axis]
        if stride < least or (axis == 0 and least == x.stride(1)):
            return False
        least = stride * size
    return x.stride(1) > 0
