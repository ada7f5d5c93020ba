# SPDX-License-Identifier: MIT
"""The CUDA kernels on the host execution layer, as functions with the operators' arguments.

A separate program, built from ``tests/host_cuda`` with AddressSanitizer and
UndefinedBehaviorSanitizer, runs them; calls and results go through its standard input and output.
"""

import enum
import math
import os
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import with_any_bytes
from torch import Tensor

DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
METRICS = {"cosine": 0, "dot": 1, "euclidean": 2}
RHOS = {"softmax": 0, "ones": 1, "similarity": 2}
ORDERS = {"similarity": 0, "index": 1}
NUMBERS = 23


class Kernel(NamedTuple):
    """A kernel by its address, relative to that of ``execution::seed()``, and its name."""

    address: int
    name: str


class Launches(NamedTuple):
    """How often a kernel was launched, the most shared memory of a launch, and how many
    instructions of whole warps all launches executed."""

    count: int
    shared_bytes: int
    collectives: int


class Choices(NamedTuple):
    """How the forward for Hopper divides its work; 0 is left to it."""

    multiprocessors: int = 0
    splits: int = 0
    step: int = 0


class Sweep(enum.IntEnum):
    """Of the forward in 16 bits. ANY: what forward takes on a device without one of its own."""

    HOPPER = 0
    PORTABLE = 1
    ANY = 2


