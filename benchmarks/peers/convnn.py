# SPDX-License-Identifier: MIT
"""ConvNN and its parts: this project's operators, and eager PyTorch that computes the same.

One head, cosine similarity, softmax; the weight is depthwise unless a label says dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..workloads import Inputs, Workload, random_candidates, spatial_candidates
from .base import TRAINING, Call, Peer, Unavailable, whole_matrices

Operation = Callable[..., Any]


def _restriction(
    kind: str, workload: Workload, inputs: Inputs
) -> tuple[Tensor | None, Tensor | None]:
    """candidates and self_indices: a token is a neighbor of itself where it is one of the keys."""
    if kind == "all":
        return None, None
    # A neighborhood of k needs k - 1 candidates beside the token itself, which may be one of them.
    count = min(max(workload.candidates, workload.k), workload.rows)
    if kind == "random":
        candidates = random_candidates(workload.rows, count)
    elif workload.side is None or workload.keys is not None:
        raise Unavailable("spatial candidates need a map of tokens that are their own keys")
    else:
        candidates = spatial_candidates(workload.side, count)
    device = inputs.query.device
    own = None if workload.keys else torch.arange(workload.tokens, device=device)
    return candidates.to(device), own


def operators() -> Any:
    """torch.ops.convnn, on the backend that this machine would choose."""
    import convnn_kernels  # noqa: F401  registers them

    return torch.ops.convnn


def forward_call(
    operation: Operation, workload: Workload, inputs: Inputs, kind: str = "all", dense: bool = False
) -> Call:
    candidates, own = _restriction(kind, workload, inputs)
    query, key, value, k = inputs.query, inputs.key, inputs.value, workload.k
    weight = inputs.dense_weight if dense else inputs.weight

    def forward() -> Any:
        return operation(query, key, value, k, weight, None, candidates, own)

    leaves = {"query": query, "key": key, "value": value, "weight": weight}
    return Call(forward, leaves, inputs.grad_dense if dense else inputs.grad_output, candidates)


def select_call(
    operation: Operation, workload: Workload, inputs: Inputs, kind: str = "all"
) -> Call:
    candidates, own = _restriction(kind, workload, inputs)
    query, key, k = inputs.query, inputs.key, workload.k

    def forward() -> Any:
        return operation(query, key, k, candidates, own)

    return Call(forward, {"query": query, "key": key}, candidates=candidates)


def aggregate_call(
    operation: Operation, workload: Workload, inputs: Inputs, dense: bool = False
) -> Call:
    """The neighbors are the selection's, found beforehand."""
    with torch.no_grad():
        similarities, indices = operators().select(inputs.query, inputs.key, workload.k)
    similarities.requires_grad_(inputs.value.requires_grad)
    value, weight = inputs.value, inputs.dense_weight if dense else inputs.weight

    def forward() -> tuple[Tensor, ...]:
        return (operation(value, similarities, indices, weight),)

    leaves = {"value": value, "similarities": similarities, "weight": weight}
    grad_output = inputs.grad_dense if dense else inputs.grad_output
    return Call(forward, leaves, grad_output, indices=indices)


def _rows_at(X: Tensor, I: Tensor) -> Tensor:
    """X [B, M, C] at I [B, N, k]: [B, N, k, C], by gathering whole rows."""
    batch, rows, channels = X.shape
    first_row = torch.arange(batch, device=X.device)[:, None, None] * rows
    return F.embedding(I + first_row, X.reshape(batch * rows, channels))


