# SPDX-License-Identifier: MIT
"""What restricts a selection, in the CUDA kernels run on the host: ranges of keys, the token itself
excluded, candidates and tokens of each batch element.

`by_hand` knows the order of neighbors and nothing of ranges, groups or candidates.
"""

import math
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from cases import Case, make_restricted_case
from host_cuda_program import HostCuda
from inputs import allowed_by
from test_host_cuda import Selection, integers, normal, small_cases
from torch import Tensor

from python_ref import assert_forward, assert_select

pytestmark = [pytest.mark.slow, pytest.mark.host_cuda]

F16, F32, F64 = torch.float16, torch.float32, torch.float64
MOST = 2**63 - 1
B, N = 2, 70
# By what kernels: dtype, keys and neighbors.
PATHS = {
    "groups": (F32, 300, 5),
    "groups, 16 bits": (F16, 330, 4),
    "all columns": (F32, 100, 5),
    "float64": (F64, 300, 5),
    "several rounds": (F32, 600, 260),
}
paths = pytest.mark.parametrize("path", PATHS)
orders = pytest.mark.parametrize("order", ["similarity", "index"])


def numbers(path: str) -> tuple[Tensor, Tensor, int]:
    """Query, key and k, with many equal similarities."""
    dtype, M, k = PATHS[path]
    return integers(B, N, 4, dtype=dtype), integers(B, M, 4, seed=1, dtype=dtype), k