class HostCuda:
    """A running program.

    For the following calls, ``seed`` determines the order of threads and blocks, ``most_bytes``
    limits the workspace for group maxima and hits, and ``choices`` are those of the forward in 16
    bits, by ``sweep``.
    """

    def __init__(self, program: Path) -> None:
        self.seed = 0
        self.most_bytes = 2**26
        self.choices = Choices()
        self.sweep = Sweep.HOPPER
        # Several test runs may share the program.
        self._log = program.with_suffix(f".{os.getpid()}.log")
        options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **options},
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> dict[Kernel, Launches]:
        """Ends the program and returns what it launched."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        lines = self._process.stdout.read().decode().splitlines()
        assert self._process.wait() == 0, self._log.read_text()
        return {
            Kernel(int(address), name): Launches(int(count), int(shared), int(collectives))
            for address, name, shared, count, collectives in map(str.split, lines)
        }

    def select(
        self,
        query: Tensor,
        key: Tensor,
        k: int,
        candidates: Tensor | None = None,
        self_indices: Tensor | None = None,
        key_mask: Tensor | None = None,
        metric: str = "cosine",
        order: str = "similarity",
        key_range: Tensor | None = None,
        exclude_self: bool = False,
    ) -> tuple[Tensor, Tensor]:
        options = (candidates, self_indices, key_mask, metric, order, key_range, exclude_self)
        return _Select.apply(self, query, key, k, options)

    def aggregate(
        self,
        value: Tensor,
        similarities: Tensor,
        indices: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        rho: str = "softmax",
        scale: float = 1.0,
    ) -> Tensor:
        return _Aggregate.apply(self, value, similarities, indices, weight, bias, rho, scale)

    def run_select(
        self,
        query: Tensor,
        key: Tensor,
        k: int,
        candidates: Tensor | None,
        self_indices: Tensor | None,
        key_mask: Tensor | None,
        metric: str,
        order: str,
        key_range: Tensor | None,
        exclude_self: bool,
    ) -> tuple[Tensor, Tensor]:
        s = query.new_empty((*query.shape[:-1], k), dtype=_similarity_dtype(query))
        I = query.new_empty((*query.shape[:-1], k), dtype=torch.int64)
        restrictions = (candidates, self_indices, key_mask, key_range, exclude_self)
        numbers, inputs = _selection(query, key, k, metric, order, *restrictions)
        return self.call(0, numbers, inputs, [s, I])

    def select_backward(
        self,
        grad_similarities: Tensor,
        query: Tensor,
        key: Tensor,
        similarities: Tensor,
        indices: Tensor,
        metric: str,
        need_query: bool = True,
        need_key: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        (N, D), M = query.shape[-2:], key.shape[-2]
        numbers = (_batch(query), N, M, D, indices.shape[-1], DTYPES[query.dtype])
        return self.call(
            1,
            (*numbers, METRICS[metric]),
            [grad_similarities, query, _unless_same(key, query), similarities, indices],
            [_empty_like(query, need_query), _empty_like(key, need_key)],
        )

    def run_aggregate(
        self,
        value: Tensor,
        similarities: Tensor,
        indices: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rho: str,
        scale: float,
    ) -> Tensor:
        numbers = _convolution(value, similarities, weight, rho)
        output = value.new_empty((*similarities.shape[:-1], numbers[4]))
        inputs = [value, similarities, indices, weight, bias]
        return self.call(2, numbers, inputs, [output], scale)[0]

    def hopper_aggregate_dense(
        self,
        value: Tensor,
        similarities: Tensor,
        indices: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        rho: str = "softmax",
        scale: float = 1.0,
        multiprocessors: int = 0,
    ) -> Tensor:
        """``aggregate`` with a dense weight by the kernels for Hopper."""
        numbers = _convolution(value, similarities, weight, rho)
        output = value.new_empty((*similarities.shape[:-1], numbers[4]))
        inputs = [value, similarities, indices, weight, bias]
        result: tuple[Tensor] = self.call(6, (*numbers, multiprocessors), inputs, [output], scale)
        return result[0]

    def aggregate_backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        similarities: Tensor,
        indices: Tensor,
        weight: Tensor | None,
        has_bias: bool,
        rho: str,
        scale: float,
        need_value: bool = True,
        need_similarities: bool = True,
        need_weight: bool = True,
        need_bias: bool = True,
    ) -> tuple[Tensor | None, ...]:
        numbers = _convolution(value, similarities, weight, rho)
        bias = value.new_empty(numbers[4]) if has_bias and need_bias else None
        outputs = [
            _empty_like(value, need_value),
            _empty_like(similarities, need_similarities),
            _empty_like(weight, need_weight),
            bias,
        ]
        inputs = [grad_output, value, similarities, indices, weight]
        return self.call(3, numbers, inputs, outputs, scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        candidates: Tensor | None = None,
        self_indices: Tensor | None = None,
        key_mask: Tensor | None = None,
        metric: str = "cosine",
        rho: str = "softmax",
        scale: float = 1.0,
        order: str = "similarity",
        key_range: Tensor | None = None,
        exclude_self: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = (candidates, self_indices, key_mask, metric, order, key_range, exclude_self)
        return _Forward.apply(self, query, key, value, weight, bias, k, options, rho, scale)

    def hopper_select(
        self,
        query: Tensor,
        key: Tensor,
        k: int,
        candidates: Tensor | None = None,
        self_indices: Tensor | None = None,
        key_mask: Tensor | None = None,
        metric: str = "cosine",
        order: str = "similarity",
        key_range: Tensor | None = None,
        exclude_self: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``select`` by the kernels for Hopper."""
        options = (candidates, self_indices, key_mask, metric, "ones", 1.0, order)
        more = (key_range, exclude_self)
        _, s, I = self.hopper_forward(query, key, None, k, None, None, *options, *more)
        return s, I

    def hopper_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        k: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        candidates: Tensor | None = None,
        self_indices: Tensor | None = None,
        key_mask: Tensor | None = None,
        metric: str = "cosine",
        rho: str = "softmax",
        scale: float = 1.0,
        order: str = "similarity",
        key_range: Tensor | None = None,
        exclude_self: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``forward`` by the kernels for Hopper; without a value, only the selection."""
        s = query.new_empty((*query.shape[:-1], k), dtype=torch.float32)
        I = query.new_empty((*query.shape[:-1], k), dtype=torch.int64)
        of_value, output = (-1, 0, 0, 0, 0), None
        if value is not None:
            _, _, _, C, O, _, dtype, _, kind, number = _convolution(value, s, weight, rho)
            of_value, output = (C, O, kind, number, dtype), value.new_empty((*s.shape[:-1], O))
        restrictions = (candidates, self_indices, key_mask, key_range, exclude_self)
        numbers, inputs = _selection(query, key, k, metric, order, *restrictions)
        numbers = (*numbers, *of_value, *self.choices, self.sweep)
        self.call(5, numbers, [*inputs, value, weight, bias], [s, I, output], scale)
        return (s if output is None else output), s, I

    def forward_backward(
        self,
        grad_output: Tensor,
        grad_similarities: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None,
        similarities: Tensor,
        indices: Tensor,
        has_bias: bool,
        metric: str,
        rho: str,
        scale: float,
        needs: tuple[bool, bool, bool, bool, bool] = (True,) * 5,
    ) -> tuple[Tensor | None, ...]:
        """``needs``: gradients of query, key, value, weight and bias."""
        batch, N, M, C, O, k, *types = _convolution(value, similarities, weight, rho)
        need_query, need_key, need_value, need_weight, need_bias = needs
        outputs = [
            _empty_like(query, need_query),
            _empty_like(key, need_key),
            _empty_like(value, need_value),
            _empty_like(weight, need_weight),
            value.new_empty(O) if has_bias and need_bias else None,
        ]
        inputs = [
            *(grad_output, grad_similarities, query, _unless_same(key, query)),
            *(value, weight, similarities, indices),
        ]
        numbers = (batch, N, M, query.shape[-1], C, O, k, DTYPES[query.dtype], *types)
        return self.call(4, (*numbers, METRICS[metric]), inputs, outputs, scale)

    def call(
        self,
        operator: int,
        numbers: tuple[int, ...],
        inputs: list[Tensor | None],
        outputs: list[Any],
        scale: float = 1.0,
    ) -> Any:
        """One call of an operator as tests/host_cuda/serve.cpp reads it; returns `outputs`."""
        filled = (*numbers, *[0] * (NUMBERS - len(numbers)))
        message = [
            struct.pack(f"=qq{NUMBERS}qqd", operator, self.seed, *filled, self.most_bytes, scale)
        ]
        message.append(struct.pack("=q", len(inputs)))
        for tensor in inputs:
            data = None if tensor is None else _bytes(tensor)
            message.append(struct.pack("=q", -1 if data is None else len(data)))
            message.append(data or b"")
        sizes = [-1 if X is None else X.numel() * X.element_size() for X in outputs]
        message.append(struct.pack(f"={len(sizes) + 1}q", len(sizes), *sizes))
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(b"".join(message))
            stdin.flush()
        except BrokenPipeError:
            self._fail()
        for X, size in zip(outputs, sizes, strict=True):
            if size > 0:
                data = stdout.read(size)
                if len(data) != size:
                    self._fail()
                bytes_of_X = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                X.copy_(bytes_of_X.view(X.dtype).view(X.shape))
        return tuple(outputs)

    def _fail(self) -> None:
        self._process.wait()
        raise AssertionError(self._log.read_text())


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, device: HostCuda, query: Tensor, key: Tensor, k: int, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        s, I = device.run_select(query, key, k, *options)
        ctx.device, ctx.metric = device, options[3]
        ctx.save_for_backward(query, key, s, I)
        ctx.mark_non_differentiable(I)
        return s, I

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        return None, *ctx.device.select_backward(grad, *ctx.saved_tensors, ctx.metric), None, None


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        device: HostCuda,
        value: Tensor,
        s: Tensor,
        I: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rho: str,
        scale: float,
    ) -> Tensor:
        ctx.device, ctx.options = device, (bias is not None, rho, scale)
        ctx.save_for_backward(value, s, I, weight)
        return device.run_aggregate(value, s, I, weight, bias, rho, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_value, grad_s, grad_weight, grad_bias = ctx.device.aggregate_backward(
            grads[0], *ctx.saved_tensors, *ctx.options
        )
        return None, grad_value, grad_s, None, grad_weight, grad_bias, None, None


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        device: HostCuda,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        k: int,
        options: tuple[Any, ...],
        rho: str,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, I = device.run_select(query, key, k, *options)
        ctx.device, ctx.options = device, (bias is not None, options[3], rho, scale)
        ctx.save_for_backward(query, key, value, weight, s, I)
        ctx.mark_non_differentiable(I)
        return device.run_aggregate(value, s, I, weight, bias, rho, scale), s, I

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_s: Tensor, _: Any) -> tuple[Any, ...]:
        grads = ctx.device.forward_backward(grad_output, grad_s, *ctx.saved_tensors, *ctx.options)
        return None, *grads, *[None] * 4


def _similarity_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _batch(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-2])


def _selection(
    query: Tensor,
    key: Tensor,
    k: int,
    metric: str,
    order: str,
    candidates: Tensor | None,
    self_indices: Tensor | None,
    key_mask: Tensor | None,
    key_range: Tensor | None,
    exclude_self: bool,
) -> tuple[tuple[int, ...], list[Tensor | None]]:
    """The numbers and inputs of a selection."""
    (N, D), M = query.shape[-2:], key.shape[-2]
    R = 0 if candidates is None else candidates.shape[-1]
    # Elements of each batch element, or 0 if it shares them.
    own = ((candidates, 1, R), (self_indices, 1, N), (key_range, 2, 2 * N))
    strides = (0 if X is None or X.ndim == dims else count for X, dims, count in own)
    numbers = (_batch(query), N, M, D, k, R, DTYPES[query.dtype], METRICS[metric], ORDERS[order])
    inputs = [query, _unless_same(key, query), candidates, self_indices, key_mask, key_range]
    return (*numbers, *strides, int(exclude_self)), inputs


def _convolution(
    value: Tensor, similarities: Tensor, weight: Tensor | None, rho: str
) -> tuple[int, ...]:
    """The numbers of an aggregation; the fifth is the outputs."""
    (N, k), (M, C) = similarities.shape[-2:], value.shape[-2:]
    kind, O = 0, C
    if weight is not None:
        kind, O = (2, weight.shape[0]) if weight.shape[1] == C else (1, C)
    dtypes = DTYPES[value.dtype], DTYPES[similarities.dtype]
    return (_batch(value), N, M, C, O, k, *dtypes, kind, RHOS[rho])


def _unless_same(key: Tensor, query: Tensor) -> Tensor | None:
    """The key; None, which stands for the query, if both are the same memory."""
    same = key.data_ptr() == query.data_ptr() and key.shape == query.shape
    return None if same and key.stride() == query.stride() else key


def _empty_like(tensor: Tensor | None, needed: bool) -> Tensor | None:
    return torch.empty(tensor.shape, dtype=tensor.dtype) if needed and tensor is not None else None


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
    if flat.dtype == torch.bool:
        flat = with_any_bytes(flat)
    return flat.view(torch.uint8).numpy().tobytes()
