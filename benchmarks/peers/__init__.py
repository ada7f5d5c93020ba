# SPDX-License-Identifier: MIT
"""All peers by name. To add one, write a build function and an entry in PEERS of its module."""

from __future__ import annotations

from . import (
    attention,
    convnn,
    convolution,
    dot,
    host,
    instruction_sets,
    models,
    ranges,
    rates,
    search,
)
from .base import PASSES, TRAINING, Call, Peer, Unavailable, around, gradient_mode, run_pass

PEERS: dict[str, Peer] = {
    **convnn.PEERS,
    **dot.PEERS,
    **instruction_sets.PEERS,
    **attention.PEERS,
    **convolution.PEERS,
    **search.PEERS,
    **ranges.PEERS,
    **models.PEERS,
    **rates.PEERS,
    **host.PEERS,
}

__all__ = [
    "PASSES",
    "PEERS",
    "TRAINING",
    "Call",
    "Peer",
    "Unavailable",
    "around",
    "gradient_mode",
    "run_pass",
]
