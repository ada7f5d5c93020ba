# SPDX-License-Identifier: MIT
"""Random cases of a seed for results on the GPU, against `python_ref` on that GPU.

The CUDA kernels are there for every case. Triton compiles some six kernels for a case of another
kind, half a second each: relatives of a case are drawn so that they need no other kernels.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from cases import CONTENTS, Case, make_case
from on_device import DEVICE, ON_CPU, there

from python_ref import assert_forward


def kind(seed: int, backend: str) -> Case:
    """The case that `make_case` draws, in a dtype that the backend takes."""
    case = make_case(seed)
    if backend == "triton":
        # Not for this backend; and the interpreter computes bfloat16 wrongly.
        instead = {torch.float64: torch.float32}
        instead |= {torch.bfloat16: torch.float16} if ON_CPU else {}
        dtypes = (instead.get(X, X) for X in (case.query_dtype, case.value_dtype))
        case = replace(case, **dict(zip(("query_dtype", "value_dtype"), dtypes, strict=True)))
    return replace(case, lead=case.lead[:1], N=min(case.N, 20)) if ON_CPU else case


def relatives(case: Case, number: int) -> Iterator[Case]:
    """The case, and others with other values, masks, candidates, scales and numbers of queries."""
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


def wrong_ones(seed: int, number: int, backend: str) -> list[str]:
    """What is wrong with a case and its relatives, `number` in all, on the backend that runs."""
    found = []
    for i, case in enumerate(relatives(kind(seed, backend), number)):
        given = {name: there(X) for name, X in case.arguments().items()}
        # New tensors are full of NaN, so that an element nobody wrote is seen.
        torch.use_deterministic_algorithms(case.seed % 2 == 1, warn_only=True)
        options = {"exact": case.exact, "seed": case.seed}
        try:
            Y, _, _ = assert_forward(torch.ops.convnn.forward, **given, **options)
            assert Y.device.type == DEVICE.type
        except AssertionError as error:
            found.append(f"relative {i}, {case.id}: {error}"[:400])
        except Exception as error:
            raise RuntimeError(f"relative {i}, {case.id}: {error}") from error
    return found
