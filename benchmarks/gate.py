# SPDX-License-Identifier: MIT
"""The gate before the clock: a result that was not just checked on a workload is not timed on it.

Neighbors pass the certificate of `python_ref.compare` on a sample of query rows. Values are
compared in float64: ConvNN at the neighbors that were returned, for all rows; attention on sampled
rows, its gradients for a grad_output that is zero elsewhere; convolution as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import python_ref

from .peers import Call, Peer
from .workloads import Workload

# Elements of the part of the similarity matrix that is computed in float64 for a check.
_SAMPLED_ELEMENTS = 2**22

# From the leaves, in some dtype, to the result.
_Reference = Callable[[Sequence[Tensor]], Tensor]

_Compare = Callable[[str, Tensor, Tensor, Tensor], None]


def _sampled_rows(workload: Workload) -> Tensor:
    """Query rows in ascending order: all of a small workload, at least 64 of a large one."""
    count = max(64, _SAMPLED_ELEMENTS // (workload.batch * workload.tokens))
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(workload.tokens, generator=generator)[:count].sort().values


def _run(call: Call, passes: str, grad_output: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    if passes == "forward":
        with torch.no_grad():
            return call.forward(), []
    results = call.forward()
    return results, list(torch.autograd.grad(results[0], tuple(call.leaves.values()), grad_output))


def _close(name: str, result: Tensor, exact: Tensor, eager: Tensor) -> None:
    """For peers that are not ours. They add up in an order of their own and may round worse than
    the eager reference: the gate only has to see that what is timed is what its name says.
    """
    error = float((result.double() - exact).abs().max())
    if not error <= 1e-4 * float(exact.abs().max()):
        raise AssertionError(
            f"{name}: an error of {error:.3g}, eager has "
            f"{float((eager.double() - exact).abs().max()):.3g}"
        )


def _compare(
    reference: _Reference,
    leaves: dict[str, Tensor],
    output: Tensor,
    gradients: Sequence[Tensor],
    grad_output: Tensor,
    assert_values: _Compare,
) -> None:
    """Output and gradients against `reference` in float64 and in float32."""
    found: list[list[Tensor]] = []
    for dtype in (torch.float64, torch.float32):
        inputs = [
            leaf.detach().to(dtype).requires_grad_(bool(gradients)) for leaf in leaves.values()
        ]
        expected = reference(inputs)
        found.append([expected.detach()])
        if gradients:
            found[-1] += torch.autograd.grad(expected, inputs, grad_output.to(dtype))
    names = ["output", *(f"gradient of {name}" for name in leaves)][: 1 + len(gradients)]
    for name, result, exact, eager in zip(names, [output, *gradients], *found, strict=True):
        assert_values(name, result.detach(), exact, eager)


def _in_total_order(similarities: Tensor, indices: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Equal similarities from place `first` on sorted by index, which `torch.topk` leaves open."""
    by_index = indices[..., first:].argsort(dim=-1)
    by_similarity = (
        similarities[..., first:]
        .gather(-1, by_index)
        .sort(dim=-1, descending=True, stable=True)
        .indices
    )
    places = by_index.gather(-1, by_similarity)
    head = torch.arange(first, device=indices.device).expand(*indices.shape[:-1], first)
    places = torch.cat([head, places + first], dim=-1)
    return similarities.gather(-1, places), indices.gather(-1, places)


def _check_convnn(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    (output, similarities, indices), gradients = _run(call, passes, call.grad_output)
    similarities = similarities.detach()
    query, key, *_ = (leaf.detach() for leaf in call.leaves.values())
    rows = _sampled_rows(workload).to(query.device)
    own = None if call.candidates is None else rows
    sample = similarities[:, rows], indices[:, rows]
    if not peer.exacting:
        sample = _in_total_order(*sample, first=0 if own is None else 1)
    python_ref.assert_certified_selection(
        query[:, rows], key, *sample, workload.k, call.candidates, own
    )

    def reference(leaves: Sequence[Tensor]) -> Tensor:
        q, k, v, weight = leaves
        s = python_ref.similarities_at(q, k, indices)
        return python_ref.aggregate(v, s, indices, weight)

    compare = python_ref.assert_values if peer.exacting else _close
    _compare(reference, call.leaves, output, gradients, call.grad_output, compare)
    at_indices = python_ref.similarities_at(query.double(), key.double(), indices)
    eager = python_ref.similarities_at(query, key, indices)
    compare("similarities", similarities, at_indices, eager)
    return f"neighbors of {len(rows)} of {workload.tokens} queries, all values"


def _check_attention(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    rows = _sampled_rows(workload).to(call.grad_output.device)
    grad_output = torch.zeros_like(call.grad_output)
    grad_output[:, rows] = call.grad_output[:, rows]
    (output,), gradients = _run(call, passes, grad_output)

    def reference(leaves: Sequence[Tensor]) -> Tensor:
        query, key, value = leaves
        logits = query[:, rows] @ key.mT / math.sqrt(query.shape[-1])
        return torch.softmax(logits, dim=-1) @ value

    _compare(reference, call.leaves, output[:, rows], gradients, grad_output[:, rows], _close)
    return f"{len(rows)} of {workload.tokens} queries"


def _check_convolution(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    (output,), gradients = _run(call, passes, call.grad_output)

    def reference(leaves: Sequence[Tensor]) -> Tensor:
        image, weight = leaves
        taps = F.unfold(image.contiguous(), 3, padding=1)
        return (weight.flatten(1) @ taps).unflatten(2, image.shape[2:])

    _compare(reference, call.leaves, output, gradients, call.grad_output, _close)
    return "all values"


_CHECKS = {
    "convnn": _check_convnn,
    "attention": _check_attention,
    "convolution": _check_convolution,
}


def check(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    """Run the pass and check it. Returns what was checked; AssertionError says what is wrong."""
    return _CHECKS[peer.computes](peer, workload, call, passes)
