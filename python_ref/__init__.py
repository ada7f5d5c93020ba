# SPDX-License-Identifier: MIT
"""The reference: ConvNN in plain eager PyTorch, and functions that compare results with it.

Nothing here is fast or saves memory. It imports only torch, and only tests and benchmarks import
it.
"""

from .certificate import assert_certified_selection, assert_exact_selection
from .compare import assert_aggregate, assert_forward, assert_select, assert_values
from .convnn import (
    aggregate,
    allowed_keys,
    forward,
    modulate,
    normalize,
    select,
    similarities_at,
    similarity,
)

__all__ = [
    "aggregate",
    "allowed_keys",
    "assert_aggregate",
    "assert_certified_selection",
    "assert_exact_selection",
    "assert_forward",
    "assert_select",
    "assert_values",
    "forward",
    "modulate",
    "normalize",
    "select",
    "similarities_at",
    "similarity",
]
