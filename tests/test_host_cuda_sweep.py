# SPDX-License-Identifier: MIT
"""The sweep of the forward for Hopper on the host: its lists have every neighbor.

The program compares them with all similarities of a row; see `host_cuda/hopper_sweep.cpp`.
"""

import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.host_cuda]


@pytest.mark.parametrize("seed", range(1, 11))
def test_lists_have_every_neighbor(seed: int, programs: Path) -> None:
    command = [programs / "host_cuda_hopper_sweep", str(seed), "all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 wrong" in done.stdout.splitlines()[-1]
