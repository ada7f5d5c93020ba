# SPDX-License-Identifier: MIT
"""Slips made by hand: what the rules do not make, where tests are thinnest."""

from tools.slips.by_hand import cpu, cuda, entry, python, triton
from tools.slips.slip import Slip

SLIPS = [
    Slip(path, before, after, what, by_hand=True)
    for module in (cpu, entry, python, triton, cuda)
    for path, slips in module.SLIPS.items()
    for before, after, what in slips
]
