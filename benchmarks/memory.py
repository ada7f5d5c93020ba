# SPDX-License-Identifier: MIT
"""Peak memory of one peer on one workload, in a process of its own.

The figure is the highest resident set while the pass runs, minus the resident set once its inputs
exist: outputs, gradients and everything in between, but not the inputs. The same peer runs once
on a tiny workload before, so that libraries and thread stacks are not counted.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .peers import PEERS, Call, gradient_mode, run_pass
from .workloads import Workload, make_inputs

_SECONDS_LIMIT = 600


class MemoryNotMeasured(RuntimeError):
    """The process ended before it could answer; the message says how."""


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise MemoryNotMeasured(f"/proc/self/status has no {field} on this system")


def _return_freed_memory() -> ctypes.CDLL | None:
    """Let glibc give freed blocks back at once: kept ones would hide what the pass allocates."""
    if not sys.platform.startswith("linux"):
        raise MemoryNotMeasured("the resident set is read from /proc, which only Linux has")
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return None
    m_mmap_threshold = -3
    libc.mallopt(m_mmap_threshold, 64 * 1024)
    libc.malloc_trim(0)
    return libc


def _measure(workload: Workload, peer_name: str, passes: str, threads: int) -> int:
    torch.set_num_threads(threads)
    peer, needs_gradient = PEERS[peer_name], passes == "forward+backward"
    libc = _return_freed_memory()
    tiny = replace(workload, batch=1)
    # A model takes images of one size only.
    if peer.computes != "model":
        tiny = replace(tiny, tokens=64, keys=None, k=min(workload.k, 64))
    with gradient_mode(passes):
        run_pass(peer.build(tiny, make_inputs(tiny, requires_grad=needs_gradient)), passes)
        call = peer.build(workload, make_inputs(workload, requires_grad=needs_gradient))
        return _peak(call, passes, libc)


def _peak(call: Call, passes: str, libc: ctypes.CDLL | None) -> int:
    if libc is not None:
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident_bytes("VmRSS")
    results = run_pass(call, passes)
    peak = _resident_bytes("VmHWM")
    del results
    return max(peak - before, 0)


def _child(connection: Connection, *arguments: object) -> None:
    try:
        connection.send(_measure(*arguments))  # type: ignore[arg-type]
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")


def peak_bytes(workload: Workload, peer_name: str, passes: str, threads: int) -> int:
    """Bytes above the inputs. Raises MemoryNotMeasured with the reason."""
    # A fork of a server that has imported what is needed but run nothing: quick, and clean of what
    # this process has allocated.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "convnn_kernels", "skimage.io"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, workload, peer_name, passes, threads))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(_SECONDS_LIMIT) else "no answer in time"
    except EOFError:
        process.join()
        code = process.exitcode or 0
        answer = f"process ended by {signal.Signals(-code).name if code < 0 else f'exit {code}'}"
    finally:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    if isinstance(answer, int):
        return answer
    raise MemoryNotMeasured(str(answer))
