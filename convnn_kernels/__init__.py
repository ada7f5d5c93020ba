# SPDX-License-Identifier: MIT
"""Convolutional Nearest Neighbors as PyTorch operators.

``convnn_kernels.functional`` holds the functions, ``torch.ops.convnn`` the operators beneath them.
``convnn_kernels.backend(name)`` forces one backend; ``convnn_kernels.warmup(...)`` compiles what a
call needs before it is made.
"""

from convnn_kernels import functional, native, nn
from convnn_kernels.backends.selection import backend
from convnn_kernels.functional import warmup
from convnn_kernels.version import __version__

# Importing `functional` defined the operators; their C++ implementations follow.
native.load()

__all__ = ["__version__", "backend", "functional", "nn", "warmup"]
