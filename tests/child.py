# SPDX-License-Identifier: MIT
"""A function in a forked child of the process of the tests, with a time limit."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def in_child(function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> str:
    """The text of the exception that the function raises, or "" if it returns.

    Raises:
        TimeoutError: if it does neither in time.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_report, args=(sender, function, *args))
    child.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise TimeoutError(f"the child was not ready after {timeout} s")
        return receiver.recv()
    finally:
        child.kill()
        child.join()


def _report(sender: Connection, function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        sender.send("")
