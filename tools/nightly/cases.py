# SPDX-License-Identifier: MIT
"""Random cases against the reference, also of special values, and directional derivatives."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from python_ref import assert_aggregate, assert_forward, assert_select, select
from tests.cases import assert_special, make_case, make_special_case

ops = torch.ops.convnn
CONVOLUTION = ("value", "weight", "bias", "rho", "scale")

# A step of a central difference, and the least distance of the similarities that decide.
STEP, GAP = 1e-6, 1e-4
# Of a derivative, relative to the size of the gradient and of the direction.
TOLERANCE = 1e-6


def random_case(seed: int) -> bool:
    """`forward` with all gradients; every third one of `select` and `aggregate`, too."""
    case = make_case(seed, restricted=seed % 3 == 2)
    arguments: dict[str, Any] = case.arguments()
    torch.set_num_threads(2 if seed % 10 == 0 else 1)
    _, s, I = assert_forward(ops.forward, **arguments, exact=case.exact, seed=seed)
    if seed % 3 == 0:
        search = {name: X for name, X in arguments.items() if name not in CONVOLUTION}
        assert_select(ops.select, **search, exact=case.exact, seed=seed)
        given = {name: arguments[name] for name in CONVOLUTION}
        assert_aggregate(ops.aggregate, similarities=s, indices=I, **given, seed=seed)
    return True


def special_case(seed: int) -> bool:
    """`select` and, as far as a special case determines them, the results of `forward`."""
    torch.set_num_threads(2 if seed % 10 == 0 else 1)
    assert_special(make_special_case(seed), ops.forward, ops.select)
    return True


def derivative(seed: int) -> bool:
    """The derivative of a loss along a random direction, by autograd and by a central difference.

    Returns False, without a comparison, where a step might change the neighbors.
    """
    case = make_case(seed, restricted=seed % 3 == 2)
    case = replace(case, query_dtype=torch.float64, value_dtype=torch.float64, content="normal")
    arguments: dict[str, Any] = case.arguments()
    if not _is_away_from_ties(arguments):
        return False
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        name: X.detach().clone().requires_grad_()
        for name, X in arguments.items()
        if isinstance(X, Tensor) and X.is_floating_point()
    }

    def randn(X: Tensor) -> Tensor:
        return torch.randn(X.shape, generator=generator, dtype=torch.float64)

    directions = {name: randn(X) for name, X in leaves.items()}
    output, similarities, _ = ops.forward(**arguments | leaves)
    weights = randn(output), randn(similarities)

    def loss(at: dict[str, Tensor]) -> Tensor:
        Y, s, _ = ops.forward(**arguments | at)
        return (Y * weights[0]).sum() + (s.masked_fill(s.isinf(), 0.0) * weights[1]).sum()

    grads = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
    for (name, X), grad in zip(leaves.items(), grads, strict=True):
        along = float((grad * directions[name]).sum())
        low, high = (
            float(loss(leaves | {name: X + sign * STEP * directions[name]}).detach())
            for sign in (-1, 1)
        )
        # Rounding of the two losses, whose terms may be large.
        noise = 1e-15 * (abs(low) + abs(high) + float(output.detach().abs().sum())) / STEP
        scale = float(grad.norm() * directions[name].norm()) + 1
        error = abs((high - low) / (2 * STEP) - along)
        if not error <= TOLERANCE * scale + 10 * noise:
            raise AssertionError(f"{case.id}: derivative of {name}: off by {error:g} of {along:g}")
    return True


def _is_away_from_ties(arguments: dict[str, Any]) -> bool:
    """Whether similarities that follow one another, and would change places, differ by a gap."""
    search = {name: X for name, X in arguments.items() if name not in CONVOLUTION}
    rows = search["key"].shape[-2]
    s, _ = select(**search | {"k": min(search["k"] + 1, rows), "order": "similarity"})
    gaps = (s[..., :-1] - s[..., 1:])[s[..., 1:].isfinite()]
    largest = float(s[s.isfinite()].abs().max()) if s.isfinite().any() else 0.0
    return bool((gaps > GAP * max(1.0, largest) ** 0.5).all())
