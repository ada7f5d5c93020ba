# SPDX-License-Identifier: MIT
"""Launching kernels and their temporary memory, at little cost on the host.

Triton's own launch, ``kernel[grid](...)``, examines every argument at every call, which takes four
times as long as the launch itself. Here a launch is prepared from sizes and options alone, by the
functions ``plan_...`` of the other files, which are cached. What remains at a call are the
pointers: their addresses, dtypes and alignment. With them the compiled variant is looked up and
handed to Triton's launcher.

The launch is left to Triton when a variant is used for the first time, when a profiler has
installed launch hooks, and in Triton's debug mode and interpreter.
"""

import functools
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

# What a configuration has for the compiler.
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# As Triton sees it: its decorators read the variable too, when kernels are defined.
_INTERPRETED = interpreted()
_ALIGNMENT = 16
_INT32 = 2**31
_GRANULE = 256

KERNELS: dict[str, "Kernel"] = {}

# A cache for functions that prepare launches. A plan takes some kilobytes, of which calls with
# sizes of many kinds would make many.
cache_plans = functools.lru_cache(maxsize=1024)


class Kernel:
    """A Triton kernel. Its parameters are pointers (p_...), then numbers, then constants."""

    def __init__(self, function: Callable[..., None]) -> None:
        code = function.__code__
        names = code.co_varnames[: code.co_argcount]
        self.name, self.module, self.names = function.__name__, function.__module__, names
        self.pointers = [name for name in names if name.startswith("p_")]
        constants = [name for name in names if function.__annotations__.get(name)]
        self.numbers = [*names[len(self.pointers) : len(names) - len(constants)]]
        assert names == (*self.pointers, *self.numbers, *constants), function
        sizes = [name for name in self.numbers if name not in _SPECIALIZED]
        self.jit = triton.jit(do_not_specialize=sizes)(function)
        # What Launch needs of compiled variants, by what is known before the pointers are.
        self.variants: dict[Any, dict[Any, Any]] = {}
        KERNELS[self.name] = self

    def prepare(self, programs: int, config: dict[str, int], **arguments: Any) -> "Launch":
        """A launch that needs nothing but pointers.

        Args:
            programs: how many.
            config: the kernel's blocks, and num_warps, num_stages, maxnreg for the compiler.
            **arguments: numbers and constants. Those that the kernel does not have are ignored, so
                that kernels may share a set.
        """
        return Launch(self, programs, config, arguments | config)


class Launch:
    """A launch of a kernel with all of its arguments but the pointers."""

    def __init__(
        self, kernel: Kernel, programs: int, config: dict[str, int], arguments: dict[str, Any]
    ) -> None:
        self.kernel, self.programs = kernel, programs
        self.options = {name: config[name] for name in _OPTIONS if name in config}
        self.values = tuple(arguments[name] for name in kernel.names[len(kernel.pointers) :])
        numbers = self.values[: len(kernel.numbers)]
        specialized = [arguments[name] for name in kernel.numbers if name in _SPECIALIZED]
        in_64_bits = [not -_INT32 <= number < _INT32 for number in numbers]
        constants = self.values[len(kernel.numbers) :]
        facts = (*specialized, *in_64_bits, *constants, *self.options.items())
        self._variants = kernel.variants.setdefault(facts, {})
        self._pointers = itemgetter(*kernel.pointers)

    def __call__(self, **pointers: Any) -> None:
        """Launches on the current device, in its current stream.

        Args:
            **pointers: tensors and buffers, None where one is absent. Those that the kernel does
                not have are ignored.
        """
        found = self._pointers(pointers)
        if _INTERPRETED:
            self._launch_by_triton(found)
            return
        addresses = [None if X is None else X.data_ptr() for X in found]
        device = driver.active.get_current_device()
        key = (device, _misaligned(addresses), *[None if X is None else X.dtype for X in found])
        variant = self._variants.get(key)
        runtime = knobs.runtime
        if (
            variant is None
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or runtime.add_stages_inspection_hook is not None
            or runtime.debug
        ):
            self._variants[key] = self._launch_by_triton(found)
            return
        stream = driver.active.get_current_stream(device)
        run, function, metadata = variant
        arguments = (*addresses, *self.values)
        run(self.programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

    def _launch_by_triton(self, pointers: tuple[Any, ...]) -> Any:
        """Returns how to launch the same variant again."""
        grid = (self.programs,)
        if _INTERPRETED:
            pointers = tuple(X.tensor() if isinstance(X, Buffer) else X for X in pointers)
        compiled = self.kernel.jit[grid](*pointers, *self.values, **self.options)
        if _INTERPRETED:
            return None
        return compiled.run, compiled.function, compiled.packed_metadata


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


class Buffer:
    """Temporary memory for kernels, contiguous and aligned for any load: a part of an allocation.

    It belongs to the stream that is current when it is made: PyTorch gives it to others only behind
    the work that has been launched there.
    """

    __slots__ = ("_address", "_count", "_memory", "_offset", "dtype")

    def __init__(self, memory: Tensor, offset: int, count: int, dtype: torch.dtype) -> None:
        self._memory, self._offset, self._count = memory, offset, count
        self._address = memory.data_ptr() + offset
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._address

    def tensor(self) -> Tensor:
        """The same memory as a tensor, which takes longer to make than to pass the buffer."""
        end = self._offset + self._count * self.dtype.itemsize
        return self._memory[self._offset : end].view(self.dtype)


def workspace(device: torch.device, *parts: tuple[int, torch.dtype]) -> list[Buffer]:
    """A buffer for each number of elements and dtype, all in one allocation."""
    offsets = [0]
    for count, dtype in parts:
        offsets.append(offsets[-1] + -(-count * dtype.itemsize // _GRANULE) * _GRANULE)
    memory = torch.empty(offsets[-1], dtype=torch.uint8, device=device)
    return [Buffer(memory, at, *part) for at, part in zip(offsets, parts, strict=False)]
