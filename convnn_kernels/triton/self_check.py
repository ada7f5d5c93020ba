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
from triton.errors import TritonError

from convnn_kernels import known_searches

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
    has_range: bool = False  # whether each query has a range of keys

    def __str__(self) -> str:
        dtype = "TF32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        sizes = f"D about {self.D}, k about {self.k}"
        special = ", few queries" if self.divided else ", some hundred keys" * self.is_medium
        return f"{self.metric} in {dtype}, {sizes}{special}{', ranges' * self.has_range}"


@cache_plans
def kind_of(search: Search, is_medium: bool = False) -> Kind:
    """The kind of a search; sizes follow the steps of `configs.sweep` and `needs_bounds`."""
    metric, D = search.metric, min(512, max(16, power_of_two(search.Q.D)))
    has_few_terms = needs_bounds(search.bits, search.Q.D, metric, search.tf32)
    if has_few_terms and metric != "euclidean":
        D -= 8
    k = 9 if search.k <= 16 else 24 if search.k <= 32 else 40
    divided = not is_medium and sweep_of(search).splits > 1
    return Kind(metric, search.dtype, search.tf32, D, k, divided, is_medium, search.has_range)


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


def cases(device: torch.device, kind: Kind, rows: int) -> Iterator[known_searches.Case]:
    # Columns are divided where there are enough tiles.
    M = 2222 if kind.divided else 450
    return known_searches.cases(
        device, kind.metric, kind.dtype, kind.D, M, rows=rows, with_ranges=kind.has_range
    )


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


def _is_right(case: known_searches.Case, k: int, is_medium: bool) -> bool:
    query, key, value = case.query, case.key, case.value
    s = query.new_empty((len(query), k), dtype=torch.float32)
    I = torch.empty_like(s, dtype=torch.int64)
    Y = value.new_empty((len(query), value.shape[1]))
    options = (None, None, None, case.metric, "similarity", case.key_range)
    search, tensors = prepare_search(query, key, k, *options)
    aggregation, more = prepare_aggregation(value, s, I, None, "softmax", 1.0)
    pointers = Pointers(query.device, **tensors, **more, p_bias=None, p_output=Y)
    if is_medium:
        select_medium(search, pointers)
        Y = aggregate(value, s, I, None, None, "softmax", 1.0)
    else:
        select_large(search, pointers, aggregation)
    in_tf32 = search.tf32 and case.metric != "euclidean"
    return known_searches.is_right(case, known_searches.Result(s, I, Y), in_tf32)
