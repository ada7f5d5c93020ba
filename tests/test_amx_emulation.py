# SPDX-License-Identifier: MIT
"""The AMX path of select on emulated tiles gives the bits of the path without tiles."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS
from torch import Tensor

from convnn_kernels.functional import select_neighbors

SOURCES = Path(__file__).parent / "amx_emulation"
# The flags of CMakeLists.txt for this path that results depend on.
FLAGS = """
    -std=c++17 -O2 -shared -fPIC -Wall -Werror -ffp-contract=fast -fno-math-errno -fno-trapping-math
    -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c -mamx-tile -mamx-bf16
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "avx512vnni" not in INSTRUCTION_SETS, reason="the path also needs AVX-512 and VNNI"
    ),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("amx_emulation") / "libselect.so"
    compiler = os.environ.get("CXX", "c++")
    emulation, source = SOURCES / "amx_emulation.h", SOURCES / "select.cpp"
    files = ["-include", str(emulation), str(source), "-o", str(path)]
    subprocess.run([compiler, *FLAGS.split(), "-DCONVNN_ISA=amx", *files], check=True)
    library = ctypes.CDLL(str(path))
    library.products_of_tiles.restype = ctypes.c_int64
    return library


def _select(
    library: ctypes.CDLL, query: Tensor, key: Tensor, k: int, metric: str
) -> tuple[Tensor, Tensor]:
    batch, n, d = query.shape
    similarities = torch.full((batch, n, k), torch.nan)
    indices = torch.full((batch, n, k), -1)
    sizes = [ctypes.c_int64(size) for size in (batch, n, key.shape[1], d, k)]
    pointers = [ctypes.c_void_p(X.data_ptr()) for X in (query, key, similarities, indices)]
    library.select_bfloat16(*sizes, ("cosine", "dot").index(metric), *pointers)
    return similarities, indices


def _cases() -> Iterator[tuple[str, Tensor, Tensor, int]]:
    features = torch.randn
    yield "whole steps", features(2, 200, 64), features(2, 1500, 64), 9
    for d in (16, 30, 45, 70, 100, 129):
        yield f"{d} columns", features(1, 200, d), features(1, 700, d), 16
    yield "as many neighbors as can be", features(1, 200, 48), features(1, 1200, 48), 96
    yield "far from the origin", features(1, 200, 64) + 5, features(1, 2000, 64) + 5, 32
    yield "all keys equal", features(1, 200, 64), torch.ones(1, 2048, 64), 9
    sizes = torch.logspace(-6, 6, 2000).reshape(1, -1, 1)
    yield "norms of twelve decades", features(1, 200, 64), features(1, 2000, 64) * sizes, 9
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


def test_tiles_change_no_bit(library: ctypes.CDLL) -> None:
    count = 0
    for name, query, key, k in _cases():
        q, keys = query.bfloat16(), key.bfloat16()
        for metric in ("cosine", "dot"):
            expected, rows = select_neighbors(q, keys, k, metric=metric)
            before = library.products_of_tiles()
            similarities, indices = _select(library, q, keys, k, metric)
            # Without a bound for a row or a key there is no screen.
            screened = library.products_of_tiles() > before
            assert screened or name in ("too large to bound", "NaN and infinity"), (name, metric)
            assert torch.equal(indices, rows), (name, metric)
            assert torch.equal(similarities.view(torch.int32), expected.view(torch.int32)), name
            count += 1
    assert count == 36


def test_the_check_before_amx_is_chosen(library: ctypes.CDLL) -> None:
    library.multiplies_correctly.restype = ctypes.c_bool
    assert library.multiplies_correctly()
