# SPDX-License-Identifier: MIT
"""The check of kernels before their first use on a device, in Triton's interpreter."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import in_interpreter

pytestmark = in_interpreter

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()
    yield
    monkeypatch.undo()
    forget_plans()


def faults(metric: str, dtype: torch.dtype, D: int = 64, k: int = 9) -> list[str]:
    from convnn_kernels.triton import self_check

    return self_check.faults(CPU, self_check.Kind(metric, dtype, False, D, k, False), rows=20)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(
    ("dtype", "D", "k"), [(torch.float16, 64, 9), (torch.float16, 8, 40), (torch.float32, 24, 24)]
)
def test_kernels_are_right(metric: str, dtype: torch.dtype, D: int, k: int) -> None:
    assert faults(metric, dtype, D, k) == []


@pytest.mark.slow
@pytest.mark.parametrize("is_right", [True, False])
def test_kernels_of_ranges(is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of which a queue has the columns of another."""
    from convnn_kernels.triton import self_check, sweep

    words = sweep.words_of_ranges

    def of_others(start: Any, begin: Any, end: Any, *rest: Any) -> Any:
        return words(start, begin + 2, end, *rest)

    if not is_right:
        monkeypatch.setattr(sweep, "words_of_ranges", of_others)
    kind = self_check.Kind("dot", torch.float16, False, 16, 9, False, has_range=True)
    found = self_check.faults(CPU, kind, rows=20)
    assert found == [] if is_right else "40 distinct keys" in found


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("is_right", [True, False])
def test_kernels_of_one_launch(
    metric: str, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that looks for ties in columns out of their order, with no rotation of tiles."""
    from convnn_kernels.triton import select_medium, self_check

    append_ties = select_medium._append_ties

    def out_of_order(*arguments: Any) -> Any:
        return append_ties(*arguments[:-1], 0)

    if not is_right:
        monkeypatch.setattr(select_medium, "_append_ties", out_of_order)
    kind = self_check.Kind(metric, torch.float16, False, 16, 9, False, is_medium=True)
    assert (self_check.faults(CPU, kind, rows=20) == []) == is_right


def search_of(
    metric: str,
    query: torch.Tensor,
    key: torch.Tensor,
    k: int,
    key_range: torch.Tensor | None = None,
) -> Any:
    from convnn_kernels.triton.search import prepare

    return prepare(query, key, k, None, None, None, metric, "similarity", key_range)[0]


def tiles_of(search: Any) -> dict[str, Any]:
    """What its kernels are compiled for; the sample is a number."""
    from convnn_kernels.triton.select_large import sweep_of

    sweep = sweep_of(search)
    return sweep.config | {
        "sample_step": None,
        "precision": sweep.precision,
        "needs_bounds": sweep.needs_bounds,
        "divided": sweep.splits > 1,
        "has_range": search.has_range,
    }


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_kind_is_checked_with_the_tiles_of_its_searches(
    arch: int, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convnn_kernels.triton import configs, hardware, self_check

    monkeypatch.setattr(hardware, "architecture", lambda X: arch)
    monkeypatch.setattr(hardware, "allows_tf32", lambda: tf32)
    checked: dict[Any, list[Any]] = {}
    for dtype, metric, D, k, (B, N), with_ranges in itertools.product(
        (torch.float32,) if tf32 else (torch.float32, torch.float16),
        ("dot", "euclidean"),
        (9, 20, 64, 200, 300),
        (5, 20, 40),
        ((1, 50), (256, 2048)),
        (False, True),
    ):
        number = torch.empty(1, dtype=dtype)
        ranges = torch.zeros(N, 2, dtype=torch.int64) if with_ranges else None
        search = search_of(metric, number.expand(B, N, D), number.expand(B, 4096, D), k, ranges)
        if not configs.allows_sweep(arch, search.bits, D, search.columns, k, with_ranges):
            continue
        kind = self_check.kind_of(search)
        if kind not in checked:
            checked[kind] = [
                tiles_of(search_of(case.metric, case.query, case.key, kind.k, case.key_range))
                for case in self_check.cases(CPU, kind, rows=4096)
            ]
        assert checked[kind] == [tiles_of(search)] * 5, (search, kind)
    assert {kind.divided for kind in checked} == {False, True}
    assert {kind.k for kind in checked} >= {9, 24}


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("D", [64, 512])
@pytest.mark.parametrize("is_right", [True, False])
def test_a_device_that_multiplies_in_tf32_is_right(
    metric: str, D: int, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its factors have 10 bits; with 6 it is wrong. Products of many channels are large, and so are
    the errors that exponentials magnify."""
    from convnn_kernels.triton import hardware, self_check

    mask = -(2 ** (13 if is_right else 17))

    def run(search: Any, pointers: Any, aggregation: Any) -> None:
        names = ("query", "key", "value", "similarities", "indices", "output")
        query, key, value, s, I, Y = (pointers.tensor(f"p_{name}") for name in names)
        if metric == "cosine":
            query, key = (torch.nn.functional.normalize(X, dim=1) for X in (query, key))
        query, key = ((X.view(torch.int32) & mask).view(torch.float32) for X in (query, key))
        S = (query.double() @ key.double().mT).float()
        order = S.nan_to_num(nan=torch.inf).sort(dim=1, descending=True, stable=True).indices
        I.copy_(order[:, : I.shape[1]])
        s.copy_(S.gather(1, I))
        Y.copy_((s.softmax(1)[:, :, None] * value[I]).sum(1))

    monkeypatch.setattr(hardware, "allows_tf32", lambda: True)
    monkeypatch.setattr(self_check, "select_large", run)
    kind = self_check.Kind(metric, torch.float32, True, D, 40, False)
    assert self_check.faults(CPU, kind, rows=600) == ([] if is_right else ["random rows"])


def test_columns_that_are_decoded_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a device has columns in another order than the finish expects."""
    from convnn_kernels.triton import select_large

    prepare = select_large.prepare_finish

    def wrong(search: Any, rescore: bool, numbers: dict[str, Any], *rest: Any) -> Any:
        return prepare(search, rescore, numbers | {"PAIR": 2 * numbers["PAIR"]}, *rest)

    monkeypatch.setattr(select_large, "prepare_finish", wrong)
    assert "random rows" in faults("cosine", torch.float16)


def test_a_device_that_fails_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line is logged, and the search goes to the exact kernel."""
    from convnn_kernels.triton import select, self_check

    device = torch.device("cuda", 0)
    query, key = torch.randn(3, 16).half(), torch.randn(1100, 16).half()
    search = search_of("dot", query, key, 2)
    monkeypatch.setattr(self_check, "_right", {})
    monkeypatch.setattr(self_check, "faults", lambda *_: ["equal keys"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.WARNING, "convnn_kernels"):
        assert not self_check.passes(device, search)
        assert not self_check.passes(device, search)
    assert len(caplog.records) == 1
    for part in ("cuda:0", "dot in float16, D about 16, k about 9", "equal keys"):
        assert part in caplog.text

    taken = []
    monkeypatch.setattr(self_check, "passes", lambda *_: False)
    monkeypatch.setattr(select, "select_large", lambda *_: taken.append("large"))
    exact = select.select_all_columns
    monkeypatch.setattr(select, "select_all_columns", lambda *a: (taken.append("exact"), exact(*a)))
    select.select(query, key, 2, None, None, None, "dot", "similarity")
    assert taken == ["exact"]


def test_nothing_is_checked_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from convnn_kernels.triton import self_check

    search = search_of("dot", torch.randn(3, 16), torch.randn(600, 16), 2)
    checked = []
    monkeypatch.setattr(self_check, "_right", {})
    monkeypatch.setattr(self_check, "faults", lambda *_: checked.append(1) or [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(self_check, "_captured", set())
    with caplog.at_level(logging.WARNING, "convnn_kernels"):
        assert not self_check.passes(device, search)
        assert not self_check.passes(device, search)
    assert len(caplog.records) == 1
    assert "captured in a CUDA graph before its kernels were checked" in caplog.text
    assert not checked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert self_check.passes(device, search)
    assert checked == [1]
    # Another product is another check.
    for _ in range(2):
        assert self_check.passes(device, search._replace(tf32=True))
    assert checked == [1, 1]
