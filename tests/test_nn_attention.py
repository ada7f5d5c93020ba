# SPDX-License-Identifier: MIT
"""ConvNNAttention, and attention as a special case of ConvNN (section 5.2)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import python_ref
from convnn_kernels import functional
from convnn_kernels.functional import Order
from convnn_kernels.nn import ConvNNAttention, RandomCandidates, SpatialCandidates


def heads(x: Tensor, projection: nn.Linear | None, count: int) -> Tensor:
    assert projection is not None
    return projection(x).unflatten(-1, (count, -1)).transpose(1, 2)


def scaled_dot_product_attention(
    layer: ConvNNAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The output of the layer if it attends to all keys, or to all that the mask allows."""
    q = heads(query, layer.query_projection, layer.num_heads)
    k = heads(key, layer.key_projection, layer.num_heads)
    v = heads(value, layer.value_projection, layer.num_heads)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return layer.output_projection(y.transpose(1, 2).flatten(2))


def kvt(layer: ConvNNAttention, x: Tensor, k: int) -> Tensor:
    """KVT as in its paper: all but the k largest logits of a row are masked."""
    q = heads(x, layer.query_projection, layer.num_heads)
    logits = q @ heads(x, layer.key_projection, layer.num_heads).mT
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)
    return scaled_dot_product_attention(layer, x, x, x, mask)


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("aggregation", ["sum", "depthwise"])
def test_attention_is_recovered(num_heads: int, aggregation: str) -> None:
    layer = ConvNNAttention(16, num_heads, k=13, metric="dot", aggregation=aggregation).double()
    x = torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), scaled_dot_product_attention(layer, x, x, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    inputs = [x, *(p for name, p in layer.named_parameters() if name != "weight")]
    for a, b in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_norms_of_queries_and_keys() -> None:
    query_norm, key_norm = nn.RMSNorm(4), nn.LayerNorm(4)
    layer = ConvNNAttention(
        16, 4, k=13, metric="dot", aggregation="sum", query_norm=query_norm, key_norm=key_norm
    ).double()
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    nn.init.uniform_(key_norm.weight)
    q = query_norm(heads(x, layer.query_projection, 4))
    k = key_norm(heads(x, layer.key_projection, 4))
    y = F.scaled_dot_product_attention(q, k, heads(x, layer.value_projection, 4))
    torch.testing.assert_close(layer(x), layer.output_projection(y.transpose(1, 2).flatten(2)))
    layer.reset_parameters()
    assert torch.equal(key_norm.weight, torch.ones_like(key_norm.weight))
    with pytest.raises(ValueError, match="ConvNNAttention: key_norm must be a module or None"):
        ConvNNAttention(16, key_norm=nn.LayerNorm)


def test_without_an_output_projection() -> None:
    layer = ConvNNAttention(16, 2, k=4, output_projection=False)
    x = torch.randn(2, 5, 16)
    y = layer(x)
    layer.output_projection = nn.Identity()
    assert torch.equal(y, layer(x))
    message = "output_projection must be True where values are 17 wide and not 16, got False"
    with pytest.raises(ValueError, match=message):
        ConvNNAttention(
            16, projections="identity", positional_encoding="both", output_projection=False
        )


def test_cross_attention_is_recovered() -> None:
    layer = ConvNNAttention(16, 2, k=11, metric="dot", aggregation="sum").double()
    query, key, value = (torch.randn(2, n, 16, dtype=torch.float64) for n in (5, 11, 11))
    expected = scaled_dot_product_attention(layer, query, key, value)
    torch.testing.assert_close(layer(query, key, value), expected)
    expected = scaled_dot_product_attention(layer, query, key, key)
    torch.testing.assert_close(layer(query, key), expected)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_kvt_attention(k: int) -> None:
    layer = ConvNNAttention(8, 2, k=k, metric="dot", aggregation="sum").double()
    x = torch.randn(3, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), kvt(layer, x, k), rtol=1e-12, atol=1e-12)


def test_key_mask() -> None:
    layer = ConvNNAttention(8, 2, k=9, metric="dot", aggregation="sum").double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.rand(2, 9) < 0.6
    mask[:, 0] = True
    x.requires_grad_(True)
    y = layer(x, key_mask=mask)
    expected = scaled_dot_product_attention(layer, x, x, x, mask[:, None, None])
    torch.testing.assert_close(y, expected)
    # A masked token has no effect on other tokens.
    (grad,) = torch.autograd.grad((y * mask.unsqueeze(-1)).sum(), x)
    assert not grad[~mask].any()
    with torch.no_grad():
        changed = torch.where(mask.unsqueeze(-1), x, 100.0)
        assert torch.equal(layer(changed, key_mask=mask)[mask], y[mask])


