# SPDX-License-Identifier: MIT
"""A child process that makes calls, so that a crash or a hang is an outcome like others."""

import multiprocessing
import os
import resource
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch

from tools.fuzz import verdict
from tools.fuzz.calls import Call
from tools.fuzz.verdict import Verdict

# What a call may allocate, so that an impossible size is refused.
MOST_BYTES = 4 * 2**30
# A fork starts at once and has what this process has imported.
_CONTEXT: Any = multiprocessing.get_context(
    "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
)


class Child:
    """Judges calls in a child process, which is replaced after a crash or a hang."""

    def __init__(self, limit: float = 20.0) -> None:
        self.limit = limit
        self.calls = 0
        self._process: multiprocessing.process.BaseProcess | None = None

    def judge(self, call: Call) -> Verdict:
        self.calls += 1
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._process is not None
        self._connection.send(call)
        try:
            if self._connection.poll(self.limit):
                return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return Verdict("crash", f"crash: {_ending(self._process.exitcode)}")
        self.close()
        return Verdict("hang", f"hang: no end after {self.limit:g} s")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        self.close()
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        assert self._process is not None
        self._process.start()
        theirs.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as pages:
            size = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES,) * 2)
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        connection.send(verdict.judge(call))
