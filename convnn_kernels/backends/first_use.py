# SPDX-License-Identifier: MIT
"""Kernels that are checked on each device before their first use."""

import logging
from collections.abc import Callable
from typing import Any

import torch

_log = logging.getLogger("convnn_kernels")

# By device, name of the kernels, and kind of calls: what came out wrong.
_faults: dict[tuple[torch.device, str, Any], list[str]] = {}
_captured: set[tuple[torch.device, str, Any]] = set()


def passes(
    device: torch.device, kernels: str, kind: Any, faults: Callable[[], list[str]]
) -> bool | None:
    """Whether kernels are right for a kind of calls: whether there are no ``faults``.

    The first question waits for the check, and if something is wrong, one line is logged. None, for
    this time, while a CUDA graph is captured and the kind was not checked before.
    """
    key = device, kernels, kind
    if key not in _faults:
        if torch.cuda.is_current_stream_capturing():
            if key not in _captured:
                _captured.add(key)
                _log.warning(
                    "%s: a call is captured in a CUDA graph before the %s were checked, so that it "
                    "takes other ones: %s",
                    *key,
                )
            return None
        found = _faults[key] = faults()
        if found:
            _log.warning("%s: the %s are wrong and not used for %s (%s)", *key, ", ".join(found))
    return not _faults[key]


def failure(case: str, error: Exception) -> str:
    """What a check says that an exception ended, in or after a case.

    An illegal access of a kernel is only reported by a later call, and after it all others fail.
    """
    message = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{case}: {message}; the CUDA context may be broken"
