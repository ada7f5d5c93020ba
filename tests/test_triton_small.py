# SPDX-License-Identifier: MIT
"""`select_network_kernel`, for few columns, in Triton's interpreter.

They need a process of their own, started with ``TRITON_INTERPRET=1``, as those of test_triton.py.
"""

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from cases import whole_numbers
from interpreter import in_interpreter
from torch import Tensor

import convnn_kernels
from convnn_kernels.triton import configs
from python_ref import assert_forward, assert_select

pytestmark = in_interpreter

ops = torch.ops.convnn
F16, F32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with convnn_kernels.backend("triton"):
        yield


@pytest.fixture(autouse=True)
def _fresh_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plan that was made with configurations of another test, and no sweep of 128 columns."""
    monkeypatch.setattr(configs, "allows_sweep", lambda *_: False)
    forget_plans()
    yield
    monkeypatch.undo()
    forget_plans()


def forget_plans() -> None:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()


class Watch:
    """How many programs took neighbors out of their rows one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from convnn_kernels.triton import select_network

        self.programs = 0
        one_by_one = select_network._one_by_one

        def count(*arguments: object) -> object:
            self.programs += 1
            return one_by_one(*arguments)

        monkeypatch.setattr(select_network, "_one_by_one", count)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels of a call."""
    from convnn_kernels.triton.launch import Launch

    names: list[str] = []
    by_triton = Launch.by_triton

    def note(launch: Launch, pointers: object) -> object:
        names.append(launch.kernel.name)
        return by_triton(launch, pointers)

    monkeypatch.setattr(Launch, "by_triton", note)
    return names


def integers(*shape: int, most: int = 3, seed: int = 0, dtype: torch.dtype = F16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Of float32, sums of fewer channels are not taken from tensor cores.
FEWEST = {F16: 16, F32: 32}


@pytest.mark.quick_one_in(7)
@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize(
    ("B", "N", "M", "k", "most"),
    [
        (3, 5, 5, 5, 60),
        (1, 37, 37, 15, 60),
        (2, 3, 130, 9, 60),
        (1, 34, 197, 9, 1),
        (1, 2, 256, 1, 3),
    ],
)
def test_the_same_bits_as_the_other_strategies(
    B: int,
    N: int,
    M: int,
    k: int,
    most: int,
    order: str,
    dtype: torch.dtype,
    watch: Watch,
    launched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums are exact. Numbers of up to 1 tie in every place, larger ones hardly."""
    if dtype == F32 and most == 60:
        most = 200
    D = FEWEST[dtype] + 5
    query, key = (
        integers(B, rows, D, most=most, seed=seed, dtype=dtype) for seed, rows in enumerate((N, M))
    )
    options = {"metric": "dot", "order": order}
    s, I = assert_select(ops.select, query, key, k, **options, exact=True, backward=False)
    assert (watch.programs > 0) == (most == 1)
    assert launched == ["select_network_kernel"]
    for left_out in ("allows_select_network", "allows_select_small"):
        monkeypatch.setattr(configs, left_out, lambda *_, **__: False)
        forget_plans()
        other = ops.select(query, key, k, **options)
        assert torch.equal(s, other[0])
        assert torch.equal(I, other[1])