def by_hand(
    query: Tensor, key: Tensor, k: int, allowed: Tensor, order: str, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The neighbors by dot product among those allowed [B, N, M]; `own` [B, N] come first."""
    s = (query.double() @ key.double().mT).masked_fill(~allowed, -math.inf)
    rank = s if own is None else s.scatter(-1, own[..., None], math.inf).where(allowed, s)
    I = rank.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    I = torch.nn.functional.pad(I, (0, k - I.shape[-1]))
    missing = torch.arange(k) >= allowed.sum(-1, keepdim=True)
    if order == "index":
        I = I.masked_fill(missing, key.shape[-2]).sort(dim=-1).values
    I = I.masked_fill(missing, 0)
    s = s.gather(-1, I).masked_fill(missing, -math.inf)
    return s.to(F64 if query.dtype == F64 else F32), I


def equal(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, result, expected))


def ranges_of(kind: str, M: int) -> Tensor:
    """[N, 2], or [B, N, 2] where the batch elements have different ones."""
    at = torch.arange(N) + M - N
    begin, end = torch.zeros(N, dtype=torch.long), at + 1
    if kind == "window":
        begin, end = at * 2 % M, at * 2 % M + 20
    elif kind == "segments":
        begin = torch.arange(N) // 23 * 60
        end = begin + 60
    elif kind == "some empty":
        begin = torch.where(at % 3 == 0, end, begin)
    elif kind == "all empty":
        begin, end = at, at
    elif kind == "at the end":
        begin, end = torch.full((N,), M - 1), torch.full((N,), M)
    elif kind == "of each batch element":
        ends = torch.randint(M + 1, (B, N, 2), generator=torch.Generator().manual_seed(0))
        begin, end = ends.sort(dim=-1).values.unbind(-1)
    return torch.stack([begin, end], -1).clamp(0, M)


@pytest.mark.parametrize(
    "case", list(islice(small_cases(make_restricted_case), 200)), ids=lambda case: case.id
)
def test_random_case(case: Case, device: HostCuda) -> None:
    device.seed = case.seed
    assert_forward(device.forward, **case.arguments(), exact=case.exact, seed=case.seed)


class RestrictedSelection(Selection):
    """The random case of a seed, with enough columns for groups."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        draw = random.Random(seed)
        self.for_each = draw.random() < 0.5
        self.own = draw.random() < 0.6
        self.excluded = self.own and draw.random() < 0.6
        self.width = draw.choice((0, 1, 20, 70, 300, 600))

    @property
    def id(self) -> str:
        more = ("for_each", self.for_each), ("excluded", self.excluded)
        return f"{super().id}-w{self.width}" + "".join(f"-{name}" for name, is_so in more if is_so)

    def restrictions(self, generator: torch.Generator) -> dict[str, Tensor | bool]:
        lead = (self.batch,) if self.for_each else ()
        begin = torch.randint(-self.width, self.M, (*lead, self.N), generator=generator)
        ranges = torch.stack([begin, begin + self.width], dim=-1).clamp(0, self.M)
        given: dict[str, Tensor | bool] = {"key_range": ranges, "exclude_self": self.excluded}
        if self.listed:
            rows = torch.rand(*lead, self.M, generator=generator).argsort(dim=-1)
            given["candidates"] = rows[..., : self.M - 3]
        if self.own:
            given["self_indices"] = torch.randint(self.M, (*lead, self.N), generator=generator)
        return given


@pytest.mark.parametrize(
    "case", [RestrictedSelection(seed) for seed in range(120)], ids=lambda case: case.id
)
def test_selection_by_groups(case: RestrictedSelection, device: HostCuda) -> None:
    device.seed = case.seed
    case.check(device)


KINDS = ["causal", "window", "segments", "some empty", "all empty", "at the end"]


@orders
@pytest.mark.parametrize("kind", [*KINDS, "of each batch element"])
@paths
def test_ranges_are_masks(path: str, kind: str, order: str, device: HostCuda) -> None:
    query, key, k = numbers(path)
    ranges = ranges_of(kind, key.shape[-2])
    allowed = allowed_by(ranges, key.shape[-2]).expand(B, -1, -1)
    result = device.select(query, key, k, metric="dot", order=order, key_range=ranges)
    assert equal(result, by_hand(query, key, k, allowed, order))


@orders
@pytest.mark.parametrize("listed", ["shared", "of each batch element"])
@paths
def test_ranges_of_candidates(path: str, listed: str, order: str, device: HostCuda) -> None:
    """In any order, and some of them no rows of key."""
    query, key, k = numbers(path)
    M = key.shape[-2]
    lead = (B,) if listed != "shared" else ()
    rows = torch.rand(*lead, M, generator=torch.Generator().manual_seed(3)).argsort(dim=-1)
    rows = rows[..., : M - 7]
    candidates = rows.where(rows % 19 != 0, torch.tensor([-1, M, -MOST, MOST])[rows % 4])
    is_listed = torch.zeros(*lead, M, dtype=torch.bool).scatter(-1, rows, rows % 19 != 0)
    for ranges in (ranges_of("of each batch element", M), None):
        allowed = is_listed[..., None, :].expand(B, N, M)
        if ranges is not None:
            allowed = allowed & allowed_by(ranges, M)
        options = {"metric": "dot", "order": order, "key_range": ranges}
        result = device.select(query, key, k, candidates, **options)
        assert equal(result, by_hand(query, key, k, allowed, order))


@orders
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("kind", ["causal", "window", "all empty", "none"])
@paths
def test_the_token_itself(
    path: str, kind: str, excluded: bool, order: str, device: HostCuda
) -> None:
    """Of each batch element; outside its range it is no neighbor. Half of the keys are equal to
    that of a token."""
    query, key, k = numbers(path)
    M = key.shape[-2]
    own = (torch.arange(N) * torch.tensor([[3], [1]]) + torch.tensor([[0], [M - N]])) % M
    key[:, ::2] = key[:, :1]
    allowed = torch.ones(B, N, M, dtype=torch.bool)
    ranges = None if kind == "none" else ranges_of(kind, M)
    if ranges is not None:
        allowed = allowed & allowed_by(ranges, M)
    if excluded:
        allowed = allowed.scatter(-1, own[..., None], False)
    result = device.select(
        *(query, key, k, None, own),
        **{"metric": "dot", "order": order, "key_range": ranges, "exclude_self": excluded},
    )
    assert equal(result, by_hand(query, key, k, allowed, order, None if excluded else own))


def test_an_excluded_token_in_a_group_of_its_own(device: HostCuda) -> None:
    """The k nearest others are in k other groups, all with smaller maxima."""
    key = torch.zeros(320, 1)
    key[torch.tensor([100, 20, 200, 300])] = torch.tensor([[9.0], [4.0], [3.0], [2.0]])
    own = torch.tensor([100])
    _, I = device.select(torch.ones(1, 1), key, 3, None, own, metric="dot", exclude_self=True)
    assert I.tolist() == [[20, 200, 300]]


@paths
def test_more_neighbors_than_a_range_has(path: str, device: HostCuda) -> None:
    query, key, k = numbers(path)
    ranges = ranges_of("window", key.shape[-2])
    own = torch.arange(N)
    assert_select(
        device.select,
        *(query[:, :20], key, k + 20, None, own[:20]),
        metric="dot",
        key_range=ranges[:20],
        exclude_self=True,
        exact=True,
        backward=False,
    )


@paths
def test_ranges_out_of_range(path: str, device: HostCuda) -> None:
    """Nothing is read outside of the keys: rows that do not exist are ignored."""
    query, key, k = numbers(path)
    M = key.shape[-2]
    wrong = torch.tensor(
        [[-1, 30], [5, M + 1], [-MOST - 1, MOST], [MOST, -MOST], [M, M + 9], [40, 20], [-9, -3]]
    )
    ranges = wrong[torch.arange(B * N).view(B, N) % len(wrong)]
    result = device.select(query, key, k, metric="dot", key_range=ranges)
    allowed = allowed_by(ranges, M)
    assert equal(result, by_hand(query, key, k, allowed, "similarity"))
    rows = torch.tensor([-1, M, MOST, -MOST - 1])[torch.arange(B * N).view(B, N) % 4]
    for excluded in (False, True):
        options = {"metric": "dot", "key_range": ranges, "exclude_self": excluded}
        again = device.select(query, key, k, None, rows, **options)
        assert equal(again, result)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@paths
def test_keys_outside_of_all_ranges_do_not_matter(
    path: str, metric: str, value: float, device: HostCuda
) -> None:
    """They are in the tiles, and in the groups, of others."""
    dtype, M, k = PATHS[path]
    query, key = normal(B, N, 6, dtype=dtype), normal(B, M, 6, seed=1, dtype=dtype)
    ranges = torch.tensor([70, 100]).expand(N, 2)
    expected = device.select(query, key, k, metric=metric, key_range=ranges)
    key[:, :70], key[:, 100:] = value, value
    assert equal(device.select(query, key, k, metric=metric, key_range=ranges), expected)


@paths
def test_batch_elements_are_as_alone(path: str, device: HostCuda) -> None:
    """Each with ranges, candidates and tokens of its own."""
    dtype, M, k = PATHS[path]
    query, key = normal(B, N, 6, dtype=dtype), normal(B, M, 6, seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    candidates = torch.rand(B, M, generator=generator).argsort(dim=-1)[:, : M - 3]
    own = torch.randint(M, (B, N), generator=generator)
    given = {"candidates": candidates, "self_indices": own}
    given["key_range"] = ranges_of("of each batch element", M)
    s, I = device.select(query, key, k, **given)
    for b in range(B):
        alone = device.select(query[b], key[b], k, **{name: X[b] for name, X in given.items()})
        assert equal((s[b], I[b]), alone)


@paths
def test_the_same_bits_in_every_order_of_threads(path: str, device: HostCuda) -> None:
    dtype, M, k = PATHS[path]
    query, key = normal(B, N, 6, dtype=dtype), normal(B, M, 6, seed=1, dtype=dtype)
    given = {"key_range": ranges_of("of each batch element", M), "exclude_self": True}
    own = torch.arange(N)
    first = device.select(query, key, k, None, own, **given)
    for device.seed in range(1, 4):
        assert equal(device.select(query, key, k, None, own, **given), first)
    device.most_bytes = 1
    assert equal(device.select(query, key, k, None, own, **given), first)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "kernel"), [(F16, "group_maxima_kernel"), (F64, "exact_topk_kernel")], ids=str
)
def test_the_cost_follows_the_ranges(
    dtype: torch.dtype, kernel: str, listed: bool, programs: Path
) -> None:
    """Counted in instructions of whole warps; with equal keys, lists are sorted once."""
    M = 640
    query = key = torch.zeros(M, 8, dtype=dtype)
    at = torch.arange(M)
    ranges = {
        "all": torch.tensor([0, M]).expand(M, 2),
        "causal": torch.stack([torch.zeros_like(at), at + 1], -1),
        "window": torch.stack([at - 31, at + 33], -1).clamp(0, M),
        "empty": torch.stack([at, at], -1),
    }
    candidates = at.flip(0) if listed else None
    counts = {}
    for name, range_ in ranges.items():
        device = HostCuda(programs / "host_cuda")
        device.select(query, key, 3, candidates, metric="dot", key_range=range_)
        ran = {kernel.name: launches for kernel, launches in device.close().items()}
        counts[name] = ran[kernel].collectives
    # The window has 28 of 100 tiles, or two of the 20 times that a warp scores 32 columns.
    assert counts["empty"] < 0.2 * counts["all"]
    assert counts["window"] < 0.7 * counts["all"]
    assert counts["causal"] - counts["window"] < 0.55 * (counts["all"] - counts["window"])