def eager_select(
    query: Tensor, key: Tensor, k: int, candidates: Tensor | None, self_indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`torch.topk` instead of the full sorts of `python_ref`, which pin down the order of ties."""
    q, keys = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    if candidates is None:
        return torch.topk(q @ keys.mT, k, dim=-1)
    S = q @ keys[:, candidates].mT
    if self_indices is None:
        s, places = torch.topk(S, k, dim=-1)
        return s, candidates[places]
    S = S.masked_fill(candidates == self_indices[:, None], float("-inf"))
    s, places = torch.topk(S, k - 1, dim=-1)
    s = torch.cat([(q * keys[:, self_indices]).sum(-1, keepdim=True), s], dim=-1)
    itself = self_indices[:, None].expand(*s.shape[:-1], 1)
    return s, torch.cat([itself, candidates[places]], dim=-1)


def eager_aggregate(value: Tensor, s: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """A gather of whole rows instead of Algorithm 1's `torch.gather` on an expanded value."""
    modulated = torch.softmax(s, dim=-1).unsqueeze(-1).to(value.dtype) * _rows_at(value, indices)
    if weight.shape[1] == 1 and value.shape[-1] > 1:
        return (modulated * weight.squeeze(1).T).sum(dim=-2)
    return modulated.mT.flatten(2) @ weight.flatten(1).T


def eager_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    weight: Tensor,
    bias: None,
    candidates: Tensor | None,
    self_indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ConvNN as one would write it in eager PyTorch for speed: output, similarities, indices."""
    s, indices = eager_select(query, key, k, candidates, self_indices)
    return eager_aggregate(value, s, indices, weight), s, indices


def _compiled(workload: Workload, inputs: Inputs) -> Call:
    if workload.torch_dtype != torch.float32 and inputs.query.device.type == "cpu":
        raise Unavailable("compiled for the CPU in float32 only")
    return forward_call(torch.compile(eager_forward, fullgraph=True), workload, inputs)


def _python_ref(workload: Workload, inputs: Inputs) -> Call:
    import python_ref

    return forward_call(python_ref.forward, workload, inputs)


def _functional(workload: Workload, inputs: Inputs) -> Call:
    from convnn_kernels import functional

    query, key, value, k, weight = *_tokens(inputs), workload.k, inputs.weight

    def forward() -> tuple[Tensor, ...]:
        return (functional.convnn(query, key, value, k, weight),)

    leaves = {"query": query, "key": key, "value": value, "weight": weight}
    return Call(forward, leaves, inputs.grad_output)


def _tokens(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.query, inputs.key, inputs.value


def _forced(backend: str, operator: str) -> Peer:
    def build(workload: Workload, inputs: Inputs) -> Call:
        import convnn_kernels

        def operation(*args: Any) -> Any:
            with convnn_kernels.backend(backend):
                return getattr(operators(), operator)(*args)

        make = select_call if operator == "select" else forward_call
        call = make(operation, workload, inputs)
        try:
            call.forward()
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
        return call

    select = operator == "select"
    return Peer(
        f"{'select' if select else 'ConvNN'}, all candidates, backend {backend}",
        "select" if select else "convnn",
        build,
        ("forward",),
        exacting=True,
    )


def _restricted(kind: str) -> dict[str, Peer]:
    return {
        f"convnn-{kind}": Peer(
            f"ConvNN, {kind} candidates",
            "convnn",
            lambda w, i: forward_call(operators().forward, w, i, kind),
            baseline=f"eager-{kind}",
            exacting=True,
        ),
        f"eager-{kind}": Peer(
            f"eager ConvNN, {kind} candidates",
            "convnn",
            lambda w, i: forward_call(eager_forward, w, i, kind),
            TRAINING,
        ),
        f"select-{kind}": Peer(
            f"select, {kind} candidates",
            "select",
            lambda w, i: select_call(operators().select, w, i, kind),
            ("forward",),
            exacting=True,
        ),
    }


PEERS = {
    "convnn-all": Peer(
        "ConvNN, all candidates",
        "convnn",
        lambda w, i: forward_call(operators().forward, w, i),
        baseline="eager",
        exacting=True,
    ),
    "convnn-dense": Peer(
        "ConvNN, all candidates, dense",
        "convnn",
        lambda w, i: forward_call(operators().forward, w, i, dense=True),
        baseline="eager-dense",
        exacting=True,
    ),
    "convnn-dense-random": Peer(
        "ConvNN, random candidates, dense",
        "convnn",
        lambda w, i: forward_call(operators().forward, w, i, "random", dense=True),
        exacting=True,
    ),
    "functional": Peer(
        "ConvNN, all candidates, by functional.convnn",
        "convnn output",
        _functional,
        baseline="eager",
        exacting=True,
    ),
    **_restricted("random"),
    **_restricted("spatial"),
    "eager": Peer(
        "eager ConvNN, all candidates",
        "convnn",
        lambda w, i: forward_call(eager_forward, w, i),
        TRAINING,
        bytes_needed=whole_matrices(2, 3),
    ),
    "eager-dense": Peer(
        "eager ConvNN, all candidates, dense",
        "convnn",
        lambda w, i: forward_call(eager_forward, w, i, dense=True),
        TRAINING,
        bytes_needed=whole_matrices(2, 3),
    ),
    "compiled": Peer(
        "torch.compile of eager ConvNN",
        "convnn",
        _compiled,
        TRAINING,
        baseline="eager",
        bytes_needed=whole_matrices(2, 3),
    ),
    "python-ref": Peer(
        "python_ref (sorts every row)",
        "convnn",
        _python_ref,
        TRAINING,
        baseline="eager",
        bytes_needed=whole_matrices(12, 12),
    ),
    "select": Peer(
        "select, all candidates",
        "select",
        lambda w, i: select_call(operators().select, w, i),
        ("forward",),
        baseline="matmul-topk",
        exacting=True,
    ),
    **{
        f"{'select' if operator == 'select' else 'convnn'}-{backend}": _forced(backend, operator)
        for operator in ("select", "forward")
        for backend in ("triton", "cuda")
    },
    "aggregate": Peer(
        "aggregate, depthwise",
        "aggregate",
        lambda w, i: aggregate_call(operators().aggregate, w, i),
        TRAINING,
        baseline="eager-aggregate",
        exacting=True,
    ),
    "aggregate-dense": Peer(
        "aggregate, dense",
        "aggregate",
        lambda w, i: aggregate_call(operators().aggregate, w, i, dense=True),
        TRAINING,
        baseline="eager-aggregate-dense",
        exacting=True,
    ),
    "eager-aggregate": Peer(
        "eager aggregate, depthwise",
        "aggregate",
        lambda w, i: aggregate_call(eager_aggregate, w, i),
        TRAINING,
    ),
    "eager-aggregate-dense": Peer(
        "eager aggregate, dense",
        "aggregate",
        lambda w, i: aggregate_call(eager_aggregate, w, i, dense=True),
        TRAINING,
    ),
}
