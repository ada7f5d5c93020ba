# SPDX-License-Identifier: MIT
"""ConvNN as an attention layer: sections 5.2 and 6.2."""

import math

import torch
from torch import Tensor, nn

from convnn_kernels import functional
from convnn_kernels.functional import Metric, Order, Rho
from convnn_kernels.nn import positional, settings
from convnn_kernels.nn.candidates import AllCandidates, Candidates

PROJECTIONS = ("identity", "learned", "value")


class ConvNNAttention(nn.Module):
    """Attention to the k nearest tokens, aggregated by a depthwise convolution (sections 5.2, 6.2).

    query [B, N, E], optionally key and value [B, M, E] → [B, N, E].

    The defaults are the paper's layer: cosine similarity, softmax, four projections without bias,
    weights initialized to one. With metric="dot" and aggregation="sum" it is KVT attention, which
    for k = M equals ``scaled_dot_product_attention``. Causal and N×M masks are not supported.

    Args:
        embed_dim: E.
        num_heads: the number of heads; it must divide the width of queries, keys and values. All
            heads share the weights of the aggregation and the candidates.
        k: the number of neighbors, at most M or the number of candidates.
        dropout: the dropout probability, applied after the aggregation and before the output
            projection.
        projections: which inputs have a learned projection: "learned": query, key and value;
            "value": value alone; "identity": none. There is always an output projection.
        projection_bias: whether the projections, including the output projection, have a bias.
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
            RandomCandidates or SpatialCandidates. include_self applies to self-attention only: in
            cross-attention, the query token is not among the keys.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if an argument or a shape is wrong; the message names it, what was expected and
            what was passed.
        RuntimeError: in forward, from the operator, such as for k above the number of candidates.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        k: int = 9,
        dropout: float = 0.0,
        *,
        projections: str = "learned",
        projection_bias: bool = False,
        rho: Rho = "softmax",
        metric: Metric = "cosine",
        scale: float | None = None,
        order: Order = "similarity",
        aggregation: str = "depthwise",
        bias: bool = False,
        positional_encoding: str | None = None,
        coordinates: str = "unit",
        candidates: Candidates | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        settings.require_count(owner, "embed_dim", embed_dim)
        settings.require_count(owner, "num_heads", num_heads)
        settings.require_between(owner, "dropout", dropout, 0, 1)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.positional_encoding = positional_encoding
        key_inputs = embed_dim + self._encodes("similarity")
        value_inputs = embed_dim + self._encodes("aggregation")
        key_width = embed_dim if projections == "learned" else key_inputs
        value_width = value_inputs if projections == "identity" else embed_dim
        for width in (key_width, value_width):
            settings.require(
                width % num_heads == 0,
                owner,
                "num_heads",
                f"a divisor of the width {width} of queries, keys and values",
                num_heads,
            )
        if scale is None:
            is_scaled = metric == "dot" and rho == "softmax"
            scale = 1 / math.sqrt(key_width // num_heads) if is_scaled else 1.0
        settings.require_common(
            owner,
            k=k,
            projections=projections,
            allowed_projections=PROJECTIONS,
            rho=rho,
            metric=metric,
            scale=scale,
            order=order,
            aggregation=aggregation,
            positional_encoding=positional_encoding,
            coordinates=coordinates,
        )
        self.k = k
        self.projections = projections
        self.rho = rho
        self.metric = metric
        self.scale = scale
        self.order = order
        self.aggregation = aggregation
        self.coordinates = coordinates
        self.candidates = AllCandidates() if candidates is None else candidates
        settings.require(
            isinstance(self.candidates, Candidates),
            owner,
            "candidates",
            "AllCandidates, RandomCandidates or SpatialCandidates",
            candidates,
        )

        def projection(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=projection_bias, device=device, dtype=dtype)

        learns_key, learns_value = projections == "learned", projections != "identity"
        self.query_projection = projection(key_inputs, key_width) if learns_key else None
        self.key_projection = projection(key_inputs, key_width) if learns_key else None
        self.value_projection = projection(value_inputs, value_width) if learns_value else None
        self.output_projection = projection(value_width, embed_dim)
        self.dropout = nn.Dropout(dropout)

        d = value_width // num_heads
        shape = {"dense": (d, d, k), "depthwise": (d, 1, k), "sum": None}[aggregation]
        self.weight = (
            None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        )
        self.bias = nn.Parameter(torch.empty(d, device=device, dtype=dtype)) if bias else None
        self._reset_convolution()

    def reset_parameters(self) -> None:
        """Reinitializes the projections and the weights of the aggregation."""
        for projection in (
            self.query_projection,
            self.key_projection,
            self.value_projection,
            self.output_projection,
        ):
            if projection is not None:
                projection.reset_parameters()
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
    ) -> Tensor:
        """Attends from each query to its k nearest keys.

        Args:
            query: [B, N, E].
            key: [B, M, E]; same as query if None.
            value: [B, M, E]; same as key if None.
            key_mask: [B, M] bool, True where a key may be a neighbor. A query with fewer than k
                such keys attends to those only.

        Returns:
            [B, N, E].
        """
        owner = type(self).__name__
        settings.require_shape(owner, "query", query, ("B", "N", self.embed_dim))
        if key is None and value is not None:
            raise ValueError(f"{owner}: key must be given if value is, got None")
        is_self = key is None or key is query
        key = query if key is None else key
        value = key if value is None else value
        batch = query.shape[0]
        settings.require_shape(owner, "key", key, (batch, "M", self.embed_dim))
        M = key.shape[1]
        settings.require_shape(owner, "value", value, (batch, M, self.embed_dim))
        if key_mask is not None:
            settings.require_shape(owner, "key_mask", key_mask, (batch, M))
            key_mask = key_mask.unsqueeze(1).expand(-1, self.num_heads, -1)  # [B, heads, M]

        # [B, heads, N or M, width of a head]
        q = self._heads(self._inputs(query, "similarity"), self.query_projection)
        k = self._heads(self._inputs(key, "similarity"), self.key_projection)
        v = self._heads(self._inputs(value, "aggregation"), self.value_projection)
        self_indices = None
        if is_self and self.candidates.include_self:
            self_indices = torch.arange(M, device=query.device)
        # [B, heads, N, width of a head]
        y = functional.convnn(
            q,
            k,
            v,
            self.k,
            self.weight,
            self.bias,
            self.candidates((M,), 0, query.device),
            self_indices,
            key_mask,
            self.metric,
            self.rho,
            self.scale,
            self.order,
        )
        joined = y.transpose(1, 2).flatten(2)  # [B, N, width]
        return self.output_projection(self.dropout(joined))

    def _encodes(self, role: str) -> bool:
        return self.positional_encoding in (role, "both")

    def _inputs(self, tokens: Tensor, role: str) -> Tensor:
        """[B, L, E] → [B, L, E], or [B, L, E + 1] with a coordinate concatenated."""
        if not self._encodes(role):
            return tokens
        batch, length, _ = tokens.shape
        # [L, 1]
        grid = positional.grid((length,), 0, self.coordinates, tokens.dtype, tokens.device)
        return torch.cat([tokens, grid.expand(batch, -1, -1)], dim=-1)

    def _heads(self, tokens: Tensor, projection: nn.Linear | None) -> Tensor:
        """[B, L, E] → [B, heads, L, width of a head]."""
        projected = tokens if projection is None else projection(tokens)
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}, k={self.k}"]
        parts += [f"projections={self.projections!r}, rho={self.rho!r}, metric={self.metric!r}"]
        parts += [f"scale={self.scale:g}"] if self.scale != 1.0 else []
        parts += [f"order={self.order!r}"] if self.order != "similarity" else []
        parts += [f"aggregation={self.aggregation!r}"]
        if self.positional_encoding is not None:
            parts += [f"positional_encoding={self.positional_encoding!r}"]
            parts += [f"coordinates={self.coordinates!r}"]
        return ", ".join(parts)
