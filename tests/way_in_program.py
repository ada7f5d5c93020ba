# SPDX-License-Identifier: MIT
"""Calls by the way in to the Hopper kernels, on CPU tensors: what ran, as JSON.

tests/test_cuda_way_in.py runs this in a process of its own, because tools.way_in replaces the
kernels for CPU tensors.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import test_errors
import torch
from torch import Tensor

import convnn_kernels
from convnn_kernels import functional, schemas
from convnn_kernels.backends import cuda, gradients, hopper, selection
from convnn_kernels.triton import backend as triton
from tools import way_in

forward = torch.ops.convnn.forward
HALF = torch.float16
log: list[str] = []
# The operators that came to Python.
asked: list[str] = []
checked: list[str] = []
results: dict[str, Any] = {}


class Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log.append(record.getMessage())


def watch_python() -> None:
    run = selection._run

    def watched(name: str, arguments: Any) -> Any:
        asked.append(name)
        return run(name, arguments)

    def faults(device: torch.device, kind: hopper.Kind) -> list[str]:
        checked.append(str(kind))
        return ["planted"] if kind.dtype is torch.bfloat16 else []

    def by_triton(name: str, device: torch.device, arguments: Any) -> Any:
        if name == gradients.OPERATOR:
            return gradients_full_of(3.0, arguments)
        s = torch.full((*arguments.query.shape[:-1], arguments.k), 3.0)
        return (s, s.long()) if name == "convnn::select" else (arguments.query.clone(), s, s.long())

    triton.unavailable = lambda: None  # type: ignore[assignment]
    triton.refuses = lambda *call: None  # type: ignore[assignment]
    triton.run = by_triton
    selection._run = watched
    hopper.faults = faults  # type: ignore[assignment]


def tokens(dtype: torch.dtype = HALF, D: int = 16) -> list[Tensor]:
    return [torch.randn(1, n, D).to(dtype) for n in (16384, 4096, 4096)]


def ran(call: Callable[[], Any]) -> list[Any]:
    """Which kernels ran, and how often Python was asked."""
    asked.clear()
    output = call()
    which = {7.0: "hopper", 5.0: "portable", 3.0: "triton"}[float(output[1].flatten()[0])]
    return [which, len(asked)]


def choices() -> None:
    Q, K, V = tokens()
    rows = torch.arange(3000)
    results["once"] = [ran(lambda: forward(Q, K, V, 9)) for _ in range(3)]
    results["select"] = [ran(lambda: (None, *torch.ops.convnn.select(Q, K, 9))) for _ in range(3)]
    results["other kind"] = [ran(lambda: forward(Q, K, V, 12)) for _ in range(2)]
    with convnn_kernels.backend("cuda"):
        results["forced"] = [ran(lambda: forward(Q, K, V, 9)) for _ in range(2)]
    results["after"] = ran(lambda: forward(Q, K, V, 9))
    results["candidates"] = [ran(lambda: forward(Q, K, V, 9, None, None, rows)) for _ in range(2)]
    os.environ["CONVNN_CHECK_INDICES"] = "1"
    results["checked"] = ran(lambda: forward(Q, K, V, 9, None, None, rows))
    results["no indices"] = ran(lambda: forward(Q, K, V, 9))
    del os.environ["CONVNN_CHECK_INDICES"]
    results["few"] = [ran(lambda: forward(Q[:, :64], K, V, 9)) for _ in range(2)]
    results["few columns"] = [ran(lambda: forward(Q, K[:, :1023], V[:, :1023], 9))]
    own = torch.arange(16384) % 4096
    results["self"] = [ran(lambda: forward(Q, K, V, 9, None, None, None, own)) for _ in range(2)]
    ranges = torch.tensor([0, 4096]).expand(16384, 2)
    restricted = {"key_range": ranges}
    results["range"] = [ran(lambda: forward(Q, K, V, 9, **restricted)) for _ in range(2)]
    restricted = {"candidates": rows[None]}
    results["own candidates"] = [ran(lambda: forward(Q, K, V, 9, **restricted)) for _ in range(2)]
    restricted = {"self_indices": own[None], "exclude_self": True}
    results["excluded"] = [ran(lambda: forward(Q, K, V, 9, **restricted)) for _ in range(2)]
    dense = torch.randn(8, 16, 9).half()
    results["dense"] = [ran(lambda: forward(Q, K, V, 9, dense)) for _ in range(2)]
    results["strided"] = ran(lambda: forward(*(X.mT.contiguous().mT for X in (Q, K, V)), 9))
    results["float32"] = [ran(lambda: forward(*tokens(torch.float32), 9)) for _ in range(2)]
    results["wrong"] = [ran(lambda: forward(*tokens(torch.bfloat16), 9)) for _ in range(2)]
    torch.cuda.is_current_stream_capturing = lambda: True
    captured = tokens(D=100)
    results["captured"] = [ran(lambda: forward(*captured, 9)) for _ in range(2)]
    torch.cuda.is_current_stream_capturing = lambda: False
    results["warm"] = [ran(lambda: forward(*captured, 9)) for _ in range(2)]


def without_python() -> None:
    """As in a program that loaded only the libraries."""
    hopper._library().convnn_cuda_set_routing(0)
    results["without Python"] = [
        ran(lambda: forward(*tokens(), 9)),
        ran(lambda: forward(*tokens(torch.float32), 9)),
    ]
    os.environ["TRITON_INTERPRET"] = "1"
    hopper.route(is_forced=False)
    results["interpreter"] = ran(lambda: forward(*tokens(), 9))
    del os.environ["TRITON_INTERPRET"]
    hopper.route(is_forced=False)
    results["with Python"] = ran(lambda: forward(*tokens(), 9))


def python_functions() -> None:
    """Of a call that the Hopper kernels run, in inference mode and not."""
    Q, K, V = tokens()
    for name, mode in (("grad", torch.enable_grad()), ("inference", torch.inference_mode())):
        seen: list[str] = []

        def profile(frame: Any, event: str, _: Any, seen: list[str] = seen) -> None:
            if event == "call" and "convnn_kernels" in frame.f_code.co_filename:
                seen.append(frame.f_code.co_name)

        with mode:
            sys.setprofile(profile)
            forward(Q, K, V, 9)
            sys.setprofile(None)
        results[f"python: {name}"] = seen


def transforms() -> None:
    tensors = [X.requires_grad_() for X in tokens()]
    results["gradients"] = ran(lambda: forward(*tensors, 9))
    results["has gradient"] = forward(*tensors, 9)[0].requires_grad
    with torch.autocast("cpu", torch.float16):
        V = tokens(torch.float32)[2]
        results["autocast"] = ran(lambda: forward(*tokens()[:2], V, 9))
    mapped = torch.func.vmap(lambda *X: forward(*X, 9))(*tokens())
    results["vmap"] = float(mapped[1].flatten()[0])


def gradients_full_of(number: float, call: Any) -> tuple[Tensor, ...]:
    none = torch.empty(0)
    of_weight = none if call.weight is None else torch.full_like(call.weight, number)
    return (
        *[torch.full_like(X, number) for X in (call.query, call.key, call.value)],
        of_weight,
        none,
    )


def gradients_by(call: list[Any], **changes: Any) -> str:
    """Which backend computes the gradients of a call of ``forward``, so changed."""
    arguments = schemas.arguments("convnn::forward")(*call)._replace(**changes)
    Q, V, k, W = arguments.query, arguments.value, arguments.k, arguments.weight
    s = torch.zeros(*Q.shape[:-1], k)
    outputs = V.shape[-1] if W is None else len(W)
    grad = torch.zeros(*Q.shape[:-1], outputs, dtype=V.dtype)
    tensors = (grad, None, Q, arguments.key, V, W, s, s.long())
    needs = [True] * 5
    grads = torch.ops.convnn.forward_backward(
        *tensors, False, arguments.metric, "softmax", 1.0, *needs, arguments.candidates
    )
    return {5.0: "cuda", 3.0: "triton"}[float(grads[0].flatten()[0])]


def backward() -> None:
    """Which backend computes gradients."""
    gradient_checks: list[str] = []

    def faults(device: torch.device, dtype: torch.dtype) -> list[str]:
        gradient_checks.append(str(dtype))
        return ["planted"] if dtype is torch.bfloat16 else []

    run = cuda.run
    cuda.run = lambda name, call: (
        gradients_full_of(5.0, call) if name == gradients.OPERATOR else run(name, call)
    )
    gradients.can_run = lambda name, device: name == gradients.OPERATOR  # type: ignore[assignment]
    gradients.faults = faults  # type: ignore[assignment]
    selection.register(schemas.OPERATORS[gradients.OPERATOR], "CPU")
    Q, K, V = tokens()
    call = [Q, K, V, 9]
    torch.cuda.is_current_stream_capturing = lambda: True
    results["backward: captured"] = gradients_by(call)
    torch.cuda.is_current_stream_capturing = lambda: False
    results["backward: taken"] = {
        "as it is": gradients_by(call),
        "again": gradients_by(call),
        "depthwise": gradients_by(call, weight=torch.randn(16, 1, 9).half()),
        "k = 16": gradients_by(call, k=16),
        "D = C = 64": gradients_by([*tokens(D=64), 9]),
        "candidates": gradients_by(call, candidates=torch.arange(2049)),
        "batch": gradients_by([X.expand(4, -1, -1) for X in (Q[:, :4096], K, V)] + [9]),
    }
    results["backward: left"] = {
        "dense": gradients_by(call, weight=torch.randn(8, 16, 9).half()),
        "k = 17": gradients_by(call, k=17),
        "D = 72": gradients_by([*tokens(D=72)[:2], V, 9]),
        "C = 72": gradients_by([Q, K, tokens(D=72)[2], 9]),
        "candidates": gradients_by(call, candidates=torch.arange(2048)),
        "few keys": gradients_by(call, key=K[:, :2048], value=V[:, :2048]),
        "few queries": gradients_by(call, query=Q[:, 1:]),
        "value in float32": gradients_by(call, value=V.float()),
        "float32": gradients_by([*tokens(torch.float32), 9]),
        "wrong": gradients_by([*tokens(torch.bfloat16), 9]),
    }
    for name in ("triton", "cuda"):
        with convnn_kernels.backend(name):
            results[f"backward: {name}"] = gradients_by(call)
    leaves = [X.requires_grad_() for X in tokens()]
    output = functional.convnn(*leaves, 9)
    # Not all indices are written, and on a GPU they are not read.
    with mock.patch.object(selection, "_check_values"):
        (grad,) = torch.autograd.grad(output, leaves[:1], torch.zeros_like(output))
    results["backward: autograd"] = float(grad.flatten()[0])
    results["backward: checked"] = gradient_checks


def errors() -> None:
    asked.clear()
    wrong = []
    for case in test_errors.CASES:
        if case.op not in ("forward", "select") or case.needs_values:
            continue
        try:
            arguments = case.change(test_errors.base(case.op))
            test_errors.call(test_errors.OPERATORS[case.op], arguments, test_errors.WAYS[0])
            found = ""
        except RuntimeError as error:
            found = test_errors.first_line(error)
        expected = test_errors.complete_message(case, test_errors.WAYS[0])
        if found != expected:
            wrong.append([found, expected])
    results["errors"] = wrong
    results["errors in Python"] = len(asked)


def exceptions() -> None:
    """Of Python, which C++ calls."""
    Q, K, V = tokens(torch.float32)
    calls = {
        "operator": lambda: forward(Q, K, V, 9),
        "function": lambda: functional.convnn(Q, K, V, 9),
        "gradient": lambda: forward(Q.requires_grad_(), K, V, 9),
        "inference": torch.inference_mode()(lambda: forward(Q.detach(), K, V, 9)),
    }
    for error in (KeyboardInterrupt("stop"), torch.OutOfMemoryError("out of memory: 7 GiB")):

        def fails(*call: Any, error: BaseException = error) -> Any:
            raise error

        triton.run = fails
        for name, call in calls.items():
            try:
                call()
            except BaseException as raised:
                results[f"{type(error).__name__}: {name}"] = [
                    raised is error,
                    type(raised).__name__,
                    str(raised),
                ]
    with convnn_kernels.backend("cpu"):
        try:
            forward(Q.detach(), K, V, 9)
        except RuntimeError as raised:
            results["cannot"] = str(raised)


def main() -> None:
    logging.getLogger("convnn_kernels").addHandler(Log())
    logging.getLogger("convnn_kernels").setLevel(logging.INFO)
    way_in.install()
    watch_python()
    choices()
    without_python()
    python_functions()
    transforms()
    backward()
    errors()
    exceptions()
    print(json.dumps(results | {"log": log, "kinds": checked}))


if __name__ == "__main__":
    main()
