# SPDX-License-Identifier: MIT
"""Peak memory of one peer on one workload, measured in a separate process.

The figure is the highest resident set during the pass minus the resident set before it: outputs,
gradients and everything temporary, but not the inputs. The same peer first runs on a tiny workload,
so that libraries and thread stacks are not counted.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .peers import PEERS, around, gradient_mode, run_pass
from .workloads import Workload, make_inputs

_SECONDS_LIMIT = 600


class MemoryNotMeasured(RuntimeError):
    """The message says why, such as a process that was killed."""


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise MemoryNotMeasured(f"/proc/self/status has no {field} on this system")


def _return_freed_memory() -> ctypes.CDLL | None:
    """Makes glibc return freed blocks at once: kept ones would hide what the pass allocates."""
    if not sys.platform.startswith("linux"):
        raise MemoryNotMeasured("the resident set is read from /proc, which only Linux has")
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return None
    m_mmap_threshold = -3
    libc.mallopt(m_mmap_threshold, 64 * 1024)
    libc.malloc_trim(0)
    return libc


def rise(run: Callable[[], object]) -> int:
    """How many bytes resident memory grows while `run` runs, at its peak."""
    libc = _return_freed_memory()
    if libc is not None:
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    results = run()
    peak = _resident_bytes("VmHWM")
    del results
    return max(peak - before, 0)


def _measure(workload: Workload, peer_name: str, passes: str, threads: int) -> int:
    torch.set_num_threads(threads)
    peer, needs_gradient = PEERS[peer_name], passes == "forward+backward"
    _return_freed_memory()
    tiny = replace(workload, batch=1)
    # A model takes images of one size.
    if peer.computes != "model":
        tiny = replace(tiny, tokens=64, keys=None, k=min(workload.k, 64))
    with gradient_mode(passes):
        run_pass(peer.build(tiny, make_inputs(tiny, requires_grad=needs_gradient)), passes)
        call = peer.build(workload, make_inputs(workload, requires_grad=needs_gradient))
    with around(call, passes):
        return rise(lambda: run_pass(call, passes))


def _child(connection: Connection, measure: Callable[..., int], *arguments: object) -> None:
    try:
        connection.send(measure(*arguments))
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")


def peak_bytes(workload: Workload, peer_name: str, passes: str, threads: int) -> int:
    """Bytes above the inputs. Raises MemoryNotMeasured."""
    return in_own_process([__name__, "skimage.io"], _measure, workload, peer_name, passes, threads)


def in_own_process(preload: Sequence[str], measure: Callable[..., int], *arguments: object) -> int:
    """The return value of `measure(*arguments)` in a separate process.

    Args:
        preload: the modules that it needs, imported once for all processes.
        measure: a function at the top level of a module.
        arguments: those of `measure`.

    Raises:
        MemoryNotMeasured: if it fails, is killed or takes too long.
    """
    # A fork server that has imported the modules but run nothing: processes start quickly, without
    # what this one has allocated.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["convnn_kernels", *preload])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, measure, *arguments))
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
