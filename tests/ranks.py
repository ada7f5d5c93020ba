# SPDX-License-Identifier: MIT
"""Processes that are the ranks of a process group (gloo, on this machine), one thread each.

They are started once and run one function after another.
"""

import datetime
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# How long a rank waits for another one, and a test for the ranks.
TIMEOUT = 60.0

# In a rank: the groups of its first ranks, by their number.
groups: dict[int, Any] = {}


class Ranks:
    """The processes; `call` runs a function on the first of them."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(size)]
        self.pipes = [pipe for pipe, _ in pairs]
        self.processes = [
            context.Process(
                target=_serve, args=(rank, size, str(folder / "store"), theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def call(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the function returns on each rank, given these arguments there."""
        for pipe, each in zip(self.pipes, arguments, strict=False):
            pipe.send_bytes(pickle.dumps((function, each)))
        answers = [self._answer(rank) for rank in range(len(arguments))]
        for rank, (is_error, answer) in enumerate(answers):
            assert not is_error, f"rank {rank} raised:\n{answer}"
        return [answer for _, answer in answers]

    def _answer(self, rank: int) -> Any:
        assert self.pipes[rank].poll(2 * TIMEOUT), f"rank {rank} does not answer"
        return pickle.loads(self.pipes[rank].recv_bytes())

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def started(size: int, folder: Path) -> Iterator[Ranks]:
    ranks = Ranks(size, folder)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    for count in range(1, size + 1):
        groups[count] = dist.new_group(range(count))
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (False, function(*arguments))
        except Exception:
            answer = (True, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
