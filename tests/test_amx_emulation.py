# SPDX-License-Identifier: MIT
"""Selection with the screen on AMX tiles gives the bits of other instruction sets.

The tiles are emulated in plain C++, so that processors with AVX-512 and without AMX test it, too.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS
from test_screen_bound import EMULATED, can_compile
from torch import Tensor

from convnn_kernels import native
from convnn_kernels.functional import select_neighbors

SOURCE = Path(__file__).parent / "amx_emulation" / "select.cpp"
# The flags of CMakeLists.txt that results depend on.
FLAGS = "-std=c++17 -O2 -Wall -Werror -ffp-contract=fast -fno-math-errno -fno-trapping-math"
OTHER = next(name for name in native.usable_cpu_instruction_sets() if name != "amx")
DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # DType of csrc/params.h

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "avx512vnni" not in INSTRUCTION_SETS or not can_compile(EMULATED),
        reason="needs AVX-512, VNNI and a compiler that knows AMX",
    ),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("amx_emulation") / "libselect.so"
    flags = [*FLAGS.split(), "-mf16c", *EMULATED, "-DCONVNN_ISA=amx", "-shared", "-fPIC"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.products_of_tiles.restype = ctypes.c_int64
    library.select_on_tiles.restype = ctypes.c_bool
    return library


def _select(
    library: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    k: int,
    metric: str,
    self_indices: Tensor | None = None,
    key_range: Tensor | None = None,
) -> tuple[Tensor, Tensor, bool]:
    """The result, and whether a chunk was computed in full."""
    batch, n, d = query.shape
    similarities = torch.full((batch, n, k), torch.nan)
    indices = torch.full((batch, n, k), -1)
    sizes = [ctypes.c_int64(size) for size in (batch, n, key.shape[1], d, k)]
    tensors = (query, key, self_indices, key_range, similarities, indices)
    pointers = [ctypes.c_void_p(0 if X is None else X.data_ptr()) for X in tensors]
    in_full = library.select_on_tiles(
        DTYPES[query.dtype], *sizes, ("cosine", "dot").index(metric), *pointers
    )
    return similarities, indices, in_full


def _cases() -> Iterator[tuple[str, Tensor, Tensor, int]]:
    features = torch.randn
    yield "whole steps", features(2, 200, 64), features(2, 1500, 64), 9
    yield "two tiles of rows at the end", features(1, 210, 64), features(1, 600, 64), 9
    for d in (16, 17, 30, 45, 80, 100, 129):
        yield f"{d} columns", features(1, 1500, d), features(1, 700, d), 16
    yield "as many neighbors as can be", features(1, 200, 48), features(1, 1200, 48), 96
    yield "far from the origin", features(1, 200, 64) + 5, features(1, 2000, 64) + 5, 32
    yield "all keys equal", features(1, 200, 64), torch.ones(1, 2048, 64), 9
    sizes = torch.logspace(-6, 4, 2000).reshape(1, -1, 1)
    yield "norms of ten decades", features(1, 200, 64), features(1, 2000, 64) * sizes, 9
    yield "tiny rows", features(1, 200, 64) * 1e-20, features(1, 2000, 64) * 1e-22, 9
    subnormal = features(1, 2000, 64)
    subnormal[..., 32:] *= 1e-39
    yield "subnormal elements", features(1, 200, 64) * 1e-36, subnormal, 9
    only = torch.zeros(1, 2000, 64)
    only[..., :4] = features(1, 2000, 4) * 1e-39
    yield "nothing but subnormal elements", features(1, 200, 64) * 1e17, only, 9
    mixed = features(1, 5120, 64)
    mixed[:, 1024:2048] = mixed[:, 3072:4096] = mixed[:, :1]
    yield "chunks with and without a screen", mixed[:, ::25] * 0.01, mixed, 20
    yield "too large to bound", features(1, 200, 64) * 1e25, features(1, 2000, 64), 9
    broken = features(1, 2000, 64)
    broken[0, 7], broken[0, 1100, 3], broken[0, 1500, 5] = torch.nan, torch.inf, -torch.inf
    yield "NaN and infinity", features(1, 200, 64), broken, 9
    yield "zeros", torch.zeros(1, 200, 64), features(1, 2000, 64), 9


# How many calls are screened: not those of rows without a bound, nor of rows of 17 bfloat16, which
# would take too much memory.
SCREENED = {torch.float32: 37, torch.float16: 34, torch.bfloat16: 34}
# Whether the screen decides too little, of some cases.
IN_FULL = {
    "whole steps": False,
    "two tiles of rows at the end": False,
    "16 columns": False,
    "100 columns": False,
    "far from the origin": False,
    "all keys equal": True,
    "chunks with and without a screen": True,
    "NaN and infinity": True,
}


def _assert_same_bits(name: str, actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for X, Y in zip(actual, expected, strict=True):
        assert torch.equal(X.view(torch.int32), Y.view(torch.int32)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_change_no_bit(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    screened = 0
    for name, query, key, k in _cases():
        q, keys = query.to(dtype), key.to(dtype)
        for metric in ("cosine", "dot"):
            before = library.products_of_tiles()
            with native.use_cpu_instruction_set(OTHER):
                expected = select_neighbors(q, keys, k, metric=metric)
            *actual, in_full = _select(library, q, keys, k, metric)
            _assert_same_bits(name, actual, expected)
            if name in IN_FULL:
                assert in_full == IN_FULL[name], name
            screened += library.products_of_tiles() > before
    assert screened == SCREENED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_rows_and_key_ranges(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Ranges begin and end within tiles, and own rows are taken out of the screen."""
    torch.manual_seed(1)
    X = torch.randn(1, 1300, 64, dtype=dtype)
    own = torch.randperm(1300)
    begin = torch.randint(0, 600, (1300,))
    key_range = torch.stack([begin, begin + torch.randint(500, 700, (1300,))], dim=1)
    causal = torch.stack([torch.zeros(1300, dtype=torch.int64), torch.arange(1300) + 1], dim=1)
    for ranges in (None, key_range, causal):
        with native.use_cpu_instruction_set(OTHER):
            expected = select_neighbors(X, X, 9, self_indices=own, key_range=ranges)
        before = library.products_of_tiles()
        *actual, _ = _select(library, X, X, 9, "cosine", own, ranges)
        assert library.products_of_tiles() > before
        _assert_same_bits("own rows", actual, expected)
