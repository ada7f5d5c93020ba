# SPDX-License-Identifier: MIT
"""Whether the kernels of select_large.py are right on a device, found out before their first use.

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

from .aggregation import prepare as prepare_aggregation
from .configs import power_of_two
from .launch import Pointers, cache_plans
from .search import Search
from .search import prepare as prepare_search
from .select_large import select_large, sweep_of

_log = logging.getLogger("convnn_kernels")


class Kind(NamedTuple):
    """Searches with the same tiles, and the sizes of a search that stands for them."""

    dtype: torch.dtype
    tf32: bool  # whether products of float32 are those of tf32 (PyTorch's switch)
    D: int  # a power of two
    k: int
    divided: bool  # whether columns are divided among programs


@cache_plans
def kind_of(search: Search) -> Kind:
    D = min(256, max(16, power_of_two(search.Q.D)))
    divided = sweep_of(search).splits > 1
    return Kind(search.dtype, search.tf32, D, 9 if search.k <= 32 else 40, divided)


_right: dict[tuple[torch.device, Kind], bool] = {}


def passes(device: torch.device, search: Search) -> bool:
    """Whether a search may be left to `select_large`. The first call of a kind waits for it.

    False, for this time, while a CUDA graph is captured and the kind was not checked before.
    """
    if device.type != "cuda":
        return True
    kind = kind_of(search)
    right = _right.get((device, kind))
    if right is None:
        if torch.cuda.is_current_stream_capturing():
            return False
        wrong = faults(device, kind)
        right = _right[device, kind] = not wrong
        if wrong:
            _log.warning(
                "%s: the Triton kernels for many columns are wrong (%s), and are not used for "
                "searches of this kind: %s",
                device,
                ", ".join(wrong),
                kind,
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

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(device, kind.dtype)

    # Columns are divided where there are enough tiles.
    D, M = kind.D, 2222 if kind.divided else 777
    query, few, key = integers(200, D), integers(40, D), integers(M, D)
    yield _Case("40 distinct keys", query, few.repeat(56, 1)[:M], "dot", True)
    # Two of three keys are copies of others, 43 and 86 columns before.
    apart = torch.arange(M, device=device)
    yield _Case("pairs of equal keys", query, key[apart - apart % 3 * 43], "dot", True)
    yield _Case("equal keys", query, key[:1].repeat(M, 1), "dot", True)
    key = key.clone()
    key[700], key[M - 1], query[3], query[4] = float("nan"), float("nan"), 0, float("nan")
    yield _Case("NaN and a zero query", query, key, "dot", True)
    query, key = (torch.randn(n, D, generator=generator).to(device, kind.dtype) for n in (rows, M))
    query[5] = 0
    yield _Case("random rows", query, key, "cosine", False)


def faults(device: torch.device, kind: Kind, rows: int = 4096) -> list[str]:
    """The names of the cases that come out wrong."""
    wrong = []
    for case in cases(device, kind, rows):
        try:
            if not _is_right(case, kind.k):
                wrong.append(case.name)
        except TritonError as error:
            wrong.append(f"{case.name}: {type(error).__name__}")
    return wrong


def _is_right(case: _Case, k: int) -> bool:
    query, key = case.query, case.key
    value = key.nan_to_num(1.0)
    s = query.new_empty((len(query), k), dtype=torch.float32)
    I = torch.empty_like(s, dtype=torch.int64)
    Y = value.new_empty((len(query), value.shape[1]))
    search, tensors = prepare_search(query, key, k, None, None, None, case.metric, "similarity")
    aggregation, more = prepare_aggregation(value, s, I, None, "softmax", 1.0)
    pointers = Pointers(query.device, **tensors, **more, p_bias=None, p_output=Y)
    select_large(search, pointers, aggregation)

    if bool(((I < 0) | (len(key) <= I)).any()):
        return False
    S = _similarities(query, key, case.metric)
    chosen = S.gather(1, I)
    if case.is_exact:
        # A stable sort of what has NaN above every number is the total order.
        order = S.nan_to_num(nan=torch.inf).sort(dim=1, descending=True, stable=True).indices
        neighbors_are_right = torch.equal(I, order[:, :k])
        bound = 0.0
    else:
        bound = (query.shape[1] + 8) * 2.0**-22
        if search.tf32:
            bound = 2.0**-9
        rest = S.scatter(1, I, -torch.inf).amax(1)
        distinct = bool((I.sort(1).values.diff(dim=1) > 0).all())
        neighbors_are_right = distinct and bool((rest <= s[:, -1] + bound).all())
    error = (s - chosen).abs()
    both_nan = s.isnan() & chosen.isnan()
    similarities_are_right = bool(((error <= bound) | both_nan).all())
    rho = chosen.softmax(1)[:, :, None]
    expected = (rho * value.double()[I]).sum(1)
    close = torch.isclose(Y.double(), expected, rtol=2**-6, atol=2**-6, equal_nan=True)
    return neighbors_are_right and similarities_are_right and bool(close.all())


def _similarities(query: Tensor, key: Tensor, metric: str) -> Tensor:
    """All of S, in float64."""
    query, key = query.double(), key.double()
    if metric == "cosine":
        query, key = (torch.nn.functional.normalize(X, dim=1) for X in (query, key))
    return query @ key.mT
