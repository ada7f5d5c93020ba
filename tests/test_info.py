# SPDX-License-Identifier: MIT
"""``python -m convnn_kernels.info``."""

import json
from collections.abc import Callable

import pytest
import torch

import convnn_kernels
from convnn_kernels import info, introspect, native


def test_json_report(run_forked: Callable[..., str]) -> None:
    code = """
        import runpy, sys
        sys.argv = ["info", "--json"]
        runpy.run_module("convnn_kernels.info", run_name="__main__")
    """
    report = json.loads(run_forked(code, CONVNN_CPU_ISA="portable"))
    assert report["versions"]["convnn_kernels"] == convnn_kernels.__version__
    assert report["versions"]["torch"] == str(torch.__version__)
    assert report["build"]["cpu_instruction_sets"] == introspect.cpu_instruction_sets()
    assert report["machine"]["cpu_instruction_set"] == "portable"
    assert set(report["backends"]) == {"triton", "cuda", "cpu"}
    assert report["backends"]["cpu"] is None


def test_text_names_each_part_and_each_backend_once() -> None:
    report = info.collect()
    text = info.render(report)
    assert report["machine"]["cpu_instruction_set"] in introspect.cpu_instruction_sets()
    assert f"{report['machine']['cpu_instruction_set']}, " in text
    for backend, reason in report["backends"].items():
        outcome = f"no: {reason}" if reason else "yes"
        assert [line.split(maxsplit=1) for line in text.splitlines()].count([backend, outcome]) == 1


NO_FOLDER = "CONVNN_CACHE or HOME must be the absolute path of a folder"
TIMES = {"wide": 100, "narrow": 150}


@pytest.mark.parametrize(
    ("source", "file", "is_kept", "expected"),
    [
        ("measured", "/a b", True, "measured in 6 ms~; delete /a b to measure again"),
        ("measured", "/a", False, "measured in 6 ms~; not remembered: cannot write /a"),
        ("measured", None, False, f"measured in 6 ms~; not remembered: {NO_FOLDER}"),
        ("remembered", "/a", True, "measured before~; delete /a to measure again"),
        ("requested", None, False, "by CONVNN_CPU_ISA"),
        ("default", None, False, "by default, because measuring failed"),
        ("only", None, False, "no line"),
    ],
)
def test_one_line_says_why_an_instruction_set_was_chosen(
    source: str, file: str | None, is_kept: bool, expected: str
) -> None:
    report = info.collect()
    report["machine"]["cpu_choice"] = {
        "source": source,
        "instruction_set": "wide",
        "picoseconds": TIMES if source in ("measured", "remembered") else {},
        "milliseconds": 5.6 if source == "measured" else None,
        "file": file,
        "is_kept": is_kept,
    }
    facts = dict(line.strip().partition(" ")[::2] for line in info.render(report).splitlines())
    found = facts.get("chosen", "no line").strip().removeprefix("as the fastest, ")
    assert found.replace(" (narrow 1.50 times as long)", "~") == expected


def test_text_without_a_build_report() -> None:
    report = info.collect()
    report["build"] = {}
    assert "unknown" in info.render(report)


def test_impossible_instruction_set_is_reported(run_forked: Callable[..., str]) -> None:
    code = "from convnn_kernels import info; print(info.render(info.collect()))"
    line = "none: CONVNN_CPU_ISA is 'abacus', but what runs here is "
    assert line + ", ".join(native.usable_cpu_instruction_sets()) in run_forked(
        code, CONVNN_CPU_ISA="abacus"
    )


def test_imports_nothing_heavy_beyond_torch(run_python: Callable[..., str]) -> None:
    # PyTorch's FLOP counter imports Triton where it is installed.
    code = """
        import sys
        import torch.utils.flop_counter
        before = set(sys.modules)
        import convnn_kernels.info
        print(*{name.partition(".")[0] for name in set(sys.modules) - before})
    """
    heavy = {"triton", "numpy", "scipy", "matplotlib", "skimage", "pytest", "python_ref"}
    assert not heavy & set(run_python(code).split())
