# SPDX-License-Identifier: MIT
"""Runs an operator, forward and backward, and compares everything it returns with the reference.

A selection is certified or compared exactly (certificate.py). `assert_values` compares every other
tensor with the float64 reference and with eager PyTorch in the same precision, both at the
neighbors that the operator returned, so that a different neighbor can neither hide nor excuse an
error.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .certificate import (
    assert_certified_selection,
    assert_exact_selection,
    fail,
    query_chunks,
)
from .convnn import (
    aggregate,
    compute_dtype,
    gather_rows,
    modulate,
    neighbor_rows,
    normalize,
    similarities_at,
    similarity,
)

# Evaluations of eager PyTorch that estimate its rounding errors, each summing in another order; and
# how many there are for a result whose error is at most CLOSE times what they allow.
ORDERS, MORE_ORDERS, CLOSE = 8, 64, 2.0
# Of a sum over the neighbors and their channels that is taken term by term; beyond these, several
# are added at once.
MOST_TERMS = 128

# Tensors by argument name; None for an optional argument that is not given.
Tensors = dict[str, Any]


def _ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The spacing of the numbers of `dtype` at `magnitude`."""
    finfo = torch.finfo(dtype)
    exponent = math.frexp(max(magnitude, finfo.tiny))[1] - 1
    return finfo.eps * 2.0**exponent


def _at(X: Tensor, mask: Tensor) -> Tensor:
    """X[mask]; all of X in its shape, without a copy, where the mask is."""
    return X if bool(mask.all()) else X[mask]


def _maximum(X: Tensor) -> float:
    return float(X.abs().max()) if X.numel() else 0.0


def _rms(X: Tensor) -> float:
    # Scaled, because squares of 1e200 overflow.
    largest = _maximum(X)
    return largest * float((X / largest).square().mean().sqrt()) if largest else 0.0


MEASURES = {"maximum": _maximum, "RMS": _rms}


def assert_values(
    name: str,
    result: Tensor,
    reference64: Tensor,
    eager: Tensor | Iterable[Tensor],
    precision: torch.dtype | None = None,
    terms: Tensor | None = None,
) -> None:
    """Asserts that `result` is about as accurate as `eager`, the same computation in the same
    precision.

    Maximum and RMS error against `reference64` may be at most twice those of `eager` plus 2 ulp of
    the result's scale, which is the maximum or the RMS of the reference. An ulp is that of the
    result's dtype, or of `precision` where the computation was less precise. Where the reference is
    a difference that may cancel entirely, `terms` are the terms subtracted, and the scale is at
    least theirs. NaN and infinities must be where the reference, in the result's dtype, or `eager`
    has them.

    The error of a single evaluation of a few elements is a matter of luck. `eager` may therefore be
    several evaluations, which are drawn until the largest of their errors admits the result: ORDERS
    of them, and all there are for a result whose error is at most CLOSE times what they allow.
    """
    if result.shape != reference64.shape:
        raise AssertionError(
            f"{name}: expected shape {list(reference64.shape)}, got {list(result.shape)}"
        )
    result = result.detach()
    errors = _Errors(result, reference64.detach().double(), precision, terms)
    expected = reference64.to(result.dtype)
    right_kind = _same_kind(result, expected)
    for i, evaluation in enumerate([eager] if isinstance(eager, Tensor) else eager, start=1):
        if result.dtype != evaluation.dtype:
            raise AssertionError(f"{name}: expected {evaluation.dtype}, got {result.dtype}")
        right_kind |= _same_kind(result, evaluation)
        excess, complaint = errors.compare(evaluation)
        if excess <= 1 and bool(right_kind.all()):
            return
        if i >= ORDERS and not (1 < excess <= CLOSE and bool(right_kind.all())):
            break
    fail(f"{name}: NaN or infinity", ~right_kind, ("got", result), ("expected", expected))
    raise AssertionError(f"{name}: {complaint}")


def _same_kind(result: Tensor, other: Tensor) -> Tensor:
    """Where both are finite, both NaN, or the same infinity."""
    not_finite = torch.where(result.isnan(), other.isnan(), result == other)
    return torch.where(result.isfinite(), other.isfinite(), not_finite)