def test_weights_are_ones_and_there_is_no_bias() -> None:
    layer = ConvNNAttention(8, 2, k=3)
    assert layer.weight is not None
    assert layer.weight.shape == (4, 1, 3)
    assert (layer.weight == 1).all()
    assert not any("bias" in name for name, _ in layer.named_parameters())
    assert sum(p.numel() for p in layer.parameters()) == 4 * 64 + 12


def test_dropout_is_applied_to_the_aggregation() -> None:
    layer = ConvNNAttention(8, k=3, dropout=0.5)
    x = torch.randn(2, 9, 8)
    seen: list[Tensor] = []
    layer.output_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(x)
    layer.eval()(x)
    assert 0.3 < (seen[0] == 0).double().mean() < 0.7
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], 2 * seen[1][kept])


@pytest.mark.parametrize(
    "settings",
    [
        {"metric": "euclidean"},
        {"rho": "similarity", "order": "index"},
        {"rho": "ones", "projections": "value"},
        {"aggregation": "dense", "bias": True},
        {"positional_encoding": "both", "coordinates": "pixel"},
        {"candidates": SpatialCandidates(5)},
        {"candidates": SpatialCandidates(stride=2, include_self=False)},
    ],
    ids=str,
)
def test_every_option_against_the_reference(settings: dict) -> None:
    layer = ConvNNAttention(6, 2, k=4, **settings).double()
    x = torch.randn(2, 10, 6, dtype=torch.float64)
    tokens = x
    if "positional_encoding" in settings:
        positions = torch.arange(10.0, dtype=torch.float64).view(1, 10, 1).expand(2, -1, -1)
        tokens = torch.cat([x, positions], -1)
    value = heads(tokens, layer.value_projection, 2)
    query = key = x.unflatten(-1, (2, 3)).transpose(1, 2)
    if layer.query_projection is not None:
        query = heads(tokens, layer.query_projection, 2)
        key = heads(tokens, layer.key_projection, 2)
    y, _, _ = python_ref.forward(
        query,
        key,
        value,
        4,
        layer.weight,
        layer.bias,
        layer.candidates((10,), 0, x.device),
        torch.arange(10) if layer.candidates.include_self else None,
        None,
        layer.metric,
        layer.rho,
        layer.scale,
        layer.order,
    )
    expected = layer.output_projection(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_cross_attention_has_no_self() -> None:
    layer = ConvNNAttention(8, k=3, candidates=RandomCandidates(5))
    query, key = torch.randn(2, 7, 8), torch.randn(2, 30, 8)
    assert layer(query, key).shape == (2, 7, 8)
    torch.manual_seed(0)
    same = layer(query, query, query)
    torch.manual_seed(0)
    assert torch.equal(layer(query), same)


def test_a_temperature_that_learns() -> None:
    """What the error for a tensor as scale says."""
    query = torch.randn(2, 6, 4, requires_grad=True)
    temperature = torch.nn.Parameter(torch.tensor(2.0))
    similarities, indices = functional.select_neighbors(query, query, 3)
    y = functional.aggregate_neighbors(query, similarities * temperature, indices)
    torch.testing.assert_close(y, functional.convnn(query, query, query, 3, scale=2.0))
    y.square().sum().backward()
    assert temperature.grad is not None
    assert temperature.grad != 0


@pytest.mark.parametrize("is_self", [True, False])
@pytest.mark.parametrize("order", ["similarity", "index"])
def test_neighbors_are_those_of_forward(is_self: bool, order: Order) -> None:
    """Aggregating what ``neighbors`` returns gives the output of forward."""
    torch.manual_seed(0)
    candidates = SpatialCandidates(7, self_similarity=0.5)
    layer = ConvNNAttention(8, 2, k=4, candidates=candidates, scale=3.0, order=order)
    layer.query_norm, layer.key_norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
    torch.nn.init.normal_(layer.query_norm.weight)
    x = torch.randn(3, 11, 8)
    key = None if is_self else torch.randn(3, 10, 8)
    mask = torch.rand(3, 11 if is_self else 10) < 0.7
    similarities, indices = layer.neighbors(x, key, key_mask=mask)
    assert similarities.shape == indices.shape == (3, 2, 11, 4)
    assert (similarities == 0.5).any().item() == is_self
    value = layer.value_projection(x if key is None else key).unflatten(2, (2, 4)).transpose(1, 2)
    y = functional.aggregate_neighbors(value, similarities, indices, layer.weight, scale=3.0)
    expected = layer.output_projection(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, key, key_mask=mask), expected)


