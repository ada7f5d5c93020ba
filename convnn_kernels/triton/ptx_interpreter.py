# SPDX-License-Identifier: MIT
"""The PTX of our kernels in Triton's interpreter, which has no inline assembly of its own.

Every element of the operands is a thread. Threads have program counters; the lowest one decides
which instruction comes next, and the threads that are there execute it. Registers are arrays.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton._C.libtriton import interpreter as memory
from triton.runtime import interpreter

Array = NDArray[Any]
_TYPES = {"r": np.uint32, "l": np.uint64}
_INSTRUCTION = re.compile(r"(?:@(\w+)\s+)?([\w.]+)\s*(.*)", re.DOTALL)


def _clz(x: Array) -> Array:
    count = np.full(x.shape, 32, np.uint32)
    for bit in range(32):
        count[(x >> np.uint32(bit)) & 1 == 1] = 31 - bit
    return count


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of a and b by four nibbles of `selector`; with 8 in a nibble, the sign of the byte."""
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & 15
        byte = (pool >> (8 * (nibble & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def _shr(a: Array, count: Array) -> Array:
    return np.where(count > 31, 0, a >> np.minimum(count, 31)).astype(np.uint32)


def _eq_halves(a: Array, b: Array) -> Array:
    """All bits of those halves of a word that are equal as float16."""
    equal = a.view(np.float16).reshape(-1, 2) == b.view(np.float16).reshape(-1, 2)
    return np.where(equal, np.uint16(0xFFFF), np.uint16(0)).view(np.uint32).reshape(-1)


def _selp(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "mov.b32": lambda a: a,
    "clz.b32": _clz,
    "and.b32": np.bitwise_and,
    "xor.b32": np.bitwise_xor,
    "add.u32": np.add,
    "shl.b32": np.left_shift,
    "shr.u32": _shr,
    "prmt.b32": _prmt,
    "selp.b32": _selp,
    "set.eq.u32.f16x2": _eq_halves,
    "setp.eq.u32": np.equal,
    "setp.ne.u32": np.not_equal,
    "setp.lt.u32": np.less,
    "mad.wide.u32": lambda a, b, c: a.astype(np.uint64) * b.astype(np.uint64) + c,
}


@functools.cache
def _parse(text: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """Instructions as (predicate or "", name, operands), and the places of labels."""
    program: list[tuple[str, str, list[str]]] = []
    labels: dict[str, int] = {}
    # A scope of its own in PTX.
    text = re.sub(r"^\s*\{|\}\s*$", "", text)
    for statement in re.split(r";|(?<=:)\s", text):
        statement = statement.strip()
        if statement.endswith(":"):
            labels[statement[:-1]] = len(program)
        elif statement and not statement.startswith(".reg"):
            found = _INSTRUCTION.fullmatch(statement)
            assert found, statement
            operands = [each.strip("[]{} \n") for each in found[3].split(",")]
            program.append((found[1] or "", found[2], operands))
    return program, labels


class _Threads:
    """The registers of all threads."""

    def __init__(self, operands: dict[str, Array], count: int) -> None:
        self.registers, self.count = operands, count

    def read(self, name: str) -> Array:
        if re.match(r"\d", name):
            return np.full(self.count, int(name, 0), np.uint32)
        return self.registers[name]

    def write(self, name: str, values: Array, active: Array) -> None:
        old = self.registers.get(name)
        values = np.broadcast_to(values, (self.count,))
        new = np.zeros(self.count, values.dtype) if old is None else old
        self.registers[name] = np.where(active, values, new)


def run(text: str, operands: dict[str, Array], count: int) -> dict[str, Array]:
    """The registers after `count` threads have run a program. Raises KeyError for an instruction
    that it does not know."""
    program, labels = _parse(text)
    threads = _Threads(operands, count)
    counters = np.zeros(count, np.int64)
    while (here := int(counters.min(initial=len(program)))) < len(program):
        predicate, name, names = program[here]
        active = counters == here
        counters[active] += 1
        if predicate:
            active = active & threads.read(predicate).astype(bool)
        if name == "bra":
            counters[active] = labels[names[0]]
        elif name == "st.global.v2.b32":
            address = threads.read(names[0])
            for i, each in enumerate(names[1:]):
                memory.store(address + np.uint64(4 * i), threads.read(each), active)
        else:
            arguments = [threads.read(each) for each in names[1:]]
            threads.write(names[0], _FUNCTIONS[name](*arguments), active)
    return threads.registers


def _create_inline_asm(
    _: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
) -> Any:
    """`tl.inline_asm_elementwise` with one result: of 32 bits, or two of 16 bits at a time."""
    assert (len(types), 4 // pack) == (1, types[0].scalar.primitive_bitwidth // 8)
    arrays = np.broadcast_arrays(*(value.data for value in values))
    shape = arrays[0].shape
    kinds = [each.strip() for each in constraints.split(",")][1:]
    operands = {
        f"${i + 1}": np.ascontiguousarray(array).reshape(-1).view(_TYPES[kind])
        for i, (array, kind) in enumerate(zip(arrays, kinds, strict=True))
    }
    result = run(text, operands, int(np.prod(shape)) // pack)["$0"]
    dtype = arrays[0].dtype if pack == 2 else np.dtype(np.int32)
    handle = interpreter.TensorHandle(result.view(dtype).reshape(shape), types[0].scalar)

    class Call:
        def get_result(self, i: int) -> Any:
            return handle

    return Call()


def install() -> None:
    """Has Triton's interpreter run inline assembly."""
    interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm
