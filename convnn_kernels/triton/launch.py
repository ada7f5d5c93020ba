# SPDX-License-Identifier: MIT
"""Launching kernels and their temporary memory, at little cost on the host.

Triton's own launch, ``kernel[grid](...)``, examines every argument at every call, which takes four
times as long as the launch itself. `Kernel.launch` looks the compiled variant up by what Triton
compiles for (dtypes, alignment, constants, options) and hands addresses to Triton's launcher. It
leaves the launch to Triton when a variant is used for the first time, when a profiler has installed
launch hooks, and when Triton's debug mode is on.
"""

import math
import sys
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from .hardware import interpreted

# The integers for which Triton compiles a variant of its own where one is 1 or a multiple of 16:
# numbers of channels, on which wide loads and whole blocks depend. All other integers are sizes and
# strides, and one variant serves them all.
_SPECIALIZED = ("C", "D", "O")

_ALIGNMENT = 16
_INT32 = 2**31

KERNELS: dict[str, "Kernel"] = {}


class Kernel:
    """A Triton kernel. Its parameters are pointers (p_...), then numbers, then constants."""

    def __init__(self, function: Callable[..., None]) -> None:
        code = function.__code__
        names = code.co_varnames[: code.co_argcount]
        pointers = [name for name in names if name.startswith("p_")]
        constants = [name for name in names if function.__annotations__.get(name)]
        numbers = names[len(pointers) : len(names) - len(constants)]
        assert names == (*pointers, *numbers, *constants), function
        sizes = [name for name in numbers if name not in _SPECIALIZED]
        self.jit = triton.jit(do_not_specialize=sizes)(function)
        self.name, self.module, self.names = function.__name__, function.__module__, names
        KERNELS[self.name] = self
        self._arguments = itemgetter(*names)
        self._pointers = slice(len(pointers))
        self._numbers = slice(len(pointers), len(pointers) + len(numbers))
        self._rest = slice(len(pointers) + len(numbers), None)
        self._channels = [i for i, name in enumerate(numbers) if name in _SPECIALIZED]
        self._variants: dict[Any, Any] = {}

    def launch(self, programs: int, config: dict[str, int], **arguments: Any) -> None:
        """Launches `programs` programs on the current device, in its current stream.

        Args:
            programs: how many.
            config: the kernel's blocks, and num_warps, num_stages, maxnreg for the compiler.
            **arguments: the other arguments, tensors and buffers among them; None where a pointer
                is absent. Arguments of other names are ignored, so that kernels may share a set.
        """
        arguments |= config
        values = self._arguments(arguments)
        if interpreted():
            self._launch_by_triton(programs, config, map(_as_tensor, values))
            return
        pointers, numbers = values[self._pointers], values[self._numbers]
        addresses = [None if X is None else X.data_ptr() for X in pointers]
        device = driver.active.get_current_device()
        key = (
            device,
            *(None if X is None else X.dtype for X in pointers),
            *(numbers[i] for i in self._channels),
            *values[self._rest],
            *config.items(),
            _misaligned(addresses),
            _exceeding_int32(numbers),
        )
        variant = self._variants.get(key)
        runtime = knobs.runtime
        if (
            variant is None
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or runtime.add_stages_inspection_hook is not None
            or runtime.debug
        ):
            self._variants[key] = self._launch_by_triton(programs, config, values)
            return
        stream = driver.active.get_current_stream(device)
        run, function, metadata = variant
        rest = (*addresses, *numbers, *values[self._rest])
        run(programs, 1, 1, stream, function, metadata, None, None, None, *rest)

    def _launch_by_triton(self, programs: int, config: dict[str, int], values: Any) -> Any:
        """Returns how to launch the same variant again."""
        options = {name: value for name, value in config.items() if name not in self.names}
        compiled = self.jit[(programs,)](*values, **options)
        return (
            None if interpreted() else (compiled.run, compiled.function, compiled.packed_metadata)
        )


def settle_cache_keys() -> None:
    """Has Triton compute its cache key of every function, callees first.

    Otherwise, in Triton 3.6 and 3.7, keys depend on which kernel happens to run first.
    """
    # A module with kernels is imported after those that it uses.
    names = [f"{__package__}.{name}" for name in ("integers", "order", "dot_of_float")]
    for name in (*names, *(kernel.module for kernel in KERNELS.values())):
        for function in vars(sys.modules[name]).values():
            getattr(getattr(function, "jit", function), "cache_key", None)


def _misaligned(addresses: list[int | None]) -> Any:
    """0 if all addresses are multiples of 16, else which are not."""
    bits = 0
    for address in addresses:
        if address is not None:
            bits |= address
    if bits % _ALIGNMENT == 0:
        return 0
    return tuple(address is not None and address % _ALIGNMENT != 0 for address in addresses)


def _exceeding_int32(numbers: tuple[int, ...]) -> Any:
    """0 if all numbers fit in 32 bits, else which do not: those are passed in 64."""
    if max(numbers) < _INT32 and min(numbers) >= -_INT32:
        return 0
    return tuple(not -_INT32 <= number < _INT32 for number in numbers)


class Buffer:
    """A part of a `Workspace`, to be passed to kernels; contiguous, aligned for any load."""

    __slots__ = ("_offset", "_workspace", "dtype", "shape")

    def __init__(
        self, workspace: "Workspace", offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._workspace, self._offset = workspace, offset
        self.shape, self.dtype = shape, dtype

    def data_ptr(self) -> int:
        return self._workspace.address + self._offset

    def tensor(self) -> Tensor:
        """The same memory as a tensor, which takes longer to make than to pass the buffer."""
        end = self._offset + math.prod(self.shape) * self.dtype.itemsize
        return self._workspace.memory[self._offset : end].view(self.dtype).view(self.shape)


class Workspace:
    """Temporary memory of a call, in one allocation.

    Buffers are added first; kernels may use them after `allocate`. The memory belongs to the stream
    that is current: PyTorch gives it to others only behind the work that has been launched there.
    """

    _GRANULE = 256

    def __init__(self) -> None:
        self.bytes = 0
        self.address = 0

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        made = Buffer(self, self.bytes, shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        self.bytes += -(-size // self._GRANULE) * self._GRANULE
        return made

    def allocate(self, device: torch.device) -> None:
        self.memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        self.address = self.memory.data_ptr()


def _as_tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, Buffer) else value
