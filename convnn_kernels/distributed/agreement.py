# SPDX-License-Identifier: MIT
"""What the ranks tell one another before a call.

Every rank takes part in the exchanges here whatever its own arguments are, so that a wrong argument
of one rank is an error on all of them. Were it raised on that rank alone, the others would wait for
it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from convnn_kernels import torch_internals


@dataclass(frozen=True)
class Ranks:
    """A process group, and how many rows of query and of key, or value, each of its ranks has."""

    group: Any
    rank: int
    queries: list[int]
    keys: list[int]

    @property
    def size(self) -> int:
        return len(self.keys)

    @property
    def total_keys(self) -> int:
        return sum(self.keys)

    def first_key(self, rank: int) -> int:
        """The row among those of all ranks with which the keys of a rank begin."""
        return sum(self.keys[:rank])


def check_group(function: str, group: Any) -> None:
    """Check that this process is one of the group and can make a call.

    Raises:
        RuntimeError: if torch.distributed is not initialized, the group has no such process, or a
            transform of torch.func is active.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{function}: torch.distributed must be initialized "
            "(torch.distributed.init_process_group)"
        )
    if torch_internals.transforms_are_active():
        raise RuntimeError(
            f"{function}: vmap and the other transforms of torch.func cannot be used over ranks"
        )
    if dist.get_rank(group) < 0:
        raise RuntimeError(f"{function}: group must be a process group that this process is in")


def agree(
    function: str, group: Any, describe: Callable[[], tuple[dict[str, Any], int, int]]
) -> Ranks:
    """Compares the arguments of all ranks.

    Args:
        function: the name that messages begin with.
        group: the process group; None for the default one.
        describe: checks the arguments of this rank, and returns what must be the same on every
            rank, by name, and how many rows of query and of key it has.

    Raises:
        RuntimeError: on every rank, naming the argument, if it is wrong on a rank or differs
            between two; what ``describe`` raised, where it did.
    """
    same: dict[str, Any] = {}
    queries = keys = 0
    error = None
    try:
        same, queries, keys = describe()
    except Exception as raised:
        error = raised
    told = _gather((None if error is None else str(error), same, queries, keys), group)
    _raise_first(function, error, [each[0] for each in told])
    for rank, (_, other, _, _) in enumerate(told):
        for name, value in told[0][1].items():
            if other[name] != value:
                raise RuntimeError(
                    f"{function}: {name} must be the same on every rank, "
                    f"got {value} on rank 0 and {other[name]} on rank {rank}"
                )
    return Ranks(
        group, dist.get_rank(group), [each[2] for each in told], [each[3] for each in told]
    )


def check_together(function: str, group: Any, check: Callable[[], None]) -> None:
    """Runs a check on every rank.

    Raises:
        RuntimeError: on every rank, if the check of one raises.
    """
    error = None
    try:
        check()
    except RuntimeError as raised:
        error = raised
    _raise_first(function, error, _gather(None if error is None else str(error), group))


def _gather(told: Any, group: Any) -> list[Any]:
    """What every rank tells, in the order of ranks: None, numbers, texts, lists and dictionaries.

    ``torch.distributed.all_gather_object`` needs numpy.
    """
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    message = torch.tensor([*json.dumps(told).encode()], dtype=torch.uint8, device=device)
    size = torch.tensor([len(message)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(each) for each in sizes]
    padded = message.new_zeros(max(lengths))
    padded[: len(message)] = message
    messages = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(messages, padded, group=group)
    return [
        json.loads(bytes(each[:length].tolist()))
        for each, length in zip(messages, lengths, strict=True)
    ]


def _raise_first(function: str, own: Exception | None, messages: list[str | None]) -> None:
    """Raises the error of this rank, or else that of the first rank that has one."""
    if own is not None:
        raise own
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"{function}: rank {rank} raised: {message}")
