# SPDX-License-Identifier: MIT
"""Neighbors by dot products, which need no work on the keys before a search: few queries among many
keys beside eager PyTorch, and decoding, with one query for each head, beside attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..workloads import Inputs, Workload
from .base import TRAINING, Call, Peer
from .convnn import operators


def _search(operation: Any, inputs: Inputs) -> Call:
    """operation: takes query and key."""
    query, key = inputs.query, inputs.key
    return Call(lambda: operation(query, key), {"query": query, "key": key}, metric="dot")


def _select(w: Workload, inputs: Inputs) -> Call:
    select = operators().select
    return _search(lambda query, key: select(query, key, w.k, metric="dot"), inputs)


def _eager(w: Workload, inputs: Inputs) -> Call:
    return _search(lambda query, key: torch.topk(query @ key.mT, w.k), inputs)


def _attend(w: Workload, inputs: Inputs) -> Call:
    """Attention to the k keys with the largest dot products, with the scale of SDPA."""

    def with_heads(tensor: Tensor) -> Tensor:
        split = tensor.detach().unflatten(0, (-1, w.heads))
        return split.requires_grad_(tensor.requires_grad)

    query, key, value = (with_heads(each) for each in (inputs.query, inputs.key, inputs.value))
    operator, scale = operators().forward, w.channels**-0.5

    def forward() -> Any:
        return operator(query, key, value, w.k, metric="dot", scale=scale)

    leaves = {"query": query, "key": key, "value": value}
    grad_output = with_heads(inputs.grad_output)
    return Call(forward, leaves, grad_output, metric="dot", scale=scale)


_SELECT, _CONVNN, _FORWARD = "select, dot products", "ConvNN, dot products", TRAINING[:1]

PEERS = {
    "select-dot": Peer(_SELECT, "select", _select, _FORWARD, "eager-dot", exacting=True),
    "eager-dot": Peer(f"eager {_SELECT}: product and topk", "select", _eager, _FORWARD),
    "convnn-dot": Peer(f"{_CONVNN}, no weight", "convnn", _attend, TRAINING, exacting=True),
}
