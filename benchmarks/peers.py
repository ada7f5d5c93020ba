# SPDX-License-Identifier: MIT
"""Who is measured. To add a peer, write a build function and give it a place in PEERS.

Every ConvNN here is one head, cosine similarity, softmax and a depthwise weight, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .workloads import Inputs, Workload, random_candidates, spatial_candidates

CANDIDATES = 64
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Call:
    """A peer made ready for one workload.

    forward: no arguments; the tensors it returns begin with the output.
    leaves: what a backward pass differentiates, by name; grad_output has the layout of the output.
    candidates: the rows that may be neighbors, or None for all; the token itself is one then too.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, Tensor]
    grad_output: Tensor
    candidates: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """`computes` names what the result is checked against: "convnn", "attention", "convolution".

    baseline: the eager peer that computes the same, or, where none does, what it would replace.
    exacting: held to the operator's contract, ties by index and errors like those of eager PyTorch;
    the others only have to compute what their name says.
    bytes_needed: an estimate of the peak from the workload and whether gradients are needed, by
    which peers that would exhaust the machine are left out.
    """

    label: str
    computes: str
    build: Callable[[Workload, Inputs], Call]
    baseline: str = "eager"
    exacting: bool = False
    bytes_needed: Callable[[Workload, bool], int] = lambda workload, backward: 0


def _candidates(workload: Workload, kind: str) -> Tensor | None:
    if kind == "all":
        return None
    # A neighborhood of k needs k - 1 candidates beside the token itself, which may be one of them.
    count = min(max(CANDIDATES, workload.k), workload.tokens)
    if kind == "random":
        return random_candidates(workload.tokens, count)
    return spatial_candidates(workload.side, count)


def _convnn_call(
    operation: Callable[..., tuple[Tensor, ...]], kind: str, workload: Workload, inputs: Inputs
) -> Call:
    candidates = _candidates(workload, kind)
    self_indices = None
    if candidates is not None:
        candidates = candidates.to(inputs.query.device)
        self_indices = torch.arange(workload.tokens, device=inputs.query.device)
    query, key, value, weight = inputs.query, inputs.key, inputs.value, inputs.weight

    def forward() -> tuple[Tensor, ...]:
        return operation(query, key, value, workload.k, weight, None, candidates, self_indices)

    leaves = {"query": query, "key": key, "value": value, "weight": weight}
    return Call(forward, leaves, inputs.grad_output, candidates)


def _convnn(kind: str) -> Callable[[Workload, Inputs], Call]:
    def build(workload: Workload, inputs: Inputs) -> Call:
        import convnn_kernels  # noqa: F401  registers the operators

        return _convnn_call(torch.ops.convnn.forward, kind, workload, inputs)

    return build


def _python_ref(workload: Workload, inputs: Inputs) -> Call:
    import python_ref

    return _convnn_call(python_ref.forward, "all", workload, inputs)


