# SPDX-License-Identifier: MIT
"""Processes that are the ranks of a process group (gloo, on this machine), one thread each.

They are started once and run one function after another.
"""

import datetime
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import CONTEXT

# How long a rank waits for another one, in seconds. A test waits twice as long for a rank.
TIMEOUT = 60.0

# In a rank: the groups of the last ranks, by their number. So the ranks of a smaller group are not
# those of the default group.
groups: dict[int, Any] = {}


class Ranks:
    """The processes; `call` runs a function on as many of them as it has arguments for."""

    def __init__(self, size: int, folder: Path, timeout: float) -> None:
        pairs = [CONTEXT.Pipe() for _ in range(size)]
        self.pipes = [pipe for pipe, _ in pairs]
        self.processes = [
            CONTEXT.Process(
                target=_serve,
                args=(rank, size, str(folder / "store"), timeout, theirs),
                daemon=True,
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def call(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the function returns on each of the last ranks, given these arguments there."""
        results = []
        for rank, pipe in enumerate(self.send(function, arguments)):
            assert pipe.poll(2 * TIMEOUT), f"rank {rank} does not answer"
            error, result = pickle.loads(pipe.recv_bytes())
            assert error is None, f"rank {rank} raised:\n{error}"
            results.append(result)
        return results

    def send(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> list[Connection]:
        """Calls the function there without waiting for it."""
        pipes = self.pipes[len(self.pipes) - len(arguments) :]
        for pipe, each in zip(pipes, arguments, strict=True):
            pipe.send_bytes(pickle.dumps((function, each)))
        return pipes

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def started(size: int, folder: Path, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    ranks = Ranks(size, folder, timeout)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    for count in range(1, size + 1):
        groups[count] = dist.new_group(range(size - count, size))
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (None, function(*arguments))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send_bytes(pickle.dumps(answer))
