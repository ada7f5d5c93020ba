# SPDX-License-Identifier: MIT
"""The PTX of convolve.py and row_products.py, executed for one warp as the PTX manual defines
``mma``, against what these files have Triton's interpreter compute in its place.

They need a process of their own, started with ``TRITON_INTERPRET=1``, as those of test_triton.py.
"""

import re

import numpy as np
import torch
import triton
import triton.language as tl
from interpreter import in_interpreter
from numpy.typing import NDArray

pytestmark = in_interpreter

Registers = dict[str, NDArray[np.float32]]
_LANE = np.arange(32)
_G, _Q = _LANE // 4, _LANE % 4
_MMA = re.compile(
    r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16|bf16)\.\2\.f32 "
    r"\{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\};"
)


def _multiply(depth: int, A: list[NDArray], B: list[NDArray], C: list[NDArray]) -> list[NDArray]:
    """D = A B + C of a warp. A and B: words [32 lanes, 2 numbers]; C and D: numbers [32 lanes].

    Word i of A has rows g (+ 8 if i is odd) and columns 2 q, 2 q + 1 (+ 8 in the last two); word i
    of B has these rows and column g; C has rows g (+ 8 in the last two) and columns 2 q, 2 q + 1.
    """
    a, b, c = np.zeros((16, depth)), np.zeros((depth, 8)), np.zeros((16, 8))
    for h in (0, 1):
        for i, word in enumerate(A):
            a[_G + 8 * (i % 2), 2 * _Q + h + 8 * (i // 2)] = word[:, h]
        for i, word in enumerate(B):
            b[2 * _Q + h + 8 * i, _G] = word[:, h]
        for i in (0, 2):
            c[_G + 4 * i, 2 * _Q + h] = C[i + h]
    d = a @ b + c
    return [d[_G + 8 * (i // 2), 2 * _Q + i % 2] for i in range(4)]


def _execute(text: str, words: dict[str, NDArray], numbers: dict[str, NDArray]) -> NDArray:
    """What the text leaves in $0 to $7, [32 lanes, 8], from words [32, 2] and numbers [32]."""
    numbers = {"z": np.zeros(32), **numbers}
    found = _MMA.findall(text)
    assert len(found) == text.count("mma")
    for depth, _, *operands in found:
        d, a, b, c = (each.split(", ") for each in operands)
        results = _multiply(
            int(depth), [words[x] for x in a], [words[x] for x in b], [numbers[x] for x in c]
        )
        numbers.update(zip(d, results, strict=True))
    return np.stack([numbers[f"${i}"] for i in range(8)], 1)


def _words(X: torch.Tensor, first: int) -> dict[str, NDArray]:
    """The words of X [8, 32] as lanes have them, from operand `first` on."""
    lanes = X.double().numpy().reshape(32, 4, 2)
    return {f"${first + i}": lanes[:, i] for i in range(4)}


@triton.jit
def _call(p_x, p_y, p_z, p_out, FUNCTION: tl.constexpr):
    o = 32 * tl.arange(0, 8)[:, None] + tl.arange(0, 32)[None, :]
    b_out = FUNCTION(tl.load(p_x + o), tl.load(p_y + o), tl.load(p_z + o), True)
    tl.store(p_out + o, b_out)


def _normal(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_diagonal_times_rows() -> None:
    from convnn_kernels.triton import convolve

    x, w, other = (_normal(seed, torch.float16) for seed in range(3))
    Y = torch.empty(8, 32)
    _call[(1,)](x, w, other, Y, convolve._products)
    words = _words(x, 8) | _words(w, 12) | _words(other, 16)
    for text in (convolve._CONVOLVE_FLOAT16, convolve._CONVOLVE_BFLOAT16):
        found = _execute(text.value, words, {})
        np.testing.assert_allclose(found, Y.numpy().reshape(32, 8), rtol=1e-5, atol=1e-5)


@triton.jit
def _sum_diagonals(p_s, p_out, FUNCTION: tl.constexpr, NUMBERS: tl.constexpr):
    o = 32 * tl.arange(0, 8)[:, None] + tl.arange(0, 32)[None, :]
    b_s = tl.where(FUNCTION(NUMBERS(8)), tl.load(p_s + o), 0.0)
    tl.store(p_out + tl.arange(0, 8), tl.sum(b_s, 1))


def test_products_of_rows() -> None:
    from convnn_kernels.triton import row_products

    x, y = (_normal(seed, torch.float16) for seed in range(2))
    s, S, sums = _normal(2, torch.float32), torch.empty(8, 32), torch.empty(8)
    _call[(1,)](s, x, y, S, row_products.add_products)
    numbers = {f"${16 + i}": s.double().numpy().reshape(32, 8)[:, i] for i in range(8)}
    for text in (row_products._FLOAT16, row_products._BFLOAT16):
        found = _execute(text.value, _words(x, 8) | _words(y, 12), numbers)
        np.testing.assert_allclose(found, S.numpy().reshape(32, 8), rtol=1e-5, atol=1e-5)
    _sum_diagonals[(1,)](S - s, sums, row_products.on_diagonal, row_products.numbers_of_elements)
    torch.testing.assert_close(sums, (x.float() * y.float()).sum(1), rtol=1e-5, atol=1e-5)


def _check(numbers: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which lanes accept the numbers of their elements [32, 8]: the text of `checked`, executed."""
    from convnn_kernels.triton import row_products

    lines = row_products._CHECK.value.replace("\n", " ")
    expected, accepted = np.zeros(32, np.int64), np.zeros(32, bool)
    for instruction in re.findall(r"(\w[\w.]*) ([^;{}]*);", lines):
        name, operands = instruction[0], instruction[1].split(", ")
        if name == "mov.u32":
            assert operands == ["n", "%laneid"]
            base = _LANE.copy()
        elif name == "shl.b32":
            base = base << int(operands[2])
        elif name == "add.u32":
            expected = base + int(operands[2])
        elif name == "setp.eq.u32":
            accepted = numbers[:, int(operands[1][1:]) - 16] == base
        elif name == "setp.eq.and.u32":
            accepted = accepted & (numbers[:, int(operands[1][1:]) - 16] == expected)
        elif name == "selp.f32":
            assert operands == ["$0", "$8", "0f7FFFFFFF", "p"]
        else:
            assert name in ("reg", "mov.f32"), instruction
    return accepted


def test_lanes_check_what_they_have() -> None:
    """Numbers that are the first one of a lane and sums of it with 1, 2 and 4, as layouts are."""
    right = np.arange(256).reshape(32, 8)
    assert _check(right).all()
    rng = np.random.default_rng(0)
    for _ in range(100):
        lane, i = rng.integers(32), rng.choice([0, 1, 2, 4])
        wrong = right.copy()
        wrong[lane, i] ^= 1 << rng.integers(8)
        assert list(np.flatnonzero(~_check(wrong))) == [lane]
