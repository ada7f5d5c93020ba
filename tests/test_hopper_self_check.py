# SPDX-License-Identifier: MIT
"""The check of the Hopper kernels before their first use, with the CPU's in their place."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from convnn_kernels import known_searches, native
from convnn_kernels.backends import first_use, hopper
from convnn_kernels.known_searches import Case, Result

CPU = torch.device("cpu")
DOT = hopper.Kind("dot", torch.float16, 64, 16)


def run_select(case: Case, k: int) -> Result:
    return Result(*torch.ops.convnn.select(*hopper.select_arguments(case, k)))


def run_forward(
    case: Case, k: int, weight: Tensor | None = None, bias: Tensor | None = None
) -> Result:
    args = hopper.forward_arguments(case, k, weight, bias)
    output, s, I = torch.ops.convnn.forward(*args)
    return Result(s, I, output, weight, bias)


def faults(kind: hopper.Kind = DOT, many: int = 60) -> list[str]:
    return hopper.faults(CPU, kind, rows=20, many=many)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the CPU's kernels in the place, with a fault that changes a result."""

    def plant(fault: Callable[[Case, Result], Result] = lambda case, result: result) -> None:
        def select(case: Case, k: int) -> Result:
            return fault(case, run_select(case, k))

        def forward(case: Case, *args: Any) -> Result:
            return fault(case, run_forward(case, *args))

        monkeypatch.setattr(hopper, "run_select", select)
        monkeypatch.setattr(hopper, "run_forward", forward)

    return plant


@pytest.mark.quick_one_in(3)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize(("dtype", "D", "k"), [(torch.float16, 64, 10), (torch.bfloat16, 128, 64)])
def test_right_kernels_pass(
    metric: str, dtype: torch.dtype, D: int, k: int, plant: Callable[..., None]
) -> None:
    plant()
    assert faults(hopper.Kind(metric, dtype, D, k)) == []


def other_tie(case: Case, result: Result) -> Result:
    """Of equal keys, one farther on."""
    return result._replace(indices=(result.indices + 41) % case.key.shape[-2])


def one_column(case: Case, result: Result) -> Result:
    """The products of one column of a tile are larger by a little."""
    s, I = result.similarities, result.indices
    return result._replace(similarities=torch.where(I % 128 == 77, s * (1 + 2**-12), s))


def no_nan(case: Case, result: Result) -> Result:
    """NaN is not above every number."""
    found = run_select(case._replace(key=case.key.nan_to_num(-1e4)), result.indices.shape[-1])
    return found if result.output is None else result


def zero_query(case: Case, result: Result) -> Result:
    """A query of zeros has no cosine 0."""
    is_zero = ~case.query.any(-1, keepdim=True)
    return result._replace(similarities=result.similarities.masked_fill(is_zero, torch.nan))


def missed(case: Case, result: Result) -> Result:
    """The nearest key is lost in one row of many."""
    if case.query.ndim == 3:
        return result
    more = run_select(case, result.indices.shape[1] + 1)
    last = [X[-1:, 1:] for X in more[:2]]
    s, I = (torch.cat([X[:-1], row]) for X, row in zip(result[:2], last, strict=True))
    return result._replace(similarities=s, indices=I)


def no_bias(case: Case, result: Result) -> Result:
    if result.output is None or result.bias is None:
        return result
    return result._replace(output=result.output - result.bias)


def other_order(case: Case, result: Result) -> Result:
    """A weight is read with its neighbors in another order."""
    if result.weight is None:
        return result
    k = result.indices.shape[-1]
    return run_forward(case, k, result.weight.flip(2), result.bias)._replace(weight=result.weight)


def out_of_range(case: Case, result: Result) -> Result:
    return result._replace(indices=result.indices.masked_fill(result.indices == 3, 10**6))


def raises(case: Case, result: Result) -> Result:
    raise RuntimeError("convnn: the launch of hopper_sweep_kernel failed")


def in_batch(result: Result, change: Callable[[Tensor], Tensor]) -> Result:
    """Changes all results of a batch; a change of other ones would be found before."""
    if result.indices.ndim == 2:
        return result
    output = None if result.output is None else change(result.output)
    s, I = change(result.similarities), change(result.indices)
    return result._replace(similarities=s, indices=I, output=output)


