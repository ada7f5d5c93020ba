# SPDX-License-Identifier: MIT
"""ConvNN over several processes.

:func:`convnn`, :func:`select_neighbors` and :func:`aggregate_neighbors` are those of
``convnn_kernels.functional`` for tokens that are sharded over the ranks of a process group (context
parallel). They need torch.distributed alone.
"""

from convnn_kernels.distributed.functions import aggregate_neighbors, convnn, select_neighbors

__all__ = ["aggregate_neighbors", "convnn", "select_neighbors"]
