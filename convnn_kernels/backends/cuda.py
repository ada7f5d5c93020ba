# SPDX-License-Identifier: MIT
"""The CUDA C++ kernels: where they can run, and calls of ``torch.ops.convnn_cuda``.

Their host side is C++, too: ``csrc/cuda``. The library needs nothing but PyTorch when it runs.
"""

import functools
import re
from typing import Any

import torch

from convnn_kernels import native


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine; None if they can."""
    reason = native.load()["cuda"]
    if reason:
        return reason
    return None if torch.cuda.is_available() else "there is no CUDA device"


def refuses(device: torch.device) -> str | None:
    """Why these kernels cannot run a call with tensors on `device`; None if they can."""
    if device.type != "cuda":
        return f"it cannot run tensors on {device}"
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability, _built_for()):
        return (
            f"it was built for {', '.join(_built_for())}, and {device} has compute "
            f"capability {capability[0]}.{capability[1]}"
        )
    return None


def runs_on(capability: tuple[int, int], built: tuple[str, ...]) -> bool:
    """Whether code for the architectures `built` runs on a device.

    Machine code ("sm_80") runs on the later devices of its major version; with a letter ("sm_90a")
    on no other device. PTX ("compute_80") is compiled for all later ones when it is loaded.
    """
    for architecture in built:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if parts is None:
            continue
        target = int(parts[2]), int(parts[3])
        same_major = target[0] == capability[0] or parts[1] == "compute"
        if target == capability or (same_major and target < capability and not parts[4]):
            return True
    return False


def run(name: str, arguments: Any) -> Any:
    """The results of operator `name` for all of its arguments."""
    return getattr(torch.ops.convnn_cuda, name.removeprefix("convnn::")).default(*arguments)


@functools.cache
def _built_for() -> tuple[str, ...]:
    part = native.build_report().get("cuda", {})
    return tuple(part["built"].split(", ")) if isinstance(part, dict) and "built" in part else ()
