# SPDX-License-Identifier: MIT
"""Launching kernels and their temporary memory, at little cost on the host.

Triton's own launch, ``kernel[grid](...)``, examines every argument at every call, which takes four
times as long as the launch itself. Here launches are prepared from sizes and options alone: in the
other files ``prepare_...`` makes one launch, and ``plan_...``, which is cached, a `Plan` of those
that follow one another. What remains at a call are the pointers: their addresses, dtypes and
alignment, which `Pointers` collects. By them the compiled variants are looked up and handed to
Triton's launcher.

The launch is left to Triton when a variant is used for the first time, when a profiler has
installed launch hooks or a hook inspects the stages of compilation, and in Triton's debug mode and
interpreter.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, TypeVar

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

# Compiler options in a configuration.
OPTIONS = ("num_warps", "num_stages", "maxnreg")
# As Triton sees it: its decorators read the variable too, when kernels are defined.
_INTERPRETED = interpreted()
_ALIGNMENT = 16
_INT32 = 2**31
_GRANULE = 256

KERNELS: dict[str, "Kernel"] = {}

# The elements and dtype of temporary memory.
Buffer = tuple[int, torch.dtype]
Function = TypeVar("Function", bound=Callable[..., Any])
_plans: list[Any] = []


# A cache for functions that prepare launches. It is bounded: a plan takes some kilobytes, and calls
# with many different sizes would otherwise pile up.
def cache_plans(function: Function) -> Function:
    cached: Any = functools.lru_cache(maxsize=1024)(function)
    _plans.append(cached)
    return cached


def forget_plans() -> None:
    """Has everything planned anew, with configurations as they are now."""
    for cached in _plans:
        cached.cache_clear()


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
        # What Launch needs of compiled variants, keyed by everything but the pointers.
        self.variants: dict[Any, dict[Any, Any]] = {}
        KERNELS[self.name] = self

    def prepare(
        self,
        programs: int,
        config: dict[str, int],
        names: Mapping[str, str | None] | None = None,
        **arguments: Any,
    ) -> "Launch":
        """A launch that needs nothing but pointers.

        Args:
            programs: how many.
            config: the kernel's blocks, and num_warps, num_stages, maxnreg for the compiler.
            names: by parameter, the name of a pointer in `Pointers` where it is another one; None
                if there is no such pointer.
            **arguments: numbers and constants. Those that the kernel does not have are ignored, as
                are such names, so that kernels may share a set.
        """
        return Launch(self, programs, config, names or {}, arguments | config)


class Launch:
    """A launch of a kernel with all of its arguments but the pointers."""

    def __init__(
        self,
        kernel: Kernel,
        programs: int,
        config: dict[str, int],
        names: Mapping[str, str | None],
        arguments: dict[str, Any],
    ) -> None:
        self.kernel, self.programs = kernel, programs
        self.options = {name: config[name] for name in OPTIONS if name in config}
        self.pointers = tuple(names.get(name, name) for name in kernel.pointers)
        self.values = tuple(arguments[name] for name in kernel.names[len(kernel.pointers) :])
        numbers = self.values[: len(kernel.numbers)]
        specialized = [arguments[name] for name in kernel.numbers if name in _SPECIALIZED]
        in_64_bits = [not -_INT32 <= number < _INT32 for number in numbers]
        constants = self.values[len(kernel.numbers) :]
        facts = (self.pointers, *specialized, *in_64_bits, *constants, *self.options.items())
        # By device and kind of pointers: how to launch a compiled variant.
        self.variants = kernel.variants.setdefault(facts, {})
        self.addresses = itemgetter(*self.pointers)

    def by_triton(self, pointers: "Pointers") -> Any:
        """Has Triton launch it, and returns how to launch the same variant again."""
        tensors = [pointers.tensor(name) for name in self.pointers]
        compiled = self.kernel.jit[(self.programs,)](*tensors, *self.values, **self.options)
        if _INTERPRETED:
            return None
        return compiled.run, compiled.function, compiled.packed_metadata


class Workspace:
    """The temporary memory of some kernels, by parameter: contiguous buffers in one allocation.

    Those of `later` take the place of those of `earlier`: whoever writes one of them must not leave
    it to be read after one of the others has been written.
    """

    def __init__(
        self,
        earlier: Mapping[str, Buffer] | None = None,
        later: Mapping[str, Buffer] | None = None,
        /,
        **sizes: Buffer,
    ) -> None:
        earlier, later = earlier or {}, later or {}
        self.sizes = {**sizes, **earlier, **later}
        self.offsets: dict[str, int] = {}
        end = self._place(sizes, 0)
        self.bytes = max(self._place(earlier, end), self._place(later, end))
        self.kind = tuple((name, dtype) for name, (_, dtype) in self.sizes.items())

    def _place(self, sizes: Mapping[str, Buffer], begin: int) -> int:
        """Puts buffers one behind the other, and returns where they end."""
        for name, (count, dtype) in sizes.items():
            self.offsets[name] = begin
            begin += -(-count * dtype.itemsize // _GRANULE) * _GRANULE
        return begin


class Plan:
    """Launches that follow one another, and their temporary memory."""

    def __init__(
        self, launches: Iterable[Launch], workspace: Workspace | None = None, /, **sizes: Buffer
    ) -> None:
        self.launches, self.workspace = tuple(launches), workspace or Workspace(**sizes)

    def __call__(self, pointers: "Pointers") -> None:
        """Launches on the current device, in its current stream."""
        if self.workspace.sizes:
            pointers.allocate(self.workspace)
        self.launch(pointers)

    def launch(self, pointers: "Pointers") -> None:
        """Launches with temporary memory that the pointers already have."""
        if _INTERPRETED:
            for launch in self.launches:
                launch.by_triton(pointers)
            return
        active, runtime = driver.active, knobs.runtime
        device = active.get_current_device()
        stream = active.get_current_stream(device)
        key, addresses = (device, pointers.kind), pointers.addresses
        watched = (
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or runtime.add_stages_inspection_hook is not None
            or runtime.debug
        )
        for launch in self.launches:
            variant = launch.variants.get(key)
            if variant is None or watched:
                launch.variants[key] = launch.by_triton(pointers)
                continue
            run, function, metadata = variant
            arguments = (*launch.addresses(addresses), *launch.values)
            run(launch.programs, 1, 1, stream, function, metadata, None, None, None, *arguments)


class Pointers:
    """The tensors and the temporary memory of a call, by the parameters of its kernels.

    `kind` is a number for all that a compiled variant depends on: which pointers there are, their
    dtypes, and which are not aligned.
    """

    __slots__ = ("_device", "_owners", "addresses", "kind")

    def __init__(self, device: torch.device, **tensors: Tensor | None) -> None:
        self._device = device
        # None is the name of what is absent.
        self._owners: dict[str | None, Any] = {None: None}
        self.addresses: dict[str | None, int | None] = {None: None}
        self.kind = 0
        self.add(**tensors)

    def add(self, **tensors: Tensor | None) -> None:
        """Adds tensors; None for one that is absent."""
        addresses, kind = self.addresses, [self.kind, *tensors]
        for name, X in tensors.items():
            if X is None:
                addresses[name] = None
                kind.append(None)
            else:
                address = addresses[name] = X.data_ptr()
                kind.append(X.dtype if address % _ALIGNMENT == 0 else (X.dtype, "not aligned"))
        self._owners.update(tensors)
        self.kind = _number_of(tuple(kind))

    def allocate(self, workspace: Workspace) -> None:
        """Adds temporary memory, which is free again when this object is gone.

        It belongs to the stream that is current: PyTorch gives it to others only behind the work
        that has been launched there.
        """
        for name in workspace.offsets:  # so that what they point to may be reused at once
            self._owners.pop(name, None)
        memory = torch.empty(workspace.bytes, dtype=torch.uint8, device=self._device)
        begin = memory.data_ptr()
        for name, offset in workspace.offsets.items():
            self.addresses[name] = begin + offset
            self._owners[name] = (memory, offset, workspace.sizes[name])
        self.kind = _number_of((self.kind, workspace.kind))

    def take(self, other: "Pointers", *names: str) -> None:
        """Adds pointers of another call, and keeps what they point to."""
        for name in names:
            self.addresses[name] = other.addresses[name]
            self._owners[name] = other._owners[name]
        self.kind = _number_of((self.kind, other.kind, *names))

    def tensor(self, name: str | None) -> Tensor | None:
        """A pointer as a tensor. That of temporary memory takes longer to make than to pass on."""
        owner = self._owners[name]
        if not isinstance(owner, tuple):
            return owner
        memory, offset, (count, dtype) = owner
        return memory[offset : offset + count * dtype.itemsize].view(dtype)


# Kinds of pointers, as Pointers has them.
_numbers: dict[Any, int] = {}
_next_number = itertools.count(1)


def _number_of(kind: Any) -> int:
    """The same number for the same kind, in any thread."""
    number = _numbers.get(kind)
    return _numbers.setdefault(kind, next(_next_number)) if number is None else number


def settle_cache_keys() -> None:
    """Has Triton compute its cache key of every function, callees first.

    Otherwise, in Triton 3.6 and 3.7, keys depend on which kernel happens to run first.
    """
    # A module with kernels is imported after those that it uses.
    functions = (
        "integers",
        "metrics",
        "order",
        "dot_of_float",
        "float16",
        "inverse_norms",
        "products",
        "networks",
        "row_products",
        "convolve",
        "modulate",
        "list_pairs",
        "ranges",
    )
    names = [f"{__package__}.{name}" for name in (*functions, "append")]
    for name in (*names, *(kernel.module for kernel in KERNELS.values())):
        for function in vars(sys.modules[name]).values():
            getattr(getattr(function, "jit", function), "cache_key", None)
