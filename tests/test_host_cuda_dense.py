# SPDX-License-Identifier: MIT
"""The dense convolution for Hopper on the host execution layer, compared with the reference."""

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SHORT
from host_cuda_program import HostCuda
from torch import Tensor

from python_ref import aggregate as reference
from python_ref import assert_aggregate, assert_forward

pytestmark = [pytest.mark.slow, pytest.mark.host_cuda]

DTYPES = (torch.float16, torch.bfloat16)
RHOS = ("softmax", "ones", "similarity")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def neighbors(N: int, k: int, M: int) -> Tensor:
    return torch.randint(M, (N, k), generator=torch.Generator().manual_seed(3))


def on(device: HostCuda, multiprocessors: int) -> Callable[..., Tensor]:
    return functools.partial(device.hopper_aggregate_dense, multiprocessors=multiprocessors)


class Aggregation:
    """The random case of a seed.

    The number of multiprocessors decides about the size of a tile and about how many a block
    computes. A tile has 128 or 256 queries and 64 or 128 outputs, a chunk 64 channels.
    """

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.seed = seed
        self.dtype = DTYPES[seed // 3 % 2]
        self.rho = RHOS[seed % 3]
        self.scale = draw.choice((1.0, 0.125, -1.0)) if self.rho == "softmax" else 1.0
        self.similarity_dtype = draw.choice((torch.float32, torch.float32, torch.float64))
        self.batch, self.N = draw.choice(((1, 1), (1, 130), (2, 70), (5, 64), (3, 150), (1, 515)))
        self.M = draw.choice((1, 7, 64, 300))
        self.C = draw.choice((1, 3, 8, 24, 40, 64, 72, 130))
        self.O = draw.choice((1, 8, 24, 63, 64, 65, 128, 130))
        self.k = draw.choice((1, 2, 3, 5, 9, 70 if self.C < 40 else 4))
        self.multiprocessors = draw.choice((1, 2, 3, 132))
        self.content = draw.choice(("normal", "normal", "special"))
        self.missing = 0.0 if self.content == "special" else draw.choice((0.0, 0.2, 1.0))
        self.has_bias = draw.random() < 0.6

    @property
    def id(self) -> str:
        return (
            f"s{self.seed}-{SHORT[self.dtype]}-s{SHORT[self.similarity_dtype]}-B{self.batch}"
            f"-N{self.N}-M{self.M}-C{self.C}-O{self.O}-k{self.k}-{self.rho}-p{self.multiprocessors}"
            f"-{self.content}-missing{self.missing:g}" + ("-bias" if self.has_bias else "")
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """value, similarities, indices, weight and bias."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            X = torch.randn(shape, generator=generator)
            if self.content == "special":
                for special in (math.nan, math.inf, -math.inf):
                    X[torch.rand(shape, generator=generator) < 0.001] = special
            return X.to(self.dtype)

        shape = (self.batch, self.N, self.k)
        s = torch.randn(shape, generator=generator, dtype=torch.float64)
        s[torch.rand(shape, generator=generator) < self.missing] = -math.inf
        I = torch.randint(self.M, shape, generator=generator)
        value, weight = draw(self.batch, self.M, self.C), draw(self.O, self.C, self.k)
        bias = draw(self.O) if self.has_bias else None
        return value, s.to(self.similarity_dtype), I, weight, bias


@pytest.mark.parametrize(
    "case", [Aggregation(seed) for seed in range(90)], ids=lambda case: case.id
)
def test_dense_aggregation(case: Aggregation, device: HostCuda) -> None:
    device.seed = case.seed
    aggregate = on(device, case.multiprocessors)
    assert_aggregate(
        aggregate, *case.tensors(), case.rho, case.scale, backward=False, seed=case.seed
    )


# Outputs and multiprocessors for which a block computes several tiles of 600 queries.
SIZES = [(64, 2), (64, 4), (130, 2), (130, 8)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rho", ["softmax", "ones"])
@pytest.mark.parametrize(("O", "multiprocessors"), SIZES)
def test_orders_of_threads(
    O: int, multiprocessors: int, rho: str, seed: int, device: HostCuda
) -> None:
    dtype, N, C, k = DTYPES[seed % 2], 600, 72, 3
    device.seed = seed
    value, weight = normal(50, C, seed=1, dtype=dtype), normal(O, C, k, seed=2, dtype=dtype)
    bias, s = normal(O, seed=4, dtype=dtype), normal(N, k, seed=5)
    aggregate = on(device, multiprocessors)
    assert_aggregate(aggregate, value, s, neighbors(N, k, 50), weight, bias, rho, backward=False)


def test_sizes_of_tiles(programs: Path) -> None:
    device = HostCuda(programs / "host_cuda")
    for O, multiprocessors in SIZES:
        aggregate = on(device, multiprocessors)
        aggregate(normal(9, 8).half(), normal(600, 1), neighbors(600, 1, 9), normal(O, 8, 1).half())
    launched = device.close()
    sizes = {of.shared_bytes for kernel, of in launched.items() if "dense_kernel" in kernel.name}
    assert len(sizes) == len(SIZES)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rho", ["similarity", "ones"])
@pytest.mark.parametrize(("O", "multiprocessors"), SIZES)
def test_nothing_is_computed_twice(
    O: int, multiprocessors: int, rho: str, seed: int, device: HostCuda
) -> None:
    """Each product, of 16 channels, is 2^27 - 2^27 + 1. The matrix instruction makes that 0, and
    what computes an output that is not finite again makes it 1.

    So a NaN that should not have been there shows, although it would have been repaired.
    """
    C, k = 144, 3
    device.seed = seed
    value = torch.tensor([2.0**27, 2.0**27, 1.0] + [0.0] * 13).repeat(50, C // 16).bfloat16()
    weight = torch.tensor([1.0, -1.0, 1.0] + [0.0] * 13).repeat(C // 16)[None, :, None]
    weight = weight.expand(O, C, k).bfloat16()
    s = torch.ones(600, k)
    output = on(device, multiprocessors)(value, s, neighbors(600, k, 50), weight, None, rho)
    assert not output.any()


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_only_the_output_is_rounded(dtype: torch.dtype, rho: str, device: HostCuda) -> None:
    """Nearly all outputs are the exact ones rounded once: nothing before had 16 bits."""
    value, weight = normal(50, 130, dtype=dtype), normal(40, 130, 9, seed=1, dtype=dtype)
    s, I, bias = normal(130, 9, seed=2), neighbors(130, 9, 50), normal(40, seed=4, dtype=dtype)
    output = device.hopper_aggregate_dense(value, s, I, weight, bias, rho)
    wide = [X.double() for X in (value, s, weight, bias)]
    exact = reference(wide[0], wide[1], I, wide[2], wide[3], rho).to(dtype)
    share = float((output == exact).double().mean())
    assert share > 0.97


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("C", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_what_missing_neighbors_have_does_not_matter(
    dtype: torch.dtype, C: int, bad: float, rho: str, device: HostCuda
) -> None:
    """The second neighbor of each query is missing, and all of the eighth query."""
    value, weight = normal(9, C, dtype=dtype), normal(C, C, 3, seed=2, dtype=dtype)
    s, I = normal(70, 3, seed=3), neighbors(70, 3, 8)
    s[:, 1], s[7] = -math.inf, -math.inf
    I[:, 1], I[7] = 8, 8
    value[8], weight[..., 1] = bad, 0

    def aggregate(value: Tensor, s: Tensor, I: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        not_finite = torch.full_like(weight, bad)
        weight = torch.where(torch.tensor([False, True, False]), not_finite, weight)
        return device.hopper_aggregate_dense(value, s, I, weight, *rest)

    assert_aggregate(aggregate, value, s, I, weight, rho=rho, backward=False)


def test_indices_out_of_range_are_missing(device: HostCuda) -> None:
    value, weight = normal(9, 16, dtype=torch.float16), normal(8, 16, 3, dtype=torch.float16)
    s, I = normal(70, 3, seed=3), neighbors(70, 3, 9)
    s[::2, 1] = -math.inf
    outside = I.clone()
    outside[::2, 1] = torch.tensor([-1, 9, 2**62, -(2**40), 2**32])[torch.arange(35) % 5]
    given = s.clone()
    given[::2, 1] = 0.5

    def aggregate(value: Tensor, _: Tensor, I: Tensor, *rest: Any) -> Tensor:
        return device.hopper_aggregate_dense(value, given, outside, *rest)

    assert_aggregate(aggregate, value, s, I, weight, rho="ones", backward=False)


@pytest.mark.parametrize("magnitude", [3e38, 3e36])
def test_products_that_overflow_only_without_rho(magnitude: float, device: HostCuda) -> None:
    """rho V W is about 1, V W beyond the range of float32, or its sum."""
    C, k, dtype = 24, 2, torch.bfloat16
    value, weight = normal(9, C).abs().to(dtype), normal(8, C, k, seed=2).abs()
    s = normal(70, k, seed=3).abs() / magnitude / 20
    assert_aggregate(
        *(device.hopper_aggregate_dense, value, s, neighbors(70, k, 9)),
        *((weight * magnitude / 5).to(dtype), None, "similarity"),
        backward=False,
    )


@pytest.mark.parametrize("value_offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_the_largest_outputs(dtype: torch.dtype, value_offset: int, device: HostCuda) -> None:
    """Sums beyond the range of the output, or not far below it."""
    largest = torch.finfo(dtype).max / 64
    value = (torch.arange(9)[:, None] + value_offset) * torch.ones(9, 8) * largest
    weight = torch.ones(8, 8, 1, dtype=dtype)
    s, I = torch.ones(70, 1), neighbors(70, 1, 9)
    assert_aggregate(
        *(device.hopper_aggregate_dense, value.to(dtype), s, I, weight), rho="ones", backward=False
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_forward(dtype: torch.dtype, device: HostCuda) -> None:
    """The dense convolution behind the selection for Hopper."""
    query, value = normal(2, 70, 16, dtype=dtype), normal(2, 70, 24, seed=1, dtype=dtype)
    weight, bias = normal(40, 24, 3, seed=2, dtype=dtype), normal(40, seed=4, dtype=dtype)
    assert_forward(device.hopper_forward, query, query, value, 3, weight, bias, backward=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "not of 16 bits"),
        ({"kind": "depthwise"}, "not dense"),
    ],
)
def test_refusals(change: dict[str, Any], reason: str, device: HostCuda) -> None:
    dtype = change.get("dtype", torch.float16)
    assert isinstance(dtype, torch.dtype)
    weight = normal(8, 1 if change.get("kind") == "depthwise" else 8, 2, dtype=dtype)
    with pytest.raises(AssertionError, match=reason):
        device.hopper_aggregate_dense(
            normal(9, 8, dtype=dtype), normal(7, 2), neighbors(7, 2, 9), weight
        )
