# SPDX-License-Identifier: MIT
"""Wrong arguments on a rank, and a rank that stops: an error on all ranks, and no wait."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, groups, started

from convnn_kernels import distributed

# What does not raise long before it hangs.
TIMEOUT = 600.0


def arguments() -> dict[str, Any]:
    rows = torch.randn(2, 20, 4)
    return {"query": rows, "key": rows, "value": rows, "k": 3}


def message(changes: dict[str, Any]) -> str:
    """In a rank: what a call with these changes raises."""
    try:
        distributed.convnn(**{**arguments(), **changes}, group=groups[2])
    except (TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


DIFFERENT = [
    ({"k": 4}, "k must be the same on every rank, got 3 on rank 0 and 4 on rank 1"),
    ({"metric": "dot"}, "metric must be the same on every rank, got 'cosine' on rank 0 and 'dot'"),
    ({"rho": "ones"}, "rho must be the same"),
    ({"scale": 2.0}, "scale must be the same on every rank, got 1.0 on rank 0 and 2.0 on rank 1"),
    ({"order": "index"}, "order must be the same"),
    ({"key_mask": torch.ones(2, 20, dtype=torch.bool)}, "key_mask must be the same on every rank, "
     "got None on rank 0 and a tensor on rank 1"),
    ({"self_indices": torch.arange(20)}, "self_indices must be the same"),
    ({"weight": torch.ones(4, 1, 3)}, "weight must be the same"),
    ({"query": torch.ones(2, 5, 4).double(), "key": torch.ones(2, 20, 4).double()},
     "the dtype of query must be the same on every rank, got float32 on rank 0 and float64"),
    ({"value": torch.ones(2, 20, 4).half()}, "the dtype of value must be the same"),
    ({"query": torch.ones(2, 20, 5), "key": torch.ones(2, 20, 5)},
     "the shape of query, without its rows, must be the same on every rank, got [2, 4] on rank 0 "
     "and [2, 5] on rank 1"),
    ({name: torch.ones(3, 20, 4) for name in ("query", "key", "value")},
     "the shape of query, without its rows, must be the same"),
    ({"value": torch.ones(2, 20, 4, requires_grad=True)},
     "whether value requires a gradient must be the same on every rank, got False on rank 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), DIFFERENT, ids=lambda each: str(each)[:40])
def test_arguments_that_differ(changes: dict[str, Any], expected: str, ranks: Ranks) -> None:
    for found in ranks.call(message, [({},), (changes,)]):
        assert found.startswith(f"RuntimeError: distributed.convnn: {expected}")


def called(name: str) -> str:
    """In a rank: what a call of this function raises."""
    given = arguments()
    if name == "select_neighbors":
        del given["value"]
    try:
        getattr(distributed, name)(**given, group=groups[2])
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("first", [0, 1])
def test_functions_that_differ(first: int, ranks: Ranks) -> None:
    """All arguments of one are also arguments of the other."""
    names = ["select_neighbors", "convnn"]
    names = names[first:] + names[:first]
    expected = (
        f"the function must be the same on every rank, got distributed.{names[0]} on rank 0 and "
        f"distributed.{names[1]} on rank 1"
    )
    found = ranks.call(called, [(name,) for name in names])
    assert found == [f"distributed.{name}: {expected}" for name in names]


WRONG = [
    ({"k": 0}, "k must be at least 1, got 0"),
    ({"k": 2.5}, "k must be a whole number, got 2.5"),
    ({"metric": "l2"}, "metric must be 'cosine', 'dot' or 'euclidean', got 'l2'"),
    ({"query": torch.ones(2, 20, 7)}, "key must have the 7 columns of query"),
    ({"value": [1.0]}, "value must be a tensor, got list"),
    ({"query": None}, "query must be a tensor, got None"),
    ({"candidates": torch.tensor([40])}, "candidates must be in [0, 40), got 40 at position 0"),
    ({"candidates": torch.tensor([7, 7])}, "candidates must be distinct, got 7 more than once"),
    ({"self_indices": torch.full((20,), -1)}, "self_indices must be in [0, 40), got -1"),
    ({"exclude_self": True}, "exclude_self must be False without self_indices, got True"),
    ({"key_range": torch.tensor([[0, 41]] * 20)}, "key_range must be 0 <= begin <= end <= 40"),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG, ids=lambda each: str(each)[:40])
def test_an_argument_that_is_wrong_on_one_rank(
    changes: dict[str, Any], expected: str, ranks: Ranks
) -> None:
    """The other rank has one that is right."""
    rights = {
        "candidates": torch.tensor([1, 39]),
        "self_indices": torch.arange(20),
        "key_range": torch.tensor([[0, 40]] * 20),
    }
    right = {name: rights[name] for name in changes if name in rights}
    first, second = ranks.call(message, [(right,), (changes,)])
    kind = "TypeError" if changes.get("k") == 2.5 or "value" in changes else "RuntimeError"
    assert second.startswith(f"{kind}: distributed.convnn: {expected}")
    assert first.startswith(
        f"RuntimeError: distributed.convnn: rank 1 raised: distributed.convnn: {expected}"
    )


def test_ranks_go_on_after_an_error(ranks: Ranks) -> None:
    assert ranks.call(message, [({},), ({"k": 0},)]) != ["nothing"] * 2
    assert ranks.call(message, [({},), ({},)]) == ["nothing"] * 2


def outside() -> str:
    """In the rank that is not in the group of one."""
    try:
        distributed.select_neighbors(torch.ones(2, 2), torch.ones(2, 2), 1, group=groups[1])
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_process_outside_of_the_group(ranks: Ranks) -> None:
    found = ranks.call(outside, [(), ()])
    assert found[0].startswith("distributed.select_neighbors: group must be a process group that")
    assert found[1] == "nothing"


def test_without_a_process_group() -> None:
    rows = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=re.escape("torch.distributed must be initialized")):
        distributed.convnn(rows, rows, rows, 1)


def stop(folder: str, rank: int, when: str) -> None:
    """In a rank: a call in the middle of which rank 1 ends; the others write what they raise."""
    from convnn_kernels.distributed import aggregation, exchange, selection

    exchange.LEAST_TABLE_ROWS = 1
    calls = []

    class Stopping:
        """The functions that compute on this rank; the second call ends the process."""

        def __getattr__(self, name: str) -> Any:
            from convnn_kernels import functional

            if name == when and rank == 1:
                calls.append(name)
                if len(calls) == 2:
                    os._exit(1)
            return getattr(functional, name)

    selection.functional = aggregation.functional = Stopping()  # type: ignore[assignment]
    try:
        distributed.convnn(**arguments(), group=groups[3])
    except RuntimeError as error:
        Path(folder, str(rank)).write_text(str(error))
    os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["select_neighbors", "aggregate_neighbors"])
def test_a_rank_that_stops(when: str, tmp_path: Path) -> None:
    """The others raise long before the timeout of the group."""
    with started(3, tmp_path, TIMEOUT) as ranks:
        ranks.call(os.getpid, [()] * 3)  # all have started
        ranks.send(stop, [(str(tmp_path), rank, when) for rank in range(3)])
        began = time.monotonic()
        for process in ranks.processes:
            process.join(TIMEOUT / 10 - (time.monotonic() - began))
        assert all(process.exitcode == 1 for process in ranks.processes)
    assert {each.name for each in tmp_path.glob("[0-9]")} == {"0", "2"}
