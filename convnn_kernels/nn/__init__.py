# SPDX-License-Identifier: MIT
"""ConvNN layers, drop-in replacements for convolution and attention."""

from convnn_kernels.nn.attention import ConvNNAttention
from convnn_kernels.nn.candidates import (
    AllCandidates,
    Candidates,
    RandomCandidates,
    SpatialCandidates,
)
from convnn_kernels.nn.convnn import ConvNN1d, ConvNN2d
from convnn_kernels.nn.hybrid import HybridBranch2d
from convnn_kernels.nn.replace import Replaced, replace

__all__ = [
    "AllCandidates",
    "Candidates",
    "ConvNN1d",
    "ConvNN2d",
    "ConvNNAttention",
    "HybridBranch2d",
    "RandomCandidates",
    "Replaced",
    "SpatialCandidates",
    "replace",
]
