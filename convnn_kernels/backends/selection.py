# SPDX-License-Identifier: MIT
"""Which backend runs a call, and why the others cannot.

CPU tensors go from the dispatcher straight to the C++ kernels. CUDA tensors come here: this module
is the one owner of the CUDA dispatch key. Where ``TRITON_INTERPRET=1`` or ``CONVNN_BACKEND`` was
set at import, CPU tensors come here first, too.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import checks, native, schemas, torch_internals
from convnn_kernels.backends import cuda
from convnn_kernels.triton import backend as triton

BACKENDS = ("triton", "cuda", "cpu")

_CHECKS: dict[str, Callable[..., None]] = {
    "convnn::forward": checks.check_forward,
    "convnn::select": checks.check_select,
    "convnn::aggregate": checks.check_aggregate,
}

_log = logging.getLogger("convnn_kernels")
_told: set[str] = set()
# Backends that turned out not to work here, and why.
_failures: dict[str, str] = {}

# One choice for the whole process: backward runs in threads of the autograd engine.
_forced: str | None = os.environ.get("CONVNN_BACKEND") or None


def available() -> dict[str, str | None]:
    """For each backend, why it cannot run on this machine; None if it can."""
    return {
        "triton": _failures.get("triton") or triton.unavailable(),
        "cuda": cuda.unavailable(),
        "cpu": _why_not_cpu(),
    }


def _why_not_cpu() -> str | None:
    # Without the library, importing the package fails.
    if native.cpu_instruction_set():
        return None
    return "CONVNN_CPU_ISA names an instruction set that cannot run here"


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Forces one backend for all calls of the process, within a ``with`` block.

    It takes precedence over the environment variable ``CONVNN_BACKEND``, which forces one from the
    start.

    Args:
        name: "triton", "cuda" or "cpu".

    Raises:
        RuntimeError: at once, if there is no such backend or it cannot run on this machine; at a
            call within the block, if the backend cannot run that call.
    """
    _require(name, "backend: name")
    return _force(name)


@contextlib.contextmanager
def _force(name: str) -> Iterator[None]:
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _require(name: str, what: str) -> None:
    """Raises unless ``name`` is a backend that can run on this machine."""
    if name not in BACKENDS:
        raise RuntimeError(f"{what} must be 'triton', 'cuda' or 'cpu', got '{name}'")
    reasons = available()
    if reasons[name]:
        can = [f"'{each}'" for each, reason in reasons.items() if not reason]
        raise RuntimeError(
            f"{what} must be a backend that can run here ({', '.join(can)}), "
            f"got '{name}': {reasons[name]}"
        )


def cuda_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The kernel of ``op`` for the CUDA key: it checks the arguments, then picks a backend."""
    name = op.name()
    arguments_of = schemas.arguments(op)

    def choose(*args: Any) -> Any:
        return _run(name, arguments_of(*args))

    return choose


def _run(name: str, args: tuple[Any, ...]) -> Any:
    if name in _CHECKS:
        _CHECKS[name](name, args)
    reasons = _reasons(args)
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if _forced is not None:
        _require(_forced, "CONVNN_BACKEND")
        if reasons[_forced]:
            raise RuntimeError(
                f"{name}: the forced backend '{_forced}' cannot run tensors on {device}: "
                f"{reasons[_forced]}"
            )
        chosen, why = _forced, "forced"
    elif not reasons["triton"]:
        chosen, why = "triton", "the default for CUDA tensors"
    elif not reasons["cuda"]:
        chosen, why = "cuda", f"triton cannot: {reasons['triton']}"
    else:
        why = "; ".join(f"{each}: {reason}" for each, reason in reasons.items())
        raise RuntimeError(f"{name}: no backend can run tensors on {device}: {why}")
    _tell(f"{name} runs on {chosen}: {why}")
    if chosen == "cuda":
        return cuda.run(name, args)
    try:
        return triton.run(name, args)
    except triton.CannotCompile as error:
        _failures["triton"] = f"it cannot compile: {error}"
        warnings.warn(f"convnn_kernels: Triton cannot compile here: {error}", stacklevel=2)
        # The next backend, or why there is none.
        return _run(name, args)


def _reasons(args: tuple[Any, ...]) -> dict[str, str | None]:
    """For each backend, why it cannot run a call with ``args``; None if it can."""
    reasons = available() | {"cpu": "it takes tensors on cpu only"}
    reasons["triton"] = reasons["triton"] or triton.refuses(args)
    reasons["cuda"] = reasons["cuda"] or cuda.refuses(args)
    return reasons


def _tell(message: str) -> None:
    """Logs a message the first time it comes up."""
    if message not in _told:
        _told.add(message)
        _log.info(message)


def forced_kernel(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """A kernel of ``op`` that stands before those of all devices, if one must.

    The C++ kernels for CPU tensors do not ask which backend is forced. Where ``CONVNN_BACKEND``
    forces another from the start, or Triton's interpreter may be asked for, this kernel, of the
    BackendSelect key, does.
    """
    if _forced in (None, "cpu") and not triton.interpreted():
        return None
    name = op.name()
    arguments_of = schemas.arguments(op)

    def ask(keyset: Any, *args: Any) -> Any:
        if _forced is not None:
            _require(_forced, "CONVNN_BACKEND")
        if _forced in ("triton", "cuda") and _on_cpu(args):
            return _run(name, arguments_of(*args))
        return op.redispatch(keyset & torch_internals.BELOW_BACKEND_SELECT, *args)

    return ask


def _on_cpu(args: tuple[Any, ...]) -> bool:
    return next(arg for arg in args if isinstance(arg, Tensor)).device.type == "cpu"
