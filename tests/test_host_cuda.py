# SPDX-License-Identifier: MIT
"""The CUDA kernels run on the host under sanitizers and compared with the reference.

`tests/host_cuda` holds the execution layer. Between barriers, threads run in an order drawn from a
seed. Cases are small, but of every element type, in every path.
"""

import importlib.util
import math
import random
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, METRICS, SHORT, Case, assert_special, make_case, make_special_case
from host_cuda_program import DTYPES as DTYPE_NUMBERS
from host_cuda_program import Choices, HostCuda, Sweep
from torch import Tensor

from python_ref import assert_aggregate, assert_forward, assert_select, select

pytestmark = [pytest.mark.slow, pytest.mark.host_cuda]

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
F32 = torch.float32
FAULTS = {
    "no_barrier": "wrong result",
    "thread_ends_before_barrier": "a barrier waits for a thread that has ended",
    "different_barriers": "threads wait at different barriers",
    "lane_ends_before_vote": "a warp waits for a lane that is elsewhere",
    "lane_elsewhere": "lanes of a warp wait at different points",
    "shared_memory_ends": "heap-buffer-overflow",
    "not_aligned": "misaligned address",
}
# Of tests/host_cuda/hopper_faults.cpp, and patterns of what is reported. Where there are several,
# the order of events decides.
HOPPER_FAULTS = {
    "a_written_in_flight": "registers of A were written while a product reads them",
    "accumulators_written_in_flight": r"accumulators were written before hold\(\)",
    "barrier_initialized_again": "a barrier is initialized again",
    "barrier_not_initialized": "a barrier that was not initialized",
    "barrier_overwritten": "the barrier at byte .* was overwritten",
    "copy_not_aligned": "a copy to shared memory not aligned to 16 bytes",
    "copy_not_waited_for": "no thread has waited for the last|a copy is in flight at the end",
    "copy_of_odd_size": "a copy of no multiple of 16 bytes",
    "copy_without_expect": "ends within a phase of .* -16 bytes|a copy is in flight at the end",
    "descriptor_not_aligned": "a descriptor that does not begin in the first of 8 rows",
    "descriptor_of_second_row": "a descriptor that does not begin in the first of 8 rows",
    "descriptor_outside": "a descriptor beyond shared memory",
    "descriptor_with_other_stride": "a descriptor without the 128-byte swizzle",
    "descriptor_without_swizzle": "a descriptor without the 128-byte swizzle",
    "fewer_bytes_expected": "more bytes were copied than .* expected|which expected fewer bytes",
    "lane_does_not_commit": r"products without wgmma_commit\(\) before a wait",
    "lanes_at_different_products": "lanes of a warp issue a product at different points",
    "lanes_elsewhere": "a warp waits for a lane that is elsewhere",
    "more_bytes_expected": "no thread can continue.* 0 of 1 arrivals and 16 bytes outstanding",
    "named_barrier_never_full": "named barrier 1, where 128 of 256 threads have come",
    "named_barrier_of_half_a_warp": "a named barrier of 48 threads",
    "named_barrier_of_too_few": "named barrier 1 was completed by (parts of|other) warps",
    "named_barrier_of_two_warpgroups": "named barrier 1 was completed by (parts of|other) warps",
    "no_barrier_after_init": r"by another thread without fence_barrier_init\(\) and __syncth",
    "no_bytes_expected": "more bytes were copied than|reads what a copy in flight writes",
    "no_fence_async_shared": r"written by threads, without fence_async_shared\(\) since",
    "no_fence_barrier_init": r"without fence_barrier_init\(\)",
    "no_hold": "wrong result",
    "no_registers_released": "waits for 224 registers instead of 168, of which 0 are free",
    "no_release_of_stages": "warp 0, 1 lanes: waits for the barrier .* 8 of 8 arrivals",
    "no_wait_for_empty": "too many arrivals|overwrites what a product in flight reads",
    "no_wait_for_full": "reads what a copy in flight writes|no thread has waited|overwrites what",
    "no_wait_for_previous": "use-after-poison(.|\n)*before it may touch results",
    "no_warp_barrier_before_release": "wrong result",
    "no_wgmma_commit": r"products without wgmma_commit\(\) before a wait",
    "no_wgmma_fence": r"a product without wgmma_fence\(\) in its group",
    "no_wgmma_wait": r"hold\(\) of a product in flight",
    "product_by_one_thread_differs": "products differ within a warpgroup",
    "product_in_flight_at_end": "a thread ends with products in flight",
    "products_differ": "products differ within a warpgroup",
    "registers_not_multiple_of_8": "registers that is not a multiple of 8 from 24 to 256",
    "registers_of_part_of_warpgroup": "the rest of its warpgroup to set registers, which 32",
    "some_do_not_wait": "use-after-poison(.|\n)*before it may touch results",
    "source_ends": "a copy from memory that may not be read",
    "source_not_aligned": "a copy from an address not aligned to 16 bytes",
    "stage_released_early": "a copy overwrites what a product in flight reads",
    "target_written_in_flight": "the target of a copy in flight was written",
    "too_many_arrivals": "too many arrivals",
    "written_before_hold": r"accumulators were written before hold\(\)",
    "wrong_parity": "reads what a copy in flight writes|overwrites what|no thread can continue",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_execution_layer_finds(fault: str, programs: Path) -> None:
    done = subprocess.run([programs / "host_cuda_faults", fault], capture_output=True, text=True)
    assert done.returncode not in (0, 2)
    assert FAULTS[fault] in done.stderr


@pytest.mark.parametrize("kernel", ["sound", "list_changed_after_reading"])
def test_execution_layer_accepts_a_sound_kernel(kernel: str, programs: Path) -> None:
    subprocess.run([programs / "host_cuda_faults", kernel], check=True)


@pytest.mark.parametrize("fault", HOPPER_FAULTS)
def test_execution_layer_finds_of_hopper(fault: str, programs: Path) -> None:
    where = r"^(multiply|add_one): block \d, warp \d+, lane \d+"
    for seed in range(3):
        done = run_hopper(programs, seed, fault)
        assert done.returncode not in (0, 2)
        assert re.search(HOPPER_FAULTS[fault], done.stderr), done.stderr
        assert re.search(f"{where}|wrong result", done.stderr, re.MULTILINE)


def test_faults_of_hopper_are_all_of_the_program() -> None:
    program = (ROOT / "tests" / "host_cuda" / "hopper_faults.cpp").read_text()
    assert set(HOPPER_FAULTS) == set(re.findall(r'has\("(\w+)"\)', program))


@pytest.mark.parametrize("seed", range(10))
def test_execution_layer_accepts_a_sound_kernel_of_hopper(seed: int, programs: Path) -> None:
    done = run_hopper(programs, seed, "none")
    assert done.returncode == 0, done.stderr


def run_hopper(programs: Path, seed: int, fault: str) -> "subprocess.CompletedProcess[str]":
    command = [programs / "host_cuda_hopper_faults", str(seed), fault]
    return subprocess.run(command, capture_output=True, text=True)


# Random cases of all operators. Few columns: selection without groups.


def small_cases(make: Callable[[int], Case] = make_case) -> Iterator[Case]:
    for case in map(make, count()):
        batch = math.prod(case.lead)
        if batch * max(case.N, case.M) <= 150 and max(case.D, case.C) <= 130:
            yield case


@pytest.mark.parametrize("case", list(islice(small_cases(), 200)), ids=lambda case: case.id)
def test_random_case(case: Case, device: HostCuda) -> None:
    device.seed = case.seed
    assert_forward(device.forward, **case.arguments(), exact=case.exact, seed=case.seed)


@pytest.mark.parametrize(
    "case", list(islice(small_cases(make_special_case), 100)), ids=lambda case: case.id
)
def test_random_special_case(case: Case, device: HostCuda) -> None:
    device.seed = case.seed
    # The inverse of a huge norm is subnormal, which has fewer bits. And a dense product is
    # multiplied by rho: of an infinite rho, infinity and NaN may be each other.
    is_dense = case.weight == "dense" and case.rho == "similarity"
    backward = case.content == "tiny" or (case.content == "not_finite" and not is_dense)
    assert_special(case, device.forward, device.select, backward)


# Selection by groups.


class Selection:
    """The random case of a seed: a selection with enough columns for groups."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.seed = seed
        self.dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
        self.metric = METRICS[seed // 3 % 3]
        contents = ("normal", "integers", "integers", "few_rows", "constant", "special")
        self.content = draw.choice(contents)
        self.batch = draw.choice((1, 1, 2))
        self.N = draw.choice((1, 2, 5, 17, 66))
        self.D = draw.choice((1, 2, 3, 7, 8, 16, 31, 32, 33, 40, 65))
        self.k = draw.choice((1, 2, 3, 5, 9, 16))
        self.M = draw.choice((261, 320, 385, 512))
        self.listed, self.own = draw.random() < 0.3, draw.random() < 0.3
        self.masked = draw.choice((0.0, 0.0, 0.5, 0.95, 1.0))
        self.order = draw.choice(("similarity", "similarity", "index"))

    @property
    def id(self) -> str:
        return (
            f"s{self.seed}-{SHORT[self.dtype]}-{self.metric}-{self.content}-B{self.batch}-N{self.N}"
            f"-M{self.M}-D{self.D}-k{self.k}-{self.order}-mask{self.masked:g}"
            + ("-listed" if self.listed else "")
            + ("-self" if self.own else "")
        )

    def rows(self, generator: torch.Generator, n: int) -> Tensor:
        shape = (self.batch, n, self.D)
        X = torch.randn(shape, generator=generator)
        if self.content == "integers":
            return torch.randint(-3, 4, shape, generator=generator).float()
        if self.content == "few_rows":
            return X[:, torch.randint(min(n, 4), (n,), generator=generator)]
        if self.content == "constant":
            # The matrix instruction cuts equal products all alike: few bits, so that it cuts none.
            return torch.full(shape, 0.3 if self.dtype == F32 else 0.25)
        if self.content == "special":
            for value in (math.nan, math.inf, -math.inf, 0.0, -0.0):
                X[:, torch.randint(n, (max(1, n // 50),), generator=generator), 0] = value
        return X

    def check(self, device: HostCuda) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        query, key = self.rows(generator, self.N), self.rows(generator, self.M)
        restrictions = self.restrictions(generator)
        mask = torch.rand(self.batch, self.M, generator=generator) >= self.masked
        assert_select(
            device.select,
            query.to(self.dtype),
            key.to(self.dtype),
            self.k,
            **restrictions,
            key_mask=mask if self.masked else None,
            metric=self.metric,
            order=self.order,
            exact=self.content == "integers" and self.metric != "cosine",
            backward=False,
        )

    def restrictions(self, generator: torch.Generator) -> dict[str, Any]:
        M, given = self.M, {}
        if self.listed:
            given["candidates"] = torch.randperm(M, generator=generator)[: M - 3]
        if self.own:
            given["self_indices"] = torch.randint(M, (self.N,), generator=generator)
        return given


@pytest.mark.parametrize("case", [Selection(seed) for seed in range(216)], ids=lambda case: case.id)
def test_selection_by_groups(case: Selection, device: HostCuda) -> None:
    device.seed = case.seed
    case.check(device)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("M", [4100, 16400])
def test_larger_groups(M: int, device: HostCuda) -> None:
    """Groups of 16 and of 32 columns."""
    query, key = integers(3, 4), integers(M, 4, seed=1)
    assert_select(device.select, query, key, 5, metric="dot", exact=True, backward=False)


def test_the_largest_groups(device: HostCuda) -> None:
    """Groups of 64 columns."""
    query, key = integers(2, 1), integers(2**18, 1, seed=1)
    s, I = device.select(query, key, 3, metric="dot")
    expected = select(query, key, 3, metric="dot")
    assert torch.equal(I, expected[1])
    assert torch.equal(s, expected[0])


def test_several_launches(device: HostCuda) -> None:
    """A workspace for one block of rows at a time."""
    query, key = normal(2, 130, 8), normal(2, 300, 8, seed=1)
    whole = device.select(query, key, 4)
    device.most_bytes = 1
    assert all(map(torch.equal, whole, device.select(query, key, 4)))


@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("option", ["all", "mask", "few_left", "candidates", "self"])
@pytest.mark.parametrize(("k", "dtype"), [(257, F32), (290, torch.float64)], ids=str)
def test_more_neighbors_than_a_list_holds(
    k: int, dtype: torch.dtype, option: str, order: str, device: HostCuda
) -> None:
    query, key = integers(5, 3, dtype=dtype), integers(600, 3, seed=1, dtype=dtype)
    rows = torch.arange(600)
    own = torch.tensor([0, 150, 599, 7, 8])
    options: dict[str, Tensor] = {
        "all": {},
        "mask": {"key_mask": rows % 2 == 0},
        "few_left": {"key_mask": (rows == 3) | (rows == 599), "self_indices": own},
        "candidates": {"candidates": torch.arange(599, 0, -2)},
        "self": {"self_indices": own, "candidates": torch.arange(599, 0, -2)},
    }[option]
    assert_select(
        device.select,
        *(query, key, k),
        **options,
        metric="dot",
        order=order,
        exact=True,
        backward=False,
    )


@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("option", ["keys", "mask", "candidates", "self_outside_candidates"])
@pytest.mark.parametrize(("M", "k"), [(20, 21), (20, 300), (300, 700)])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_more_neighbors_than_keys(
    dtype: torch.dtype, M: int, k: int, option: str, order: str, device: HostCuda
) -> None:
    query, key = integers(5, 3, dtype=dtype), integers(M, 3, seed=1, dtype=dtype)
    options: dict[str, Tensor] = {
        "keys": {},
        "mask": {"key_mask": torch.arange(M) % 3 == 0},
        "candidates": {"candidates": torch.arange(M - 1, 0, -2)},
        "self_outside_candidates": {
            "candidates": torch.arange(M - 1, 0, -2),
            "self_indices": torch.tensor([0, 2, M - 1, M - 2, 4]),
        },
    }[option]
    options |= {"metric": "dot", "order": order}
    assert_select(device.select, query, key, k, **options, exact=True, backward=False)


@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
@pytest.mark.parametrize(
    ("metric", "rho"), [("cosine", "softmax"), ("dot", "similarity"), ("euclidean", "ones")]
)
@pytest.mark.parametrize(("M", "k"), [(8, 9), (3, 40), (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_missing_places_and_gradients(
    dtype: torch.dtype, M: int, k: int, metric: str, rho: str, kind: str, device: HostCuda
) -> None:
    """The value that a missing place has an index of is NaN."""
    N, D, C, O = 6, 18, 5, 3
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (O, C, k)}[kind]
    value = normal(2, M, C, seed=2, dtype=dtype)
    value[:, :1] = math.nan
    assert_forward(
        device.forward,
        normal(2, N, D, dtype=dtype),
        normal(2, M, D, seed=1, dtype=dtype),
        value,
        k,
        None if shape is None else normal(*shape, seed=3, dtype=dtype) / 8,
        normal(O if kind == "dense" else C, seed=4, dtype=dtype),
        key_mask=(torch.arange(M) != 0).expand(2, M),
        metric=metric,
        rho=rho,
    )


@pytest.mark.parametrize("size", [1e20, 1e-20, 1e-37, 3e38])
@pytest.mark.parametrize("M", [20, 300])
def test_norms_of_finite_rows_are_finite(size: float, M: int, device: HostCuda) -> None:
    query, key = normal(5, 40), normal(M, 40, seed=1)
    query = query / query.abs().amax() * size
    key = key * (min(size, 1e37) if size > 1 else size)
    s, _ = assert_select(device.select, query, key, 5)
    assert bool(s.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_gradients_of_infinite_rows(dtype: torch.dtype, device: HostCuda) -> None:
    """They are NaN, but 0 where a row is nobody's neighbor, or has none."""
    query, key = normal(5, 6, dtype=dtype), normal(9, 6, seed=1, dtype=dtype)
    other, wide = query.clone(), key.clone()
    other[1, 2], wide[[3, 7], 0] = math.inf, -math.inf

    def gradients(query: Tensor, key: Tensor, hidden: Sequence[int] = (7,)) -> Any:
        s, I = device.select(
            query, key, 8, key_mask=~torch.isin(torch.arange(9), torch.tensor(hidden))
        )
        assert not I.eq(7).any()
        return device.select_backward(torch.ones_like(s), query, key, s, I, "cosine")

    assert gradients(other, key)[0][1].isnan().all()
    grad_key = gradients(query, wide)[1]
    assert grad_key[3].isnan().all()
    assert not grad_key[7].any()
    assert not any(grad.any() for grad in gradients(other, wide, hidden=range(9))[:2])


@pytest.mark.parametrize("near", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(2, 1, 2), (3, 2, 2)])
def test_a_softmax_that_is_nan_leaves_missing_neighbors_out(
    shape: tuple[int, ...], near: float, device: HostCuda
) -> None:
    """Their part of each gradient is 0."""
    value, weight = torch.ones(2, 2), torch.ones(shape)
    s, I = torch.tensor([[near, -math.inf]]), torch.tensor([[1, 0]])
    grad_output = torch.ones(1, shape[0])
    grad_value, grad_s, grad_weight, _ = device.aggregate_backward(
        grad_output, value, s, I, weight, False, "softmax", 1.0
    )
    assert grad_s.isnan().tolist() == [[True, False]]
    assert grad_s[0, 1] == 0
    assert grad_value[1].isnan().all()
    assert not grad_value[0].any()
    assert grad_weight[..., 0].isnan().all()
    assert not grad_weight[..., 1].any()


