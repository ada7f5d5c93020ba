# SPDX-License-Identifier: MIT
"""ConvNN1d, ConvNN2d and HybridBranch2d: options, and convolution as a special case."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_reference import algorithm_1
from torch import nn
from torch.profiler import ProfilerActivity, profile

import python_ref
from convnn_kernels import functional
from convnn_kernels.nn import (
    AllCandidates,
    ConvNN1d,
    ConvNN2d,
    HybridBranch2d,
    RandomCandidates,
    SpatialCandidates,
)


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(torch.float64)


def set_integers(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(integers(*parameter.shape))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (6, 5), (3, 11)])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv2d_is_recovered(
    size: int, shape: tuple[int, int], depthwise: bool, bias: bool
) -> None:
    groups, out = (3, 3) if depthwise else (1, 4)
    conv = nn.Conv2d(3, out, size, padding=size // 2, groups=groups, bias=bias).double()
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(ConvNN2d.from_conv2d(conv)(x), conv(x), rtol=1e-12, atol=1e-12)
    set_integers(conv)
    x = integers(2, 3, *shape)
    layer = ConvNN2d.from_conv2d(conv)
    assert torch.equal(layer(x), conv(x))
    assert torch.equal(layer.float()(x.float()), conv.float()(x.float()))


@pytest.mark.parametrize("aggregation", ["dense", "depthwise", "sum"])
def test_initial_parameters_are_those_of_a_convolution(aggregation: Any) -> None:
    channels, k = 2048, 4
    layer = ConvNN1d(channels, channels, k, bias=True, aggregation=aggregation)
    inputs = k * (channels if aggregation == "dense" else 1)  # of an output
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            largest = parameter.abs().max().item() * inputs**0.5
            assert 0.99 < largest <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (4, 4), (7, 3)])
@pytest.mark.parametrize("size", [3, 5])
def test_selected_indices_are_the_taps(size: int, shape: tuple[int, int]) -> None:
    height, width = shape
    reach = size // 2
    layer = ConvNN2d.from_conv2d(nn.Conv2d(2, 2, size, padding=reach))
    _, indices = layer.neighbors(torch.randn(3, 2, *shape))
    taps = [
        [(i + di) * (width + 2 * reach) + j + dj for di in range(size) for dj in range(size)]
        for i in range(height)
        for j in range(width)
    ]
    assert torch.equal(indices, torch.tensor(taps).expand(3, -1, -1))


def test_taps_of_a_7x7_kernel_are_not_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"kernel_size must be 1x1, 3x3 or 5x5.*got \(7, 7\)"):
        ConvNN2d.from_conv2d(nn.Conv2d(1, 1, 7, padding=3))
    layer = ConvNN2d(
        1,
        1,
        k=49,
        projections="coordinates",
        positional_encoding="similarity",
        coordinates="pixel",
        metric="euclidean",
    )
    _, indices = layer.neighbors(torch.zeros(1, 1, 11, 11))
    found = {(int(i) // 11 - 5, int(i) % 11 - 5) for i in indices[0, 60]}
    assert {(4, 0), (0, 4), (-4, 0), (0, -4)} <= found
    assert not {(3, 3), (3, -3), (-3, 3), (-3, -3)} & found


@pytest.mark.parametrize("size", [1, 3, 7, 13])
@pytest.mark.parametrize("length", [1, 4, 20])
@pytest.mark.parametrize("groups", [1, 3])
def test_conv1d_is_recovered(size: int, length: int, groups: int) -> None:
    conv = nn.Conv1d(3, 3, size, padding="same", groups=groups).double()
    x = torch.randn(2, 3, length, dtype=torch.float64)
    torch.testing.assert_close(ConvNN1d.from_conv1d(conv)(x), conv(x), rtol=1e-12, atol=1e-12)
    set_integers(conv)
    x = integers(2, 3, length)
    layer = ConvNN1d.from_conv1d(conv)
    assert torch.equal(layer(x), conv(x))
    _, indices = layer.neighbors(x)
    taps = torch.arange(length).unsqueeze(1) + torch.arange(size)
    assert torch.equal(indices, taps.expand(2, -1, -1))


def test_gradients_are_those_of_the_convolution() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    layer = ConvNN2d.from_conv2d(conv)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.autograd.grad(conv(x), (x, *conv.parameters()), grad)
    got = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-12, atol=1e-12)


def test_taps_are_exact_on_a_large_map_under_autocast() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    layer = ConvNN2d.from_conv2d(conv)
    x = torch.randn(1, 1, 2, 700)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = conv(x)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"dilation": 2, "padding": 2}, "dilation"),
        ({"padding": 0}, "padding"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode"),
        ({"padding": 1, "groups": 2}, "groups"),
    ],
)
def test_other_convolutions_are_rejected(setting: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"from_conv2d: {name} must be"):
        ConvNN2d.from_conv2d(nn.Conv2d(4, 4, 3, **setting))
    with pytest.raises(ValueError, match=f"from_conv1d: {name} must be"):
        ConvNN1d.from_conv1d(nn.Conv1d(4, 4, 3, **setting))


def test_unequal_strides_are_rejected() -> None:
    message = r"from_conv2d: stride must be the same along both axes, got \(2, 1\)"
    with pytest.raises(ValueError, match=message):
        ConvNN2d.from_conv2d(nn.Conv2d(4, 4, 3, (2, 1), 1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 6), (7, 5), (8, 9)])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("stride", [2, 3])
def test_strided_conv2d_is_recovered(size: int, shape: tuple[int, int], stride: int) -> None:
    conv = nn.Conv2d(3, 4, size, stride, size // 2).double()
    set_integers(conv)
    x = integers(2, 3, *shape)
    assert torch.equal(ConvNN2d.from_conv2d(conv)(x), conv(x))


@pytest.mark.parametrize("length", [1, 2, 9, 10])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_strided_conv1d_is_recovered(size: int, length: int) -> None:
    conv = nn.Conv1d(3, 4, size, 2, size // 2).double()
    set_integers(conv)
    x = integers(2, 3, length)
    assert torch.equal(ConvNN1d.from_conv1d(conv)(x), conv(x))


@pytest.mark.parametrize("candidates", [AllCandidates(True), SpatialCandidates(9)])
@pytest.mark.parametrize("positional_encoding", [None, "both"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("projections", ["learned", "identity"])
def test_a_stride_computes_every_second_token(
    projections: str, padding: int, positional_encoding: str | None, candidates: nn.Module
) -> None:
    """A strided layer gives what it gives without the stride, on its grid."""
    layer = ConvNN2d(
        2,
        3,
        k=4,
        padding=padding,
        projections=projections,
        positional_encoding=positional_encoding,
        candidates=candidates,
    ).double()
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    every, (_, indices) = layer(x), layer.neighbors(x)
    layer.stride = 2
    y = layer(x)
    torch.testing.assert_close(y, every[..., ::2, ::2], check_stride=False)
    assert y.is_contiguous(memory_format=torch.channels_last)
    rows = torch.arange(30).view(5, 6)[::2, ::2].flatten()
    assert torch.equal(layer.neighbors(x)[1], indices[:, rows])


@pytest.mark.slow
def test_a_stride_compiles_for_any_size() -> None:
    layer = ConvNN2d(2, 3, k=4, stride=2, projections="identity")
    assert "stride=2" in repr(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 6), (8, 7)):
        x = torch.randn(2, 2, *shape)
        torch.testing.assert_close(compiled(x), layer(x))
    with pytest.raises(ValueError, match="ConvNN1d: stride must be a whole number of at least 1"):
        ConvNN1d(2, 3, stride=0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_one_branch_alone_is_not_copied(ratio: float) -> None:
    layer, x = HybridBranch2d(3, 4, 3, ratio), torch.randn(1, 3, 5, 6)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        layer(x)
    joins = any(event.name == "aten::cat" for event in recorded.events())
    assert joins == (ratio == 0.5)


def test_strided_hybrid_branches() -> None:
    x = torch.randn(2, 4, 7, 6)
    for size in (3, 5):
        expected = nn.Conv2d(4, 6, size, 2, size // 2)(x).shape
        for ratio in (0.0, 0.5, 1.0):
            assert HybridBranch2d(4, 6, size, ratio, stride=2)(x).shape == expected
    with pytest.raises(ValueError, match="HybridBranch2d: kernel_size must be odd with a stride"):
        HybridBranch2d(4, 6, 2, stride=2)


def test_frozen_weights_remain_frozen() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1)
    conv.weight.requires_grad_(False)
    layer = ConvNN2d.from_conv2d(conv)
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)


def test_an_even_kernel_is_rejected() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        ConvNN1d.from_conv1d(nn.Conv1d(1, 1, 4, padding="same"))


@pytest.mark.parametrize("rho", ["softmax", "similarity"])
def test_algorithm_1(rho: str) -> None:
    layer = ConvNN1d(5, 7, k=4, rho=rho).double()
    x = torch.randn(2, 5, 11, dtype=torch.float64)

    projections = (layer.query_projection, layer.key_projection, layer.value_projection)
    q, k, v = (F.conv1d(x, linear.weight.unsqueeze(-1)) for linear in projections)
    torch.testing.assert_close(layer(x), algorithm_1(q, k, v, layer.weight, layer.bias, rho))


@pytest.mark.parametrize("positional_encoding", [None, "similarity", "aggregation", "both"])
@pytest.mark.parametrize("projections", ["identity", "learned", "value"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("coordinates", ["unit", "pixel"])
def test_tokens_of_a_map(
    positional_encoding: str | None, projections: str, padding: int, coordinates: str
) -> None:
    """Flattening, padding, coordinates and projections, computed token by token."""
    layer = ConvNN2d(
        2,
        3,
        k=4,
        padding=padding,
        projections=projections,
        positional_encoding=positional_encoding,
        coordinates=coordinates,
    ).double()
    height, width = 3, 4
    x = torch.randn(2, 2, height, width, dtype=torch.float64)
    rows, columns = height + 2 * padding, width + 2 * padding
    tokens = torch.zeros(2, rows, columns, 2, dtype=torch.float64)
    grid = torch.zeros(rows, columns, 2, dtype=torch.float64)
    inside = []
    for i in range(rows):
        for j in range(columns):
            position = [i, j]
            if coordinates == "unit":
                position = [2 * i / (rows - 1) - 1, 2 * j / (columns - 1) - 1]
            grid[i, j] = torch.tensor(position, dtype=torch.float64)
            if padding <= i < height + padding and padding <= j < width + padding:
                tokens[:, i, j] = x[:, :, i - padding, j - padding]
                inside.append(i * columns + j)
    with_positions = torch.cat([tokens, grid.expand(2, -1, -1, -1)], -1).flatten(1, 2)
    plain = tokens.flatten(1, 2)
    key = with_positions if positional_encoding in ("similarity", "both") else plain
    value = with_positions if positional_encoding in ("aggregation", "both") else plain
    query = key[:, inside]
    if layer.query_projection and layer.key_projection:
        query, key = layer.query_projection(query), layer.key_projection(key)
    if layer.value_projection:
        value = layer.value_projection(value)
    expected = functional.convnn(query, key, value, 4, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected.mT.reshape(2, 3, height, width))
    similarities, indices = layer.neighbors(x)
    torch.testing.assert_close(similarities, functional.select_neighbors(query, key, 4)[0])
    assert torch.equal(indices, functional.select_neighbors(query, key, 4)[1])


@pytest.mark.parametrize("positional_encoding", ["similarity", "both"])
@pytest.mark.parametrize("projections", ["identity", "learned"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_standardized_features(
    stride: int, padding: int, projections: str, positional_encoding: str
) -> None:
    """The deviation of every map is computed from all its numbers, those of padding included."""
    settings: dict[str, Any] = {
        "padding": padding,
        "stride": stride,
        "projections": projections,
        "positional_encoding": positional_encoding,
    }
    layer = ConvNN2d(2, 3, k=4, standardize=True, **settings).double()
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64) * torch.tensor([3.0, 0.1]).view(2, 1, 1, 1)
    x.requires_grad_(True)
    plain = F.pad(x, (padding,) * 4).flatten(2).mT  # [B, M, C]
    numbers = plain.flatten(1)  # [B, M * C]
    centered = numbers - numbers.mean(1, keepdim=True)
    variance = centered.square().sum(1) / (numbers.shape[1] - 1)
    scaled = plain / (variance.sqrt() + 1e-6).view(2, 1, 1)
    shape = (3 + 2 * padding, 5 + 2 * padding)
    axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 2).expand(2, -1, -1)
    key = torch.cat([scaled, grid], -1)
    value = torch.cat([plain, grid], -1) if positional_encoding == "both" else plain
    rows = torch.arange(shape[0] * shape[1]).view(shape)
    inside = rows[padding : 3 + padding, padding : 5 + padding][::stride, ::stride]
    query = key[:, inside.flatten()]
    if projections == "learned":
        query, key = layer.query_projection(query), layer.key_projection(key)
        value = layer.value_projection(value)
    y, expected = layer(x), functional.convnn(query, key, value, 4, layer.weight, layer.bias)
    expected = expected.mT.unflatten(-1, inside.shape)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad), rtol=1e-9, atol=0
    )
    assert not torch.allclose(y, ConvNN2d(2, 3, k=4, **settings).double()(x))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 4), (2, 3, 1), (1, 3, 4)], ids=str)
def test_standardized_maps_without_a_deviation(shape: tuple[int, ...]) -> None:
    layer = ConvNN1d(
        shape[1], 2, k=3, standardize=True, positional_encoding="similarity", metric="euclidean"
    )
    for x in (torch.zeros(shape), torch.full(shape, 3.0)):
        x.requires_grad_(True)
        y = layer(x)
        assert y.isfinite().all()
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("projections", ["identity", "learned", "coordinates"])
def test_order_of_coordinates(projections: str) -> None:
    """The last two channels of queries, keys and values are swapped."""
    settings: dict[str, Any] = {
        "k": 4,
        "padding": 1,
        "projections": projections,
        "positional_encoding": "both",
    }
    yx = ConvNN2d(3, 4, **settings).double()
    xy = ConvNN2d(3, 4, coordinate_order="xy", **settings).double()
    swapped = torch.tensor([0, 1, 2, 4, 3])
    inputs = [name for name in yx.state_dict() if name.endswith("projection.weight")]
    state = {
        name: each[:, swapped] if name in inputs or each.shape == (4, 5, 4) else each
        for name, each in yx.state_dict().items()
    }
    xy.load_state_dict(state)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(xy(x), yx(x))
    xy.load_state_dict(yx.state_dict())
    assert not torch.allclose(xy(x), yx(x))


def test_layer_against_the_reference() -> None:
    layer = ConvNN2d(3, 4, k=5, projections="identity", rho="ones", padding=1).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    key = F.pad(x, (1, 1, 1, 1)).flatten(2).mT
    expected, _, _ = python_ref.forward(
        x.flatten(2).mT, key, key, 5, layer.weight, layer.bias, rho="ones"
    )
    torch.testing.assert_close(layer(x), expected.mT.unflatten(-1, (4, 4)))


def test_padding_adds_keys_to_small_maps() -> None:
    x = torch.randn(1, 3, 2, 2)
    for padding, count in ((1, 9), (0, 4)):
        similarities, _ = ConvNN2d(3, 4, k=9, padding=padding).neighbors(x)
        assert torch.equal(similarities.isfinite().sum(-1), torch.full((1, 4), count))


@pytest.mark.parametrize("aggregation", ["depthwise", "sum"])
def test_other_aggregations(aggregation: str) -> None:
    layer = ConvNN1d(
        4, 4, k=3, projections="identity", aggregation=aggregation, metric="dot", scale=0.5
    ).double()
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    assert (layer.weight is None) == (aggregation == "sum")
    expected, _, _ = python_ref.forward(
        x.mT, x.mT, x.mT, 3, layer.weight, layer.bias, metric="dot", scale=0.5
    )
    torch.testing.assert_close(layer(x), expected.mT)


def test_self_is_first_with_include_self() -> None:
    x = torch.randn(2, 3, 5, 6)
    layer = ConvNN2d(
        3, 3, k=4, padding=1, metric="dot", projections="identity", candidates=AllCandidates(True)
    )
    _, indices = layer.neighbors(x)
    rows = torch.arange(7 * 8).view(7, 8)[1:-1, 1:-1].flatten()
    assert torch.equal(indices[..., 0], rows.expand(2, -1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"k": 2.0}, "k must be a whole number of at least 1, got 2.0"),
        ({"padding": -1}, "padding must be a whole number of at least 0, got -1"),
        ({"in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
        ({"out_channels": True}, "out_channels must be a whole number of at least 1, got True"),
        ({"rho": "max"}, "rho must be 'softmax', 'ones' or 'similarity', got 'max'"),
        ({"metric": "l1"}, "metric must be 'cosine', 'dot' or 'euclidean', got 'l1'"),
        ({"order": "random"}, "order must be 'similarity' or 'index', got 'random'"),
        ({"aggregation": "mean"}, "aggregation must be 'dense', 'depthwise' or 'sum', got 'mean'"),
        ({"aggregation": "sum"}, "out_channels must be the 3 channels of the values"),
        ({"projections": "none"}, "projections must be 'identity', 'learned', 'value' or"),
        ({"rho": "ones"}, "projections must be other than learned with rho='ones'"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"scale": "big"}, "scale must be a finite number, got 'big'"),
        ({"scale": None}, "scale must be a finite number, got None"),
        ({"scale": 10**400}, "scale must be a finite number, got 1000"),
        ({"scale": True}, "scale must be a finite number, got True"),
        ({"scale": torch.tensor(2.0)}, "scale must be a number, which gets no gradient .*select_n"),
        (
            {"k": torch.tensor(4)},
            r"k must be a whole number .*, got Tensor of shape \[\]",
        ),
        ({"k": np.ones(3)}, r"k must be a whole number of at least 1, got ndarray of shape \[3\]"),
        ({"metric": np.ones(3)}, r"metric must be .*, got ndarray of shape \[3\]"),
        ({"key_channels": True}, "key_channels must be a whole number of at least 1, got True"),
        ({"scale": 2.0, "rho": "similarity"}, "scale must be 1.0 unless rho is 'softmax', got 2.0"),
        ({"positional_encoding": "add"}, "positional_encoding must be None, 'similarity', "),
        ({"coordinates": "polar"}, "coordinates must be 'unit' or 'pixel', got 'polar'"),
        ({"coordinate_order": "zx"}, "coordinate_order must be 'yx' or 'xy', got 'zx'"),
        (
            {"standardize": True, "positional_encoding": "aggregation"},
            "positional_encoding must be 'similarity' or 'both' with standardize=True, got 'agg",
        ),
        (
            {"standardize": True, "projections": "coordinates", "positional_encoding": "both"},
            "standardize must be False with projections='coordinates', which does not compare",
        ),
        ({"projections": "coordinates"}, "positional_encoding must be 'similarity' or 'both'"),
        ({"projections": "identity", "key_channels": 4}, "key_channels must be None"),
        ({"value_channels": 0}, "value_channels must be a whole number"),
        ({"projections": "identity", "projection_bias": True}, "projection_bias must be False"),
        ({"candidates": "all"}, "candidates must be AllCandidates, RandomCandidates or"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    for layer in (ConvNN1d, ConvNN2d):
        with pytest.raises(ValueError, match=f"{layer.__name__}: {message}"):
            layer(**{"in_channels": 3, "out_channels": 6, **settings})


def test_settings_may_be_numbers_of_numpy() -> None:
    layer = ConvNN2d(
        np.int64(3),
        np.int32(6),
        np.int64(4),
        padding=np.uint8(1),
        key_channels=np.int64(5),
        value_channels=np.int64(7),
        scale=np.float32(2.0),
    )
    plain = ConvNN2d(3, 6, 4, padding=1, key_channels=5, value_channels=7, scale=2.0)
    assert repr(layer) == repr(plain)
    for name in ("in_channels", "out_channels", "k", "padding", "scale"):
        assert type(getattr(layer, name)) is type(getattr(plain, name))
    assert layer(torch.randn(1, 3, 4, 4)).shape == (1, 6, 4, 4)

    hybrid = HybridBranch2d(np.int64(3), np.int64(100), np.int64(3), np.float32(0.29))
    assert type(hybrid.branch_ratio) is float
    assert repr(hybrid.convnn) == repr(HybridBranch2d(3, 100, 3, 0.29).convnn)


@pytest.mark.parametrize("make", [ConvNN1d, ConvNN2d])
def test_errors_of_python_name_the_class(make: type) -> None:
    for call in (
        lambda: make(3, 8, dilation=2),
        lambda: make(3),
        lambda: make(3, 8)(),
        lambda: make(3, 8).neighbors(),
        lambda: make(3, 8).reset_parameters(1),
    ):
        with pytest.raises(TypeError, match=rf"^{make.__name__}\.\w+\(\) "):
            call()


def test_only_a_convolution_is_taken_over() -> None:
    for conv in (nn.ConvTranspose2d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 3), nn.Linear(3, 3)):
        name = type(conv).__name__
        with pytest.raises(
            ValueError, match=f"from_conv2d: conv must be an nn.Conv2d .*, got {name}"
        ):
            ConvNN2d.from_conv2d(conv)
    with pytest.raises(
        ValueError, match=r"from_conv2d: conv must be an nn.Conv2d .*, got ndarray$"
    ):
        ConvNN2d.from_conv2d(np.zeros(3))
    with pytest.raises(ValueError, match=r"from_conv1d: conv must be an nn.Conv1d .*, got Conv2d"):
        ConvNN1d.from_conv1d(nn.Conv2d(3, 3, 1))


class Standardized2d(nn.Conv2d):
    """Its weight is not what it convolves with, as in timm's ResNetV2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