class _Errors:
    """Of a result, where it and the reference in its dtype are finite."""

    def __init__(
        self, result: Tensor, exact: Tensor, precision: torch.dtype | None, terms: Tensor | None
    ) -> None:
        self.usable = result.isfinite() & exact.to(result.dtype).isfinite()
        self.result, self.reference, self.exact = result, exact, _at(exact, self.usable)
        self.errors = (_at(result, self.usable).double() - self.exact).abs()
        scaled_by = [self.exact]
        if terms is not None:
            scaled_by.append(_at(terms, self.usable).nan_to_num(0.0, 0.0, 0.0))
        dtypes = [result.dtype, precision or result.dtype]
        self.ulps = {
            label: max(_ulp(max(map(measure, scaled_by)), dtype) for dtype in dtypes)
            for label, measure in MEASURES.items()
        }
        self.of_eager = dict.fromkeys(MEASURES, 0.0)

    def compare(self, eager: Tensor) -> tuple[float, str]:
        """The largest ratio of an error to what is allowed, and, above 1, what is wrong.

        What is allowed grows with each evaluation of eager PyTorch.
        """
        eager_errors = (_at(eager, self.usable).double() - self.exact).abs()
        eager_errors = _at(eager_errors, eager_errors.isfinite())
        worst, complaint = 0.0, ""
        for label, measure in MEASURES.items():
            error, ulp = measure(self.errors), self.ulps[label]
            self.of_eager[label] = max(self.of_eager[label], measure(eager_errors))
            tolerance = 2 * self.of_eager[label] + 2 * ulp
            if error > max(1.0, worst) * tolerance:
                worst = error / tolerance
                where = tuple(self.usable.nonzero()[int(self.errors.argmax())].tolist())
                got, expected = self.result[where].item(), self.reference[where].item()
                complaint = (
                    f"{label} error {error:.3g} > {tolerance:.3g} (eager "
                    f"{self.of_eager[label]:.3g}, ulp {ulp:.3g}); the largest error at {where}: "
                    f"{got!r} for {expected!r}"
                )
        return worst, complaint


