# SPDX-License-Identifier: MIT
"""Whether the kernels of select_large.py and select_medium.py are right on a device, found out
before their first use.

They contain PTX that Triton does not check, and expect that the product of a pair has the same bits
in every tile. So on each device, for each `Kind` of search, they first run on small searches whose
results are known. If one is wrong, one line is logged, and for this kind the strategies for few
columns take their place, more slowly.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from .aggregate import aggregate
from .aggregation import prepare as prepare_aggregation
from .configs import needs_bounds, power_of_two
from .launch import Pointers, cache_plans
from .search import Search
from .search import prepare as prepare_search
from .select_large import select_large, sweep_of
from .select_medium import select_medium

_log = logging.getLogger("convnn_kernels")


class Kind(NamedTuple):
    """Searches whose sweep has the same tiles, and the sizes of those that stand for them."""

    metric: str
    dtype: torch.dtype
    tf32: bool  # whether products of float32 are those of tf32 (PyTorch's switch)
    D: int
    k: int
    divided: bool  # whether columns are divided among programs
    is_medium: bool = False  # whether they are those of select_medium.py

    def __str__(self) -> str:
        dtype = "TF32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        sizes = f"D about {self.D}, k about {self.k}"
        special = ", few queries" if self.divided else ", some hundred keys" * self.is_medium
        return f"{self.metric} in {dtype}, {sizes}{special}"


@cache_plans
def kind_of(search: Search, is_medium: bool = False) -> Kind:
    """The kind of a search; sizes follow the steps of `configs.sweep` and `needs_bounds`."""
    metric, D = search.metric, min(512, max(16, power_of_two(search.Q.D)))
    has_few_terms = needs_bounds(search.bits, search.Q.D, metric, search.tf32)
    if has_few_terms and metric != "euclidean":
        D -= 8
    k = 9 if search.k <= 16 else 24 if search.k <= 32 else 40
    divided = not is_medium and sweep_of(search).splits > 1
    return Kind(metric, search.dtype, search.tf32, D, k, divided, is_medium)


_right: dict[tuple[torch.device, Kind], bool] = {}
_captured: set[tuple[torch.device, Kind]] = set()


def passes(device: torch.device, search: Search, is_medium: bool = False) -> bool:
    """Whether a search may be left to `select_large`, or to `select_medium`.

    The first call of a kind waits for it. False, for this time, while a CUDA graph is captured and
    the kind was not checked before.
    """
    if device.type != "cuda":
        return True
    key = device, kind_of(search, is_medium)
    right = _right.get(key)
    if right is None:
        if torch.cuda.is_current_stream_capturing():
            if key not in _captured:
                _captured.add(key)
                _log.warning(
                    "%s: a search is captured in a CUDA graph before its kernels were checked, so "
                    "that it takes the slower exact kernel: %s",
                    *key,
                )
            return False
        wrong = faults(*key)
        right = _right[key] = not wrong
        if wrong:
            _log.warning(
                "%s: the Triton kernels for many columns are wrong and not used for %s (%s)",
                *key,
                ", ".join(wrong),
            )
    return right


class _Case(NamedTuple):
    name: str
    query: Tensor  # [N, D]
    key: Tensor  # [M, D]
    metric: str
    is_exact: bool  # whether every similarity is exact, so that neighbors are unique


def cases(device: torch.device, kind: Kind, rows: int) -> Iterator[_Case]:
    generator = torch.Generator().manual_seed(0)
    # Columns are divided where there are enough tiles.
    D, M = kind.D, 2222 if kind.divided else 450
    # So many channels that a norm is a power of two.
    nonzero = 4 ** ((D.bit_length() - 1) // 2)

    def signs(n: int) -> Tensor:
        """Rows of 1, -1 and 0."""
        first = torch.randint(0, D, (n, 1), generator=generator)
        where = (first + torch.arange(nonzero)) % D
        which = torch.randint(0, 2, (n, nonzero), generator=generator) * 2.0 - 1.0
        return torch.zeros(n, D).scatter(1, where, which).to(device, kind.dtype)

    def case(name: str, query: Tensor, key: Tensor, is_exact: bool = True) -> _Case:
        return _Case(name, query, key, kind.metric, is_exact)

    query, few, key = signs(200), signs(40), signs(M)
    yield case("40 distinct keys", query, few.repeat(56, 1)[:M])
    # Two of three keys are copies of others, 43 and 86 columns before.
    apart = torch.arange(M, device=device)
    yield case("pairs of equal keys", query, key[apart - apart % 3 * 43])
    yield case("equal keys", query, key[:1].repeat(M, 1))
    key = key.clone()
    key[M // 2], key[M - 1], query[3], query[4] = float("nan"), float("nan"), 0, float("nan")
    yield case("NaN and a zero query", query, key)
    query, key = (torch.randn(n, D, generator=generator).to(device, kind.dtype) for n in (rows, M))
    query[5] = 0
    yield case("random rows", query, key, is_exact=False)


def faults(device: torch.device, kind: Kind, rows: int = 4096) -> list[str]:
    """The names of the cases that come out wrong."""
    wrong = []
    for case in cases(device, kind, rows):
        try:
            if not _is_right(case, kind.k, kind.is_medium):
                wrong.append(case.name)
        except TritonError as error:
            wrong.append(f"{case.name}: {type(error).__name__}")
    return wrong


def _is_right(case: _Case, k: int, is_medium: bool) -> bool:
    query, key = case.query, case.key
    value = key.nan_to_num(1.0)
    s = query.new_empty((len(query), k), dtype=torch.float32)
    I = torch.empty_like(s, dtype=torch.int64)
    Y = value.new_empty((len(query), value.shape[1]))
    search, tensors = prepare_search(query, key, k, None, None, None, case.metric, "similarity")
    aggregation, more = prepare_aggregation(value, s, I, None, "softmax", 1.0)
    pointers = Pointers(query.device, **tensors, **more, p_bias=None, p_output=Y)
    if is_medium:
        select_medium(search, pointers)
        Y = aggregate(value, s, I, None, None, "softmax", 1.0)
    else:
        select_large(search, pointers, aggregation)

    if bool(((I < 0) | (len(key) <= I)).any()):
        return False
    in_tf32 = search.tf32 and case.metric != "euclidean"
    # Some rows at a time: all of S in float64 would take more memory than a search.
    blocks = (X.split(256) for X in (query, s, I, Y))
    return all(
        _rows_are_right(case._replace(query=rows), value, s_rows, I_rows, Y_rows, in_tf32)
        for rows, s_rows, I_rows, Y_rows in zip(*blocks, strict=True)
    )


def _rows_are_right(
    case: _Case, value: Tensor, s: Tensor, I: Tensor, Y: Tensor, in_tf32: bool
) -> bool:
    """Whether s, I and Y [n, ...] are those of the queries of a case."""
    k, D = I.shape[1], value.shape[1]
    S, size = _similarities(case.query, case.key, case.metric)
    chosen = S.gather(1, I)
    bound = torch.zeros_like(chosen)
    if case.is_exact:
        # A stable sort of what has NaN above every number is the total order.
        order = S.nan_to_num(nan=torch.inf).sort(dim=1, descending=True, stable=True).indices
        neighbors_are_right = torch.equal(I, order[:, :k])
    else:
        size *= 2.0**-9 if in_tf32 else (D + 8) * 2.0**-22
        bound = size.gather(1, I)
        rest = (S - size).scatter(1, I, -torch.inf).amax(1)
        distinct = bool((I.sort(1).values.diff(dim=1) > 0).all())
        neighbors_are_right = distinct and bool((rest <= s[:, -1] + bound[:, -1]).all())
    error = (s - chosen).abs()
    both_nan = s.isnan() & chosen.isnan()
    similarities_are_right = bool(((error <= bound) | both_nan).all())
    # Of the returned similarities, since an exponential magnifies their errors.
    rho = s.double().softmax(1)[:, :, None]
    expected = (rho * value.double()[I]).sum(1)
    close = torch.isclose(Y.double(), expected, rtol=2**-6, atol=2**-6, equal_nan=True)
    return neighbors_are_right and similarities_are_right and bool(close.all())


def _similarities(query: Tensor, key: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """All of S in float64, and of each similarity the size to which its error is relative."""
    query, key = query.double(), key.double()
    if metric == "euclidean":
        S = -torch.stack([(row - key).square().sum(1) for row in query])
        return S, S.abs()
    if metric == "cosine":
        query, key = (torch.nn.functional.normalize(X, dim=1) for X in (query, key))
    return query @ key.mT, query.norm(dim=1)[:, None] * key.norm(dim=1)