class Standardized1d(nn.Conv1d):
    pass


def test_a_subclass_of_a_convolution_is_rejected() -> None:
    for make, conv in (
        (ConvNN2d.from_conv2d, Standardized2d(3, 3, 3, padding=1)),
        (ConvNN2d.from_conv2d, nn.LazyConv2d(3, 3, padding=1)),
        (ConvNN1d.from_conv1d, Standardized1d(3, 3, 3, padding=1)),
    ):
        name = type(conv).__name__
        with pytest.raises(ValueError, match=f"conv must be .* not of a subclass, got {name}"):
            make(conv)


def test_a_convolution_of_another_dtype_is_rejected() -> None:
    message = "conv.weight must be float64, float32, float16 or bfloat16, got complex64"
    with pytest.raises(ValueError, match=f"from_conv2d: {message}"):
        ConvNN2d.from_conv2d(nn.Conv2d(3, 3, 3, padding=1, dtype=torch.complex64))


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"ConvNN1d: input must have shape \[B, 3, L\], got shape"):
        ConvNN1d(3, 4)(torch.zeros(1, 4, 20))
    with pytest.raises(ValueError, match=r"ConvNN2d: input must have shape \[B, 3, H, W\], got"):
        ConvNN2d(3, 4)(torch.zeros(3, 20, 20))
    with pytest.raises(ValueError, match=r"HybridBranch2d: input must have shape \[B, 3, H, W\]"):
        HybridBranch2d(3, 4)(torch.zeros(1, 2, 20, 20))
    with pytest.raises(ValueError, match="ConvNN2d: input must be a tensor, got None"):
        ConvNN2d(3, 4)(None)
    with pytest.raises(ValueError, match=r"ConvNN2d: input must be a tensor, got ndarray of shape"):
        ConvNN2d(3, 4)(np.zeros((1, 3, 20, 20)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("projections", ["learned", "identity"])
def test_inputs_of_other_dtypes(projections: str, dtype: torch.dtype) -> None:
    got = str(dtype).removeprefix("torch.")
    message = f"input must be float64, float32, float16 or bfloat16, got {got}"
    layers = [ConvNN1d(3, 4, projections=projections), ConvNN2d(3, 4, projections=projections)]
    layers += [HybridBranch2d(3, 4, branch_ratio=ratio) for ratio in (0, 0.5)]
    for layer in layers:
        shape = (1, 3, 20) if isinstance(layer, ConvNN1d) else (1, 3, 5, 5)
        calls = [layer, layer.neighbors] if hasattr(layer, "neighbors") else [layer]
        for call in calls:
            with pytest.raises(ValueError, match=f"{type(layer).__name__}: {message}"):
                call(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("ratio", "channels"), [(0.0, 0), (0.125, 12), (0.29, 29), (0.5, 50), (0.999, 99), (1.0, 100)]
)
def test_branches_share_the_channels(ratio: float, channels: int) -> None:
    layer = HybridBranch2d(3, 100, branch_ratio=ratio)
    assert (layer.convnn.out_channels if layer.convnn else 0) == channels
    assert (layer.conv.out_channels if layer.conv else 0) == 100 - channels
    # A channel has as many parameters in one branch as in the other.
    assert sum(p.numel() for p in layer.parameters()) == 100 * (3 * 9 + 1) + 100 * 101


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_hybrid_is_its_branches(kernel_size: int) -> None:
    layer = HybridBranch2d(3, 5, kernel_size, candidates=SpatialCandidates(9))
    x = torch.randn(2, 3, 6, 6)
    assert layer.convnn is not None
    assert layer.conv is not None
    assert layer.convnn.k == kernel_size**2
    expected = layer.fuse(torch.cat([layer.conv(x), layer.convnn(x)], 1))
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == (2, 5, 6, 6)


def test_settings_of_the_branch() -> None:
    layer = HybridBranch2d(
        3,
        4,
        positional_encoding="both",
        coordinate_order="xy",
        standardize=True,
        candidates=SpatialCandidates(4, spacing="ends", self_similarity=1.0),
    )
    text = repr(layer.convnn)
    for part in ("coordinate_order='xy'", "standardize=True", "self_similarity=1.0", "'ends'"):
        assert part in text
        assert part not in repr(HybridBranch2d(3, 4, positional_encoding="both"))
    # After what a layer without an encoding has.
    assert HybridBranch2d(3, 4).convnn.extra_repr() + ", positional_encoding='both'" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branch_ratio": 1.1}, "branch_ratio must be between 0 and 1, got 1.1"),
        ({"branch_ratio": True}, "branch_ratio must be between 0 and 1, got True"),
        ({"branch_ratio": torch.tensor(0.5)}, "branch_ratio must be between 0 and 1, got Tensor"),
        ({"branch_ratio": float("nan")}, "branch_ratio must be between 0 and 1, got nan"),
        ({"kernel_size": 0}, "kernel_size must be a whole number of at least 1"),
        ({"branch_ratio": None}, "branch_ratio must be between 0 and 1, got None"),
        ({"in_channels": 0}, "in_channels must be a whole number"),
        ({"out_channels": 0}, "out_channels must be a whole number"),
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"padding": -1}, "padding must be a whole number of at least 0, got -1"),
        ({"metric": "l1"}, "metric must be"),
        ({"rho": "max"}, "rho must be"),
        ({"order": "random"}, "order must be"),
        ({"scale": 2.0}, "scale must be 1.0 unless rho is 'softmax', got 2.0"),
        ({"coordinates": "polar"}, "coordinates must be"),
        ({"coordinate_order": None}, "coordinate_order must be 'yx' or 'xy', got None"),
        ({"standardize": True}, "positional_encoding must be 'similarity' or 'both' with standard"),
        ({"aggregation": "mean"}, "aggregation must be"),
        ({"projections": "learned"}, "projections must be other than learned"),
        ({"projections": "coordinates"}, "positional_encoding must be 'similarity' or 'both'"),
        ({"candidates": 32}, "candidates must be AllCandidates, RandomCandidates or"),
    ],
)
@pytest.mark.parametrize("branch_ratio", [0.0, 0.5])
def test_wrong_hybrid_settings(settings: dict, message: str, branch_ratio: float) -> None:
    """Errors name the layer, not its branch, which may not exist."""

    class Derived(HybridBranch2d):
        pass

    options = {"in_channels": 3, "out_channels": 4, "branch_ratio": branch_ratio, **settings}
    for layer in (HybridBranch2d, Derived):
        with pytest.raises(ValueError, match=f"^{layer.__name__}: {message}"):
            layer(**options)


