# SPDX-License-Identifier: MIT
"""The check of kernels before their first use on a device, in Triton's interpreter."""

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


def faults(dtype: torch.dtype) -> list[str]:
    from convnn_kernels.triton import self_check

    return self_check.faults(CPU, dtype, rows=20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_are_right(dtype: torch.dtype) -> None:
    assert faults(dtype) == []


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

    device = torch.device("cuda", 0)
    monkeypatch.setattr(self_check, "_right", {})
    monkeypatch.setattr(self_check, "faults", lambda *_: ["equal keys"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.WARNING, "convnn_kernels"):
        assert not self_check.passes(device, torch.float16)
        assert not self_check.passes(device, torch.float16)
    assert len(caplog.records) == 1
    for part in ("cuda:0", "float16", "equal keys"):
        assert part in caplog.text

    taken = []
    monkeypatch.setattr(self_check, "passes", lambda *_: False)
    monkeypatch.setattr(select, "select_large", lambda *_: taken.append("large"))
    exact = select.select_all_columns
    monkeypatch.setattr(select, "select_all_columns", lambda *a: (taken.append("exact"), exact(*a)))
    query, key = torch.randn(3, 16), torch.randn(600, 16)
    select.select(query, key, 2, None, None, None, "dot", "similarity")
    assert taken == ["exact"]


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from convnn_kernels.triton import self_check

    checked = []
    monkeypatch.setattr(self_check, "_right", {})
    monkeypatch.setattr(self_check, "faults", lambda *_: checked.append(1) or [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    assert not self_check.passes(device, torch.float32)
    assert not checked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert self_check.passes(device, torch.float32)
    assert checked == [1]
    # Another product is another check.
    assert self_check.passes(device, torch.float32, tf32=True)
    assert self_check.passes(device, torch.float32, tf32=True)
    assert checked == [1, 1]