def with_common_bits(share: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query [2, D] and key [150, D] with dot products 2^n + 0, ..., 149 in some order, and the
    opposite ones. So many of them share their first 24 bits, which leave units of 2^(n - 15).
    """
    n = 15 + share.bit_length() - 1
    query, key = torch.zeros(2, FEWEST[dtype]), torch.zeros(150, FEWEST[dtype])
    query[0, 3], query[0, 7] = 256.0, 1.0
    query[1] = -query[0]
    key[:, 3] = 2.0 ** (n - 8)
    key[:, 7] = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    return query.to(dtype), key.to(dtype)


def assert_in_order(query: Tensor, key: Tensor, k: int) -> None:
    """Sums of these products are exact, though larger than `assert_select` allows."""
    s, I = ops.select(query, key, k, metric="dot")
    S = query.double() @ key.double().mT
    expected = S.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(I, expected)
    assert torch.equal(s.double(), S.gather(1, expected))


@pytest.mark.parametrize(
    ("share", "k", "programs"),
    [(2, 9, 0), (2, 10, 0), (4, 8, 0), (4, 9, 1), (4, 11, 0), (4, 13, 1)],
)
@pytest.mark.parametrize("dtype", [F16, F32])
def test_neighbors_that_share_their_first_24_bits(
    dtype: torch.dtype, share: int, k: int, programs: int, watch: Watch
) -> None:
    """A list of 12 or 16 has all that do, in the order of the columns or the opposite one, unless
    the last ones do."""
    query, key = with_common_bits(share, dtype)
    assert_in_order(query, key, k)
    assert watch.programs == programs


@pytest.mark.parametrize("place", [0, 1, 4, 7, 8])
def test_one_pair_that_shares_them(place: int, watch: Watch) -> None:
    """Two entries of a list are out of order: the last column has the larger product."""
    query, key = with_common_bits(1, F16)
    larger = key[key[:, 7].argsort(descending=True)[place]].clone()
    larger[7] += 0.5
    assert_in_order(query, torch.cat((key, larger[None])), 9)
    assert watch.programs == 0


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("k", [2, 9, 15])
def test_more_that_share_them_than_a_list_holds(k: int, dtype: torch.dtype, watch: Watch) -> None:
    query, key = with_common_bits(32, dtype)
    assert_in_order(query, key, k)
    assert watch.programs == 1
    # Or all their bits: the first columns are the nearest.
    assert_in_order(query, key[:1].expand(200, -1), k)
    assert watch.programs == 2


@pytest.mark.parametrize("dtype", [F16, F32])
def test_a_row_does_not_depend_on_what_others_of_its_program_are(
    dtype: torch.dtype, watch: Watch
) -> None:
    query, key = normal(32, 40, dtype=dtype), normal(70, 40, seed=1, dtype=dtype)
    s, I = ops.select(query, key, 7)
    assert watch.programs == 0
    query = query.clone()
    query[3], query[20] = math.nan, 0.0
    changed_s, changed_I = ops.select(query, key, 7)
    assert watch.programs == 1
    others = (torch.arange(32) != 3) & (torch.arange(32) != 20)
    assert torch.equal(s[others], changed_s[others])
    assert torch.equal(I[others], changed_I[others])


SPECIAL = {
    "nan_rows": lambda X: X.index_fill_(0, torch.tensor([5, 101]), math.nan),
    "infinite_rows": lambda X: X.index_fill_(0, torch.tensor([7, 120]), -math.inf),
    "one_infinite_column": lambda X: X[100:120, 2:3].fill_(-math.inf),
    "zero_rows": lambda X: X.index_fill_(0, torch.arange(0, 140, 2), 0.0),
    "negative_zero": lambda X: X.index_fill_(0, torch.arange(40, 140), -0.0),
    "constant": lambda X: X.fill_(0.3),
    "largest": lambda X: X[5:140:3].fill_(torch.finfo(X.dtype).max),
    "very small": lambda X: X[5:140:3].mul_(2.0**-16),
}


@pytest.mark.quick_one_in(7)
@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("special", SPECIAL)
def test_special_values(special: str, metric: str, dtype: torch.dtype) -> None:
    query, key = normal(6, 37, dtype=dtype), normal(140, 37, seed=1, dtype=dtype)
    SPECIAL[special](key)
    query[1], query[2, 3], query[3] = 0.0, math.nan, -0.0
    query[4, 0] = math.inf
    assert_select(ops.select, query, key, 6, metric=metric, backward=False)


OPTIONS = {
    "mask": {"key_mask": torch.arange(140) % 7 == 3},
    "few_left": {"key_mask": (torch.arange(140) == 3) | (torch.arange(140) == 139)},
    "none_left": {"key_mask": torch.zeros(140, dtype=torch.bool)},
    "candidates": {"candidates": torch.arange(139, 0, -2)},
    "few_candidates_and_mask": {
        "candidates": (torch.arange(9) * 17) % 140,
        "key_mask": torch.arange(140) % 3 == 0,
    },
    "self_outside_candidates": {
        "self_indices": torch.tensor([0, 131, 138, 6, 8]),
        "candidates": torch.arange(139, 12, -2),
    },
    "self_few_candidates_and_mask": {
        "self_indices": torch.tensor([0, 17, 34, 6, 8]),
        "candidates": (torch.arange(4) * 17) % 140,
        "key_mask": torch.arange(140) % 3 == 0,
    },
    "self_no_candidates": {
        "self_indices": torch.tensor([0, 17, 34, 6, 8]),
        "candidates": torch.arange(0),
    },
    "self": {"self_indices": torch.tensor([0, 130, 139, 7, 8])},
    "self_and_mask": {
        "self_indices": torch.tensor([0, 130, 139, 7, 8]),
        "key_mask": torch.arange(140) % 2 == 0,
    },
}


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("ties", F16), ("hardly any", F16), ("one by one", F16), ("hardly any", F32)],
)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("order", ["similarity", "index"])
def test_options(
    option: str, order: str, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All similarities of a query are negative; tokens are near themselves."""
    import triton.language as tl

    from convnn_kernels.triton import select_network

    if way == "one by one":
        monkeypatch.setattr(select_network, "_LARGEST_SUM", tl.constexpr(0.0))
    most = 1 if way == "ties" else 60
    query, key = (
        integers(rows, 34, most=most, seed=seed, dtype=dtype) for seed, rows in enumerate((5, 140))
    )
    key, query[4] = key.abs(), -query[4].abs() - 1
    options = OPTIONS[option] | {"metric": "dot", "order": order}
    if "self_indices" in options:
        query[:4] = key[options["self_indices"][:4]]
    assert_select(ops.select, query, key, 4, **options, exact=True, backward=False)


def test_missing_neighbors_are_no_ties(watch: Watch) -> None:
    query, key = integers(5, 18, most=60), integers(140, 18, most=60, seed=1)
    options = OPTIONS["few_left"] | {"metric": "dot"}
    assert_select(ops.select, query, key, 4, **options, exact=True, backward=False)
    assert watch.programs == 0


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize(
    "option", ["self", "mask", "self_outside_candidates", "self_few_candidates_and_mask"]
)
def test_options_of_the_cosine(option: str, dtype: torch.dtype) -> None:
    """What is masked is NaN."""
    query, key = normal(5, 34, dtype=dtype), normal(140, 34, seed=1, dtype=dtype)
    options = OPTIONS[option]
    if "key_mask" in options:
        key[~options["key_mask"]] = math.nan
    assert_select(ops.select, query, key, 15, **options, backward=False)


@pytest.mark.parametrize("dtype", [F16, F32])
def test_rows_of_any_strides(dtype: torch.dtype) -> None:
    query = normal(2, 3, 50, seed=2, dtype=dtype)[:, :, 8:45].transpose(0, 1)
    key = normal(1, 90, 41, seed=3, dtype=dtype)[:, ::2, 4:].expand(3, 45, 37).unsqueeze(1)
    key = key.expand(3, 2, 45, 37)
    assert_select(ops.select, query.unsqueeze(2), key, 9)


@pytest.mark.parametrize("what", ["all", "queries", "last keys", "own keys"])
def test_rows_that_are_scaled_first(
    what: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if float16 had the range of bfloat16, and rows were large that are not."""
    import triton.language as tl

    from convnn_kernels.triton import select_network

    largest = {"all": 0.0, "queries": 21.0}.get(what, 1000.0)
    monkeypatch.setattr(select_network, "_LARGEST_SQUARES", tl.constexpr(largest))
    monkeypatch.setattr(select_network, "rescales", lambda _: True)
    query, key = normal(20, 21), normal(140, 21, seed=1) * 2.0**-6
    key[135] *= 2.0**12 if what in ("last keys", "own keys") else 1
    options = {}
    if what == "own keys":
        options = {"candidates": torch.arange(30), "self_indices": 116 + torch.arange(20)}
    assert_select(ops.select, query, key, 9, **options, backward=False)
    assert watch.programs == 1


@pytest.mark.quick_one_in(4)
@pytest.mark.parametrize(
    ("dtypes", "order"),
    [
        ((F16, F16), "similarity"),
        ((F16, F16), "index"),
        ((F32, F32), "similarity"),
        ((F32, F16), "index"),
        ((F16, F32), "similarity"),
    ],
)
@pytest.mark.parametrize(
    ("N", "M", "C", "k", "rho", "has_weight", "metric"),
    [
        (37, 37, 20, 9, "softmax", True, "cosine"),
        (5, 130, 80, 15, "softmax", False, "dot"),
        (33, 70, 64, 1, "ones", True, "cosine"),
        (4, 4, 1, 4, "similarity", False, "dot"),
        (18, 60, 66, 9, "similarity", True, "cosine"),
    ],
)
def test_forward_in_one_launch(
    N: int,
    M: int,
    C: int,
    k: int,
    rho: str,
    has_weight: bool,
    metric: str,
    order: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    launched: list[str],
) -> None:
    dtype, of_value = dtypes
    query, key = normal(3, N, 37, dtype=dtype), normal(3, M, 37, seed=1, dtype=dtype)
    value = normal(3, M, C, seed=2, dtype=of_value)
    weight = normal(C, 1, k, seed=3, dtype=of_value) / 8 if has_weight else None
    bias = normal(C, seed=4, dtype=of_value) if has_weight else None
    scale = 0.7 if rho == "softmax" else 1.0
    options = {"rho": rho, "metric": metric, "order": order, "scale": scale}
    with torch.no_grad():
        ops.forward(query, key, value, k, weight, bias, **options)
    assert launched == ["select_network_kernel"]
    assert_forward(ops.forward, query, key, value, k, weight, bias, **options, backward=False)


class Convolutions:
    """How many programs convolved on tensor cores, and how many row by row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from convnn_kernels.triton import select_network

        self.counts = {"convolve": 0, "_convolve": 0}
        for name in self.counts:
            monkeypatch.setattr(select_network, name, self._counted(name, select_network))

    def _counted(self, name: str, module: ModuleType) -> Callable[..., object]:
        function = getattr(module, name)

        def count(*arguments: object) -> object:
            self.counts[name] += 1
            return function(*arguments)

        return count


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> Convolutions:
    return Convolutions(monkeypatch)


@pytest.mark.parametrize(
    ("N", "C", "k", "rho", "has_weight"),
    [
        (19, 32, 9, "softmax", True),
        (33, 80, 3, "similarity", True),
        (16, 192, 1, "ones", False),
        (3, 224, 2, "softmax", True),
    ],
)
def test_a_convolution_on_tensor_cores(
    N: int, C: int, k: int, rho: str, has_weight: bool, convolutions: Convolutions
) -> None:
    """Blocks of channels that are full or not, passes of several of them."""
    query, key, value = normal(2, N, 21), normal(2, 20, 21, seed=1), normal(2, 20, C, seed=2)
    weight = normal(C, 1, k, seed=3) / 8 if has_weight else None
    bias = normal(C, seed=4) if has_weight else None
    options = {"rho": rho, "backward": False}
    assert_forward(ops.forward, query, key, value, k, weight, bias, **options)
    assert convolutions.counts["convolve"] > 0
    assert convolutions.counts["_convolve"] == 0


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 65504.0])
@pytest.mark.parametrize("channel", [0, 6, 21, 47])
def test_a_number_that_is_not_finite_stays_in_its_channel(
    channel: int, number: float, convolutions: Convolutions
) -> None:
    """Products with 0 would spread it to others. The largest one is a number like others."""
    query, key, value = normal(2, 19, 21), normal(2, 20, 21, seed=1), normal(2, 20, 48, seed=2)
    value[1, 7, channel] = number
    weight = normal(48, 1, 5, seed=3) / 8
    assert_forward(ops.forward, query, key, value, 5, weight, backward=False)
    assert (convolutions.counts["_convolve"] > 0) == (not math.isfinite(number))


