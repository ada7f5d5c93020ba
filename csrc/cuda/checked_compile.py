# SPDX-License-Identifier: MIT
"""Runs nvcc and fails where ptxas only mentions that code is not what was written.

    python csrc/cuda/checked_compile.py NVCC [OPTION...]

ptxas prints messages of number C75xx if it waits for a matrix product that the source does not wait
for (wgmma in sequence: several times slower), or ignores setmaxnreg. It calls them information, so
that no option of nvcc or ptxas turns them into errors. CMake calls this in the place of nvcc.

With CONVNN_BOUNDED_WAITS the messages are no errors: a wait that ends in a report calls printf, and
across a call ptxas always puts the products in sequence. Such kernels are slower and still right.
"""

import re
import subprocess
import sys
from pathlib import Path


def serialized(output: str) -> list[str]:
    """The lines of a compiler's output that say so."""
    return [line for line in output.splitlines() if re.search(r"\(C75\d\d\)", line)]


def is_for_debugging(command: list[str]) -> bool:
    """Whether the kernels may be slow."""
    return any(option.startswith("-DCONVNN_BOUNDED_WAITS") for option in command)


def main(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stderr.write(done.stdout)
    if done.returncode:
        return done.returncode
    if not serialized(done.stdout) or is_for_debugging(command):
        return 0
    if "-o" in command:
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    sys.stderr.write(
        "convnn_kernels: ptxas changed the order of matrix products or ignored setmaxnreg (C75xx, "
        "above). Such a kernel is slow or hangs, so this is an error.\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
