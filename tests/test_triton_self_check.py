# SPDX-License-Identifier: MIT
"""The check of kernels before their first use on a device, in Triton's interpreter."""

import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from convnn_kernels.triton import backend

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" or backend.unavailable() is not None,
        reason="needs TRITON_INTERPRET=1 and Triton",
    ),
    # What NumPy says of NaN and infinity within the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()
    yield
    monkeypatch.undo()
    forget_plans()


def faults(dtype: torch.dtype, D: int = 64, k: int = 9) -> list[str]:
    from convnn_kernels.triton import self_check

    return self_check.faults(CPU, self_check.Kind(dtype, False, D, k, False), rows=20)


@pytest.mark.slow
@pytest.mark.parametrize(("D", "k"), [(64, 9), (16, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_are_right(dtype: torch.dtype, D: int, k: int) -> None:
    assert faults(dtype, D, k) == []


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_kind_is_checked_by_searches_of_its_kind(
    arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tiles of the search that is to be checked, and divided as it is."""
    from convnn_kernels.triton import configs, hardware, self_check
    from convnn_kernels.triton.search import prepare
    from convnn_kernels.triton.select_large import sweep_of

    def search_of(query: torch.Tensor, key: torch.Tensor, k: int) -> Any:
        return prepare(query, key, k, None, None, None, "cosine", "similarity")[0]

    monkeypatch.setattr(hardware, "architecture", lambda X: arch)
    kinds = set()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for D, k, (B, N) in itertools.product((9, 64, 100, 200), (5, 40), ((1, 50), (64, 2048))):
            number = torch.empty(1, dtype=dtype)
            search = search_of(number.expand(B, N, D), number.expand(B, 4096, D), k)
            if not configs.allows_sweep(arch, search.bits, D, search.columns, k):
                continue
            kind, sweep = self_check.kind_of(search), sweep_of(search)
            kinds.add(kind)
            if sweep.config["BLOCK_M"] == 32 and not kind.divided:
                continue  # a search as small as those of the check is always divided
            for case in self_check.cases(CPU, kind, rows=4096):
                checked = sweep_of(search_of(case.query, case.key, kind.k))
                assert {**checked.config, "sample_step": 0} == {**sweep.config, "sample_step": 0}
                assert (checked.splits > 1) == kind.divided == (sweep.splits > 1)
    assert {kind.divided for kind in kinds} == {False, True}
    assert {kind.k for kind in kinds} == {9, 40}


def test_columns_that_are_decoded_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a device has columns in another order than the finish expects."""
    from convnn_kernels.triton import select_large

    prepare = select_large.prepare_finish

    def wrong(search: Any, rescore: bool, numbers: dict[str, Any], *rest: Any) -> Any:
        return prepare(search, rescore, numbers | {"PAIR": 2 * numbers["PAIR"]}, *rest)

    monkeypatch.setattr(select_large, "prepare_finish", wrong)
    assert "random rows" in faults(torch.float16)


def test_a_device_that_fails_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line is logged, and the search goes to the exact kernel."""
    from convnn_kernels.triton import select, self_check
    from convnn_kernels.triton.search import prepare

    device = torch.device("cuda", 0)
    query, key = torch.randn(3, 16).half(), torch.randn(1100, 16).half()
    search, _ = prepare(query, key, 2, None, None, None, "dot", "similarity")
    monkeypatch.setattr(self_check, "_right", {})
    monkeypatch.setattr(self_check, "faults", lambda *_: ["equal keys"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.WARNING, "convnn_kernels"):
        assert not self_check.passes(device, search)
        assert not self_check.passes(device, search)
    assert len(caplog.records) == 1
    for part in ("cuda:0", "float16", "D=16", "equal keys"):
        assert part in caplog.text

    taken = []
    monkeypatch.setattr(self_check, "passes", lambda *_: False)
    monkeypatch.setattr(select, "select_large", lambda *_: taken.append("large"))
    exact = select.select_all_columns
    monkeypatch.setattr(select, "select_all_columns", lambda *a: (taken.append("exact"), exact(*a)))
    select.select(query, key, 2, None, None, None, "dot", "similarity")
    assert taken == ["exact"]


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from convnn_kernels.triton import self_check
    from convnn_kernels.triton.search import prepare

    query, key = torch.randn(3, 16), torch.randn(600, 16)
    search, _ = prepare(query, key, 2, None, None, None, "dot", "similarity")
    checked = []
    monkeypatch.setattr(self_check, "_right", {})
    monkeypatch.setattr(self_check, "faults", lambda *_: checked.append(1) or [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    assert not self_check.passes(device, search)
    assert not checked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert self_check.passes(device, search)
    assert checked == [1]
    # Another product is another check.
    for _ in range(2):
        assert self_check.passes(device, search._replace(tf32=True))
    assert checked == [1, 1]
