# SPDX-License-Identifier: MIT
"""ConvNN as an attention layer: sections 5.2 and 6.2."""

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from convnn_kernels.functional import Metric, Order, Rho, window_ranges
from convnn_kernels.nn import positional, settings
from convnn_kernels.nn.candidates import Candidates, require_candidates
from convnn_kernels.nn.ranges import intersection
from convnn_kernels.nn.searching import Search, convolve, select
from convnn_kernels.nn.symbolic import is_symbolic, symbolic_call

Projections: TypeAlias = Literal["identity", "learned", "value"]
PROJECTIONS = get_args(Projections)


class ConvNNAttention(nn.Module):
    """Attention to the k nearest tokens, aggregated by a depthwise convolution (sections 5.2, 6.2).

    query [B, N, E], optionally key and value [B, M, E] → [B, N, E].

    The defaults are the paper's layer: cosine similarity, softmax, four projections without bias,
    weights initialized to one. With metric="dot" and aggregation="sum" it is KVT attention, which
    for k = M equals ``scaled_dot_product_attention``. Which keys a query may see is a range for
    each query, by ``causal``, ``window`` or forward's key_range; other N×M masks are not supported.

    Args:
        embed_dim: E.
        num_heads: the number of heads; it must divide the width of queries, keys and values. All
            heads share the weights of the aggregation and the candidates.
        k: the number of neighbors. Where M or the number of candidates is smaller, places are
            missing, as with key_mask: they add nothing, and the last taps of the weight are not
            used.
        dropout: the dropout probability, applied after the aggregation and before the output
            projection.
        projections: which inputs have a learned projection: "learned": query, key and value;
            "value": value alone; "identity": none.
        projection_bias: whether the projections, including the output projection, have a bias.
        output_projection: whether the joined heads are projected. Without, values must be E wide.
        query_norm: a module that normalizes the projected queries of each head, [B, heads, N, width
            of a head], such as ``nn.RMSNorm(width)``. If None, they remain as they are.
        key_norm: the same for keys.
        rho: "softmax", "ones" or "similarity". "ones" is rejected with projections="learned".
        metric: "cosine", "dot" or "euclidean".
        scale: factor of the similarities in the softmax. If None, 1/√(width of a head) with
            metric="dot" and rho="softmax", otherwise 1.0.
        order: "similarity" or "index": the order in which neighbors meet the taps of the weight.
        aggregation: "depthwise": weight [d, 1, k], initialized to one; "dense": weight [d, d, k],
            initialized like nn.Conv1d; "sum": no weight. d is the width of one head's values.
        bias: whether the aggregation has a bias, [d], initialized to zero.
        positional_encoding: where a coordinate is concatenated before the projections (section
            4.2.1): None, "similarity", "aggregation" or "both".
        coordinates: "unit": from -1 to 1; "pixel": the position itself.
        candidates: which tokens may be neighbors (section 4.2.2): AllCandidates (if None),
            RandomCandidates or SpatialCandidates. include_self, exclude_self and self_similarity
            apply where the query tokens are among the keys: in self-attention, and with causal or a
            window, if there are at least as many keys.
        window: w; a query sees only the w keys nearest to it by position, itself included, or with
            causal the last w. See ``functional.window_ranges``. If None, it sees all.
        causal: whether a query sees no key behind it. With causal or a window, the queries are the
            last N of the M tokens that the keys are (N = M if key is None): query i sees keys up to
            M - N + i, so that the first M - N may be a cache; it also has the coordinate of that
            token. As those of "unit" depend on M, encode positions by "pixel" where M grows.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if an argument or a shape is wrong, or an input has no floating-point dtype; the
            message names it, what was expected and what was passed.
        RuntimeError: in forward, if dtypes or devices of inputs and parameters differ.

    Examples:
        >>> import convnn_kernels.nn as cnn
        >>> layer = cnn.ConvNNAttention(192, num_heads=3, k=9, candidates=cnn.RandomCandidates(32))
        >>> tokens = torch.randn(2, 100, 192)
        >>> layer(tokens).shape
        torch.Size([2, 100, 192])
        >>> memory = torch.randn(2, 70, 192)
        >>> layer(tokens, memory, key_mask=torch.rand(2, 70) < 0.9).shape
        torch.Size([2, 100, 192])

        Three sequences that are packed into one, each of which attends to its own past:

        >>> from convnn_kernels.functional import segment_ranges
        >>> layer = cnn.ConvNNAttention(192, k=9, causal=True)
        >>> layer(torch.randn(1, 100, 192), key_range=segment_ranges([50, 7, 43])).shape
        torch.Size([1, 100, 192])
    """

    # For modules that were pickled before there were these settings.
    window: int | None = None
    causal: bool = False

    query_projection: nn.Linear | None
    key_projection: nn.Linear | None
    value_projection: nn.Linear | None
    output_projection: nn.Linear | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        k: int = 9,
        dropout: float = 0.0,
        *,
        projections: Projections = "learned",
        projection_bias: bool = False,
        output_projection: bool = True,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        rho: Rho = "softmax",
        metric: Metric = "cosine",
        scale: float | None = None,
        order: Order = "similarity",
        aggregation: settings.Aggregation = "depthwise",
        bias: bool = False,
        positional_encoding: settings.PositionalEncoding = None,
        coordinates: settings.Coordinates = "unit",
        candidates: Candidates | None = None,
        window: int | None = None,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.embed_dim = settings.require_count(owner, "embed_dim", embed_dim)
        self.num_heads = settings.require_count(owner, "num_heads", num_heads)
        self.k = settings.require_common(
            owner,
            k=k,
            projections=projections,
            allowed_projections=PROJECTIONS,
            rho=rho,
            metric=metric,
            scale=1.0 if scale is None else scale,
            order=order,
            aggregation=aggregation,
            positional_encoding=positional_encoding,
            coordinates=coordinates,
        )
        self.projections = projections
        self.rho = rho
        self.metric = metric
        self.order = order
        self.aggregation = aggregation
        self.positional_encoding = positional_encoding
        self.coordinates = coordinates
        self.candidates = require_candidates(owner, candidates)
        self.window = None if window is None else settings.require_count(owner, "window", window)
        self.causal = settings.require_flag(owner, "causal", causal)
        self.scale = self._default_scale() if scale is None else float(scale)
        options = settings.require_options(owner, device, dtype)
        settings.require_flag(owner, "bias", bias)
        settings.require_flag(owner, "projection_bias", projection_bias)
        settings.require_flag(owner, "output_projection", output_projection)
        self._create_projections(output_projection, {"bias": projection_bias, **options})
        self.query_norm = _require_norm(owner, "query_norm", query_norm)
        self.key_norm = _require_norm(owner, "key_norm", key_norm)
        self.dropout = nn.Dropout(settings.require_between(owner, "dropout", dropout, 0, 1))
        self._create_convolution(bias, options)
        self._reset_convolution()

    def _default_scale(self) -> float:
        key_width, _ = self._widths()
        is_scaled = self.metric == "dot" and self.rho == "softmax"
        return 1 / math.sqrt(key_width // self.num_heads) if is_scaled else 1.0

    def _widths(self) -> tuple[int, int]:
        """The widths of queries and keys, and of values, of all heads together."""
        key_width = value_width = self.embed_dim
        if self.projections != "learned":
            key_width += self._encodes("similarity")
        if self.projections == "identity":
            value_width += self._encodes("aggregation")
        for width in (key_width, value_width):
            settings.require(
                width % self.num_heads == 0,
                type(self).__name__,
                "num_heads",
                f"a divisor of the width {width} of queries, keys and values",
                self.num_heads,
            )
        return key_width, value_width

    def _create_projections(self, has_output: bool, options: dict[str, Any]) -> None:
        key_width, value_width = self._widths()
        key_inputs = self.embed_dim + self._encodes("similarity")
        value_inputs = self.embed_dim + self._encodes("aggregation")
        self.query_projection = self.key_projection = None
        self.value_projection = self.output_projection = None
        if self.projections == "learned":
            self.query_projection = nn.Linear(key_inputs, key_width, **options)
            self.key_projection = nn.Linear(key_inputs, key_width, **options)
        if self.projections != "identity":
            self.value_projection = nn.Linear(value_inputs, value_width, **options)
        settings.require(
            has_output or value_width == self.embed_dim,
            type(self).__name__,
            "output_projection",
            f"True where values are {value_width} wide and not {self.embed_dim}",
            has_output,
        )
        if has_output:
            self.output_projection = nn.Linear(value_width, self.embed_dim, **options)

    def _create_convolution(self, has_bias: bool, options: dict[str, Any]) -> None:
        _, value_width = self._widths()
        d, k = value_width // self.num_heads, self.k
        shape = {"dense": (d, d, k), "depthwise": (d, 1, k), "sum": None}[self.aggregation]
        self.weight = None if shape is None else nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(d, **options)) if has_bias else None

    def reset_parameters(self) -> None:
        """Reinitializes the projections, the norms and the weights of the aggregation."""
        for part in (
            self.query_projection,
            self.key_projection,
            self.value_projection,
            self.output_projection,
            self.query_norm,
            self.key_norm,
        ):
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
        self._reset_convolution()

    def _reset_convolution(self) -> None:
        if self.weight is not None:
            if self.aggregation == "depthwise":
                nn.init.ones_(self.weight)
            else:
                nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_range: Tensor | None = None,
    ) -> Tensor:
        """Attends from each query to its k nearest keys.

        Args:
            query: [B, N, E].
            key: [B, M, E]; same as query if None.
            value: [B, M, E]; same as key if None.
            key_mask: [B, M] bool, True where a key may be a neighbor. A query with fewer than k
                such keys attends to those only.
            key_range: [N, 2], [B, N, 2] or [B, heads, N, 2] int64: query i may see the keys
                begin <= j < end only, such as those of its own sequence
                (``functional.segment_ranges``), and of those only what window and causal leave.

        Returns:
            [B, N, E].
        """
        if is_symbolic(query, key, value, key_mask, key_range):
            return symbolic_call(self, query, key, value, key_mask, key_range)
        owner = type(self).__name__
        if key is None and value is not None:
            raise ValueError(f"{owner}: key must be given if value is, got None")
        try:
            return self._attended(query, key, value, key_mask, key_range)
        except RuntimeError:
            settings.require_as_parameters(
                self, query=query, key=key, value=value, key_mask=key_mask, key_range=key_range
            )
            raise

    def _attended(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_mask: Tensor | None,
        key_range: Tensor | None,
    ) -> Tensor:
        owner = type(self).__name__
        q, k, search = self._query_and_key(query, key, key_mask, key_range)
        key = query if key is None else key
        value = key if value is None else value
        settings.require_input(owner, "value", value, (*key.shape[:2], self.embed_dim))
        _, width = self._widths()
        v = self._heads(self._with_coordinates(value, "aggregation"), self.value_projection, width)
        # [B, heads, N, width of a head]
        y = convolve(q, k, v, self.weight, self.bias, search, self.rho, self.scale)
        joined = self.dropout(y.transpose(1, 2).flatten(2))  # [B, N, width]
        return joined if self.output_projection is None else self.output_projection(joined)

    def neighbors(
        self,
        query: Tensor,
        key: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_range: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the neighbors that each head picks.

        Random candidates are drawn anew, so they differ from those of any forward.

        Args:
            query: [B, N, E].
            key: [B, M, E]; same as query if None.
            key_mask: [B, M] bool, True where a key may be a neighbor.
            key_range: as in forward.

        Returns:
            similarities, [B, heads, N, k] float32 (float64 if the input is), before ``scale``, and
            indices, [B, heads, N, k] int64: rows of key. See ``functional.select_neighbors``.

        Example:
            >>> layer = ConvNNAttention(192, num_heads=3, k=9)
            >>> similarities, indices = layer.neighbors(torch.randn(2, 100, 192))
            >>> indices.shape
            torch.Size([2, 3, 100, 9])
        """
        try:
            return select(*self._query_and_key(query, key, key_mask, key_range))
        except RuntimeError:
            settings.require_as_parameters(
                self, query=query, key=key, key_mask=key_mask, key_range=key_range
            )
            raise

    def _query_and_key(
        self,
        query: Tensor,
        key: Tensor | None,
        key_mask: Tensor | None,
        key_range: Tensor | None,
    ) -> tuple[Tensor, Tensor, Search]:
        """[B, heads, N, width of a head] and [B, heads, M, width of a head], and how to search."""
        owner = type(self).__name__
        settings.require_input(owner, "query", query, ("B", "N", self.embed_dim))
        is_self = key is None or key is query
        key = query if key is None else key
        batch = query.shape[0]
        settings.require_input(owner, "key", key, (batch, "M", self.embed_dim))
        N, M = query.shape[1], key.shape[1]
        if key_mask is not None:
            settings.require_shape(owner, "key_mask", key_mask, (batch, M))
            settings.require_dtype(owner, "key_mask", key_mask, torch.bool)
        is_last = self.causal or self.window is not None
        tokens = self._with_coordinates(query, "similarity", M if is_last else None)
        width, _ = self._widths()
        q = self._heads(tokens, self.query_projection, width)
        k = self._heads(self._with_coordinates(key, "similarity"), self.key_projection, width)
        heads = q.shape[1]
        if key_mask is not None:
            key_mask = key_mask.unsqueeze(1).expand(-1, heads, -1)  # [B, heads, M]
        # Whether the query tokens are among the keys: the last of them.
        has_self = is_self or (is_last and N <= M)
        candidates, self_indices = self.candidates, None
        if has_self and (candidates.include_self or candidates.exclude_self):
            self_indices = torch.arange(M - N, M, device=query.device)
        search = Search(
            self.k,
            candidates((M,), 0, query.device),
            self_indices,
            candidates.self_similarity,
            self.metric,
            self.order,
            candidates.exclude_self and has_self,
            key_mask,
            self._key_range(key_range, (batch, heads, N, M), query.device),
        )
        q = q if self.query_norm is None else self.query_norm(q)
        k = k if self.key_norm is None else self.key_norm(k)
        return q, k, search

    def _key_range(
        self, given: Tensor | None, sizes: tuple[int, int, int, int], device: torch.device
    ) -> Tensor | None:
        """[N, 2], [B, 1, N, 2] or [B, heads, N, 2]: the given range and that of the settings."""
        batch, heads, N, M = sizes
        own = None
        if self.causal or self.window is not None:
            own = window_ranges(N, M, self.window, self.causal, device)
        if given is None:
            return own
        owner = type(self).__name__
        shapes = {2: (N, 2), 3: (batch, N, 2), 4: (batch, heads, N, 2)}
        expected = shapes.get(getattr(given, "ndim", 0), shapes[2])
        settings.require_shape(owner, "key_range", given, expected)
        settings.require_dtype(owner, "key_range", given, torch.int64)
        given = given.unsqueeze(1) if given.dim() == 3 else given
        if given.dim() == 4:
            given = given.expand(-1, heads, -1, -1)
        return given if own is None else intersection(given, own, M)

    def _encodes(self, role: str) -> bool:
        return self.positional_encoding in (role, "both")

    def _with_coordinates(self, tokens: Tensor, role: str, among: int | None = None) -> Tensor:
        """[B, L, E] → [B, L, E], or [B, L, E + 1] with a coordinate concatenated.

        Args:
            tokens: [B, L, E].
            role: what the tokens are used for.
            among: the number of tokens of which these are the last; L if None, and at least L.
        """
        if not self._encodes(role):
            return tokens
        batch, length, _ = tokens.shape
        among = length if among is None else max(among, length)
        # [L, 1]
        grid = positional.grid((among,), 0, self.coordinates, tokens.dtype, tokens.device)
        grid = grid[among - length :]
        return torch.cat([tokens, grid.expand(batch, -1, -1)], dim=-1)

    def _heads(self, tokens: Tensor, projection: nn.Linear | None, width: int) -> Tensor:
        """[B, L, E] → [B, heads, L, width of a head].

        ``width`` is that of all heads. With tensor parallel, the projection of a rank gives less
        than that, which are fewer heads.
        """
        projected = tokens if projection is None else projection(tokens)
        return projected.unflatten(-1, (-1, width // self.num_heads)).transpose(1, 2)

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}, k={self.k}"]
        parts += [f"projections={self.projections!r}, rho={self.rho!r}, metric={self.metric!r}"]
        parts += [f"scale={self.scale:g}"] if self.scale != 1.0 else []
        parts += [f"order={self.order!r}"] if self.order != "similarity" else []
        parts += [f"aggregation={self.aggregation!r}"]
        if self.positional_encoding is not None:
            parts += [f"positional_encoding={self.positional_encoding!r}"]
            parts += [f"coordinates={self.coordinates!r}"]
        parts += [f"window={self.window}"] if self.window is not None else []
        parts += ["causal=True"] if self.causal else []
        return ", ".join(parts)


def _require_norm(owner: str, name: str, norm: nn.Module | None) -> nn.Module | None:
    is_module = norm is None or isinstance(norm, nn.Module)
    settings.require(is_module, owner, name, "a module or None", norm)
    return norm
