# SPDX-License-Identifier: MIT
"""The registry of peers. To add one, write a build function and give it a name in its module."""

from __future__ import annotations

from . import attention, convnn, convolution, host, isa, models, rates, search
from .base import PASSES, TRAINING, Call, Peer, Unavailable, gradient_mode, run_pass

PEERS: dict[str, Peer] = {
    **convnn.PEERS,
    **isa.PEERS,
    **attention.PEERS,
    **convolution.PEERS,
    **search.PEERS,
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
    "gradient_mode",
    "run_pass",
]
