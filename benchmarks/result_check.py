# SPDX-License-Identifier: MIT
"""Checks a result before it is timed: whatever is not correct is not measured.

Neighbors found by this project must pass the certificate of `python_ref` on a sample of query rows;
those of other libraries only have to be the nearest up to rounding. Values are compared in float64:
ConvNN and its parts at the returned neighbors, attention with its definition, convolution as a
whole. Where all rows would take too much memory, a sample of them is compared, and gradients come
from a grad_output that is zero elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import python_ref

from .call_checks import CallChecks
from .peers import Call, Peer, gradient_mode
from .peers.convnn import operators
from .workloads import Workload

# The most elements of the similarity matrix, and of gathered neighbors, that a check computes in
# float64.
_SAMPLED_PAIRS = 2**22
_SAMPLED_ELEMENTS = 2**22

# Tolerance for other peers, relative to the largest value. They may sum in another order and round
# worse than the eager reference; the check only has to confirm that they compute what their name
# says.
_CLOSE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}

# Computes the output from the leaves, in their dtype.
_Reference = Callable[[Sequence[Tensor]], Tensor]

_Compare = Callable[[str, Tensor, Tensor, Tensor], None]


def _sampled_rows(workload: Workload, per_row: int, elements: int, device: torch.device) -> Tensor:
    """Query rows in ascending order: all of a small workload, at least 64 of a large one."""
    count = max(64, elements // (workload.batch * per_row))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(workload.tokens, generator=generator)[:count].sort().values
    return rows.to(device)


def _run(call: Call, passes: str, grad_output: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    with gradient_mode(passes):
        results = call.forward()
    if passes != "forward+backward":
        # Autograd refuses tensors made in inference mode, so the reference gets copies.
        return [each.clone() for each in results], []
    gradients = torch.autograd.grad(results[0], tuple(call.leaves.values()), grad_output)
    return list(results), list(gradients)


def _close(
    name: str,
    result: Tensor,
    exact: Tensor,
    eager: Tensor,
    precision: torch.dtype = torch.float64,
) -> None:
    """precision: the lowest one in the computation."""
    if result.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(result.shape)}, expected {list(exact.shape)}")
    error = float((result.double() - exact).abs().max())
    tolerance = max(_CLOSE[result.dtype], _CLOSE[precision])
    if not error <= tolerance * float(exact.abs().max()):
        raise AssertionError(
            f"{name}: an error of {error:.3g}, eager has "
            f"{float((eager.double() - exact).abs().max()):.3g}"
        )


def _compare(
    reference: _Reference,
    leaves: dict[str, Tensor],
    output: Tensor,
    gradients: Sequence[Tensor],
    grad_output: Tensor | None,
    assert_values: _Compare,
) -> None:
    """Output and gradients against `reference` in float64 and in the precision of the leaves."""
    found: list[list[Tensor]] = []
    for double in (True, False):
        inputs = [
            (leaf.detach().double() if double else leaf.detach().clone()).requires_grad_(
                bool(gradients)
            )
            for leaf in leaves.values()
        ]
        expected = reference(inputs)
        found.append([expected.detach()])
        if gradients:
            assert grad_output is not None
            found[-1] += torch.autograd.grad(expected, inputs, grad_output.to(expected.dtype))
    names = ["output", *(f"gradient of {name}" for name in leaves)][: 1 + len(gradients)]
    for name, result, exact, eager in zip(names, [output, *gradients], *found, strict=True):
        assert_values(name, result.detach(), exact, eager)


def _zero_elsewhere(grad_output: Tensor | None, rows: Tensor) -> Tensor | None:
    """grad_output [..., N, O] with all other rows set to zero."""
    if grad_output is None or len(rows) == grad_output.shape[-2]:
        return grad_output
    kept = torch.zeros_like(grad_output)
    kept[..., rows, :] = grad_output[..., rows, :]
    return kept


def _at(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[..., rows, :]


def _self_indices(workload: Workload, call: Call, rows: Tensor) -> Tensor | None:
    return None if call.candidates is None or workload.keys is not None else rows


def _check_neighbors(
    peer: Peer, workload: Workload, call: Call, similarities: Tensor, indices: Tensor
) -> str:
    if not peer.exacting:
        return _check_nearest(workload, call, similarities, indices)
    query, key = call.leaves["query"].detach(), call.leaves["key"].detach()
    similarities = similarities.detach()
    rows = _sampled_rows(workload, workload.rows, _SAMPLED_PAIRS, query.device)
    python_ref.assert_certified_selection(
        query[..., rows, :],
        key,
        similarities[..., rows, :],
        indices[..., rows, :],
        workload.k,
        call.candidates,
        _self_indices(workload, call, rows),
        metric=call.metric,
        key_range=_at(call.key_range, rows),
    )
    rows = _sampled_rows(workload, workload.k * workload.channels, _SAMPLED_ELEMENTS, query.device)
    q, at = query[..., rows, :], indices[..., rows, :]
    found = similarities[..., rows, :]
    exact = python_ref.similarities_at(q.double(), key.double(), at, call.metric)
    eager = _in_several_orders(q, key, at, call.metric)
    if call.key_range is not None:
        # The certificate has checked which neighbors are missing.
        missing = found.isneginf()
        exact = exact.masked_fill(missing, -math.inf)
        eager = (each.masked_fill(missing, -math.inf) for each in eager)
    python_ref.assert_values("similarities", found, exact, eager)
    return f"neighbors of {len(rows)} of {workload.tokens} queries"


def _in_several_orders(
    query: Tensor, key: Tensor, indices: Tensor, metric: str
) -> Iterator[Tensor]:
    """The similarities by sums in other orders. Of a few queries there are so few that the rounding
    of one evaluation may be unusually small.
    """
    yield python_ref.similarities_at(query, key, indices, metric)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        order = torch.randperm(query.shape[-1], generator=generator).to(query.device)
        yield python_ref.similarities_at(query[..., order], key[..., order], indices, metric)


def _check_nearest(workload: Workload, call: Call, similarities: Tensor, indices: Tensor) -> str:
    """They are the k nearest candidates up to the rounding of the peer's dtype."""
    query, key = call.leaves["query"].detach(), call.leaves["key"].detach()
    rows = _sampled_rows(workload, workload.rows, _SAMPLED_PAIRS, query.device)
    itself = _self_indices(workload, call, rows)
    q = query[..., rows, :].double()
    S = python_ref.similarity(q, key.double(), call.metric)
    s, I = similarities.detach()[..., rows, :], indices[..., rows, :]
    ascending = I.sort(dim=-1).values
    if not bool((ascending[..., 1:] > ascending[..., :-1]).all()):
        raise AssertionError("indices: a neighbor is returned more than once")
    largest = 1.0 if call.metric == "cosine" else float(S.abs().max())
    tolerance = 10 * _CLOSE[query.dtype] * largest
    exact = S.gather(-1, I)
    # The token itself always comes first.
    allowed, is_self = python_ref.allowed_keys(q, key, call.candidates, itself)
    S = S.masked_fill(~allowed, -math.inf).masked_fill(is_self, math.inf)
    worst, bound = S.gather(-1, I).amin(-1), torch.topk(S, workload.k, dim=-1).values[..., -1]
    if not bool((worst >= bound - tolerance).all()):
        raise AssertionError(
            f"indices: the k-th nearest is up to {float((bound - worst).max()):.3g} nearer"
        )
    error = float((s.double() - exact).abs().max())
    if not error <= tolerance:
        raise AssertionError(f"similarities: an error of {error:.3g}")
    return f"neighbors of {len(rows)} of {workload.tokens} queries, up to rounding"