@dataclass
class _Problem:
    """An operator's inputs and the neighbors it chose, from which all results can be recomputed.

    There is a query and a key unless the similarities were given, and a value unless only `select`
    ran.
    """

    tensors: Tensors
    indices: Tensor
    missing: Tensor
    metric: str = "cosine"
    rho: str = "softmax"
    scale: float = 1.0
    # The gradients of the outputs, by name; empty for a forward pass alone.
    grads: dict[str, Tensor] = field(default_factory=dict)

    def evaluate(
        self,
        to_dtype: Callable[[torch.dtype], torch.dtype],
        inputs: Tensors | None = None,
        shuffle: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Outputs and "gradient of ..." each tensor, in the dtypes that `to_dtype` returns.

        Queries are processed in chunks to bound memory. With `shuffle`, every sum is taken in a
        random order, and products are rounded in other ways.
        """
        inputs = self.tensors if inputs is None else inputs
        given = {
            name: X.detach().to(to_dtype(X.dtype)) for name, X in inputs.items() if X is not None
        }
        gradients = {f"gradient of {name}": torch.zeros_like(X) for name, X in given.items()}
        parts: dict[str, list[Tensor]] = {}
        N, k = self.indices.shape[-2:]
        rows_at_once = [given[name].shape[-2] for name in ("key",) if name in given]
        columns = [given[name].shape[-1] for name in ("query", "value") if name in given]
        per_query = self.indices.shape[:-2].numel() * max(k * max(columns), *rows_at_once, 1)
        for rows in query_chunks(N, per_query) if N else [slice(0, 0)]:
            leaves = {
                name: (X[..., rows, :] if name in ("query", "similarities") else X)
                .detach()
                .requires_grad_(bool(self.grads))
                for name, X in given.items()
            }
            outputs = self._outputs(leaves, rows, shuffle)
            for name, output in outputs.items():
                parts.setdefault(name, []).append(output.detach())
            roots = [name for name, output in outputs.items() if output.requires_grad]
            if not roots:
                continue
            found = torch.autograd.grad(
                [outputs[name] for name in roots],
                list(leaves.values()),
                [self.grads[name][..., rows, :].to(outputs[name].dtype) for name in roots],
                allow_unused=True,
            )
            for name, gradient in zip(leaves, found, strict=True):
                total = gradients[f"gradient of {name}"]
                if name in ("query", "similarities"):
                    total = total[..., rows, :]
                if gradient is not None:
                    total += gradient
        results = {name: torch.cat(chunks, dim=-2) for name, chunks in parts.items()}
        return {**results, **gradients} if self.grads else results

    def _outputs(
        self, leaves: dict[str, Tensor], rows: slice, shuffle: torch.Generator | None
    ) -> dict[str, Tensor]:
        I, missing = self.indices[..., rows, :], self.missing[..., rows, :]
        X: Tensors = {"query": None, "key": None, "value": None, "similarities": None}
        X |= {"weight": None, "bias": None, **leaves}
        restore: dict[str, Callable[[Tensor], Tensor]] = {
            name: lambda result: result for name in ("output", "similarities")
        }
        if shuffle is not None:
            X, I, missing, restore = _shuffled(X, I, missing, shuffle)
        outputs = {}
        s = X["similarities"]
        if s is None:
            s = _similarities(X["query"], X["key"], I, self.metric, missing, shuffle)
            outputs["similarities"] = restore["similarities"](s)
        if X["value"] is not None:
            given = X["value"], s, I, X["weight"], X["bias"], self.rho, self.scale
            Y = aggregate(*given) if shuffle is None else _aggregate_one_by_one(*given, shuffle)
            outputs["output"] = restore["output"](Y)
        return outputs


def _similarities(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    metric: str,
    missing: Tensor,
    shuffle: torch.Generator | None,
) -> Tensor:
    """The similarities of given neighbors: pair by pair in float64, otherwise as in eager PyTorch.

    Eager PyTorch takes them from the matrix product Q K^T, which sums column after column. A
    separate sum per pair is more accurate, and too strict a standard. With non-finite inputs, S
    would put 0 * inf into the gradient. With `shuffle`, a loop takes the columns in their order,
    because small products sum in a different one. Few columns, or equal elements, have few orders,
    and the sums of all may be exact by luck. The terms are therefore multiplied by a random factor,
    by which the sum is divided.
    """
    finite = bool(query.isfinite().all()) and bool(key.isfinite().all())
    if shuffle is not None:
        Q, K_nn = neighbor_rows(query, key, indices, metric, missing)
        factor = 0.5 + 0.5 * torch.rand((), generator=shuffle).to(Q)
        s = torch.zeros_like(K_nn[..., 0])
        for q, k in zip(Q.unbind(-1), K_nn.unbind(-1), strict=True):
            s = s - (q - k).square() * factor if metric == "euclidean" else s + q * k * factor
        s = s / factor
    elif query.dtype == torch.float64 or metric == "euclidean" or not finite or key.shape[-2] == 0:
        s = similarities_at(query, key, indices, metric, missing)
    else:
        s = similarity(query, key, metric).gather(-1, indices)
    return s.masked_fill(missing, -math.inf)


def _aggregate_one_by_one(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rho: str,
    scale: float,
    generator: torch.Generator,
) -> Tensor:
    """As `aggregate`, but sums take one term after another, as a loop does.

    PyTorch takes several partial sums, which are more accurate, however the terms are ordered: most
    of all where they are equal, as those of neighbors with the same similarity may be. The product
    of a similarity and a scale that is no power of two is rounded in another way, too.
    """
    dtype = compute_dtype(value.dtype)
    C, k = value.shape[-1], indices.shape[-1]
    missing = (similarities == -math.inf).unsqueeze(-1)
    V_nn = gather_rows(value.to(dtype), indices).masked_fill(missing, 0.0)
    if rho != "softmax":
        weights = modulate(similarities, rho, scale)
    else:
        is_exact = abs(math.frexp(scale)[0]) in (0.0, 0.5)
        factor = 1.0 if is_exact else 0.5 + 0.5 * float(torch.rand((), generator=generator))
        weights = modulate(similarities * factor, rho, scale / factor)
        total = sum(weights.unbind(-1), torch.zeros_like(weights[..., 0]))
        weights = weights / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    X_nn = weights.to(dtype).unsqueeze(-1) * V_nn
    if weight is None:
        each = X_nn.unbind(-2)
    elif weight.shape == (C, 1, k) and C != 1:
        each = (X_nn * weight.to(dtype).squeeze(1).mT).unbind(-2)
    else:
        W = weight.to(dtype).permute(2, 1, 0).reshape(k * C, weight.shape[0])
        at_once = -(-k * C // MOST_TERMS)
        parts = zip(X_nn.flatten(-2).split(at_once, -1), W.split(at_once), strict=True)
        each = tuple(X @ own for X, own in parts)
    Y = sum(each[1:], each[0]) if k > 0 else X_nn.sum(dim=-2)
    if bias is not None:
        Y = Y + bias.to(dtype)
    return Y.to(value.dtype)


def _shuffled(
    X: Tensors, I: Tensor, missing: Tensor, generator: torch.Generator
) -> tuple[Tensors, Tensor, Tensor, dict[str, Callable[[Tensor], Tensor]]]:
    """The same problem with queries, columns, neighbors, channels and outputs in random order, and
    functions that restore the order of its outputs. Autograd restores that of the gradients.
    """

    def order(size: int) -> Tensor:
        # Drawn on the CPU, for the same orders on every device.
        return torch.randperm(size, generator=generator).to(I.device)

    def permute(T: Tensor, *orders: Tensor | None) -> Tensor:
        for dim, by in enumerate(reversed(orders), start=1):
            T = T if by is None else T.index_select(-dim, by)
        return T

    N, k = (order(size) for size in I.shape[-2:])
    shuffled = dict(X)
    if X["query"] is not None:
        D = order(X["query"].shape[-1])
        shuffled |= {"query": permute(X["query"], N, D), "key": permute(X["key"], None, D)}
    if X["similarities"] is not None:
        shuffled["similarities"] = permute(X["similarities"], N, k)
    outputs = None
    if X["value"] is not None:
        C = outputs = order(X["value"].shape[-1])
        shuffled["value"] = permute(X["value"], None, C)
        weight = X["weight"]
        if weight is not None and weight.shape[1] == len(C):
            outputs = order(weight.shape[0])
            shuffled["weight"] = permute(weight, outputs, C, k)
        elif weight is not None:
            shuffled["weight"] = permute(weight, C, None, k)
        if X["bias"] is not None:
            shuffled["bias"] = permute(X["bias"], outputs)
    back = [None if by is None else by.argsort() for by in (N, k, outputs)]
    restore = {
        "similarities": lambda s: permute(s, back[0], back[1]),
        "output": lambda Y: permute(Y, back[0], back[2]),
    }
    return shuffled, permute(I, N, k), permute(missing, N, k), restore


def _double(dtype: torch.dtype) -> torch.dtype:
    return torch.float64


def _eager_evaluations(problem: _Problem) -> Iterator[dict[str, Tensor]]:
    """Evaluates the problem in the precision of its inputs, first as is, then in other orders."""
    tensors = problem.tensors
    generator = torch.Generator().manual_seed(0)
    orders = [None] + [generator] * (MORE_ORDERS - 1)
    given = [X for X in tensors.values() if X is not None]
    if all(X.dtype != torch.float64 for X in given):
        for shuffle in orders:
            yield problem.evaluate(compute_dtype, shuffle=shuffle)
        return
    # Eager float64 is the reference itself and would show no error. Rounding errors of the right
    # size come from float32, with inputs rounded to float32, scaled to float64; doubled, because
    # the difference of two float64 computations has the errors of both.
    single = {name: None if X is None else X.detach().float() for name, X in tensors.items()}
    exact = problem.evaluate(_double, single)
    ratio = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    for shuffle in orders:
        rough = problem.evaluate(compute_dtype, single, shuffle)
        eager = problem.evaluate(compute_dtype, shuffle=shuffle)
        for name, X in eager.items():
            error = (rough[name].double() - exact[name]) * ratio
            eager[name] = X + torch.where(error.isfinite(), error, 0.0).to(X.dtype)
        yield eager


def _projected_terms(problem: _Problem) -> dict[str, Tensor]:
    """The gradients of query and key before the cosine removes their component along the row.

    For parallel rows, only rounding errors remain after that.
    """
    if problem.metric != "cosine" or problem.tensors.get("query") is None:
        return {}
    tensors, norms = dict(problem.tensors), {}
    for name in ("query", "key"):
        X = problem.tensors[name].detach().double()
        norms[name] = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
        tensors[name] = normalize(X)
    terms = replace(problem, tensors=tensors, metric="dot").evaluate(_double)
    return {
        f"gradient of {name}": terms[f"gradient of {name}"] / norm
        for name, norm in norms.items()
        if problem.grads
    }


def _softmax_terms(problem: _Problem) -> Tensor:
    """What is subtracted in the gradient of given similarities, rho_j (t_j - sum_l rho_l t_l).

    Here t_j, the gradient of rho_j, is a sum, and its terms may cancel as well: their absolute
    values are added.
    """
    sizes = {name: None if X is None else X.detach().abs() for name, X in problem.tensors.items()}
    sizes["similarities"] = s = problem.tensors["similarities"].detach().double()
    grads = {name: grad.abs() for name, grad in problem.grads.items()}
    # With rho = s, the gradient of s is t.
    linear = replace(problem, tensors=sizes, grads=grads, rho="similarity").evaluate(_double)
    t = linear["gradient of similarities"]
    rho = modulate(s, "softmax", problem.scale)
    # Four times, for the rounding errors of sums, of which those of eager PyTorch have none if all
    # neighbors are equal.
    return 4 * abs(problem.scale) * rho * (t + (rho * t).sum(-1, keepdim=True))


def _power_of_two(X: Tensor) -> Tensor:
    """The largest that is at most X; 1 where X is 0 or not finite."""
    X = torch.where((X > 0) & X.isfinite(), X, 1.0)
    return torch.exp2(torch.frexp(X).exponent.to(X) - 1)


def _precision(problem: _Problem, name: str) -> torch.dtype:
    """The least precise dtype that takes part in the computation of a result."""
    tensors = problem.tensors
    names = ("query", "key") if name == "similarities" else tuple(tensors)
    dtypes = {compute_dtype(tensors[n].dtype) for n in names if tensors.get(n) is not None}
    return torch.float32 if torch.float32 in dtypes else torch.float64


def _compare(problem: _Problem, results: dict[str, Tensor]) -> None:
    """Compares each result, an output or a gradient by name, with `assert_values`."""
    exact = problem.evaluate(_double)
    terms = _projected_terms(problem)
    evaluations = _eager_evaluations(problem)
    drawn: list[dict[str, Tensor]] = []

    def eager(name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        for i in range(MORE_ORDERS):
            if i == len(drawn):
                drawn.append(next(evaluations))
            yield drawn[i][name].to(dtype)

    for name, result in results.items():
        dtype, precision = result.dtype, _precision(problem, name)
        if name != "gradient of similarities" or problem.rho != "softmax":
            given = result, exact[name], eager(name, dtype), precision, terms.get(name)
            assert_values(name, *given)
            continue
        # Each row at the scale of its own terms: those of one must not excuse errors of another.
        subtracted = _softmax_terms(problem)
        size = _power_of_two(subtracted.amax(-1, keepdim=True)) if result.numel() else 1.0
        rows, exact_rows = result / size, exact[name] / size
        eager_rows = ((X / size).to(dtype) for X in eager(name, dtype))
        given = rows.to(dtype), exact_rows, eager_rows, precision, subtracted / size
        assert_values(name, *given)


def _run(
    operator: Callable[[Tensors], dict[str, Tensor]],
    tensors: Tensors,
    backward: bool,
    grads: dict[str, Tensor | None],
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The operator's outputs, the gradients of its inputs, and the output gradients used.

    Output gradients that are not given are random.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        name: None if X is None else X.detach().requires_grad_(backward)
        for name, X in tensors.items()
    }
    outputs = operator(leaves)
    if not backward:
        return outputs, {}, {}
    complete = {}
    for name, output in outputs.items():
        grad = grads.get(name)
        if grad is None:
            grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        complete[name] = grad.to(output.device, output.dtype)
    roots = [name for name, output in outputs.items() if output.requires_grad]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(
        [outputs[name] for name in roots],
        list(wanted.values()),
        [complete[name] for name in roots],
        allow_unused=True,
    )
    gradients = {
        # A missing gradient means that it is zero, and nothing else.
        f"gradient of {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True)
    }
    return {name: X.detach() for name, X in outputs.items()}, gradients, complete


def assert_select(
    operator: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    order: str = "similarity",
    key_range: Tensor | None = None,
    exclude_self: bool = False,
    *,
    exact: bool = False,
    backward: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Runs `operator` as `select`, forward and backward, and checks everything it returns.

    `exact` adds the exact comparison. Returns similarities and indices.
    """
    options = (candidates, self_indices, key_mask, metric, order, key_range, exclude_self)
    chosen: list[Tensor] = []

    def run(leaves: Tensors) -> dict[str, Tensor]:
        s, I = operator(leaves["query"], leaves["key"], k, *options)
        chosen.append(I)
        return {"similarities": s}

    tensors: Tensors = {"query": query, "key": key}
    outputs, gradients, grads = _run(run, tensors, backward, {}, seed)
    s, I = outputs["similarities"], chosen[0]
    assert_certified_selection(query, key, s, I, k, *options)
    if exact:
        assert_exact_selection(query, key, s, I, k, *options)
    problem = _Problem(tensors, I, s == -math.inf, metric, grads=grads)
    _compare(problem, {**outputs, **gradients})
    return s, I


def assert_aggregate(
    operator: Callable[..., Tensor],
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rho: str = "softmax",
    scale: float = 1.0,
    backward: bool = True,
    grad_output: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Runs `operator` as `aggregate`, forward and backward, and checks everything it returns.

    `grad_output` replaces the random gradient of the output. Returns the output.
    """

    def run(leaves: Tensors) -> dict[str, Tensor]:
        value, s, weight, bias = leaves.values()
        return {"output": operator(value, s, indices, weight, bias, rho, scale)}

    tensors: Tensors = {
        "value": value,
        "similarities": similarities,
        "weight": weight,
        "bias": bias,
    }
    outputs, gradients, grads = _run(run, tensors, backward, {"output": grad_output}, seed)
    missing = similarities.detach() == -math.inf
    problem = _Problem(tensors, indices, missing, rho=rho, scale=scale, grads=grads)
    _compare(problem, {**outputs, **gradients})
    return outputs["output"]


def assert_forward(
    operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    rho: str = "softmax",
    scale: float = 1.0,
    order: str = "similarity",
    key_range: Tensor | None = None,
    exclude_self: bool = False,
    *,
    exact: bool = False,
    backward: bool = True,
    grad_output: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `operator` as `forward`, forward and backward, and checks everything it returns.

    `exact` adds the exact comparison of the selection; `grad_output` replaces the random gradient
    of the output. Returns output, similarities and indices.
    """
    options = (candidates, self_indices, key_mask, metric)
    more = (order, key_range, exclude_self)
    chosen: list[Tensor] = []

    def run(leaves: Tensors) -> dict[str, Tensor]:
        query, key, value, weight, bias = leaves.values()
        Y, s, I = operator(query, key, value, k, weight, bias, *options, rho, scale, *more)
        chosen.append(I)
        return {"output": Y, "similarities": s}

    tensors: Tensors = {
        "query": query,
        "key": key,
        "value": value,
        "weight": weight,
        "bias": bias,
    }
    outputs, gradients, grads = _run(run, tensors, backward, {"output": grad_output}, seed)
    s, I = outputs["similarities"], chosen[0]
    assert_certified_selection(query, key, s, I, k, *options, *more)
    if exact:
        assert_exact_selection(query, key, s, I, k, *options, *more)
    problem = _Problem(tensors, I, s == -math.inf, metric, rho, scale, grads)
    _compare(problem, {**outputs, **gradients})
    return outputs["output"], s, I
