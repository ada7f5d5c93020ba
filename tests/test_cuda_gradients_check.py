# SPDX-License-Identifier: MIT
"""The check of the gradients in CUDA C++ before their first use, with the CPU's in their place."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from convnn_kernels.backends import cuda, first_use, gradients, hopper
from convnn_kernels.triton import backend as triton

CPU = torch.device("cpu")
Gradients = tuple[Tensor, ...]


def run(arguments: Any) -> Gradients:
    return torch.ops.convnn.forward_backward.default(*arguments)


@pytest.mark.parametrize("dtype", gradients.DTYPES)
def test_right_gradients_pass(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "run", run)
    with torch.device("meta"):
        assert gradients.faults(CPU, dtype, rows=600) == []


def hub_chunk(call: Any, grads: Gradients) -> Gradients:
    """The key that all choose lacks the pairs of 256 queries."""
    call = call._replace(grad_output=call.grad_output.clone())
    call.grad_output[:, 256:512] = 0
    grads[2][:, 5] = run(call)[2][:, 5]
    return grads


def counts_missing(call: Any, grads: Gradients) -> Gradients:
    """A missing neighbor is row 0, with similarity -2."""
    return run(call._replace(similarities=call.similarities.clamp_min(-2.0)))


def zero_row(call: Any, grads: Gradients) -> Gradients:
    """The gradient of a zero row of query is not zero."""
    grads[0][:, 3] = 1
    return grads


def unchosen(call: Any, grads: Gradients) -> Gradients:
    """The row of a key that no query chose is not written."""
    grads[1][:, -1] = float("nan")
    return grads


def direct(call: Any, grads: Gradients) -> Gradients:
    """The gradient of the similarities themselves is left out."""
    return run(call._replace(grad_similarities=None))


def batch(call: Any, grads: Gradients) -> Gradients:
    """Pairs of the second batch element go to the first."""
    return (grads[0], grads[1].flip(0), *grads[2:])


def weight(call: Any, grads: Gradients) -> Gradients:
    """One element of dW is off by 5%."""
    if call.weight is not None:
        grads[3][3, 0, 2] *= 1.05
    return grads


def bias(call: Any, grads: Gradients) -> Gradients:
    """The bias has the sum of one batch element."""
    if call.has_bias:
        return (*grads[:4], call.grad_output[0].double().sum(0).to(grads[4].dtype))
    return grads


def no_scale(call: Any, grads: Gradients) -> Gradients:
    return run(call._replace(scale=1.0))


def raises(call: Any, grads: Gradients) -> Gradients:
    raise RuntimeError("convnn: the launch of key_side_kernel failed")


FAULTS = {
    hub_chunk: "value of cosine, softmax",
    counts_missing: "query of cosine, softmax",
    zero_row: "query of cosine, ones",
    unchosen: "key of dot, similarity",
    direct: "query of euclidean, softmax",
    batch: "key of cosine, softmax",
    weight: "weight of cosine, softmax",
    bias: "bias of cosine, ones",
    no_scale: "key of euclidean, softmax",
    raises: "cosine, softmax, D = 64, C = 64, k = 9: convnn: the launch of key_side_kernel failed; "
    "the CUDA context may be broken",
}


@pytest.mark.quick_one_in(3)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_found(fault: Callable[..., Gradients], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "run", lambda call: fault(call, run(call)))
    found = gradients.faults(CPU, torch.float16, rows=600)
    assert any(each.startswith(FAULTS[fault]) for each in found), found


def test_an_exception_ends_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an illegal access is raised by what comes next: the tensors of another case."""
    monkeypatch.setattr(gradients, "run", run)
    make = gradients._arguments

    def arguments(case: gradients.Case, *args: Any) -> Any:
        if case == gradients.CASES[1]:
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with")
        return make(case, *args)

    monkeypatch.setattr(gradients, "_arguments", arguments)
    found = gradients.faults(CPU, torch.float16, rows=600)
    assert found == [
        f"{gradients.CASES[1]}: CUDA error: an illegal memory access; "
        "the CUDA context may be broken"
    ]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A device of compute capability 9.0: what the check finds there, and how often it ran."""
    state: dict[str, Any] = {"faults": [], "ran": 0, "captures": False}

    def faults(*_: Any) -> list[str]:
        state["ran"] += 1
        return state["faults"]

    monkeypatch.setattr(gradients, "faults", faults)
    monkeypatch.setattr(first_use, "_faults", {})
    monkeypatch.setattr(first_use, "_captured", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["captures"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "refuses", lambda device: None)
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    return state


GPU = torch.device("cuda", 0)


def test_each_dtype_is_checked_once(device: dict[str, Any]) -> None:
    for _ in range(2):
        for dtype in gradients.DTYPES:
            assert gradients.passes(GPU, dtype)
    assert device["ran"] == 2


def test_one_line_is_logged_for_wrong_gradients(
    device: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    device["faults"] = ["query of cosine"]
    with caplog.at_level(logging.WARNING, "convnn_kernels"):
        assert [gradients.passes(GPU, torch.float16) for _ in range(2)] == [False] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "cuda:0: the CUDA C++ gradients are wrong and not used for float16 (query of cosine)"
    ]


def test_nothing_is_checked_while_a_graph_is_captured(device: dict[str, Any]) -> None:
    device["captures"] = True
    assert gradients.passes(GPU, torch.float16) is None
    assert device["ran"] == 0
    device["captures"] = False
    assert gradients.passes(GPU, torch.float16)


def test_where_the_gradients_may_be_chosen(
    device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gradients.can_run(gradients.OPERATOR, GPU)
    assert not gradients.can_run("convnn::select_backward", GPU)
    assert not gradients.can_run(gradients.OPERATOR, CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    assert gradients.report() == {"cuda:0": "float16 is right, bfloat16 is right"}
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        assert not gradients.can_run(gradients.OPERATOR, GPU)
        assert gradients.report() == {}


def test_where_there_is_no_choice_nothing_is_checked(
    device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the library asked, with no arguments."""
    for forced in ("triton", "cuda"):
        assert gradients.choice(gradients.OPERATOR, GPU, None, forced) == hopper.Choice()
    monkeypatch.setattr(triton, "unavailable", lambda: "not installed")
    assert gradients.choice(gradients.OPERATOR, GPU, None, None) == hopper.Choice()
    assert device["ran"] == 0