def _check_convnn(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    device = call.leaves["query"].device
    rows = _sampled_rows(workload, workload.k * workload.channels, _SAMPLED_ELEMENTS, device)
    grad_output = _zero_elsewhere(call.grad_output, rows)
    results, gradients = _run(call, passes, grad_output)
    output, *found = results
    if not found:
        # This peer returns only the output; its neighbors are those that `select` finds.
        with torch.no_grad():
            query, key = call.leaves["query"], call.leaves["key"]
            found = operators().select(query, key, workload.k, metric=call.metric)
    similarities, indices = found
    _check_neighbors(peer, workload, call, similarities, indices)
    at = indices[..., rows, :]

    def reference(leaves: Sequence[Tensor]) -> Tensor:
        q, k, v = leaves[:3]
        weight = leaves[3] if len(leaves) > 3 else None
        s = python_ref.similarities_at(q[..., rows, :], k, at, call.metric)
        return python_ref.aggregate(v, s, at, weight, scale=call.scale)

    compare = python_ref.assert_values if peer.exacting else _close
    grad_at = _at(call.grad_output, rows)
    _compare(reference, call.leaves, output[..., rows, :], gradients, grad_at, compare)
    return f"neighbors and values of {len(rows)} of {workload.tokens} queries"


def _check_select(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    (similarities, indices), _ = _run(call, passes, None)
    return _check_neighbors(peer, workload, call, similarities, indices)


def _check_product(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    (S,), _ = _run(call, passes, None)
    rows = _sampled_rows(workload, workload.rows, _SAMPLED_PAIRS, S.device)
    query, key = call.leaves["query"].detach()[:, rows], call.leaves["key"].detach()
    exact = F.normalize(query.double(), dim=-1) @ F.normalize(key.double(), dim=-1).mT
    _close("product", S[:, rows], exact, F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT)
    return f"{len(rows)} of {workload.tokens} rows"


def _check_aggregate(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    assert call.indices is not None
    device = call.leaves["value"].device
    rows = _sampled_rows(workload, workload.k * workload.channels, _SAMPLED_ELEMENTS, device)
    (output,), gradients = _run(call, passes, _zero_elsewhere(call.grad_output, rows))
    at = call.indices[:, rows]

    def reference(leaves: Sequence[Tensor]) -> Tensor:
        v, s, weight = leaves
        return python_ref.aggregate(v, s[:, rows], at, weight)

    # Similarities are float32, but eager PyTorch multiplies in the dtype of the value.
    close = functools.partial(_close, precision=call.leaves["value"].dtype)
    compare = python_ref.assert_values if peer.exacting else close
    grad_at = _at(call.grad_output, rows)
    _compare(reference, call.leaves, output[:, rows], gradients, grad_at, compare)
    return f"values of {len(rows)} of {workload.tokens} queries"


def _check_attention(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    device = call.leaves["query"].device
    rows = _sampled_rows(workload, workload.rows, _SAMPLED_PAIRS, device)
    (output,), gradients = _run(call, passes, _zero_elsewhere(call.grad_output, rows))

    def reference(leaves: Sequence[Tensor]) -> Tensor:
        query, key, value = leaves
        logits = query[..., rows, :] @ key.mT / math.sqrt(query.shape[-1])
        return torch.softmax(logits, dim=-1) @ value

    grad_at = _at(call.grad_output, rows)
    _compare(reference, call.leaves, output[..., rows, :], gradients, grad_at, _close)
    return f"{len(rows)} of {workload.tokens} queries"


def _check_convolution(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    (output,), gradients = _run(call, passes, call.grad_output)

    def reference(leaves: Sequence[Tensor]) -> Tensor:
        image, weight = leaves
        taps = F.unfold(image.contiguous(), 3, padding=1)
        return (weight.flatten(1) @ taps).unflatten(2, image.shape[2:])

    _compare(reference, call.leaves, output, gradients, call.grad_output, _close)
    return "all values"


def _check_model(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    """Checks every call of this project's operators, or the whole model if there are none."""
    with CallChecks() as calls:
        (output,), gradients = _run(call, passes, call.grad_output)
    if not all(bool(each.isfinite().all()) for each in (output, *gradients)):
        raise AssertionError("output or gradients are not finite")
    if count := calls.check():
        return f"{count} calls of the operators"
    assert call.exact is not None
    with torch.no_grad():
        _close("output", output.detach(), call.exact(), output)
    return "all outputs"


def _check_rate(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    (product,), _ = _run(call, passes, None)
    a, b = call.leaves["a"][:64], call.leaves["b"]
    _close("product", product[:64], a.double() @ b.double(), a @ b)
    return "64 rows"


def _check_copy(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    (copied,), _ = _run(call, passes, None)
    if not torch.equal(copied, call.leaves["source"]):
        raise AssertionError("the copy differs")
    return "all values"


_CHECKS = {
    "convnn": _check_convnn,
    "select": _check_select,
    "product": _check_product,
    "aggregate": _check_aggregate,
    "attention": _check_attention,
    "convolution": _check_convolution,
    "model": _check_model,
    "rate": _check_rate,
    "copy": _check_copy,
}


def check(peer: Peer, workload: Workload, call: Call, passes: str) -> str:
    """Runs the pass and returns what was checked. Raises AssertionError if a result is wrong."""
    with call.block():
        return _CHECKS[peer.computes](peer, workload, call, passes)