def second_launch_is_shifted(case: Case, result: Result) -> Result:
    """From block 264 of 316 on, rows have the results of the row before."""

    def change(X: Tensor) -> Tensor:
        rows = X.flatten(0, 1).clone()
        first = len(rows) * 264 // 316
        rows[first:] = rows[first - 1 : -1].clone()
        return rows.view_as(X)

    return in_batch(result, change)


def second_launch_is_not_written(case: Case, result: Result) -> Result:
    def change(X: Tensor) -> Tensor:
        rows = X.flatten(0, 1).clone()
        rows[len(rows) * 264 // 316 :] = 0
        return rows.view_as(X)

    return in_batch(result, change)


def second_item_has_the_queries_of_the_first(case: Case, result: Result) -> Result:
    """Of a block."""

    def change(X: Tensor) -> Tensor:
        rows = X.flatten(0, 1).clone()
        size, first = len(rows) * 20 // 316, len(rows) * 132 // 316
        rows[first : first + size] = rows[:size].clone()
        return rows.view_as(X)

    return in_batch(result, change)


def keys_of_the_first_element(case: Case, result: Result) -> Result:
    """All batch elements are searched with z = 0."""
    if case.query.ndim == 2:
        return result
    wrong = run_select(case._replace(key=case.key[:1].expand_as(case.key)), result.indices.shape[2])
    return result._replace(similarities=wrong.similarities, indices=wrong.indices)


def last_rows_of_an_element(case: Case, result: Result) -> Result:
    """The last block, which is partial, is not written."""

    def change(X: Tensor) -> Tensor:
        X = X.clone()
        X[:, -32:] = 0
        return X

    return in_batch(result, change)


def _without(case: Case, result: Result, **changes: Any) -> Result:
    k = result.indices.shape[-1]
    case = case._replace(**changes)
    if result.output is None:
        return run_select(case, k)
    return run_forward(case, k, result.weight, result.bias)


def no_mask(case: Case, result: Result) -> Result:
    return _without(case, result, key_mask=None)


def mask_of_the_first_element(case: Case, result: Result) -> Result:
    mask = case.key_mask
    return result if mask is None else _without(case, result, key_mask=mask[:1].expand_as(mask))


def no_candidates(case: Case, result: Result) -> Result:
    return _without(case, result, candidates=None)


def places_of_candidates(case: Case, result: Result) -> Result:
    """Indices count candidates, not rows of key."""
    if case.candidates is None:
        return result
    places = torch.zeros(case.key.shape[-2], dtype=torch.int64)
    places[case.candidates] = torch.arange(len(case.candidates))
    return result._replace(indices=places[result.indices])


def by_similarity(case: Case, result: Result) -> Result:
    return _without(case, result, order="similarity")


FAULTS = {
    other_tie: "distinct keys",
    one_column: "equal keys",
    no_nan: "NaN and a zero query",
    zero_query: "NaN and a zero query",
    missed: "random rows",
    no_bias: "random rows",
    other_order: "random rows",
    out_of_range: "equal keys",
    second_launch_is_shifted: "a batch of many queries",
    second_launch_is_not_written: "a batch of many queries",
    second_item_has_the_queries_of_the_first: "a batch of many queries",
    keys_of_the_first_element: "a batch of many queries",
    last_rows_of_an_element: "a batch of many queries",
    no_mask: "candidates and a mask",
    mask_of_the_first_element: "candidates and a mask",
    no_candidates: "candidates and a mask",
    places_of_candidates: "candidates and a mask",
    by_similarity: "order by index",
    raises: "41 distinct keys: convnn: the launch of hopper_sweep_kernel failed; "
    "the CUDA context may be broken",
}


@pytest.mark.quick_one_in(3)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_found(fault: Callable[..., Result], plant: Callable[..., None]) -> None:
    plant(fault)
    found = faults()
    assert any(FAULTS[fault] in case for case in found)


@pytest.mark.slow
def test_a_second_launch_that_is_shifted(plant: Callable[..., None]) -> None:
    """At the size of the check, of whose rows every 37th is compared."""
    kind = DOT._replace(k=10)
    plant()
    assert faults(kind, many=20_000) == []
    for fault in (second_launch_is_shifted, second_item_has_the_queries_of_the_first):
        plant(fault)
        assert "a batch of many queries" in faults(kind, many=20_000)


def test_an_exception_ends_the_check(
    plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an illegal access is raised by what comes next: the tensors of another case."""
    plant()
    make = known_searches.cases

    def cases(*args: Any, **numbers: Any) -> Iterator[Case]:
        yield next(make(*args, **numbers))
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with")

    monkeypatch.setattr(known_searches, "cases", cases)
    assert faults() == [
        "41 distinct keys: CUDA error: an illegal memory access; the CUDA context may be broken"
    ]

    def none(*args: Any, **numbers: Any) -> Iterator[Case]:
        raise KeyError

    monkeypatch.setattr(known_searches, "cases", none)
    assert faults() == ["the first case: KeyError; the CUDA context may be broken"]


def test_one_line_is_logged_for_an_exception(
    plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(raises)
    monkeypatch.setattr(first_use, "_faults", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.WARNING, "convnn_kernels"):
        assert [hopper.passes(CPU, 3) for _ in range(2)] == [False] * 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("cpu: the Hopper kernels are wrong and not used for dot in bfloat16")
    assert line.endswith("sweep_kernel failed; the CUDA context may be broken)")


def test_a_default_device_changes_nothing(plant: Callable[..., None]) -> None:
    plant()
    with torch.device("meta"):
        assert faults() == []


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the check finds, and how often it ran."""
    state: dict[str, Any] = {"faults": [], "ran": 0, "captures": False}

    def faults(device: torch.device, kind: hopper.Kind) -> list[str]:
        state["ran"] += 1
        return state["faults"]

    monkeypatch.setattr(hopper, "faults", faults)
    monkeypatch.setattr(first_use, "_faults", {})
    monkeypatch.setattr(first_use, "_captured", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["captures"])
    return state


def test_a_kind_is_checked_once_on_each_device(checks: dict[str, Any]) -> None:
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        for number in (3, 4):
            assert hopper.passes(device, number)
            assert hopper.passes(device, number)
    assert checks["ran"] == 4


def test_one_line_is_logged_for_wrong_kernels(
    checks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    checks["faults"] = ["equal keys", "random rows"]
    with caplog.at_level(logging.WARNING, "convnn_kernels"):
        assert [hopper.passes(torch.device("cuda", 0), 3) for _ in range(3)] == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "cuda:0: the Hopper kernels are wrong and not used for dot in bfloat16, D up to 64, "
        "k up to 10 (equal keys, random rows)"
    ]


def test_nothing_is_checked_while_a_graph_is_captured(
    checks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda", 0)
    checks["captures"] = True
    with caplog.at_level(logging.WARNING, "convnn_kernels"):
        assert [hopper.passes(device, 3) for _ in range(2)] == [None, None]
    assert checks["ran"] == 0
    assert len(caplog.records) == 1
    checks["captures"] = False
    assert hopper.passes(device, 3)
    checks["captures"] = True
    assert hopper.passes(device, 3)


def test_kinds_are_numbered_as_in_cpp() -> None:
    kinds = [hopper.kind_of(number) for number in range(hopper.KINDS)]
    assert len(set(kinds)) == hopper.KINDS
    assert {kind.k for kind in kinds} == {10, 16, 32, 64}
    assert str(kinds[0]) == "cosine in float16, D up to 64, k up to 10"
    assert str(kinds[-1]) == "dot in bfloat16, D up to 128, k up to 64"


def test_where_the_kernels_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(hopper, "unavailable", lambda: None)
    for capability, runs in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        assert hopper.can_run("convnn::forward", device) == runs
        assert not hopper.can_run("convnn::aggregate", device)
        assert not hopper.can_run("convnn::forward", CPU)
    monkeypatch.setattr(hopper, "unavailable", lambda: "not built for sm_90a")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not hopper.can_run("convnn::forward", device)


def test_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: {"cpu": "", "cuda": "not built"})
    assert hopper.unavailable() == "not built"
    assert not hopper.is_in_front()
