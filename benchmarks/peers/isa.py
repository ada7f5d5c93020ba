# SPDX-License-Identifier: MIT
"""This project's CPU kernels with another instruction set, in a process of its own.

The instruction set is chosen when the library is loaded. The process keeps its inputs and answers
with the seconds of its passes, so that it is timed in turn with the peers of this one.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import time
import weakref
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..workloads import Inputs, Workload, make_inputs
from .base import Call, Peer, Unavailable
from .convnn import forward_call, operators, select_call

# Until the threads of the other process wait no longer for work on all cores.
_SETTLE_SECONDS = 0.005
_numbers = itertools.count()


def _call(operator: str, workload: Workload, inputs: Inputs) -> Call:
    operation = getattr(operators(), operator)
    make = select_call if operator == "select" else forward_call
    return make(operation, workload, inputs)


def _serve(connection: Connection) -> None:
    """Answers requests until the other end closes: (name, number of a call, argument)."""
    from convnn_kernels import native

    # Ctrl-C is for the process that asks; this one ends when the other does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    calls: dict[int, Call] = {}
    with torch.no_grad():
        while True:
            try:
                request, number, argument = connection.recv()
            except EOFError:
                return
            answer: Any = None
            try:
                if request == "prepare":
                    operator, workload, threads = argument
                    torch.set_num_threads(threads)
                    calls[number] = _call(operator, workload, make_inputs(workload))
                    answer = native.cpu_instruction_set()
                elif request == "drop":
                    calls.pop(number, None)
                    continue
                elif request == "result":
                    answer = [each.numpy() for each in calls[number].forward()]
                else:
                    forward = calls[number].forward
                    time.sleep(_SETTLE_SECONDS)
                    start = time.perf_counter()
                    for _ in range(argument):
                        forward()
                    answer = (time.perf_counter() - start) / argument
            except Exception as error:
                answer = error
            connection.send(answer)


class _Worker:
    def __init__(self, isa: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        before = os.environ.get("CONVNN_CPU_ISA")
        os.environ["CONVNN_CPU_ISA"] = isa
        try:
            self.process.start()
        finally:
            if before is None:
                del os.environ["CONVNN_CPU_ISA"]
            else:
                os.environ["CONVNN_CPU_ISA"] = before
        other.close()

    def ask(self, request: str, number: int, argument: object = None) -> Any:
        self.connection.send((request, number, argument))
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def drop(self, number: int) -> None:
        if self.process.is_alive():
            self.connection.send(("drop", number, None))


@functools.cache
def _worker(isa: str) -> _Worker:
    return _Worker(isa)


def _peer(operator: str, isa: str) -> Peer:
    def build(workload: Workload, inputs: Inputs) -> Call:
        from convnn_kernels import native

        if (inputs.query.device.type, native.cpu_instruction_set()) == ("cpu", isa):
            raise Unavailable(f"{isa} is what this process uses already")
        if inputs.query.device.type != "cpu":
            raise Unavailable("instruction sets are the CPU's")
        if workload.dtype == "bfloat16":
            raise Unavailable("results come as arrays of NumPy, which has no bfloat16")
        worker, number = _worker(isa), next(_numbers)
        used = worker.ask("prepare", number, (operator, workload, torch.get_num_threads()))
        if used != isa:
            raise Unavailable(f"{isa} cannot run here")

        def forward() -> tuple[torch.Tensor, ...]:
            return tuple(torch.from_numpy(each) for each in worker.ask("result", number))

        weakref.finalize(forward, worker.drop, number)
        here = _call(operator, workload, inputs)
        return Call(
            forward,
            here.leaves,
            here.grad_output,
            sample=lambda repeats: worker.ask("sample", number, repeats),
        )

    label = "select" if operator == "select" else "ConvNN"
    return Peer(
        f"{label}, all candidates, {isa}",
        "select" if operator == "select" else "convnn",
        build,
        ("forward",),
        exacting=True,
    )


PEERS = {
    "select-avx2": _peer("select", "avx2"),
    "convnn-avx2": _peer("forward", "avx2"),
    "select-portable": _peer("select", "portable"),
    "convnn-portable": _peer("forward", "portable"),
}