@pytest.mark.parametrize("aggregation", ["depthwise", "sum"])
def test_a_branch_that_does_not_mix_channels(aggregation: str) -> None:
    x = torch.randn(2, 3, 5, 5)
    layer = HybridBranch2d(3, 6, aggregation=aggregation)
    assert layer(x).shape == (2, 6, 5, 5)
    layer = HybridBranch2d(3, 10, aggregation=aggregation, positional_encoding="both")
    assert layer(x).shape == (2, 10, 5, 5)
    message = r"^HybridBranch2d: branch_ratio \* out_channels must be the 3 channels of .*, got 2"
    with pytest.raises(ValueError, match=message):
        HybridBranch2d(3, 4, aggregation=aggregation)


def test_settings_are_printed() -> None:
    text = repr(ConvNN2d(3, 4, order="index", candidates=RandomCandidates(20)))
    for part in ("3, 4, k=9", "order='index'", "RandomCandidates(20, include_self=True"):
        assert part in text


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tokens_of_a_map_are_one_tensor(
    monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format
) -> None:
    """Operators read rows of adjacent channels: each would copy those of a map for itself."""
    given = []

    def convnn(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> torch.Tensor:
        given.extend((query, key, value))
        return value

    monkeypatch.setattr(functional, "convnn", convnn)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    ConvNN2d(3, 3, k=2, projections="identity")(x)
    assert all(each.is_contiguous() for each in given)
    assert len({each.data_ptr() for each in given}) == 1
    if memory_format == torch.channels_last:
        assert given[0].data_ptr() == x.data_ptr()
