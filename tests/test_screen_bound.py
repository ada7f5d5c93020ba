# SPDX-License-Identifier: MIT
"""The bound of the errors of screened similarities, against the errors of unfavorable rows."""

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from instruction_sets import INSTRUCTION_SETS

from convnn_kernels import native

TESTS = Path(__file__).parent
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
AMX = [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-bf16"]
EMULATED = [*AMX, "-include", str(TESTS / "amx_emulation" / "amx_emulation.h")]


@dataclass
class Screen:
    """A screen, for rows of a type, compiled for an instruction set that this machine must have."""

    instruction_set: str
    flags: list[str]
    name: str = "FixedPointScreen"
    element: str = "float"


SCREENS = {
    "avx2": Screen("avx2", ["-mavx2", "-mfma"]),
    "avx512": Screen("avx512", AVX512),
    "avx512vnni": Screen("avx512vnni", [*AVX512, "-mavx512vnni"]),
    "amx": Screen("amx", AMX, "AmxScreen<float>"),
    "amx, bfloat16": Screen("amx", AMX, "AmxScreen<bfloat16>", "bfloat16"),
    "emulated amx": Screen("avx512vnni", EMULATED, "AmxScreen<float>"),
    "emulated amx, bfloat16": Screen("avx512vnni", EMULATED, "AmxScreen<bfloat16>", "bfloat16"),
}
QUICK = ("avx512vnni", "amx") if "avx512vnni" in INSTRUCTION_SETS else ("avx2",)


def can_compile(flags: list[str]) -> bool:
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *flags, "-E", "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"", capture_output=True).returncode == 0


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, screen in SCREENS.items()
        if screen.instruction_set in INSTRUCTION_SETS and can_compile(screen.flags)
    ],
)
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    screen = SCREENS[request.param]
    path = tmp_path_factory.mktemp("screen") / "program.so"
    source = TESTS / "screen_program.cpp"
    flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC"]
    defines = [f"-DSCREEN={screen.name}", f"-DELEMENT={screen.element}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, *flags, *screen.flags, *defines, str(source), "-o", str(path)], check=True
    )
    assert screen.instruction_set in native.usable_cpu_instruction_sets()  # which requests AMX
    library = ctypes.CDLL(str(path))
    library.worst_share.restype = ctypes.c_double
    library.screen = request.param
    return library


ERRORS = {"any": 0, "along": 1, "across": 2}


def worst(
    program: ctypes.CDLL,
    d: int,
    errors: str,
    dominated: bool = False,
    cosine: bool = False,
    scales: tuple[float, float] = (1, 1),
) -> float:
    """The largest error as a share of its bound, from equal to opposite directions."""
    return max(
        program.worst_share(
            ctypes.c_int64(d),
            ctypes.c_double(distance),
            ERRORS[errors],
            dominated,
            cosine,
            *map(ctypes.c_double, scales),
        )
        for distance in (0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1, 3, 10)
        for _ in range(3)
    )


@pytest.mark.parametrize("dominated", [False, True])
@pytest.mark.parametrize("errors", ERRORS)
def test_no_error_exceeds_its_bound(program: ctypes.CDLL, errors: str, dominated: bool) -> None:
    """And half the bound would be too little, but for rows of bfloat16, which are not rounded."""
    largest = max(worst(program, d, errors, dominated) for d in (16, 17, 33, 64, 100, 512, 1500))
    assert largest <= 1
    if errors == ("along" if "amx" in program.screen else "across"):
        assert largest > 0.5 or "bfloat16" in program.screen


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("scales", [(2.0**-60, 2.0**50), (2.0**-80, 2.0**-80), (1.0, 2.0**-145)])
def test_rows_of_any_norm(program: ctypes.CDLL, scales: tuple[float, float], errors: str) -> None:
    """Rows may be subnormal, and so may products of small rows."""
    for d in (16, 33, 100):
        assert worst(program, d, errors, scales=scales) <= 1


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0**-39, 2.0**-39), (2.0**-39, 2.0**59)])
def test_rows_divided_by_their_norms(
    program: ctypes.CDLL, scales: tuple[float, float], errors: str
) -> None:
    """Of any size above 1e-12."""
    for d in (16, 33, 100):
        assert worst(program, d, errors, cosine=True, scales=scales) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("errors", ERRORS)
def test_many_columns(program: ctypes.CDLL, errors: str) -> None:
    assert worst(program, 2_000 if "emulated" in program.screen else 20_000, errors) <= 1