def test_more_than_65535_batch_rows(device: HostCuda) -> None:
    """Backward, too. The next test is by groups."""
    query, key = integers(66000, 1, 1), integers(66000, 2, 1, seed=1)
    s, I = device.select(query, key, 1, metric="dot")
    expected = select(query, key, 1, metric="dot")
    assert torch.equal(I, expected[1])
    assert torch.equal(s, expected[0])
    grad = integers(66000, 1, 1, seed=2)
    grads = device.select_backward(grad, query, key, s, I, "dot")
    assert torch.equal(grads[0], grad * key.gather(1, I))
    assert torch.equal(grads[1], torch.zeros_like(key).scatter(1, I, grad * query))


def test_more_than_65535_batch_rows_by_groups(device: HostCuda) -> None:
    """Takes minutes, so it is not part of CI."""
    query, key = integers(65600, 1, 1), integers(65600, 257, 1, seed=1)
    s, I = device.select(query, key, 1, metric="dot")
    expected = select(query, key, 1, metric="dot")
    assert torch.equal(I, expected[1])
    assert torch.equal(s, expected[0])


def test_too_many_rows_of_key(device: HostCuda) -> None:
    """Rejected before anything is read, even if there are few candidates."""
    rows = 2**32
    numbers = (1, 1, rows, 1, 1, 1, DTYPE_NUMBERS[F32], 1, 0)
    inputs = [torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.int64), *[None] * 3]
    with pytest.raises(AssertionError, match=f"key must have at most {rows - 1} rows .*got {rows}"):
        device.call(0, numbers, inputs, [torch.empty(1), torch.empty(1, dtype=torch.int64)])


