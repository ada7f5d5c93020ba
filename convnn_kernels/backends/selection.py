# SPDX-License-Identifier: MIT
"""Which backend runs a call, and why the others cannot.

CPU tensors go from the dispatcher straight to the C++ kernels. So do CUDA tensors in calls that the
Hopper kernels run (hopper.py), where nothing is forced. All other CUDA tensors come here, gradients
that are left to CUDA C++ (gradients.py) among them. Where ``TRITON_INTERPRET=1`` or
``CONVNN_BACKEND`` was set at import, CPU tensors come here first as well.

A backend is chosen once for each operator, device, list of dtypes, kind of call that the Hopper
kernels run, and forced backend. The reason is logged then, at level INFO of the logger
``convnn_kernels``. Arguments are checked once for each list of shapes, dtypes and options.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnn_kernels import checks, native, raised, schemas, torch_internals
from convnn_kernels.backends import cuda, gradients, hopper
from convnn_kernels.triton import backend as triton
from convnn_kernels.triton.hardware import interpreted

BACKENDS = ("triton", "cuda", "cpu")

_CHECKS: dict[str, Callable[..., None]] = {
    "convnn::forward": checks.check_forward,
    "convnn::select": checks.check_select,
    "convnn::aggregate": checks.check_aggregate,
    "convnn::forward_backward": checks.check_forward_backward,
    "convnn::select_backward": checks.check_select_backward,
    "convnn::aggregate_backward": checks.check_aggregate_backward,
}

_log = logging.getLogger("convnn_kernels")
# Backends that turned out not to work here, and why.
_failures: dict[str, str] = {}

# One choice for the whole process: backward runs in threads of the autograd engine.
_FROM_ENVIRONMENT = os.environ.get("CONVNN_BACKEND") or None
_forced: str | None = _FROM_ENVIRONMENT


class Call(NamedTuple):
    """What the choice of a backend depends on."""

    operator: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    # Whether a dimension exceeds what Triton's kernels can count.
    is_huge: bool
    forced: str | None
    # What the kernels in CUDA C++ that may be faster than Triton's make of it.
    by_cuda: hopper.Choice = hopper.Choice()


# The backends chosen so far.
_chosen: dict[Call, str] = {}
# Arguments that have been checked, by their kinds: the device and the backend of such a call.
_checked: dict[Any, tuple[torch.device, str]] = {}
_MOST_CHECKED = 4096


def available() -> dict[str, str | None]:
    """For each backend, why it cannot run on this machine; None if it can."""
    return {
        "triton": _failures.get("triton") or triton.unavailable(),
        "cuda": cuda.unavailable(),
        "cpu": _why_not_cpu(),
    }


def _why_not_cpu() -> str | None:
    # Without the library, importing the package fails.
    if native.cpu_can_run():
        return None
    return "CONVNN_CPU_ISA names an instruction set that cannot run here"


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Forces one backend for all calls of the process, within a ``with`` block.

    Called without ``with``, it only checks that the backend can run here, and forces nothing. It
    takes precedence over the environment variable ``CONVNN_BACKEND``, which forces one from the
    start.

    Args:
        name: "triton", "cuda" or "cpu".

    Raises:
        RuntimeError: at once, if there is no such backend or it cannot run on this machine; at a
            call within the block, if the backend cannot run that call.

    Example:
        >>> import torch
        >>> import convnn_kernels
        >>> from convnn_kernels.functional import convnn
        >>> x = torch.randn(2, 64, 16)
        >>> with convnn_kernels.backend("cpu"):
        ...     y = convnn(x, x, x, k=9)
    """
    _require(name, "backend: name")
    return _force(name)


@contextlib.contextmanager
def _force(name: str) -> Iterator[None]:
    global _forced
    before, _forced = _forced, name
    hopper.route(is_forced=True)
    try:
        yield
    finally:
        _forced = before
        hopper.route(before is not None)


def _require(name: str, what: str) -> None:
    """Raises unless ``name`` is a backend that can run on this machine."""
    if name not in BACKENDS:
        raise RuntimeError(f"{what} must be 'triton', 'cuda' or 'cpu', got {name!r}")
    reasons = available()
    if reasons[name]:
        can = [f"'{each}'" for each, reason in reasons.items() if not reason]
        raise RuntimeError(
            f"{what} must be a backend that can run here ({', '.join(can)}), "
            f"got '{name}': {reasons[name]}"
        )