@pytest.mark.parametrize("rho", ["softmax", "ones"])
def test_missing_neighbors_of_aligned_rows(rho: str, convolutions: Convolutions) -> None:
    query, key, value = normal(2, 19, 21), normal(2, 30, 21, seed=1), normal(2, 30, 32, seed=2)
    mask = torch.arange(60).view(2, 30) % 30 > 3
    mask[0, 7:] = False
    value[~mask] = math.nan
    options = {"key_mask": mask, "rho": rho, "backward": False}
    assert_forward(ops.forward, query, key, value, 5, normal(32, 1, 5, seed=3), **options)
    assert min(convolutions.counts.values()) > 0


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list with an entry for each block of products that were added on tensor cores."""
    from convnn_kernels.triton import select_network

    blocks: list[object] = []
    add_products = select_network.add_products

    def note(*arguments: object) -> object:
        blocks.append(arguments[0])
        return add_products(*arguments)

    monkeypatch.setattr(select_network, "add_products", note)
    return blocks


@pytest.mark.parametrize("special", ["none", *SPECIAL])
@pytest.mark.parametrize("with_self", [False, True])
def test_squares_on_tensor_cores(with_self: bool, special: str, added: list[object]) -> None:
    """Blocks of channels that are full or not; the token itself, whose product is added there."""
    query, key = normal(20, 48), normal(140, 48, seed=1)
    SPECIAL.get(special, lambda X: X)(key)
    options = {"candidates": torch.arange(139, 12, -2)}
    if with_self:
        options["self_indices"] = torch.arange(20) * 6
    assert_select(ops.select, query, key, 6, **options, backward=False)
    assert added


def test_lanes_with_other_elements_than_expected(
    monkeypatch: pytest.MonkeyPatch, watch: Watch, convolutions: Convolutions
) -> None:
    """As if Triton gave them some: all is computed in another way, and no row one by one."""
    import triton.language as tl

    from convnn_kernels.triton import convolve, select_network

    for module in (select_network, convolve):
        monkeypatch.setattr(
            module, "checked", lambda b_x, *_: b_x * tl.full([1], math.nan, tl.float32)
        )
    query, key, value = normal(2, 19, 48), normal(2, 40, 48, seed=1), normal(2, 40, 32, seed=2)
    options = {"candidates": torch.arange(39, 4, -2), "self_indices": torch.arange(19) + 7}
    weight = normal(32, 1, 5, seed=3)
    assert_forward(ops.forward, query, key, value, 5, weight, **options, backward=False)
    assert watch.programs == 0
    assert convolutions.counts["_convolve"] > 0


@pytest.mark.parametrize("dtype", [F16, F32])
def test_candidates_self_and_a_mask_in_one_launch(dtype: torch.dtype, launched: list[str]) -> None:
    query, key, value = (
        normal(2, *shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate(((19, 37), (40, 37), (40, 20)))
    )
    mask = torch.arange(40).expand(2, 40) % 3 != torch.tensor([[0], [1]])
    options = {"candidates": torch.arange(39, 4, -2), "self_indices": torch.arange(19) + 7}
    arguments = (query, key, value, 5, normal(20, 1, 5, seed=3, dtype=dtype))
    with torch.no_grad():
        ops.forward(*arguments, **options, key_mask=mask)
    assert launched == ["select_network_kernel"]
    assert_forward(ops.forward, *arguments, **options, key_mask=mask, backward=False)


@pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
def test_values_of_missing_neighbors_do_not_matter(rho: str) -> None:
    """Nor do those of rows behind the last query: the first value, which no mask allows, is NaN."""
    query, key, value = normal(2, 19, 21), normal(2, 30, 21, seed=1), normal(2, 30, 20, seed=2)
    mask = torch.arange(60).view(2, 30) % 30 > 3
    mask[0, 7:] = False
    value[~mask] = math.nan
    weight = normal(20, 1, 5, seed=3)
    assert_forward(
        ops.forward, query, key, value, 5, weight, key_mask=mask, rho=rho, backward=False
    )


@pytest.mark.parametrize("channels", [slice(2, 22), slice(0, 48)], ids=str)
def test_values_of_batch_elements_that_share_their_keys(channels: slice) -> None:
    """Value and strides of its own. The queries of all are those of one batch element."""
    query, value = normal(2, 3, 7, 21), normal(3, 2, 30, 64, seed=2).transpose(0, 1)
    value = value[..., channels]
    key = normal(30, 21, seed=1).expand(2, 3, 30, 21)
    weight = normal(value.shape[-1], 1, 5, seed=3)
    assert_forward(ops.forward, query, key, value, 5, weight)


@pytest.mark.parametrize("bits", [2, 9, 11, 12, 17, 20])
def test_whole_numbers_of_many_bits(bits: int, launched: list[str]) -> None:
    query, key = whole_numbers(3, 200, 70, bits)
    s, _ = ops.select(query, key, 4, metric="dot")
    assert launched == ["select_network_kernel"]
    assert torch.equal(s, torch.tensor([199.0, 198, 197, 196]).expand(3, 1, 4))


def test_all_bits_of_float32_are_multiplied() -> None:
    """Numbers of 24 bits, of which each product has one: the sums are exact."""
    D = 32
    generator = torch.Generator().manual_seed(0)
    of_24_bits = torch.randint(2**23, 2**24, (150, D), generator=generator).to(F32)
    ones = torch.eye(D)[:5]
    assert_in_order(ones, of_24_bits, 9)
    assert_in_order(of_24_bits[:5], torch.eye(D)[torch.arange(150) % D], 9)
    # Products of 24 bits of two middle pieces, and of a first and a last one.
    of_12_bits = torch.randint(2**11, 2**12, (150, D), generator=generator).to(F32)
    assert_in_order(4095 * ones, of_12_bits, 9)
    assert_in_order(of_12_bits[:5] * torch.eye(D)[:5], of_12_bits.flip(0), 9)


def test_similarities_of_float32_are_as_accurate_as_its_sums() -> None:
    """Without a bound that grows with D: nearer to float64 than the sums of PyTorch are."""
    query, key = normal(20, 96, dtype=F32), normal(150, 96, seed=1, dtype=F32)
    for metric in ("dot", "cosine"):
        s, I = ops.select(query, key, 9, metric=metric)
        rows = [query, key]
        if metric == "cosine":
            rows = [X.double() / X.double().norm(dim=1, keepdim=True) for X in rows]
        S = (rows[0].double() @ rows[1].double().mT).gather(1, I)
        assert (s - S).abs().max() <= 2.0**-22 * S.abs().max()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-40, 2.0**-39, 2.0**60, 2.0**100])
def test_rows_of_float32_of_any_size(size: float, watch: Watch) -> None:
    """Of a norm about 2^-39.86 and below, rows count as zero; large ones are scaled."""
    query, key = normal(5, 40, dtype=F32), normal(140, 40, seed=1, dtype=F32)
    query[1:3] *= size / query[1:3].norm(dim=1, keepdim=True)
    key[::3] *= size / key[::3].norm(dim=1, keepdim=True)
    assert_select(ops.select, query, key, 9, backward=False)
    assert (watch.programs > 0) == (size != 2.0**-39)


@pytest.mark.parametrize(
    ("D", "tf32", "small"), [(31, False, False), (32, False, True), (3, True, True)]
)
def test_which_sums_of_float32_are_returned(
    D: int, tf32: bool, small: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's switch for TF32 counts, as elsewhere."""
    from convnn_kernels.triton import hardware

    monkeypatch.setattr(hardware, "allows_tf32", lambda: tf32)
    query, key = normal(5, D, dtype=F32), normal(40, D, seed=1, dtype=F32)
    assert_select(ops.select, query, key, 5, backward=False)
    assert (launched == ["select_network_kernel"]) == small