def test_neighbors_reject_what_forward_rejects() -> None:
    layer = ConvNNAttention(8, k=3)
    with pytest.raises(ValueError, match=r"ConvNNAttention: query must have shape \[B, N, 8\]"):
        layer.neighbors(torch.zeros(2, 9, 7))
    with pytest.raises(ValueError, match=r"key_mask must have shape \[2, 9\], got shape \[2, 8\]"):
        layer.neighbors(torch.zeros(2, 9, 8), key_mask=torch.ones(2, 8, dtype=torch.bool))


def test_settings_may_be_numbers_of_numpy() -> None:
    layer = ConvNNAttention(np.int64(8), np.int64(2), np.int32(3), np.float32(0.5))
    assert repr(layer) == repr(ConvNNAttention(8, 2, 3, 0.5))
    counts = (layer.embed_dim, layer.num_heads, layer.k)
    assert [type(count) for count in counts] == [int] * 3
    assert type(ConvNNAttention(8, scale=np.float64(2)).scale) is float
    assert type(layer.dropout.p) is float


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be a whole number"),
        ({"num_heads": 3}, "num_heads must be a divisor of the width 8 .*, got 3"),
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1, got 0"),
        ({"k": -1}, "k must be a whole number of at least 1, got -1"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
        ({"dropout": None}, "dropout must be between 0 and 1, got None"),
        ({"projections": "coordinates"}, "projections must be 'identity', 'learned' or 'value'"),
        ({"rho": "ones"}, "projections must be other than learned with rho='ones'"),
        ({"metric": "l1"}, "metric must be"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        (
            {"scale": torch.nn.Parameter(torch.tensor(2.0))},
            r"scale must be a number, which gets no gradient \(for a temperature that learns, "
            r"multiply the similarities of functional.select_neighbors by it and call "
            r"functional.aggregate_neighbors\), got Parameter of shape \[\]",
        ),
        ({"dropout": True}, "dropout must be between 0 and 1, got True"),
        ({"num_heads": torch.tensor(2)}, "num_heads must be a whole number of at least 1, got Ten"),
        (
            {"projections": "identity", "positional_encoding": "both", "num_heads": 2},
            "num_heads must be a divisor of the width 9",
        ),
        ({"candidates": 32}, "candidates must be AllCandidates, RandomCandidates or"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"ConvNNAttention: {message}"):
        ConvNNAttention(**{"embed_dim": 8, **settings})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 9, 7)], r"query must have shape \[B, N, 8\], got shape \[2, 9, 7\]"),
        ([(9, 8)], "query must have shape"),
        ([(2, 9, 8), (1, 9, 8)], r"key must have shape \[2, M, 8\], got shape \[1, 9, 8\]"),
        (
            [(2, 9, 8), (2, 5, 8), (2, 6, 8)],
            r"value must have shape \[2, 5, 8\], got shape \[2, 6, 8\]",
        ),
        ([(2, 9, 8), None, (2, 9, 8)], "key must be given if value is, got None"),
        ([(2, 9, 8), None, None, (2, 8)], r"key_mask must have shape \[2, 9\], got shape \[2, 8\]"),
    ],
)
def test_wrong_inputs(shapes: list, message: str) -> None:
    layer = ConvNNAttention(8, k=3)
    with pytest.raises(ValueError, match=f"ConvNNAttention: {message}"):
        layer(*(None if shape is None else torch.zeros(shape) for shape in shapes))


def test_inputs_of_other_dtypes() -> None:
    x, whole = torch.zeros(2, 9, 8), torch.zeros(2, 9, 8, dtype=torch.int64)
    layer = ConvNNAttention(8, k=3, projections="identity", output_projection=False)
    for name in ("query", "key", "value"):
        inputs = {"query": x, "key": x, "value": x, name: whole}
        with pytest.raises(ValueError, match=f"ConvNNAttention: {name} must be float64, .* int64"):
            layer(**inputs)
    for dtype in (torch.int64, torch.uint8, torch.float32):
        with pytest.raises(ValueError, match="ConvNNAttention: key_mask must be bool, got "):
            layer(x, key_mask=torch.ones(2, 9, dtype=dtype))
