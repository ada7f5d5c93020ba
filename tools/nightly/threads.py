# SPDX-License-Identifier: MIT
"""Sixteen Python threads call at once, and each gets what it got alone."""

import threading

import torch
from torch import Tensor

from tests.cases import make_case

ops = torch.ops.convnn

CALLERS = 16
CALLS = 8


def _results(seed: int) -> list[Tensor]:
    arguments = make_case(seed, restricted=seed % 2 == 1).arguments()
    leaves = {
        name: X.detach().requires_grad_()
        for name, X in arguments.items()
        if isinstance(X, Tensor) and X.is_floating_point()
    }
    Y, s, I = ops.forward(**arguments | leaves)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(X.shape, generator=generator).to(X.dtype) for X in (Y, s)]
    found = torch.autograd.grad(
        (Y, s), list(leaves.values()), grads, allow_unused=True, materialize_grads=True
    )
    return [Y, s, I, *found]


def at_once(case: int) -> bool:
    """CALLS calls of each of CALLERS threads, forward and backward."""
    seeds = range(case * CALLERS * CALLS, (case + 1) * CALLERS * CALLS)
    torch.set_num_threads(1 + case % 3)
    expected = {seed: _results(seed) for seed in seeds}
    wrong: list[str] = []
    ready = threading.Barrier(CALLERS)

    def call(first: int) -> None:
        ready.wait()
        for seed in range(first, first + CALLS):
            try:
                for i, (one, other) in enumerate(zip(_results(seed), expected[seed], strict=True)):
                    if not torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5)):
                        wrong.append(f"result {i} of the call with seed {seed}")
            except Exception as error:
                wrong.append(f"seed {seed}: {type(error).__name__}: {error}")

    callers = [threading.Thread(target=call, args=(seeds[i * CALLS],)) for i in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    if wrong:
        raise AssertionError("; ".join(wrong[:3]))
    return True
