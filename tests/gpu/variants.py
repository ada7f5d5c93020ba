# SPDX-License-Identifier: MIT
"""Random cases by seed, computed on the GPU and compared with `python_ref` on that GPU.

Triton compiles about six kernels for a new kind of case, half a second each, so each seed has
several variants that need the same kernels. The CUDA C++ kernels are compiled in advance.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from cases import CONTENTS, Case, make_case
from on_device import DEVICE, ON_CPU, there

from python_ref import assert_forward


def kind(seed: int, backend: str) -> Case:
    """The case that `make_case` draws, with an odd seed a restricted one, in a dtype that the
    backend supports."""
    case = make_case(seed, restricted=seed % 2 == 1)
    if backend == "triton":
        # Triton has no float64, and its interpreter computes bfloat16 wrongly.
        instead = {torch.float64: torch.float32}
        instead |= {torch.bfloat16: torch.float16} if ON_CPU else {}
        dtypes = (instead.get(X, X) for X in (case.query_dtype, case.value_dtype))
        case = replace(case, **dict(zip(("query_dtype", "value_dtype"), dtypes, strict=True)))
    return replace(case, lead=case.lead[:1], N=min(case.N, 20)) if ON_CPU else case


def variants(case: Case, number: int) -> Iterator[Case]:
    """The case, and some with other values, masks, candidates, scales and numbers of queries."""
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


def wrong_variants(seed: int, number: int, backend: str) -> list[str]:
    """Errors in the case of a seed and its variants, `number` in total, on the current backend."""
    found = []
    for i, case in enumerate(variants(kind(seed, backend), number)):
        given = {name: there(X) for name, X in case.arguments().items()}
        # Fills new tensors with NaN, to detect elements that are never written.
        torch.use_deterministic_algorithms(case.seed % 2 == 1, warn_only=True)
        options = {"exact": case.exact, "seed": case.seed}
        try:
            Y, _, _ = assert_forward(torch.ops.convnn.forward, **given, **options)
            assert Y.device.type == DEVICE.type
        except AssertionError as error:
            found.append(f"variant {i}, {case.id}: {error}"[:400])
        except Exception as error:
            raise RuntimeError(f"variant {i}, {case.id}: {error}") from error
    return found
