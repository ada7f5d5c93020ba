# SPDX-License-Identifier: MIT
"""Messages from rank to rank."""

import torch
import torch.distributed as dist
from torch import Tensor

from convnn_kernels.distributed.agreement import Ranks


def begin(sent: Tensor, to: int, received: Tensor, source: int, ranks: Ranks) -> list[dist.Work]:
    """Begins to send a contiguous tensor to one rank, and to receive one from another.

    Both are sent as bytes, which any backend sends, whatever dtypes it knows. Nothing is sent of a
    tensor without elements, as both ranks know.
    """
    operations = []
    for function, message, peer in ((dist.isend, sent, to), (dist.irecv, received, source)):
        if message.numel():
            as_bytes = message.view(torch.uint8)
            operations.append(dist.P2POp(function, as_bytes, group=ranks.group, group_peer=peer))
    return dist.batch_isend_irecv(operations) if operations else []