# Aggregation and its gradients.


class Aggregation:
    """The random case of a seed, with a dense convolution or another one."""

    def __init__(self, seed: int, dense: bool) -> None:
        draw = random.Random(seed)
        self.seed, self.dense = seed, dense
        self.dtype = DTYPES[seed % 4]
        self.similarity_dtype = draw.choice((torch.float32, torch.float32, torch.float64))
        self.rho = draw.choice(("softmax", "softmax", "ones", "similarity"))
        self.scale = draw.choice((1.0, 0.125, -1.0)) if self.rho == "softmax" else 1.0
        self.batch = draw.choice((1, 1, 2, 3))
        self.N = draw.choice((1, 2, 15, 33, 65))
        self.M = draw.choice((1, 3, 17, 64, 65, 70))
        self.C = draw.choice((1, 2, 7, 8, 31, 32, 33, 65))
        self.O = draw.choice((1, 3, 8, 16, 33, 64, 66))
        self.k = draw.choice((1, 2, 3, 5)) if dense else draw.choice((1, 2, 3, 9, 33, 70))
        self.kind = "dense" if dense else draw.choice(("none", "depthwise"))
        if self.kind == "depthwise" and self.C == 1:
            self.kind = "none"
        self.bias = draw.random() < 0.5
        self.missing = draw.choice((0.0, 0.0, 0.3, 1.0))
        self.hub = draw.random() < 0.3

    @property
    def id(self) -> str:
        return (
            f"s{self.seed}-{SHORT[self.dtype]}-s{SHORT[self.similarity_dtype]}-B{self.batch}"
            f"-N{self.N}-M{self.M}-C{self.C}-O{self.O}-k{self.k}-{self.kind}-{self.rho}"
            f"-missing{self.missing:g}" + ("-bias" if self.bias else "")
        )

    def tensors(self) -> list[Tensor | None]:
        """value, similarities, indices, weight and bias."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        shape = (self.batch, self.N, self.k)
        s = draw(*shape)
        s[torch.rand(shape, generator=generator) < self.missing] = -math.inf
        I = torch.randint(1 if self.hub else self.M, shape, generator=generator)
        weights = {
            "none": None,
            "depthwise": (self.C, 1, self.k),
            "dense": (self.O, self.C, self.k),
        }
        weight = None if weights[self.kind] is None else draw(*weights[self.kind])
        bias = draw(self.O if self.dense else self.C) if self.bias else None
        value = draw(self.batch, self.M, self.C).to(self.dtype)
        rest = [None if X is None else X.to(self.dtype) for X in (weight, bias)]
        return [value, s.to(self.similarity_dtype), I, *rest]


AGGREGATIONS = [Aggregation(seed, dense) for dense in (False, True) for seed in range(200)]


@pytest.mark.parametrize("case", AGGREGATIONS, ids=lambda case: case.id)
def test_aggregation(case: Aggregation, device: HostCuda) -> None:
    device.seed = case.seed
    assert_aggregate(device.aggregate, *case.tensors(), case.rho, case.scale, seed=case.seed)


@pytest.mark.parametrize("kind", ["depthwise", "dense"])
def test_aggregation_of_more_than_65535_batch_rows(kind: str, device: HostCuda) -> None:
    weight = integers(*{"depthwise": (2, 1, 1), "dense": (1, 2, 1)}[kind], seed=1)
    value, I = integers(66000, 2, 2), torch.arange(66000).view(-1, 1, 1) % 2
    assert_aggregate(device.aggregate, value, torch.ones(66000, 1, 1), I, weight, rho="ones")


@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
def test_a_weight_gradient_of_several_parts(kind: str, device: HostCuda) -> None:
    N, C, k = 600, 3, 2
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (4, C, k)}[kind]
    weight = None if shape is None else normal(*shape)
    bias = normal(4 if kind == "dense" else C, seed=5)
    I = torch.randint(7, (N, k), generator=torch.Generator().manual_seed(3))
    assert_aggregate(device.aggregate, normal(7, C, seed=1), normal(N, k), I, weight, bias)


def test_values_of_missing_neighbors_do_not_matter(device: HostCuda) -> None:
    value = normal(6, 20)
    value[0] = math.nan
    s = normal(4, 3)
    s[1], s[2, 1] = -math.inf, -math.inf
    I = torch.tensor([[1, 2, 3], [0, 0, 0], [4, 0, 5], [2, 2, 2]])
    for weight in (None, normal(20, 1, 3), normal(7, 20, 3)):
        Y = assert_aggregate(device.aggregate, value, s, I, weight)
        assert bool(Y.isfinite().all())


@pytest.mark.parametrize("M", [200, 300])
def test_sums_that_overflow_on_the_way(M: int, device: HostCuda) -> None:
    """Whether a sum overflows depends on its order. The order of the returned similarity counts,
    with and without groups."""
    query, key = torch.ones(1, 40), normal(M, 40, seed=1)
    key[123] = 0
    key[123, [0, 1]] = -3e38
    key[123, [16, 33]] = 3e38
    key[123, 4] = 1e38
    s, I = device.select(query, key, 2, metric="dot")
    assert I[0, 0] == 123
    assert s[0, 0].item() == pytest.approx(1e38, rel=0.02)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("where", ["query", "key", "both"])
def test_many_rows_that_are_not_finite(where: str, metric: str, device: HostCuda) -> None:
    """NaN, infinity and both, in any column, among sums that overflow on the way."""
    D = 45
    query, key = torch.ones(70, D), normal(300, D, seed=1)
    bad = [math.nan, math.inf, -math.inf]
    for i in range(70) if where != "key" else ():
        query[i, 11 * i % D] = bad[i % 3] if i % 5 else 1.0
        if i % 7 == 0:
            query[i] = bad[i % 3]
    for i in range(0, 300, 37) if where != "query" else ():
        key[i, 7 * i % D] = bad[i % 3]
        key[i, 5 * i % D] = bad[i % 2]
    key[123] = 0
    key[123, [0, 1, 16, 33, 4]] = torch.tensor([-3e38, -3e38, 3e38, 3e38, 1e38])
    assert_select(device.select, query, key, 16, metric=metric, backward=False)
    whole = device.select(query, key, 16, metric=metric)
    # The same neighbors of fewer keys, without groups.
    few = [i for i in range(300) if i in whole[1] or i % 2]
    assert len(few) <= 256
    again = device.select(query, key[few], 16, metric=metric)
    assert torch.equal(whole[1], torch.tensor(few)[again[1]])
    assert torch.equal(whole[0].nan_to_num(nan=1e30), again[0].nan_to_num(nan=1e30))


def test_gradients_beside_nan_are_finite(device: HostCuda) -> None:
    """If sums of pieces overflow, products are computed again, also next to a row with NaN."""
    n = 40
    large = 1 + 2**-7 - 2**-22  # its second piece is almost twice as large
    grad, weight = normal(20, n, seed=1), normal(n, n, 1, seed=3)
    grad[:, 20:], weight[20:] = large * 2.0**123, large
    grad[8:16, 0] = math.nan
    s, I = normal(20, 1), torch.arange(20).view(20, 1)
    value = normal(20, n, seed=2) / 2**20
    assert_aggregate(device.aggregate, value, s, I, weight, rho="ones", grad_output=grad)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("C", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_weights_of_missing_neighbors_do_not_matter(
    dtype: torch.dtype, C: int, bad: float, device: HostCuda
) -> None:
    value, weight = normal(9, C, dtype=dtype), normal(C, C, 3, seed=2, dtype=dtype)
    s, I = normal(70, 3, seed=3), torch.randint(9, (70, 3), generator=torch.Generator())
    s[:, 1], s[7] = -math.inf, -math.inf
    weight[..., 1] = 0

    def aggregate(value: Tensor, s: Tensor, I: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        not_finite = torch.full_like(weight, bad)
        weight = torch.where(torch.tensor([False, True, False]), not_finite, weight)
        return device.aggregate(value, s, I, weight, *rest)

    assert_aggregate(aggregate, value, s, I, weight)
    weight[..., 1] = bad
    grads = device.aggregate_backward(
        *(normal(70, C, seed=4, dtype=dtype), value, s, I, weight, False, "softmax", 1.0)
    )
    assert grads[2] is not None
    assert not grads[2][..., 1].any()


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("C", [1, 40])
def test_softmax_with_an_infinite_value(C: int, is_dense: bool, device: HostCuda) -> None:
    """rho_j (g . V_j - sum_i rho_i g . V_i) is -inf but for the neighbor itself."""
    value = torch.ones(3, C)
    value[0, 0] = math.inf
    weight, outputs = (torch.ones(2, C, 3), 2) if is_dense else (None, C)
    s, I = torch.zeros(1, 3), torch.arange(3)[None]
    grads = device.aggregate_backward(
        *(torch.ones(1, outputs), value, s, I, weight, False, "softmax", 1.0),
    )
    assert grads[1] is not None
    assert grads[1][0, 0].isnan()
    assert grads[1][0, 1:].eq(-math.inf).all()


@pytest.mark.parametrize("C", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_weights_of_places_that_did_not_choose_a_key_do_not_matter(
    dtype: torch.dtype, C: int, device: HostCuda
) -> None:
    """Each query has a neighbor in each slot; only the third is infinite."""
    value, weight = normal(9, C, dtype=dtype), normal(7, C, 3, seed=2, dtype=dtype)
    weight[..., 2] = math.inf
    I = torch.tensor([[0, 1, 8], [1, 2, 7], [0, 0, 8]])
    s = normal(3, 3, seed=3)
    value.requires_grad_()
    Y = device.aggregate(value, s, I, weight)
    (grad,) = torch.autograd.grad(Y, value, normal(3, 7, seed=4).abs().to(dtype))
    assert bool(grad[:7].isfinite().all())
    assert bool((grad[7:] == math.inf).all())


@pytest.mark.parametrize("C", [5, 40])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float64, (1e-200, 1e200, 1e180)),
        (torch.float32, (1e-30, 1e20, 1e25)),
        (torch.bfloat16, (1e-30, 1e20, 1e25)),
    ],
    ids=str,
)
def test_a_product_that_only_rho_keeps_finite(
    dtype: torch.dtype, sizes: tuple[float, ...], C: int, device: HostCuda
) -> None:
    s, value, weight = (
        normal(*shape, seed=len(shape), dtype=dtype) * size
        for shape, size in zip(((6, 2), (9, C), (4, C, 2)), sizes, strict=True)
    )
    similarities = s.to(torch.float64 if dtype == torch.float64 else F32)
    I = torch.arange(12).view(6, 2) % 9
    options = {"rho": "similarity", "backward": False}
    Y = assert_aggregate(device.aggregate, value, similarities, I, weight, **options)
    assert bool(Y.isfinite().all())


@pytest.mark.parametrize("C", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_infinite_values_stay_infinite(dtype: torch.dtype, C: int, device: HostCuda) -> None:
    value = normal(6, C, dtype=dtype)
    value[1, 2], value[3, 0] = math.inf, -math.inf
    I = torch.tensor([[0, 2], [1, 0], [3, 4], [1, 3], *[[0, 4]] * 32])
    s, weight = normal(36, 2, seed=1), normal(C, C, 2, seed=2, dtype=dtype)
    Y = assert_aggregate(device.aggregate, value, s, I, weight, rho="ones")
    assert bool(Y[0].isfinite().all())
    assert bool(Y[1:3].isinf().all())


# Keys that many queries chose: their pairs are summed in chunks.


def constant(file: str, name: str) -> int:
    found = re.search(rf"{name} = (\d+);", (SOURCES / file).read_text())
    assert found is not None
    return int(found[1])


DENSE_CHUNK = constant("inverse_list.h", "kFewestOfChunk")
CHUNK = constant("key_side.cuh", "kPairsOfChunk")


def hubs(chunk: int) -> list[tuple[int, int, int]]:
    """How many queries chose key 0, key 1, and key 2 with key 1 in the next slot.

    This sets where the pairs of key 1 begin and how many there are in each slot.
    """
    return [
        (0, chunk - 1, 0),
        (0, chunk, 0),
        (0, chunk + 1, 0),
        (1, chunk, 0),
        (1, 2 * chunk - 2, 0),
        (1, 2 * chunk - 1, 0),
        (5, 2 * chunk + 7, 0),
        (chunk, 3 * chunk, 1),
        (chunk - 1, chunk // 2, chunk // 2 + 2),
        (0, chunk + 1, 2 * chunk),
    ]


HUBS = [
    *(("dense", 5, hub) for hub in hubs(DENSE_CHUNK)),
    *(("none", 5, hub) for hub in hubs(CHUNK)),
    *(("depthwise", 8, hub) for hub in hubs(CHUNK)),
]


@pytest.mark.parametrize(("kind", "C", "hub"), HUBS, ids=str)
def test_value_gradient_of_a_key_with_many_pairs(
    kind: str, C: int, hub: tuple[int, int, int], device: HostCuda
) -> None:
    """In the second batch element, with as many queries without any neighbor."""
    O, k = 3, 2
    first = torch.repeat_interleave(torch.arange(3), torch.tensor(hub))
    chosen = torch.stack((first, torch.where(first == 2, 1, 3)), dim=1)
    chosen = torch.cat((chosen, torch.ones_like(chosen)))
    N = len(chosen)
    I = torch.stack((torch.full_like(chosen, 3), chosen))
    s = normal(2, N, k)
    s[:, N // 2 :] = -math.inf
    s[0] = -math.inf
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (O, C, k)}[kind]
    weight = None if shape is None else normal(*shape, seed=3)
    assert_aggregate(device.aggregate, normal(2, 4, C, seed=1), s, I, weight)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("D", [7, 8])
@pytest.mark.parametrize("hub", hubs(CHUNK), ids=str)
def test_key_gradient_of_a_key_with_many_pairs(
    hub: tuple[int, int, int], D: int, metric: str, device: HostCuda
) -> None:
    """In the second batch element; in the first one all keys are masked."""
    first = torch.repeat_interleave(torch.arange(3), torch.tensor(hub))
    query, key = 4 * normal(len(first), D), normal(3, D, seed=1)
    key[:, :3] = 9 * torch.eye(3)
    query[:, :3] = key[first, :3]
    query, key = query.expand(2, -1, -1), key.expand(2, -1, -1)
    mask = torch.tensor([[False], [True]]).expand(2, 3)
    _, I = assert_select(device.select, query, key, 1, key_mask=mask, metric=metric)
    assert torch.equal(I[1, :, 0], first)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("kind", ["depthwise", "dense"])
def test_every_query_chooses_the_same_keys(kind: str, dtype: torch.dtype, device: HostCuda) -> None:
    """An image of one color. There are so many columns that chunks exceed the minimum size."""
    N, columns, k = DENSE_CHUNK + 40, DENSE_CHUNK + 2, 2
    X = normal(1, columns, dtype=dtype).expand(N, columns)
    shape = {"depthwise": (columns, 1, k), "dense": (columns, columns, k)}[kind]
    weight = normal(*shape, seed=1, dtype=dtype) / columns**0.5
    _, _, I = assert_forward(device.forward, X, X, X, k, weight)
    assert torch.equal(I, torch.arange(k).expand(N, k))


@pytest.mark.parametrize(("kind", "C"), [("depthwise", 5), ("depthwise", 8), ("dense", 5)])
def test_the_same_bits_of_many_pairs_in_every_order_of_threads(
    kind: str, C: int, device: HostCuda
) -> None:
    N, k = 3 * CHUNK, 2
    weight = normal(*((3, C, k) if kind == "dense" else (C, 1, k)))
    I = torch.randint(2, (N, k), generator=torch.Generator().manual_seed(1))
    I[: 2 * CHUNK + 9] = torch.tensor([0, 1])
    s, X, value = normal(N, k), normal(N, C, seed=1), normal(2, C, seed=2)

    def run(seed: int) -> tuple[Tensor | None, ...]:
        device.seed = seed
        grad = normal(N, weight.shape[0], seed=3)
        of_value = device.aggregate_backward(grad, value, s, I, weight, False, "softmax", 1.0)[0]
        return of_value, device.select_backward(s, X, value, s, I, "cosine")[1]

    first = run(0)
    for seed in range(1, 5):
        assert all(map(torch.equal, first, run(seed))), f"seed {seed}"


# The backward of forward in one call.


def backward_call(
    dtype: torch.dtype, rho: str, kind: str, direct: bool, D: int = 5, C: int = 7
) -> dict[str, Any]:
    """Arguments of forward_backward, with a missing neighbor."""
    N, M, O, k = 9, 12, 4, 3
    shape = {"none": None, "depthwise": (C, 1, k), "dense": (O, C, k)}[kind]
    similarities = normal(2, N, k, seed=5, dtype=torch.float64 if dtype is torch.float64 else F32)
    similarities[0, 2, 1] = -math.inf
    return {
        "grad_output": normal(2, N, O if kind == "dense" else C, dtype=dtype),
        "grad_similarities": normal(2, N, k, seed=6).to(similarities.dtype) if direct else None,
        "query": normal(2, N, D, seed=1, dtype=dtype),
        "key": normal(2, M, D, seed=2, dtype=dtype),
        "value": normal(2, M, C, seed=3, dtype=dtype),
        "weight": None if shape is None else normal(*shape, seed=4, dtype=dtype),
        "similarities": similarities,
        "indices": torch.arange(2 * N * k).view(2, N, k) * 7 % M,
        **{"has_bias": True, "metric": "cosine", "rho": rho, "scale": 1.0},
    }


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "output-only"])
@pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(("D", "C"), [(5, 7), (8, 16)])
def test_forward_backward_has_the_bits_of_two_steps(
    D: int, C: int, dtype: torch.dtype, kind: str, rho: str, direct: bool, device: HostCuda
) -> None:
    x = backward_call(dtype, rho, kind, direct, D, C)
    # Nothing may reach the similarities: the C++ operators leave that case to their caller.
    selects = direct or rho != "ones"
    needs = (selects, selects, True, True, True)
    grads = device.forward_backward(**x, needs=needs)
    grad_value, grad_s, grad_weight, grad_bias = device.aggregate_backward(
        *(x["grad_output"], x["value"], x["similarities"], x["indices"], x["weight"]),
        *(x["has_bias"], x["rho"], x["scale"]),
    )
    grad_query = grad_key = None
    if selects:
        if rho == "ones":
            grad_s = x["grad_similarities"]
        elif direct:
            grad_s = grad_s + x["grad_similarities"]
        grad_query, grad_key = device.select_backward(
            grad_s, x["query"], x["key"], x["similarities"], x["indices"], x["metric"]
        )
    expected = (grad_query, grad_key, grad_value, grad_weight, grad_bias)
    for name, one, other in zip(
        ("query", "key", "value", "weight", "bias"), grads, expected, strict=True
    ):
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


def test_forward_backward_sorts_the_pairs_once(programs: Path) -> None:
    program = HostCuda(programs / "host_cuda")
    program.forward_backward(**backward_call(F32, "softmax", "depthwise", True))
    counts = {kernel.name: launches.count for kernel, launches in program.close().items()}
    assert set(counts.values()) == {1} | {counts.pop("sum_parts_kernel")}
    # No chunk: there are fewer pairs.
    kernels = "permute_weight units query_side count_pairs place_keys scatter_pairs key_side"
    assert set(counts) == {f"{name}_kernel" for name in kernels.split()}


def needed_subsets() -> list[tuple[bool, bool, bool, bool, bool]]:
    return [tuple(bool(bits >> i & 1) for i in range(5)) for bits in range(1, 31)]  # type: ignore[misc]


@pytest.mark.parametrize(("D", "C"), [(5, 7), (8, 16)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["none", "depthwise"])
def test_a_gradient_does_not_depend_on_which_others_are_needed(
    kind: str, metric: str, D: int, C: int, device: HostCuda
) -> None:
    x = backward_call(F32, "softmax", kind, True, D, C) | {"metric": metric}
    whole = device.forward_backward(**x)
    for needs in needed_subsets()[:: 1 if metric == "cosine" else 4]:
        grads = device.forward_backward(**x, needs=needs)
        for one, other, needed in zip(grads, whole, needs, strict=True):
            if one is not None:
                assert needed
                assert torch.equal(one, other), needs
            else:
                assert not needed or other is None


# D, C and k where tiles, stretches of channels and the place of their numbers change: rows of one
# and of several stretches, queries by eight and by two, numbers in the workspace.
SIZES = [
    (72, 136, 9),
    (136, 8, 9),
    (33, 20, 9),
    (16, 24, 1),
    (16, 24, 33),
    (8, 8, 130),
    (5, 7, 130),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("metric", "rho"), [("cosine", "softmax"), ("dot", "similarity"), ("euclidean", "softmax")]
)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=SHORT.get)
def test_gradients_of_other_sizes(
    dtype: torch.dtype, metric: str, rho: str, size: tuple[int, int, int], device: HostCuda
) -> None:
    """Two batch elements with 33 queries: tiles have some of both. A single block has all tiles."""
    D, C, k = size
    device.most_bytes = 1
    query, key = normal(2, 33, D), normal(2, max(40, k + 3), D, seed=1)
    if metric != "cosine":
        query, key = query / D**0.5, key / D**0.5
    value = normal(2, key.shape[1], C, seed=2)
    weight, bias = normal(C, 1, k, seed=3) / k, normal(C, seed=4)
    arguments = [X.to(dtype) for X in (query, key, value)]
    options = [X.to(dtype) for X in (weight, bias)]
    assert_forward(device.forward, *arguments, k, *options, metric=metric, rho=rho)


@pytest.mark.parametrize("D", [8, 5])
@pytest.mark.parametrize(
    ("batch", "N", "M", "k"), [(1, 20, 8300, 3), (2, 2100, 3, 2), (3, 9, 130, 40)]
)
def test_pairs_of_ranges_of_keys_and_of_tiles(
    batch: int, N: int, M: int, k: int, D: int, device: HostCuda
) -> None:
    """More keys than are counted at a time; more pairs than a tile has; blocks of keys."""
    query, key = integers(batch, N, D), integers(batch, M, D, seed=1)
    generator = torch.Generator().manual_seed(2)
    I = torch.randint(M, (batch, N, k), generator=generator)
    grad, s = integers(batch, N, k, seed=3), torch.zeros(batch, N, k)
    s[torch.rand(s.shape, generator=generator) < 0.2] = -math.inf
    _, grad_key = device.select_backward(grad, query, key, s, I, "dot")
    terms = torch.where(s == 0, grad, 0)[..., None] * query[:, :, None]
    expected = torch.zeros_like(key)
    for b in range(batch):
        expected[b].index_add_(0, I[b].flatten(), terms[b].flatten(0, 1))
    assert torch.equal(grad_key, expected)


@pytest.mark.parametrize("D", [8, 5])
def test_the_pairs_of_a_key_are_added_in_order(D: int, device: HostCuda) -> None:
    """The sum of these numbers is 0 in their order, and 1 in others."""
    query = torch.tensor([2.0**24, 1, -(2.0**24)])[:, None].expand(3, D)
    I, ones = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    _, grad_key = device.select_backward(ones, query, query, ones, I, "dot")
    assert grad_key is not None
    assert not grad_key.any()


@pytest.mark.parametrize("C", [5, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_what_is_in_no_pair_does_not_matter(dtype: torch.dtype, C: int, device: HostCuda) -> None:
    """A query without a neighbor, a key that nobody chose, and G where neighbors are missing."""
    x = backward_call(dtype, "softmax", "depthwise", True, C, C)
    x["indices"] = x["indices"] % 11
    x["similarities"][0, 4] = x["similarities"][:, :, 2] = -math.inf
    expected = device.forward_backward(**x)
    x["query"][0, 4] = x["grad_output"][0, 4] = math.nan
    x["key"][:, 11] = x["value"][:, 11] = math.inf
    x["weight"][..., 2] = math.nan
    grads = device.forward_backward(**x)
    for grad, other in zip(grads[:4], expected[:4], strict=True):
        assert torch.equal(grad, other)
    assert not grads[0][0, 4].any()
    assert not grads[1][:, 11].any()
    assert not grads[2][:, 11].any()
    assert not grads[3][..., 2].any()


@pytest.mark.parametrize("D", [5, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_rows_of_norm_zero_have_gradient_zero(dtype: torch.dtype, D: int, device: HostCuda) -> None:
    x = backward_call(dtype, "softmax", "none", True, D, 8)
    tiny = 0.0 if dtype == torch.float16 else 1e-14
    x["query"][1, 3], x["key"][0, 7] = tiny, -tiny
    x["query"][0, 2], x["key"][1, 1] = 0.0, 0.0
    grads = device.forward_backward(**x)
    for grad, rows in ((grads[0], ((1, 3), (0, 2))), (grads[1], ((0, 7), (1, 1)))):
        assert bool(grad.isfinite().all())
        assert all(not grad[row].any() for row in rows)
        assert int((grad == 0).all(-1).sum()) == 2


# Numbers that are hard to split: with many bits, tiny next to huge, not finite.

BITS = [(1, 23), (4, 20), (7, 17), (8, 16), (9, 15), (11, 13), (12, 12), (13, 11), (16, 8), (20, 4)]


def whole(bits: int, *shape: int, seed: int = 0) -> Tensor:
    """Odd integers of `bits` bits and both signs, at most 5/8 of the largest."""
    generator = torch.Generator().manual_seed(seed)
    high = 5 * 2**bits // 8
    X = torch.randint(2 ** (bits - 1), max(high, 2), shape, generator=generator) | 1
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -X, X).float()


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("D", [32, 45])
def test_neighbors_of_whole_numbers_are_exact(
    D: int, bits: tuple[int, int], device: HostCuda
) -> None:
    """Many similarities that differ slightly, with sums below 2^24."""
    generator = torch.Generator().manual_seed(D)
    batch, M = 3, 320
    query, key = torch.zeros(batch, 1, D), torch.zeros(batch, M, D)
    for b in range(batch):
        first, second = torch.randperm(D, generator=generator)[:2]
        query[b, 0, first], query[b, 0, second] = whole(bits[0], 1, seed=b), 1.0
        step = torch.randint(2 if bits[1] > 1 else 1, (M,), generator=generator)
        key[b, :, first] = whole(bits[1], 1, seed=5 + b).abs() - step
        # Compensates for the step, up to a small remainder.
        rest = torch.randint(40, (M,), generator=generator)
        key[b, :, second] = query[b, 0, first] * step + rest
    assert (query.abs() @ key.abs().mT).max() < 2**24
    s, I = device.select(query, key, 5, metric="dot")
    expected = select(query.double(), key.double(), 5, metric="dot")
    assert torch.equal(I, expected[1])
    assert torch.equal(s.double(), expected[0])


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_convolution_of_whole_numbers_is_exact(bits: tuple[int, int], device: HostCuda) -> None:
    """Forward and backward, where each sum has one large term."""
    n = 36
    generator = torch.Generator().manual_seed(sum(bits))
    value, grad, chosen = (torch.eye(n)[torch.randperm(n, generator=generator)] for _ in range(3))
    value, grad = value * whole(bits[0], n), grad * whole(bits[1], n, seed=1)
    weights = [whole(b, n, n, 1, seed=2) for b in reversed(bits)]
    s, I = torch.ones(n, 1), chosen.argmax(dim=1, keepdim=True)
    gathered = value.double()[I[:, 0]]
    Y = device.aggregate(value, s, I, weights[0], rho="ones")
    assert torch.equal(Y.double(), gathered @ weights[0][..., 0].double().T)
    grads = device.aggregate_backward(grad, value, s, I, weights[1], False, "ones", 1.0)
    assert torch.equal(grads[0].double()[I[:, 0]], grad.double() @ weights[1][..., 0].double())
    assert torch.equal(grads[2][..., 0].double(), grad.double().T @ gathered)


@pytest.mark.parametrize(("small", "large"), [(-121, 120), (-118, 0), (-60, 60)])
def test_tiny_numbers_keep_their_digits(small: int, large: int, device: HostCuda) -> None:
    key, query = normal(300, 40) * 2.0**small, normal(3, 40, seed=1) * 2.0**large
    assert_select(device.select, query, key, 4, metric="dot", backward=False)
    s, I = torch.ones(5, 2), torch.arange(10).view(5, 2)
    weight = normal(3, 40, 2, seed=2) * 2.0**large
    assert_aggregate(device.aggregate, key[:10], s, I, weight, rho="ones")


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000])
def test_every_nan_stays_nan(bits: int, device: HostCuda) -> None:
    """Including those whose bits would carry into the sign when rounded."""
    nan = torch.tensor(bits, dtype=torch.int32).view(F32)
    value = torch.ones(32, 32)
    value[0, 0] = nan
    Y = device.aggregate(value, torch.ones(32, 1), torch.zeros(32, 1).long(), normal(4, 32, 1))
    assert bool(Y.isnan().all())
    key = torch.ones(512, 32)
    key[500, 3] = nan
    s, I = device.select(torch.ones(2, 32), key, 1, metric="dot")
    assert bool(s.isnan().all())
    assert I.eq(500).all()


@pytest.mark.parametrize("order", ["similarity", "index"])
def test_candidates_that_are_not_distinct_write_within_bounds(order: str, device: HostCuda) -> None:
    """The result is undefined; AddressSanitizer checks the accesses."""
    candidates = torch.zeros(600, dtype=torch.long)
    for k in (9, 257):
        s, _ = device.select(normal(3, 2), normal(600, 2, seed=1), k, candidates, order=order)
        assert s.shape == (3, k)


@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
def test_softmax_of_a_large_spread(kind: str, device: HostCuda) -> None:
    """exp would overflow, or be 0 everywhere, without the largest of scale times the similarity."""
    s, I = 400 * normal(6, 5), torch.arange(30).view(6, 5) % 9
    s[1], s[2, :3] = s[1] / 100, -math.inf
    shape = {"none": None, "depthwise": (7, 1, 5), "dense": (3, 7, 5)}[kind]
    weight = None if shape is None else normal(*shape, seed=1)
    for scale in (-1.0, 1.0):
        Y = assert_aggregate(
            device.aggregate, normal(9, 7, seed=2), s, I, weight, scale=scale, backward=False
        )
        assert bool(Y.isfinite().all())


def test_infinite_similarity_is_nan_as_in_eager_softmax(device: HostCuda) -> None:
    s = normal(3, 4)
    s[0, 1], s[1, 2] = math.inf, math.nan
    I = torch.arange(12).view(3, 4)
    Y = assert_aggregate(device.aggregate, normal(12, 5), s, I, backward=False)
    assert bool(Y[:2].isnan().all())
    assert bool(Y[2].isfinite().all())


def test_no_access_out_of_bounds(device: HostCuda) -> None:
    """Indices out of range are ignored; AddressSanitizer checks the accesses."""
    query, key = integers(3, 4), integers(400, 4, seed=1)
    wrong = torch.tensor([-5, 10**9, 400])
    for step, order in ((1, "similarity"), (4, "similarity"), (1, "index")):
        allowed = torch.arange(0, 400, step)
        candidates = torch.cat([wrong, allowed])
        own = torch.tensor([10**12, -1, 3])
        k = 4 if order == "similarity" else 300
        s, I = device.select(query, key, k, candidates, own, metric="dot", order=order)
        expected = select(query[:2], key, k, allowed, metric="dot", order=order)
        assert torch.equal(I[:2], expected[1])
        assert torch.equal(s[:2], expected[0])
    value = normal(5, 3).requires_grad_()
    I = torch.tensor([[0, 1], [-7, 10**12]])
    for weight in (None, normal(3, 1, 2), normal(4, 3, 2)):
        W = None if weight is None else weight.requires_grad_()
        Y = device.aggregate(value, normal(2, 2), I, W)
        assert not Y[1].any()
        assert not torch.autograd.grad(Y.sum(), value)[0][2:].any()
    grads = device.select_backward(
        *(normal(2, 2), normal(2, 3), normal(5, 3), normal(2, 2), I, "cosine")
    )
    assert not grads[0][1].any()


@pytest.mark.parametrize("weight", [None, (6, 1, 4), (5, 6, 4)], ids=str)
@pytest.mark.parametrize(
    ("lead", "N"), [((), 0), ((0,), 3), ((2, 0), 3), ((2,), 0)], ids=["N0", "B0", "B2x0", "B2N0"]
)
def test_empty(
    lead: tuple[int, ...], N: int, weight: tuple[int, ...] | None, device: HostCuda
) -> None:
    tensors = [torch.randn(*lead, n, 6).requires_grad_() for n in (N, 9, 9)]
    W = None if weight is None else torch.randn(weight).requires_grad_()
    Y, s, _ = device.forward(*tensors, 4, W)
    (Y.sum() + s.sum()).backward()
    assert all(not X.grad.any() for X in (*tensors, W) if X is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(
    ("kind", "D", "C"), [("depthwise", 5, 9), ("depthwise", 8, 16), ("dense", 5, 9)]
)
def test_the_same_bits_in_every_order_of_threads(
    kind: str, D: int, C: int, dtype: torch.dtype, device: HostCuda
) -> None:
    """Forward and backward. One case has hubs, ties, several blocks and groups."""
    N, M, O, k = 70, 262, 11, 3
    query, key, value = (normal(1, n, D if i < 2 else C, seed=i) for i, n in enumerate((N, M, M)))
    key[:, 100:150] = key[:, :50]
    query[0, :40] = query[0, :1]
    weight = normal(*((O, C, k) if kind == "dense" else (C, 1, k)), seed=3)
    bias = normal(O if kind == "dense" else C, seed=4)
    leaves = [X.to(dtype).requires_grad_() for X in (query, key, value, weight, bias)]

    def run(seed: int) -> list[Tensor]:
        device.seed = seed
        Y, s, I = device.forward(*leaves[:3], k, *leaves[3:])
        grads = [normal(*X.shape, seed=6).to(X.dtype) for X in (Y, s)]
        return [Y, s, I, *torch.autograd.grad((Y, s), leaves, grads)]

    first = run(0)
    for seed in range(1, 10):
        assert all(map(torch.equal, first, run(seed))), f"seed {seed}"


def test_every_kernel_of_every_type_runs(programs: Path) -> None:
    """Every instance is launched, with the shared memory that resources.py expects."""
    spec = importlib.util.spec_from_file_location("resources", SOURCES / "resources.py")
    assert spec is not None
    assert spec.loader is not None
    resources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(resources)
    program = programs / "host_cuda"
    listed = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    addresses = {
        name: int(address, 16) for address, _, name in re.findall(r"(\w+) (\w) (\S+)", listed)
    }
    kernels = [name for name in addresses if re.match(r"_ZN6convnn4cudaL?\d+\w+_kernel[IE]", name)]
    origin = addresses["_ZN9execution4seedEm"]
    instances = dict(
        zip(
            (addresses[name] - origin for name in kernels), resources.readable(kernels), strict=True
        )
    )
    text = "".join(path.read_text() for path in SOURCES.glob("*.cuh"))
    written = set(re.findall(r"__launch_bounds__\([^)]*\) void (\w+_kernel)\(", text))
    assert {name.partition("<")[0] for name in instances.values()} == written
    assert "group_maxima_kernel<BFloat16, true>" in instances.values()

    device = HostCuda(program)
    for dtype in DTYPES:
        for columns, shape in ((3, (2, 3, 2)), (3, (3, 1, 2)), (8, (8, 1, 2))):
            X = [normal(n, columns, seed=n, dtype=dtype) for n in (CHUNK, 600, 600)]
            X = [x.requires_grad_() for x in X]
            weight = normal(*shape, dtype=dtype).requires_grad_()
            bias = normal(weight.shape[0], dtype=dtype).requires_grad_()
            Y, s, _ = device.forward(*X, 2, weight, bias, torch.arange(600))
            (Y.sum() + s.sum()).backward()
        ranges = torch.tensor([0, 600]).expand(CHUNK, 2)
        for each in (None, ranges):
            device.select(*X[:2], 257, key_range=each)
        rows = torch.arange(600).expand(2, 600)
        pairs = [x.detach().expand(2, -1, -1) for x in X[:2]]
        device.select(*pairs, 2, rows, key_range=ranges)
    for dtype, D in product((torch.float16, torch.bfloat16), (64, 128)):
        query, key = normal(20, D, dtype=dtype), normal(300, D, seed=1, dtype=dtype)
        for k, splits in product((2, 11, 17, 33), (1, 2)):
            device.choices = Choices(splits=splits)
            device.sweep = Sweep.PORTABLE if splits == 1 else Sweep.HOPPER
            device.hopper_forward(query, key, key, k)
    launched = device.close()
    # Those of the dense convolution for Hopper run in test_host_cuda_dense.py.
    of_dense = {name for name in instances.values() if name.startswith(("hopper_dense", "dense_"))}
    assert {instances[kernel.address] for kernel in launched} == set(instances.values()) - of_dense
    by_size = "top_groups_kernel", "query_side_kernel", "count_pairs_kernel", "scatter_pairs_kernel"
    for kernel, launches in launched.items():
        expected = resources.dynamic_shared(instances[kernel.address])
        less = kernel.name in by_size and launches.shared_bytes < expected
        # What a sweep and a finish have depends on the device and on sizes.
        less = less or kernel.name.startswith(("hopper_", "mma_"))
        assert launches.shared_bytes == expected or less, instances[kernel.address]
