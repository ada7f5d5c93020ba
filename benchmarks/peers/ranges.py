# SPDX-License-Identifier: MIT
"""Selection in which each query may see some keys only: causal, in a window, and in sequences that
are packed into one, beside each of them alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..workloads import Inputs, Workload
from .base import TRAINING, Build, Call, Peer, Unavailable
from .convnn import operators

WINDOW, SEQUENCES = 512, 64


@functools.cache
def lengths(tokens: int) -> tuple[int, ...]:
    """Of SEQUENCES sequences that together have as many tokens: from half to 1.5 times the mean."""
    generator = torch.Generator().manual_seed(4)
    sizes = 0.5 + torch.rand(SEQUENCES, generator=generator, dtype=torch.float64)
    ends = (sizes.cumsum(0) * tokens / sizes.sum()).round().long()
    return tuple(ends.diff(prepend=ends.new_zeros(1)).tolist())


def key_range(kind: str, tokens: int) -> Tensor:
    """[N, 2], of tokens that are their own keys."""
    from convnn_kernels import functional

    if kind == "packed":
        return functional.segment_ranges(lengths(tokens))
    window = WINDOW if kind == "window" else None
    return functional.window_ranges(tokens, window=window, causal=kind == "causal")


def pairs(name: str, tokens: int) -> int | None:
    """How many pairs of a query and a key a peer of this module multiplies; None for the others."""
    kind = _KINDS.get(name)
    return None if kind is None else int(key_range(kind, tokens).diff(dim=-1).sum())


def _require(w: Workload) -> None:
    if w.keys is not None or w.tokens < SEQUENCES * w.k:
        raise Unavailable(f"{SEQUENCES} sequences need {SEQUENCES * w.k} tokens, their own keys")


def _select(kind: str) -> Build:
    def build(w: Workload, inputs: Inputs) -> Call:
        _require(w)
        select, ranges = operators().select, key_range(kind, w.tokens).to(inputs.query.device)
        query, key = inputs.query, inputs.key
        return Call(
            lambda: select(query, key, w.k, key_range=ranges),
            {"query": query, "key": key},
            key_range=ranges,
        )

    return build


def _each_alone(w: Workload, inputs: Inputs) -> Call:
    """The time includes that of making one result of all of them."""
    _require(w)
    select, sizes = operators().select, lengths(w.tokens)
    queries, keys = (
        [part.contiguous() for part in each.split(sizes, dim=1)]
        for each in (inputs.query, inputs.key)
    )
    ranges = key_range("packed", w.tokens).to(inputs.query.device)

    def forward() -> tuple[Tensor, ...]:
        found = [select(q, k, w.k) for q, k in zip(queries, keys, strict=True)]
        s, indices = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
        return s, indices + ranges[:, :1]

    leaves = {"query": inputs.query, "key": inputs.key}
    return Call(forward, leaves, key_range=ranges)


_KINDS = {
    "select-causal": "causal",
    "select-window": "window",
    "select-packed": "packed",
    "select-alone": "packed",
}


def _peer(label: str, build: Build) -> Peer:
    return Peer(f"select, {label}", "select", build, TRAINING[:1], exacting=True)


PEERS = {
    "select-causal": _peer("causal", _select("causal")),
    "select-window": _peer(f"window of {WINDOW}", _select("window")),
    "select-packed": _peer(f"{SEQUENCES} packed sequences", _select("packed")),
    "select-alone": _peer(f"{SEQUENCES} sequences one by one", _each_alone),
}