def register(op: torch._ops.OpOverload, key: str = "CUDA") -> None:
    """Registers the kernel of ``op`` for CUDA tensors.

    Where C++ stands on their key, it is one of the library that C++ calls.
    """
    if not (op.name() in hopper.OPERATORS and hopper.is_in_front()):
        schemas.LIBRARY.impl(op, cuda_kernel(op), key)
        return
    name = op.name().removeprefix("convnn::")
    schemas.PYTHON_LIBRARY.impl(name, answering_kernel(op), key)
    # It is called below that key.
    schemas.PYTHON_LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def cuda_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The kernel of ``op`` for the CUDA key: it checks the arguments and runs a backend."""
    name = op.name()
    arguments_of = schemas.arguments(op)

    def run(*args: Any) -> Any:
        return _run(name, arguments_of(*args))

    return run


_NO_ERROR = torch.empty(0, dtype=torch.uint8, device="cpu")


def answering_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """As `cuda_kernel`, for C++: another result is the message of an exception, in bytes.

    `raised.original` finds the exception again.
    """
    run = cuda_kernel(op)
    results = len(op._schema.returns)

    def answer(*args: Any) -> Any:
        raised.keep(None)
        try:
            return *run(*args), _NO_ERROR
        except BaseException as error:
            message = list(raised.keep(error).encode())
            text = torch.tensor(message, dtype=torch.uint8, device="cpu")
            return *[_NO_ERROR] * results, text

    return answer


def _run(name: str, arguments: Any) -> Any:
    """The results of operator ``name`` for its arguments, a namedtuple of schemas.py."""
    # Read once: another thread may enter or leave a block that forces a backend.
    forced = _forced
    # All that checks and the choice of a backend read.
    key = (
        name,
        forced,
        *[(X.shape, X.dtype, X.device) if isinstance(X, Tensor) else X for X in arguments],
    )
    device_and_backend = _checked.get(key)
    if device_and_backend is None:
        device_and_backend, is_final = _check(name, arguments, forced)
        if is_final:
            if len(_checked) >= _MOST_CHECKED:
                _checked.clear()
            _checked[key] = device_and_backend
    for X in arguments:
        # Not among what is checked once: memory may be freed at any time.
        if isinstance(X, Tensor) and not _begin(X) and X.numel():
            checks.check_storage(name, arguments)
    device, chosen = device_and_backend
    if device.type == "cpu" or os.environ.get("CONVNN_CHECK_INDICES", "0") == "1":
        _check_values(name, arguments)
    if chosen == "cuda":
        return cuda.run(name, arguments)
    try:
        return triton.run(name, device, arguments)
    except triton.CannotCompile as error:
        _failures["triton"] = f"it cannot compile: {error}"
        _chosen.clear()
        _checked.clear()
        warnings.warn(f"convnn_kernels: Triton cannot compile here: {error}", stacklevel=2)
        # The next backend, or why there is none.
        return _run(name, arguments)


def _begin(X: Tensor) -> int:
    """Where the storage begins, or the tensor; 0 if it was freed, whatever the tensor's offset."""
    return X.untyped_storage().data_ptr() if X.storage_offset() else X.data_ptr()


def _check(name: str, arguments: Any, forced: str | None) -> tuple[tuple[torch.device, str], bool]:
    """Checks the arguments; returns their device and the backend, and whether that is final."""
    _CHECKS[name](name, arguments)
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    device = tensors[0].device
    dtypes = tuple(X.dtype for X in tensors)
    chooser = gradients if name == gradients.OPERATOR else hopper
    by_cuda = chooser.choice(name, device, arguments, forced)
    call = Call(name, device, dtypes, triton.is_huge(tensors), forced, by_cuda)
    if call not in _chosen:
        _chosen[call], why = choose(call)
        runs_hopper = _chosen[call] == "cuda" and by_cuda.kind is not None
        where = f"cuda (Hopper: {by_cuda.kind})" if runs_hopper else _chosen[call]
        _log.info(f"{name} runs on {where}: {why}")
    return (device, _chosen[call]), by_cuda.is_final


def _check_values(name: str, arguments: Any) -> None:
    """Reports index values out of range. Reading them waits for the device."""
    if name in ("convnn::forward", "convnn::select"):
        rows = arguments.key.shape[-2]
        checks.check_candidates(name, arguments.candidates, rows)
        checks.check_self_indices(name, arguments.self_indices, rows)
        checks.check_key_range(name, arguments.key_range, rows)
    else:
        rows_of = arguments.key if name == "convnn::select_backward" else arguments.value
        checks.check_indices(name, arguments.indices, arguments.similarities, rows_of.shape[-2])


def choose(call: Call) -> tuple[str, str]:
    """The backend that runs a call, and why.

    Raises:
        RuntimeError: if none can run it, or the one that is forced cannot, with the reasons.
    """
    reasons = available() | {"cpu": "it takes tensors on cpu only"}
    reasons["triton"] = reasons["triton"] or triton.refuses(call.device, call.dtypes, call.is_huge)
    reasons["cuda"] = reasons["cuda"] or cuda.refuses(call.device)
    if call.forced is not None:
        # One that could run when it was forced may have failed since.
        _require(
            call.forced,
            "CONVNN_BACKEND" if call.forced == _FROM_ENVIRONMENT else "backend: name",
        )
        if reasons[call.forced]:
            raise RuntimeError(
                f"{call.operator}: the forced backend '{call.forced}' cannot run tensors on "
                f"{call.device}: {reasons[call.forced]}"
            )
        return call.forced, "forced"
    if call.by_cuda.is_faster and not reasons["cuda"]:
        return "cuda", "predicted to be faster than triton"
    if not reasons["triton"]:
        return "triton", "the default for CUDA tensors"
    if not reasons["cuda"]:
        return "cuda", f"triton cannot: {reasons['triton']}"
    why = "; ".join(f"{each}: {reason}" for each, reason in reasons.items())
    raise RuntimeError(f"{call.operator}: no backend can run tensors on {call.device}: {why}")


def forced_kernel(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """A kernel of ``op`` that stands before those of all devices, if one must.

    The C++ kernels for CPU tensors do not ask which backend is forced. Where ``CONVNN_BACKEND``
    forces another from the start, or Triton's interpreter may be asked for, this kernel, of the
    BackendSelect key, does.
    """
    if _forced in (None, "cpu") and not interpreted():
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


hopper.route(_forced is not None)
