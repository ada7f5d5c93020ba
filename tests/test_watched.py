# SPDX-License-Identifier: MIT
"""Fakes of the tools that watch calls on a GPU."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")

from benchmarks import watched
from benchmarks.gpu_runner import Context, Record, run_stage
from benchmarks.gpu_stages import STAGES

SANITIZER = """#!{python}
import sys
tool, planted = sys.argv[sys.argv.index("--tool") + 1], "fault" in sys.argv
print("all calls ran")
errors = int(planted) if {finds} else 0
what = "RACECHECK SUMMARY: %d hazards" if tool == "racecheck" else "ERROR SUMMARY: %d errors"
print("=========", what % errors if {runs} else "Device not supported")
"""


@pytest.mark.parametrize(
    ("runs", "finds", "expected"),
    [(1, 1, ["passed"] * 4), (1, 0, ["passed"] * 3 + ["failed"]), (0, 0, ["failed"] * 4)],
)
def test_sanitizer_with_a_faked_tool(
    runs: int, finds: int, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool must find the planted fault."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(python=sys.executable, runs=runs, finds=finds))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    results = list[Record]()
    run_stage(STAGES[6], Context("cuda", tmp_path, 60.0), results.append)
    found = {each["case"]: each["status"] for each in results}
    assert [found[case] for case in STAGES[6].cases("cuda")] == expected


def test_counters_are_read() -> None:
    name = "sm__inst_executed_pipe_tensor.avg.pct"
    text = f'''==PROF== Connected
"ID","Process ID","Kernel Name","{name}","Block Size"
"","","","%",""
"0","7","group_maxima_kernel","61.5","(256, 1)"
'''
    (row,) = watched.counters(text)
    assert row == {"Kernel Name": "group_maxima_kernel", name: "61.5"}
    assert watched.counters("==ERROR== LibraryNotLoaded") == []
