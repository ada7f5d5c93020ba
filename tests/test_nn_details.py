# SPDX-License-Identifier: MIT
"""Details of layers: where tokens of a grid lie, what stays frozen, and in which dtype coordinates
are compared."""

import pytest
import torch
from torch import nn

from convnn_kernels.nn import ConvNN1d, ConvNN2d, SpatialCandidates


@pytest.mark.parametrize(("r", "length"), [(3, 8), (4, 7), (5, 12), (2, 3)])
def test_a_grid_is_spaced_evenly_where_its_size_does_not_divide_the_map(
    r: int, length: int
) -> None:
    found = SpatialCandidates(r)((length,), 0, torch.device("cpu"))
    assert found is not None
    assert found.tolist() == [i * length // r for i in range(r)]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_in_a_convolution_stays_so(frozen: str) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    getattr(conv, frozen).requires_grad_(False)
    layer = ConvNN2d.from_conv2d(conv)
    for name in ("weight", "bias"):
        assert getattr(layer, name).requires_grad == (name != frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_coordinates_are_compared_in_float32(dtype: torch.dtype) -> None:
    """In 16 bits, many of 3,000 tokens would be in one place."""
    options = {"projections": "coordinates", "positional_encoding": "similarity"}
    layer = ConvNN1d(2, 2, k=3, metric="euclidean", **options)
    x = torch.randn(1, 2, 3000)
    _, expected = layer.neighbors(x)
    _, indices = layer.neighbors(x.to(dtype))
    assert torch.equal(indices, expected)
