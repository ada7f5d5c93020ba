# SPDX-License-Identifier: MIT
"""A process that has imported PyTorch and pytest, and forks itself to run tests.

Importing them takes longer than most slips need to be noticed. The package itself and Triton are
imported after the fork, so that each run has its own.

It reads lines of JSON, each what `Server.run` is given, and for each writes the number of the new
process and then its exit status.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO


def _serve() -> None:
    import pytest
    import torch  # noqa: F401

    _end_with_parent()
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            _end_with_parent()
            limit_time()
            output = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(command["folder"])
            os.environ.update(command["environment"])
            sys.path[0] = command["folder"]
            sys.argv = ["pytest", *command["arguments"]]
            status = pytest.main(command["arguments"])
            sys.stdout.flush()
            os._exit(int(status))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def limit_time(scale: int = 1) -> None:
    """From now on this process may take so long; then a signal ends it, whatever it is doing.

    Called anew for each test: how long all tests of a file take says nothing of a slip.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 120 * scale
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    signal.alarm(600 * scale)


def _end_with_parent() -> None:
    """Have Linux kill this process when the one that started it ends."""
    set_signal_of_parents_death = 1
    ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)


class Server:
    """Starts such a process when it is first needed."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None

    def _streams(self) -> tuple[IO[str], IO[str]]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tools.slips.server"],
                cwd=Path(__file__).parent.parent.parent,
                env={**os.environ, **self._environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def run(
        self,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str],
        output: Path,
    ) -> int | None:
        """Runs pytest in a folder. Returns its exit status, or None if a test took too long."""
        commands, replies = self._streams()
        request = {
            "arguments": arguments,
            "folder": str(folder),
            "environment": environment,
            "output": str(output),
        }
        commands.write(json.dumps(request) + "\n")
        commands.flush()
        group = int(replies.readline())
        status = int(replies.readline())
        _kill_group(group)  # the programs that the tests started
        return None if -status in (signal.SIGXCPU, signal.SIGALRM) else status


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    _serve()
