# SPDX-License-Identifier: MIT
"""The bound of the errors of screened similarities, against the errors of unfavorable rows."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
from instruction_sets import INSTRUCTION_SETS, quick_last

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
}


@pytest.fixture(
    scope="module", params=quick_last([name for name in INSTRUCTION_SETS if name != "portable"])
)
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("screen") / "program.so"
    source = Path(__file__).parent / "screen_program.cpp"
    flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, *flags, *FLAGS[request.param], str(source), "-o", str(path)], check=True
    )
    library = ctypes.CDLL(str(path))
    library.worst_share.restype = ctypes.c_double
    return library


ERRORS = {"any": 0, "along": 1, "across": 2}


def worst(
    program: ctypes.CDLL,
    d: int,
    errors: str,
    dominated: bool = False,
    scales: tuple[float, float] = (1, 1),
) -> float:
    """The largest error as a share of its bound, from equal to opposite directions."""
    return max(
        program.worst_share(
            ctypes.c_int64(d),
            ctypes.c_double(distance),
            ERRORS[errors],
            dominated,
            *map(ctypes.c_double, scales),
        )
        for distance in (0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1, 3, 10)
        for _ in range(3)
    )


@pytest.mark.parametrize("dominated", [False, True])
@pytest.mark.parametrize("errors", ERRORS)
def test_no_error_exceeds_its_bound(program: ctypes.CDLL, errors: str, dominated: bool) -> None:
    """And half the bound would be too little."""
    largest = max(worst(program, d, errors, dominated) for d in (16, 17, 33, 64, 100, 512, 1500))
    assert largest <= 1
    if errors == "across":
        assert largest > 0.5


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("scales", [(2.0**-60, 2.0**50), (2.0**-80, 2.0**-80), (1.0, 2.0**-145)])
def test_rows_of_any_norm(program: ctypes.CDLL, scales: tuple[float, float], errors: str) -> None:
    """Rows may be subnormal, and so may products of small rows."""
    for d in (16, 33, 100):
        assert worst(program, d, errors, scales=scales) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("errors", ERRORS)
def test_many_columns(program: ctypes.CDLL, errors: str) -> None:
    assert worst(program, 20_000, errors) <= 1
