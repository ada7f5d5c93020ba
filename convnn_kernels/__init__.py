# SPDX-License-Identifier: MIT
"""Convolutional Nearest Neighbors as PyTorch operators.

``convnn_kernels.nn`` has the layers, ``convnn_kernels.functional`` the functions, which call the
operators ``torch.ops.convnn``. ``convnn_kernels.backend(name)`` forces a backend, and
``convnn_kernels.warmup(...)`` compiles the kernels of a call in advance.
"""

from convnn_kernels import functional, nn
from convnn_kernels.backends.selection import backend
from convnn_kernels.functional import warmup
from convnn_kernels.version import __version__

__all__ = ["__version__", "backend", "functional", "nn", "warmup"]
