# SPDX-License-Identifier: MIT
"""Where tests of the Triton kernels run: in Triton's interpreter, on CPU tensors."""

import os

import pytest

from convnn_kernels.triton import backend

# It takes a process that was started with TRITON_INTERPRET=1.
in_interpreter = [
    pytest.mark.triton,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" or backend.unavailable() is not None,
        reason="needs TRITON_INTERPRET=1 and Triton",
    ),
    # What NumPy says of NaN and infinity within the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