def eager_convnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    weight: Tensor,
    bias: None,
    candidates: Tensor | None,
    self_indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ConvNN as one would write it in eager PyTorch for speed: output, similarities, indices.

    `torch.topk` instead of the full sorts of `python_ref`, which pin down the order of ties, and
    a gather of whole rows instead of Algorithm 1's `torch.gather` on an expanded value.
    """
    q, keys = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    if candidates is None or self_indices is None:
        s, indices = torch.topk(q @ keys.mT, k, dim=-1)
    else:
        S = q @ keys[:, candidates].mT
        S = S.masked_fill(candidates == self_indices[:, None], float("-inf"))
        s, places = torch.topk(S, k - 1, dim=-1)
        s = torch.cat([(q * keys[:, self_indices]).sum(-1, keepdim=True), s], dim=-1)
        itself = self_indices[:, None].expand(*s.shape[:-1], 1)
        indices = torch.cat([itself, candidates[places]], dim=-1)

    batch, tokens, channels = value.shape
    first_row = torch.arange(batch, device=value.device)[:, None, None] * tokens
    neighbors = F.embedding(indices + first_row, value.reshape(batch * tokens, channels))
    modulated = torch.softmax(s, dim=-1).unsqueeze(-1) * neighbors
    return (modulated * weight.squeeze(1).T).sum(dim=-2), s, indices


def _eager(kind: str) -> Callable[[Workload, Inputs], Call]:
    def build(workload: Workload, inputs: Inputs) -> Call:
        return _convnn_call(eager_convnn, kind, workload, inputs)

    return build


def _attention(workload: Workload, inputs: Inputs) -> Call:
    query, key, value = inputs.query, inputs.key, inputs.value

    def forward() -> tuple[Tensor, ...]:
        q, k, v = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        return (F.scaled_dot_product_attention(q, k, v).squeeze(1),)

    return Call(forward, {"query": query, "key": key, "value": value}, inputs.grad_output)


def _convolution(workload: Workload, inputs: Inputs) -> Call:
    def as_map(tokens: Tensor) -> Tensor:
        # [B, H W, C] tokens, read as [B, C, H, W], are channels_last without a copy.
        return tokens.unflatten(1, (workload.side, workload.side)).permute(0, 3, 1, 2)

    needs_gradient = inputs.value.requires_grad
    image = as_map(inputs.value.detach()).requires_grad_(needs_gradient)
    weight = inputs.conv_weight.detach().contiguous(memory_format=torch.channels_last)
    weight.requires_grad_(needs_gradient)

    def forward() -> tuple[Tensor, ...]:
        return (F.conv2d(image, weight, padding=1),)

    return Call(forward, {"image": image, "weight": weight}, as_map(inputs.grad_output))


def _whole_matrices(in_forward: int, in_backward: int) -> Callable[[Workload, bool], int]:
    """The estimate for peers that hold so many N x N matrices in float32 at a time."""

    def bytes_needed(workload: Workload, backward: bool) -> int:
        matrices = in_backward if backward else in_forward
        return 4 * matrices * workload.batch * workload.tokens**2

    return bytes_needed


PEERS: dict[str, Peer] = {
    "convnn-all": Peer("ConvNN, all candidates", "convnn", _convnn("all"), exacting=True),
    "convnn-random": Peer(
        f"ConvNN, {CANDIDATES} random", "convnn", _convnn("random"), "eager-random", True
    ),
    "convnn-spatial": Peer(
        f"ConvNN, {CANDIDATES} spatial", "convnn", _convnn("spatial"), "eager-spatial", True
    ),
    "eager": Peer(
        "eager ConvNN, all candidates",
        "convnn",
        _eager("all"),
        bytes_needed=_whole_matrices(1, 3),
    ),
    "eager-random": Peer(
        f"eager ConvNN, {CANDIDATES} random", "convnn", _eager("random"), "eager-random"
    ),
    "eager-spatial": Peer(
        f"eager ConvNN, {CANDIDATES} spatial", "convnn", _eager("spatial"), "eager-spatial"
    ),
    "python-ref": Peer(
        "python_ref (sorts every row)",
        "convnn",
        _python_ref,
        bytes_needed=_whole_matrices(12, 12),
    ),
    "sdpa": Peer("scaled_dot_product_attention", "attention", _attention),
    "conv2d": Peer("Conv2d 3x3, channels_last", "convolution", _convolution),
}

# python_ref is the judge of results, not a competitor: it is measured only when asked for.
DEFAULT_PEERS = tuple(name for name in PEERS if name != "python-ref")


def run_pass(call: Call, passes: str) -> tuple[Tensor, ...]:
    """One forward pass without gradients, or one with its gradients after the output."""
    if passes == "forward":
        with torch.no_grad():
            return call.forward()
    output = call.forward()[0]
    return output, *torch.autograd.grad(output, tuple(call.leaves.values()), call.grad_output)
