# SPDX-License-Identifier: MIT
"""The forward for Hopper, run on the host under sanitizers and compared with the reference.

`tests/host_cuda` executes the instructions of sm_90a that it uses, with copies and products that
complete late. Threads, copies and products come in an order drawn from a seed.
"""

import math
import random
from pathlib import Path

import pytest
import torch
from cases import SHORT
from host_cuda_program import Choices, HostCuda, Sweep
from torch import Tensor

from python_ref import assert_forward

pytestmark = [pytest.mark.slow, pytest.mark.host_cuda]

BF16, F16 = torch.bfloat16, torch.float16
HALVES = (BF16, F16)
TILE = 128
# One multiprocessor has several items, and more of them than splits share the columns.
ONE = Choices(multiprocessors=1, splits=1)


@pytest.fixture(params=["hopper", "portable"])
def device(device: HostCuda, request: pytest.FixtureRequest) -> HostCuda:
    """By either sweep."""
    device.sweep = Sweep[request.param.upper()]
    return device


both_types = pytest.mark.parametrize("dtype", HALVES, ids=SHORT.get)
both_metrics = pytest.mark.parametrize("metric", ["cosine", "dot"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def check(
    device: HostCuda,
    query: Tensor,
    key: Tensor,
    k: int,
    value: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rho: str = "softmax",
    scale: float = 1.0,
    exact: bool = False,
    key_mask: Tensor | None = None,
    candidates: Tensor | None = None,
    metric: str = "cosine",
    order: str = "similarity",
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward by the rules of `python_ref`, and equal rows of key in the order of indices."""
    if value is None:
        value = normal(*key.shape[:-1], 8, seed=9, dtype=query.dtype)
    Y, s, I = assert_forward(
        device.hopper_forward,
        *(query, key, value, k, weight, bias, candidates, None, key_mask),
        *(metric, rho, scale, order),
        exact=exact,
        backward=False,
    )
    assert_equal_rows_by_index(key, s, I, key_mask, candidates)
    return Y, s, I


def assert_equal_rows_by_index(
    key: Tensor, s: Tensor, I: Tensor, key_mask: Tensor | None, candidates: Tensor | None
) -> None:
    """Of rows of key with the same bits, those of lower index are returned first, all as near."""
    M = key.shape[-2]
    allowed = torch.ones(key.shape[:-1], dtype=torch.bool)
    if candidates is not None:
        allowed = torch.zeros_like(allowed)
        allowed[..., candidates] = True
    if key_mask is not None:
        allowed &= key_mask
    rows_of_key, allowed = key.reshape(-1, M, key.shape[-1]), allowed.view(-1, M)
    for batch, (K, ok) in enumerate(zip(rows_of_key, allowed, strict=True)):
        bits = K.contiguous().view(torch.int16)
        _, kind, counts = torch.unique(bits, dim=0, return_inverse=True, return_counts=True)
        if bool((counts == 1).all()):
            continue
        similarities = s.reshape(-1, *s.shape[-2:])[batch]
        indices = I.reshape(-1, *I.shape[-2:])[batch]
        for row, at in zip(similarities, indices, strict=True):
            there = row != -math.inf
            chosen = torch.zeros(M, dtype=torch.bool)
            chosen[at[there]] = True
            kinds = kind[at[there]].unique()
            for which in kinds[counts[kinds] > 1]:
                taken = chosen[ok & (kind == which)].long()
                assert bool((taken.diff() <= 0).all()), (batch, which, taken)
                values = row[there][kind[at[there]] == which].view(torch.int32)
                assert bool((values == values[0]).all()), (batch, which, values)


@both_types
@both_metrics
@pytest.mark.parametrize("D", [64, 128])
def test_tails_and_several_items(D: int, metric: str, dtype: torch.dtype, device: HostCuda) -> None:
    """Rows and columns that do not fill their last block, one block with several items."""
    device.choices = ONE
    query, key = normal(2, 300, D, dtype=dtype), normal(2, 700, D, seed=1, dtype=dtype)
    check(device, query, key, 9, metric=metric)


@both_types
@pytest.mark.parametrize("D", [16, 17, 33, 64, 65, 100, 128])
def test_columns(D: int, dtype: torch.dtype, device: HostCuda) -> None:
    query, key = normal(40, D, dtype=dtype), normal(300, D, seed=1, dtype=dtype)
    check(device, query, key, 9)


@both_types
@pytest.mark.parametrize("k", [1, 9, 10, 11, 16, 17, 32, 33, 64])
def test_neighbors(k: int, dtype: torch.dtype, device: HostCuda) -> None:
    query, key = normal(70, 64, dtype=dtype), normal(900, 64, seed=1, dtype=dtype)
    check(device, query, key, k, weight=normal(8, 1, k, seed=2, dtype=dtype))


@both_types
@pytest.mark.parametrize(("M", "k"), [(1, 1), (1, 9), (8, 9), (20, 33), (63, 64), (129, 64)])
def test_few_keys(M: int, k: int, dtype: torch.dtype, device: HostCuda) -> None:
    """The value that a missing place has an index of is NaN."""
    query, key = normal(33, 20, dtype=dtype), normal(M, 20, seed=1, dtype=dtype)
    mask = torch.arange(M) != 0
    for C, rho in ((5, "softmax"), (8, "ones"), (8, "similarity")):
        value = normal(M, C, seed=2, dtype=dtype)
        value[0] = math.nan
        check(device, query, key, k, value, key_mask=mask, rho=rho)


@both_types
@pytest.mark.parametrize("k", [5, 16, 64])
@pytest.mark.parametrize("kinds", [1, 2, 40])
def test_equal_keys(kinds: int, k: int, dtype: torch.dtype, device: HostCuda) -> None:
    """Ties go by index, and lists overflow."""
    key = normal(kinds, 64, dtype=dtype)[torch.arange(700) * 7 % kinds]
    query = normal(66, 64, seed=1, dtype=dtype)
    check(device, query, key, k, order="index" if kinds == 2 else "similarity")


@both_types
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_rows_that_are_not_finite(metric: str, dtype: torch.dtype, device: HostCuda) -> None:
    """NaN, infinity and zeros in query and key."""
    query, key = normal(70, 40, dtype=dtype), normal(400, 40, seed=1, dtype=dtype)
    bad = [math.nan, math.inf, -math.inf]
    for i in range(0, 70, 3):
        query[i, i % 40] = bad[i // 3 % 3]
    query[1], query[2, 1:] = 0, -0.0
    for j in range(0, 400, 41):
        key[j, j % 40] = bad[j // 41 % 3]
    key[7], key[300] = 0, -0.0
    check(device, query, key, 16, metric=metric)


@both_types
@pytest.mark.parametrize("k", [3, 40])
def test_many_keys_of_nan(k: int, dtype: torch.dtype, device: HostCuda) -> None:
    key = normal(600, 16, dtype=dtype)
    key[torch.arange(600) % 3 == 1, 5] = math.nan
    check(device, normal(20, 16, seed=1, dtype=dtype), key, k)


def test_cosines_that_underflow_tie(device: HostCuda) -> None:
    """Positive ones are +0 and negative ones -0."""
    query, key = torch.zeros(20, 16), torch.zeros(300, 16)
    query[:, 0], query[:, 1] = 2.0**60, 2.0**-100
    key[:, 0] = -1
    nearest = torch.arange(0, 300, 25)
    key[nearest, 0], key[nearest, 1] = 0, torch.tensor([-1.0, 1.0, 1.0]).repeat(4)
    _, s, I = check(device, query.to(BF16), key.to(BF16), 9)
    assert not s.any()
    assert torch.equal(I, nearest[:9].expand(20, 9))


@pytest.mark.parametrize("of_query", [1e38, 1.0, 1e-40])
@pytest.mark.parametrize("of_key", [1e38, 1.0, 1e-40])
@pytest.mark.parametrize("D", [33, 64])
def test_huge_and_tiny_rows(D: int, of_query: float, of_key: float, device: HostCuda) -> None:
    """Norms and products neither overflow nor vanish, but below 1e-12 a row counts as zero. At
    D = 33 rows of key are copied."""
    query, key = normal(20, D), normal(200, D, seed=1)
    query = (query.double() / query.abs().max() * of_query).to(BF16)
    key = (key.double() / key.abs().max() * of_key).to(BF16)
    _, s, _ = check(device, query, key, 9)
    assert bool(s.isfinite().all())
    assert bool((s != 0).all()) == (of_query > 1e-12 and of_key > 1e-12)


@pytest.mark.parametrize("D", [33, 64, 128])
def test_norms_near_the_limits(D: int, device: HostCuda) -> None:
    """All elements as large as can be, norms just above and below 1e-12, and subnormal elements."""

    def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
        X = normal(n, D, seed=seed).double()
        sizes = X.new_tensor([0, 1.05e-12, 0.95e-12, 1e-39, 1])[torch.arange(n) % 5, None]
        X = X / X.norm(dim=1, keepdim=True) * sizes
        X[::5] = X.new_tensor(3.38e38).copysign(normal(len(X[::5]), D, seed=seed + 1))
        X = X.to(BF16)
        assert bool(X.isfinite().all())
        return X, X.double().norm(dim=1) > 1e-12

    (query, of_query), (key, of_key) = rows(20, 0), rows(200, 2)
    _, s, I = check(device, query, key, 64)
    counts = of_query[:, None] & of_key[I]
    assert bool((s[~counts] == 0).all())
    # Those of elements of one size may be at right angles.
    assert bool((s[counts] != 0).double().mean() > 0.95)
    # Not only those of one size are near.
    assert len((I[0] % 5).unique()) > 2


@both_types
@pytest.mark.parametrize("D", [64, 128])
def test_rows_of_many_norms(D: int, dtype: torch.dtype, device: HostCuda) -> None:
    """The factors of a sample are those of its columns."""
    key = normal(900, D, seed=1) * 2.0 ** integers(900, 1, seed=2)
    check(device, normal(40, D, dtype=dtype), key.to(dtype), 9)


@both_types
@both_metrics
@pytest.mark.parametrize("masked", [0.5, 0.97, 1.0])
def test_masked_keys(masked: float, metric: str, dtype: torch.dtype, device: HostCuda) -> None:
    query, key = normal(2, 40, 24, dtype=dtype), normal(2, 400, 24, seed=1, dtype=dtype)
    mask = torch.rand(2, 400, generator=torch.Generator().manual_seed(2)) >= masked
    for order in ("similarity", "index"):
        check(device, query, key, 16, key_mask=mask, metric=metric, order=order)


@both_types
def test_columns_without_a_neighbor_count_for_nothing(dtype: torch.dtype, device: HostCuda) -> None:
    """Though all similarities are below 0: masked, or without a candidate in a tile of as many
    columns as there are keys, or beyond the keys."""
    query = integers(40, 64, dtype=dtype).abs()
    key = -integers(256, 64, seed=1, dtype=dtype).abs()
    mask = torch.arange(256) % 3 == 0
    check(device, query, key, 9, key_mask=mask, metric="dot", exact=True)
    candidates = torch.randperm(TILE, generator=torch.Generator().manual_seed(2))[:100]
    check(device, query, key[:TILE], 9, candidates=candidates, metric="dot", exact=True)
    check(device, query, key[:100], 9, metric="dot", exact=True)


@both_types
@pytest.mark.parametrize("R", [1, 5, 130, 400])
def test_candidates(R: int, dtype: torch.dtype, device: HostCuda) -> None:
    """In any order; ties go by the row of key."""
    query, key = normal(2, 18, 64, dtype=dtype), normal(2, 400, 64, seed=1, dtype=dtype)
    key[:, 200:] = key[:, :200]
    candidates = torch.randperm(400, generator=torch.Generator().manual_seed(3))[:R]
    mask = torch.arange(400).expand(2, 400) % 5 != 0
    for order in ("similarity", "index"):
        check(device, query, key, 9, candidates=candidates, order=order)
    check(device, query, key, 9, candidates=candidates, key_mask=mask, metric="dot")


@both_types
@pytest.mark.parametrize("C", [1, 12, 64, 65, 72])
@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
def test_aggregation(kind: str, C: int, dtype: torch.dtype, device: HostCuda) -> None:
    query, key = normal(2, 35, 16, dtype=dtype), normal(2, 140, 16, seed=1, dtype=dtype)
    value = normal(2, 140, C, seed=2, dtype=dtype)
    for k, rho in ((9, "softmax"), (16, "similarity"), (33, "ones")):
        shape = {"none": None, "depthwise": (C, 1, k), "dense": (6, C, k)}[kind]
        weight = None if shape is None else normal(*shape, seed=3, dtype=dtype)
        bias = normal(6 if kind == "dense" else C, seed=4, dtype=dtype) if rho != "ones" else None
        check(device, query, key, k, value, weight, bias, rho, metric="dot")


@pytest.mark.parametrize("scale", [0.125, 8.0, -1.0, 0.0])
def test_scales(scale: float, device: HostCuda) -> None:
    query, key = normal(35, 16), normal(140, 16, seed=1)
    check(device, query, key, 9, normal(140, 24, seed=2), scale=scale, metric="dot")
    check(device, query, key, 40, normal(140, 24, seed=2), scale=scale)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64, F16])
def test_a_value_of_another_type(value_dtype: torch.dtype, device: HostCuda) -> None:
    value = normal(140, 24, seed=2, dtype=value_dtype)
    weight = normal(24, 1, 9, seed=3, dtype=value_dtype)
    check(device, normal(35, 16), normal(140, 16, seed=1), 9, value, weight)


def test_a_weight_beyond_shared_memory(device: HostCuda) -> None:
    C, k = 300, 40
    value, weight = normal(100, C, seed=2), normal(C, 1, k, seed=3)
    check(device, normal(5, 16), normal(100, 16, seed=1), k, value, weight)


def test_similarities_that_are_infinite(device: HostCuda) -> None:
    """-inf marks a missing neighbor for the output, also between others of lower index."""
    key = torch.ones(40, 16, dtype=BF16)
    key[::2, 0] = -math.inf
    query, value = torch.ones(3, 16, dtype=BF16), normal(40, 16, seed=1)
    value[::2] = math.nan
    for order in ("similarity", "index"):
        device.seed += 1
        s, I = device.hopper_select(query, key, 30, metric="dot", order=order)
        assert bool(((s == -math.inf) == (I % 2 == 0)).all())
        Y, s, I = device.hopper_forward(query, key, value, 30, metric="dot", order=order)
        expected = value[1::2].double().mean(dim=0).expand(3, 16)
        torch.testing.assert_close(Y.double(), expected, rtol=2**-7, atol=2**-9)


@both_types
@pytest.mark.parametrize("D", [19, 64, 128])
def test_exact_sums_as_in_float32(D: int, dtype: torch.dtype, device: HostCuda) -> None:
    query, key = integers(2, 9, D, dtype=dtype), integers(2, 400, D, seed=1, dtype=dtype)
    for k, order in ((9, "similarity"), (40, "index")):
        _, s, I = check(device, query, key, k, exact=True, metric="dot", order=order)
        # By groups of columns.
        expected = device.select(query.float(), key.float(), k, metric="dot", order=order)
        assert torch.equal(s, expected[0])
        assert torch.equal(I, expected[1])


@both_types
@both_metrics
@pytest.mark.parametrize("D", [64, 128])
def test_a_similarity_has_the_same_bits_anywhere(
    D: int, metric: str, dtype: torch.dtype, device: HostCuda
) -> None:
    """At all 128 columns of a tile, in all rows of a block, and as any row of key."""
    query = normal(1, D, dtype=dtype).expand(256, D)
    key = normal(1, D, seed=1, dtype=dtype).expand(TILE, D)
    seen = []
    for half in range(2):
        mask = torch.arange(TILE) % 2 == half
        s, _ = device.hopper_select(query, key, 64, key_mask=mask, metric=metric)
        seen.append(s)
    bits = torch.stack(seen).view(torch.int32)
    assert bool((bits == bits.flatten()[0]).all())
    # Among other keys, in another tile.
    others = normal(300, D, seed=2, dtype=dtype)
    for at in (0, 129, 299):
        others[at] = key[0]
        mask = torch.arange(300) == at
        s, I = device.hopper_select(query[:3], others, 1, key_mask=mask, metric=metric)
        assert bool((at == I).all())
        assert bool((s.view(torch.int32) == bits.flatten()[0]).all())


@both_types
@pytest.mark.parametrize("D", [16, 64, 128])
def test_sums_of_one_sign(D: int, dtype: torch.dtype, device: HostCuda) -> None:
    """The instruction truncates products and sums, so the errors of these add up."""
    X = torch.full((33, D), 0.3).to(dtype)
    s, I = device.hopper_select(X, X, 9)
    assert torch.equal(I, torch.arange(9).expand(33, 9))
    assert bool((s == s[0, 0]).all())
    assert 1 - (D + 4) * 2**-24 <= s[0, 0].item() <= 1 + 2**-23


SPLIT = {"query": normal(2, 300, 40), "key": normal(2, 900, 40, seed=1)}


@pytest.mark.parametrize("seed", range(10))
def test_any_schedule_gives_the_same(seed: int, device: HostCuda) -> None:
    """Bits do not depend on the order of threads, on blocks, splits, samples or launches."""
    draw = random.Random(seed)
    k, C = 9, 24
    arguments = (normal(2, 900, C, seed=2), k, normal(C, 1, k, seed=3))
    device.choices = Choices(3, 1, 1)
    expected = device.hopper_forward(*SPLIT.values(), *arguments)
    device.seed = seed
    device.choices = Choices(draw.choice((1, 2, 5)), draw.randint(1, 8), draw.randint(1, 4))
    device.most_bytes = draw.choice((1, 2**19, 2**26))
    results = device.hopper_forward(*SPLIT.values(), *arguments)
    assert all(map(torch.equal, expected, results))


@pytest.mark.parametrize("kind", ["dense", "depthwise", "none"])
@pytest.mark.parametrize("case", ["16 bits", "few columns", "self", "float32"])
def test_forward_without_kernels_for_hopper(case: str, kind: str, programs: Path) -> None:
    """A device other than Hopper has no machine code of these."""
    device = HostCuda(programs / "host_cuda")
    device.sweep = Sweep.ANY
    dtype, D = torch.float32 if case == "float32" else BF16, 8 if case == "few columns" else 24
    query, key, value = (
        integers(2, rows, columns, seed=seed, dtype=dtype)
        for seed, (rows, columns) in enumerate(((20, D), (300, D), (300, 16)))
    )
    weight = {"dense": normal(5, 16, 3), "depthwise": normal(16, 1, 3), "none": None}[kind]
    weight = weight if weight is None else weight.to(dtype)
    own = torch.arange(20) if case == "self" else None
    assert_forward(
        device.hopper_forward,
        *(query, key, value, 3, weight, None, None, own, None),
        *("dot", "softmax", 1.0, "similarity"),
        exact=True,
        backward=False,
    )
    launched = {kernel.name for kernel in device.close()}
    assert not launched & {"hopper_sweep_kernel", "hopper_dense_kernel", "dense_rho_kernel"}
    assert ("mma_sweep_kernel" in launched) == (case == "16 bits")


@pytest.mark.parametrize(("blocks_of_room", "launches"), [(0, 5), (1, 5), (2, 3), (4, 2), (5, 1)])
def test_the_workspace_limits_the_rows_of_a_launch(
    blocks_of_room: int, launches: int, programs: Path
) -> None:
    """In whole waves of the device, here two blocks with their four splits."""
    device = HostCuda(programs / "host_cuda")
    device.choices = Choices(multiprocessors=8, splits=4)
    bytes_of_block = 256 * 4 * (4 * 30 * 8 + 4)
    device.most_bytes = blocks_of_room * bytes_of_block
    device.hopper_select(normal(5, 3, 16), normal(5, 512, 16, seed=1), 9)
    counts = {kernel.name: ran.count for kernel, ran in device.close().items()}
    assert counts["hopper_sweep_kernel"] == counts["hopper_finish_kernel"] == launches
    assert counts["hopper_keys_kernel"] == 1


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("k", [9, 16, 30, 64])
def test_splits(k: int, splits: int, device: HostCuda) -> None:
    device.choices = Choices(2, splits)
    key = normal(900, 64, seed=1)
    key[600:] = key[:300]
    check(device, normal(70, 64), key, k)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("the metric is euclidean", {"metric": "euclidean"}),
        ("neither float16 nor bfloat16", {"dtype": torch.float32}),
        ("k is more than 64", {"k": 65}),
        ("more than 128 columns", {"D": 129}),
        ("fewer than 16 columns", {"D": 15}),
        ("self_indices", {"self_indices": torch.zeros(4, dtype=torch.int64)}),
        ("key_range", {"key_range": torch.zeros(4, 2, dtype=torch.int64)}),
        ("candidates are those of each batch", {"candidates": torch.arange(9).expand(1, 9)}),
        ("no keys", {"M": 0}),
    ],
)
def test_what_is_refused(reason: str, change: dict[str, object], device: HostCuda) -> None:
    options = {"metric": "cosine", "dtype": BF16, "k": 3, "D": 16, "M": 80} | change
    D, dtype = options.pop("D"), options.pop("dtype")
    query, key = normal(1, 4, D, dtype=dtype), normal(1, options.pop("M"), D, dtype=dtype)
    with pytest.raises(AssertionError, match=f"refused: .*{reason}"):
        device.hopper_select(query, key, **options)


class Search:
    """The random case of a seed."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.seed = seed
        self.dtype = HALVES[seed % 2]
        self.metric = ("cosine", "dot")[seed // 2 % 2]
        contents = ("normal", "normal", "integers", "few_rows", "constant", "special", "clusters")
        self.content = draw.choice(contents)
        self.batch = draw.choice((1, 1, 2, 3))
        self.N = draw.choice((1, 2, 17, 63, 66, 255, 257))
        self.M = draw.choice((1, 7, 100, 127, 128, 129, 261, 512, 700))
        self.D = draw.choice((16, 17, 24, 31, 33, 63, 64, 64, 65, 96, 127, 128))
        self.C = draw.choice((1, 5, 8, 40, 64, 66, 72))
        self.k = draw.choice((1, 2, 5, 9, 9, 12, 16, 17, 32, 33, 50, 64))
        self.kind = draw.choice(("none", "depthwise", "depthwise", "dense"))
        self.rho = draw.choice(("softmax", "softmax", "ones", "similarity"))
        self.bias = draw.random() < 0.5
        self.listed = draw.random() < 0.25
        self.masked = draw.choice((0.0, 0.0, 0.5, 0.95, 1.0))
        self.order = draw.choice(("similarity", "similarity", "index"))
        self.choices = Choices(draw.randint(1, 4), draw.choice((0, 1, 1, 2, 5)), draw.randint(0, 4))
        self.most_bytes = draw.choice((1, 2**18, 2**26))

    @property
    def id(self) -> str:
        return (
            f"s{self.seed}-{SHORT[self.dtype]}-{self.metric}-{self.content}-B{self.batch}-N{self.N}"
            f"-M{self.M}-D{self.D}-C{self.C}-k{self.k}-{self.kind}-{self.rho}-{self.order}"
            f"-mask{self.masked:g}" + ("-listed" if self.listed else "")
        )

    def rows(self, generator: torch.Generator, n: int) -> Tensor:
        shape = (self.batch, n, self.D)
        X = torch.randn(shape, generator=generator)
        if self.content == "integers":
            return torch.randint(-3, 4, shape, generator=generator).float()
        if self.content == "few_rows":
            return X[:, torch.randint(min(n, 4), (n,), generator=generator)]
        if self.content == "constant":
            # Not of one sign: test_sums_of_one_sign.
            return (0.3 * X[:1, :1].sign()).expand(shape)
        if self.content == "clusters":
            return X[:, torch.arange(n) % min(n, 3)] + 2**-6 * X
        if self.content == "special":
            for value in (math.nan, math.inf, -math.inf, 0.0, -0.0):
                X[:, torch.randint(n, (max(1, n // 50),), generator=generator), 0] = value
        return X

    def check(self, device: HostCuda) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        query, key = self.rows(generator, self.N), self.rows(generator, self.M)
        C, k, M = self.C, self.k, self.M
        shape = {"none": None, "depthwise": (C, 1, k), "dense": (6, C, k)}[self.kind]
        if shape is not None and shape[0] == C == 1:
            shape = None
        outputs = 6 if self.kind == "dense" else C
        mask = torch.rand(self.batch, M, generator=generator) >= self.masked
        device.seed, device.choices, device.most_bytes = self.seed, self.choices, self.most_bytes
        check(
            device,
            query.to(self.dtype),
            key.to(self.dtype),
            k,
            normal(self.batch, M, C, seed=self.seed, dtype=self.dtype),
            None if shape is None else normal(*shape, seed=self.seed + 1, dtype=self.dtype),
            normal(outputs, seed=self.seed + 2, dtype=self.dtype) if self.bias else None,
            self.rho,
            1.0,
            self.content == "integers" and self.metric == "dot",
            mask if self.masked else None,
            torch.randperm(M, generator=generator)[: max(1, M - 3)] if self.listed else None,
            self.metric,
            self.order,
        )


@pytest.mark.parametrize("case", [Search(seed) for seed in range(12)], ids=lambda case: case.id)
def test_random_case(case: Search, device: HostCuda) -> None:
    case.check(device)


@pytest.mark.parametrize(
    "case", [Search(seed) for seed in range(12, 200)], ids=lambda case: case.id
)
def test_further_random_case(case: Search, device: HostCuda) -> None:
    """Takes minutes, so it is not part of CI."""
    case.check(device)
