# SPDX-License-Identifier: MIT
"""5,000 random cases for each backend: results on the GPU against `python_ref` on that GPU.

The CUDA kernels are there for every case. Triton compiles some six kernels for a case of another
kind, half a second each, and 5,000 kinds would be an hour of compiling: `relatives` draws what a
kernel is not compiled for.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from cases import CONTENTS, Case, make_case
from on_device import DEVICE, ON_CPU, there

from python_ref import assert_forward

ops = torch.ops.convnn
CASES = 16 if ON_CPU else 5000
AT_ONCE = 4 if ON_CPU else 50
KINDS = {"cuda": AT_ONCE, "triton": 2}


def kinds(backend: str, first: int, number: int) -> Iterator[Case]:
    """Cases as `make_case` draws them, from seed `first` on."""
    for seed in islice(count(first), number):
        case = make_case(seed)
        if backend == "triton":
            # Not for this backend; and the interpreter computes bfloat16 wrongly.
            instead = {torch.float64: torch.float32}
            instead |= {torch.bfloat16: torch.float16} if ON_CPU else {}
            dtypes = (instead.get(X, X) for X in (case.query_dtype, case.value_dtype))
            case = replace(case, **dict(zip(("query_dtype", "value_dtype"), dtypes, strict=True)))
        if ON_CPU:
            case = replace(case, lead=case.lead[:1], N=min(case.N, 20))
        yield case


def relatives(case: Case, number: int) -> Iterator[Case]:
    """The case, and others with other values, masks, candidates, scales and numbers of queries.

    A kernel is compiled for dtypes, tiles, and which sizes and strides are 1 or multiples of 16:
    these stay, also where the number of queries is another one with the same rest.
    """
    draw = random.Random(case.seed)
    yield case
    for i in range(1, number):
        N = case.N % 16 + 16 * draw.randint(0, case.N // 16)
        yield replace(
            case,
            seed=100_000 * i + case.seed,
            N=N if N > 1 else case.N,
            content=draw.choice(CONTENTS),
            scale=draw.choice((1.0, 0.125, 3.0, -1.0)) if case.rho == "softmax" else 1.0,
        )


@pytest.mark.parametrize("part", range(CASES // AT_ONCE))
def test_random_cases(
    backend: str, part: int, record_property: Callable[[str, object], None]
) -> None:
    each = AT_ONCE // KINDS[backend]
    wrong = []
    for kind in kinds(backend, 20_000 + part * KINDS[backend], KINDS[backend]):
        for case in relatives(kind, each):
            arguments = {name: there(X) for name, X in case.arguments().items()}
            # New tensors are full of NaN, so that an element nobody wrote is seen.
            torch.use_deterministic_algorithms(case.seed % 2 == 1, warn_only=True)
            try:
                Y, _, _ = assert_forward(ops.forward, **arguments, exact=case.exact, seed=case.seed)
                assert Y.device.type == DEVICE.type
            except AssertionError as error:
                wrong.append(f"{case.id}: {error}")
    record_property("cases", AT_ONCE)
    record_property("wrong", len(wrong))
    assert not wrong, f"{len(wrong)} of {AT_ONCE}: " + "\n".join(wrong[:5])
