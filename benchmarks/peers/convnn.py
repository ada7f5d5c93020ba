# SPDX-License-Identifier: MIT
"""This project's operators, and eager PyTorch that computes the same.

One head, cosine similarity, softmax; the weight is depthwise unless a label says dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..workloads import Inputs, Workload, random_candidates, spatial_candidates
from .base import TRAINING, Build, Call, Peer, Unavailable


def operators() -> Any:
    """torch.ops.convnn, on the backend that is selected by default."""
    import convnn_kernels  # noqa: F401  registers them

    return torch.ops.convnn


class Eager:
    """The operators as one would write them in eager PyTorch for speed."""

    @staticmethod
    def select(
        query: Tensor, key: Tensor, k: int, candidates: Tensor | None, self_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`torch.topk` instead of the full sorts of `python_ref`, which fix the order of ties."""
        q, keys = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        if candidates is None:
            return torch.topk(q @ keys.mT, k, dim=-1)
        S = q @ keys[:, candidates].mT
        if self_indices is None:
            s, columns = torch.topk(S, k, dim=-1)
            return s, candidates[columns]
        S = S.masked_fill(candidates == self_indices[:, None], float("-inf"))
        s, columns = torch.topk(S, k - 1, dim=-1)
        s = torch.cat([(q * keys[:, self_indices]).sum(-1, keepdim=True), s], dim=-1)
        itself = self_indices[:, None].expand(*s.shape[:-1], 1)
        return s, torch.cat([itself, candidates[columns]], dim=-1)

    @staticmethod
    def aggregate(value: Tensor, s: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        """Gathers whole rows, where Algorithm 1 uses `torch.gather` on an expanded value."""
        batch, rows, channels = value.shape
        first_row = torch.arange(batch, device=value.device)[:, None, None] * rows
        neighbors = F.embedding(indices + first_row, value.reshape(batch * rows, channels))
        modulated = torch.softmax(s, dim=-1).unsqueeze(-1).to(value.dtype) * neighbors
        if weight.shape[1] == 1 and channels > 1:
            return (modulated * weight.squeeze(1).T).sum(dim=-2)
        return modulated.mT.flatten(2) @ weight.flatten(1).T

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k: int,
        weight: Tensor,
        bias: None,
        candidates: Tensor | None,
        self_indices: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, indices = Eager.select(query, key, k, candidates, self_indices)
        return Eager.aggregate(value, s, indices, weight), s, indices


def _restriction(
    kind: str, workload: Workload, inputs: Inputs
) -> tuple[Tensor | None, Tensor | None]:
    """candidates and self_indices. Tokens are their own neighbors unless there are other keys."""
    if kind == "all":
        return None, None
    # k neighbors are the token itself and k - 1 candidates, one of which may be that token again.
    count = min(max(workload.candidates, workload.k), workload.rows)
    if kind == "random":
        candidates = random_candidates(workload.rows, count)
    elif workload.side is None or workload.keys is not None:
        raise Unavailable("spatial candidates need a map of tokens that are their own keys")
    else:
        candidates = spatial_candidates(workload.side, count)
    device = inputs.query.device
    itself = None if workload.keys else torch.arange(workload.tokens, device=device)
    return candidates.to(device), itself


def _forward(operation: Any, w: Workload, inputs: Inputs, kind: str, dense: bool) -> Call:
    candidates, itself = _restriction(kind, w, inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    weight = inputs.dense_weight if dense else inputs.weight

    def forward() -> Any:
        return operation(query, key, value, w.k, weight, None, candidates, itself)

    leaves = {"query": query, "key": key, "value": value, "weight": weight}
    return Call(forward, leaves, inputs.grad_dense if dense else inputs.grad_output, candidates)


def _select(operation: Any, w: Workload, inputs: Inputs, kind: str, dense: bool) -> Call:
    candidates, itself = _restriction(kind, w, inputs)

    def forward() -> Any:
        return operation(inputs.query, inputs.key, w.k, candidates, itself)

    return Call(forward, {"query": inputs.query, "key": inputs.key}, candidates=candidates)


def _aggregate(operation: Any, w: Workload, inputs: Inputs, kind: str, dense: bool) -> Call:
    """Of the neighbors that `select` finds beforehand."""
    with torch.no_grad():
        similarities, indices = operators().select(inputs.query, inputs.key, w.k)
    similarities.requires_grad_(inputs.value.requires_grad)
    value, weight = inputs.value, inputs.dense_weight if dense else inputs.weight

    def forward() -> tuple[Tensor, ...]:
        return (operation(value, similarities, indices, weight),)

    leaves = {"value": value, "similarities": similarities, "weight": weight}
    grad_output = inputs.grad_dense if dense else inputs.grad_output
    return Call(forward, leaves, grad_output, indices=indices)


_CALLS = {"forward": _forward, "select": _select, "aggregate": _aggregate}


def _ours(operator: str, kind: str = "all", dense: bool = False) -> Build:
    return lambda w, inputs: _CALLS[operator](
        getattr(operators(), operator), w, inputs, kind, dense
    )


def _eager(operator: str, kind: str = "all", dense: bool = False) -> Build:
    return lambda w, inputs: _CALLS[operator](getattr(Eager, operator), w, inputs, kind, dense)


def _on_backend(backend: str, operator: str) -> Build:
    def build(workload: Workload, inputs: Inputs) -> Call:
        import convnn_kernels

        def operation(*args: Any) -> Any:
            with convnn_kernels.backend(backend):
                return getattr(operators(), operator)(*args)

        call = _CALLS[operator](operation, workload, inputs, "all", False)
        try:
            call.forward()
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
        return call

    return build


def _compiled(workload: Workload, inputs: Inputs) -> Call:
    if workload.torch_dtype != torch.float32 and inputs.query.device.type == "cpu":
        raise Unavailable("compiled for the CPU in float32 only")
    return _forward(torch.compile(Eager.forward, fullgraph=True), workload, inputs, "all", False)


def _functional(workload: Workload, inputs: Inputs) -> Call:
    from convnn_kernels import functional

    query, key, value, weight = inputs.query, inputs.key, inputs.value, inputs.weight

    def forward() -> tuple[Tensor, ...]:
        return (functional.convnn(query, key, value, workload.k, weight),)

    leaves = {"query": query, "key": key, "value": value, "weight": weight}
    return Call(forward, leaves, inputs.grad_output)


def _convnn(label: str, build: Build, baseline: str | None = None) -> Peer:
    return Peer(f"ConvNN, {label}", "convnn", build, baseline=baseline, exacting=True)


def _eager_convnn(label: str, build: Build, matrices: tuple[int, int] = (0, 0)) -> Peer:
    return Peer(f"eager ConvNN, {label}", "convnn", build, TRAINING, matrices=matrices)


PEERS = {
    "convnn-all": _convnn("all candidates", _ours("forward"), "eager"),
    "convnn-random": _convnn("random candidates", _ours("forward", "random"), "eager-random"),
    "convnn-spatial": _convnn("spatial candidates", _ours("forward", "spatial"), "eager-spatial"),
    "convnn-dense": _convnn("all candidates, dense", _ours("forward", dense=True), "eager-dense"),
    "convnn-dense-random": _convnn(
        "random candidates, dense", _ours("forward", "random", dense=True)
    ),
    "eager": _eager_convnn("all candidates", _eager("forward"), (2, 3)),
    "eager-random": _eager_convnn("random candidates", _eager("forward", "random")),
    "eager-spatial": _eager_convnn("spatial candidates", _eager("forward", "spatial")),
    "eager-dense": _eager_convnn("all candidates, dense", _eager("forward", dense=True), (2, 3)),
    "compiled": Peer(
        "torch.compile of eager ConvNN",
        "convnn",
        _compiled,
        TRAINING,
        baseline="eager",
        matrices=(2, 3),
    ),
    "functional": Peer(
        "ConvNN, all candidates, by functional.convnn",
        "convnn",
        _functional,
        baseline="eager",
        exacting=True,
    ),
    "select": Peer(
        "select, all candidates",
        "select",
        _ours("select"),
        ("forward",),
        baseline="matmul-topk",
        exacting=True,
    ),
    **{
        f"{name}-{backend}": Peer(
            f"{'select' if operator == 'select' else 'ConvNN'}, all candidates, backend {backend}",
            name,
            _on_backend(backend, operator),
            ("forward",),
            exacting=True,
        )
        for name, operator in (("select", "select"), ("convnn", "forward"))
        for backend in ("triton", "cuda")
    },
    **{
        f"aggregate{suffix}": Peer(
            f"aggregate, {label}",
            "aggregate",
            _ours("aggregate", dense=bool(suffix)),
            TRAINING,
            baseline=f"eager-aggregate{suffix}",
            exacting=True,
        )
        for suffix, label in (("", "depthwise"), ("-dense", "dense"))
    },
    **{
        f"eager-aggregate{suffix}": Peer(
            f"eager aggregate, {label}",
            "aggregate",
            _eager("aggregate", dense=bool(suffix)),
            TRAINING,
        )
        for suffix, label in (("", "depthwise"), ("-dense", "dense"))
    },
}
