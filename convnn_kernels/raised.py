# SPDX-License-Identifier: MIT
"""Exceptions that pass through C++, which keeps no more than their message.

C++ on the CUDA key calls Python (csrc/cuda/way_in.h) and raises a RuntimeError with the message of
what Python raised. The Python code above it raises the exception itself, such as KeyboardInterrupt
or torch.OutOfMemoryError. Where only PyTorch is above, in a direct call of an operator in inference
mode, the RuntimeError remains.
"""

import threading

_kept = threading.local()


def keep(error: BaseException | None) -> str:
    """Keeps an exception for `original`, and returns its message, which is not empty."""
    _kept.error = error
    return "" if error is None else _message(error)


def original(error: RuntimeError) -> BaseException | None:
    """The exception of which C++ knew the message only, if `error` is from there."""
    kept = getattr(_kept, "error", None)
    if kept is None or str(error) != _message(kept):
        return None
    _kept.error = None
    return kept


def _message(error: BaseException) -> str:
    name = type(error).__name__
    return str(error) if isinstance(error, RuntimeError) and str(error) else f"{name}: {error}"
