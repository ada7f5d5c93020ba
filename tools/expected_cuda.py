# SPDX-License-Identifier: MIT
"""What `tools.predict` assumes of each CUDA C++ kernel, from the numbers of a launch, as expected.py
of each Triton kernel: but lines may be named with a line that calls their function, behind an @.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Numbers = Any  # of a launch: cuda_plan/*_numbers.h, and predict_cuda.numbers_of()
Table = Mapping[str, Callable[[Numbers], Any]]


@dataclass
class Expected:
    """Functions of the numbers of a launch, by how a line begins.

    loops: the trips of a loop, each time that it is reached.
    branches: how probable it is that what an `if` may skip is executed; 1 if not named.
    shares: of the lanes of a warp, those that access memory there; or of global memory, L2.
    copied: bytes of an asynchronous copy.
    busiest: what the block that has most to do has of it, over the mean of all blocks.
    """

    loops: Table = field(default_factory=dict)
    branches: Table = field(default_factory=dict)
    shares: Table = field(default_factory=dict)
    copied: Table = field(default_factory=dict)
    busiest: Callable[[Numbers], float] = lambda n: 1.0


EXPECTED: dict[str, Expected] = {}
