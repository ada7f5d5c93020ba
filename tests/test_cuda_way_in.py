# SPDX-License-Identifier: MIT
"""The way of calls to the kernels in CUDA C++, on CPU tensors: through C++, and through Python.

way_in_program.py makes the calls, in one process, and says which kernels ran.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler"),
]
ROOT = Path(__file__).parent.parent
KIND = "cosine in float16, D up to 64, k up to 10"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    program = ROOT / "tests" / "way_in_program.py"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_only_the_first_call_of_a_kind_passes_python(results: dict[str, Any]) -> None:
    assert results["once"] == [["hopper", 1], ["hopper", 0], ["hopper", 0]]
    assert results["select"] == [["hopper", 1], ["hopper", 0], ["hopper", 0]]
    assert results["other kind"] == [["hopper", 1], ["hopper", 0]]
    assert results["candidates"] == [["hopper", 0]] * 2
    assert results["strided"] == ["hopper", 0]


def test_no_python_function_below_autograd(results: dict[str, Any]) -> None:
    assert set(results["python: grad"]) == {"autograd", "needs_autograd"}
    assert results["python: inference"] == []


def test_a_kind_is_checked_once(results: dict[str, Any]) -> None:
    kinds = results["kinds"]
    assert kinds[0] == KIND
    assert len(set(kinds)) == len(kinds) == 4


def test_the_choice_is_logged_once(results: dict[str, Any]) -> None:
    why = f"cuda (Hopper: {KIND}): predicted to be faster than triton"
    assert results["log"][:2] == [f"convnn::{op} runs on {why}" for op in ("forward", "select")]
    assert f"convnn::forward runs on cuda (Hopper: {KIND}): forced" in results["log"]


def test_a_forced_backend_is_asked_for_in_python(results: dict[str, Any]) -> None:
    assert results["forced"] == [["hopper", 1]] * 2
    assert results["after"] == ["hopper", 0]
    assert results["cannot"] == (
        "convnn::forward: the forced backend 'cpu' cannot run tensors on cpu: "
        "it takes tensors on cpu only"
    )


def test_a_program_without_python_gets_what_the_library_has(results: dict[str, Any]) -> None:
    assert results["without Python"] == [["hopper", 0], ["portable", 0]]
    assert results["interpreter"] == ["hopper", 1]
    assert results["with Python"] == ["hopper", 0]


def test_checked_indices_are_read_in_python(results: dict[str, Any]) -> None:
    assert results["checked"] == ["hopper", 1]
    assert results["no indices"] == ["hopper", 0]


@pytest.mark.parametrize(
    "call", ["few", "self", "dense", "float32", "range", "own candidates", "excluded"]
)
def test_other_calls_are_left_to_triton(call: str, results: dict[str, Any]) -> None:
    assert results[call] == [["triton", 1]] * 2
    assert results["few columns"] == [["triton", 1]]


def test_a_wrong_kernel_is_not_used(results: dict[str, Any]) -> None:
    assert results["wrong"] == [["triton", 1]] * 2
    kind = "cosine in bfloat16, D up to 64, k up to 10"
    assert f"cpu: the Hopper kernels are wrong and not used for {kind} (planted)" in results["log"]


def test_nothing_is_checked_while_a_graph_is_captured(results: dict[str, Any]) -> None:
    assert results["captured"] == [["triton", 1]] * 2
    assert results["warm"] == [["hopper", 1], ["hopper", 0]]
    before = [line for line in results["log"] if "captured in a CUDA graph" in line]
    assert len([line for line in before if "Hopper" in line]) == 1


def test_autograd_autocast_and_vmap(results: dict[str, Any]) -> None:
    assert results["gradients"] == ["hopper", 0]
    assert results["has gradient"]
    assert results["autocast"] == ["hopper", 0]
    assert results["vmap"] == 7.0


def test_gradients_that_cpp_is_faster_at(results: dict[str, Any]) -> None:
    assert set(results["backward: taken"].values()) == {"cuda"}, results["backward: taken"]
    assert set(results["backward: left"].values()) == {"triton"}, results["backward: left"]
    assert results["backward: autograd"] == 5.0


def test_gradients_are_checked_before_their_first_use(results: dict[str, Any]) -> None:
    assert results["backward: captured"] == "triton"
    assert results["backward: checked"] == ["torch.float16", "torch.bfloat16"]
    log = results["log"]
    wrong = "cpu: the CUDA C++ gradients are wrong and not used for bfloat16 (planted)"
    assert log.count(wrong) == 1
    before = "captured in a CUDA graph before the CUDA C++ gradients were checked"
    assert len([line for line in log if before in line]) == 1


def test_the_choice_for_gradients_is_logged_once(results: dict[str, Any]) -> None:
    lines = [line for line in results["log"] if line.startswith("convnn::forward_backward")]
    # For each list of dtypes: with a weight, with candidates, with neither.
    chosen = "convnn::forward_backward runs on cuda: predicted to be faster than triton"
    assert lines.count(chosen) == 3
    assert "convnn::forward_backward runs on triton: forced" in lines
    assert "convnn::forward_backward runs on cuda: forced" in lines
    assert results["backward: triton"] == "triton"
    assert results["backward: cuda"] == "cuda"


def test_errors_of_arguments(results: dict[str, Any]) -> None:
    assert results["errors"] == []
    # Where query is None, no device is known; forward and select.
    assert results["errors in Python"] == 2


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "OutOfMemoryError"])
def test_exceptions_of_python(name: str, results: dict[str, Any]) -> None:
    text = {"KeyboardInterrupt": "stop", "OutOfMemoryError": "out of memory: 7 GiB"}[name]
    for call in ("operator", "function", "gradient"):
        assert results[f"{name}: {call}"] == [True, name, text]
    prefix = "" if name == "OutOfMemoryError" else f"{name}: "
    assert results[f"{name}: inference"] == [False, "RuntimeError", prefix + text]
