# SPDX-License-Identifier: MIT
"""ConvNN over several processes.

:func:`convnn`, :func:`select_neighbors` and :func:`aggregate_neighbors` are those of
``convnn_kernels.functional`` for tokens that are sharded over the ranks of a process group (context
parallel). They need torch.distributed alone.

:func:`register_sharding` tells DTensor how to run the operators.
"""

from convnn_kernels.distributed.functions import aggregate_neighbors, convnn, select_neighbors

__all__ = ["aggregate_neighbors", "convnn", "register_sharding", "select_neighbors"]


def register_sharding() -> None:
    """Registers the sharding rules of ``torch.ops.convnn`` with DTensor.

    Call it once, before operators get DTensors; calling it again changes nothing. DTensor is
    imported here, not with the package. With the rules, tensors may be

    - sharded by any leading dimension, such as the batch or the heads;
    - sharded by the rows of query, with key and value replicated; their gradients are then partial
      sums (``Partial``);
    - replicated.

    weight and bias are replicated, and their gradients partial sums. Anything else is redistributed
    to the nearest of these. All tensors of a call must be DTensors, those of indices too.

    Example:
        >>> from convnn_kernels import distributed
        >>> distributed.register_sharding()
    """
    from convnn_kernels.distributed import sharding

    sharding.register()
