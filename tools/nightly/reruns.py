# SPDX-License-Identifier: MIT
"""The same call again, with other numbers of threads: the same bits."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ops = torch.ops.convnn

CONFIGURATIONS = [
    *itertools.product(
        (torch.float32, torch.float64, torch.float16, torch.bfloat16),
        ("cosine", "dot", "euclidean"),
        ("depthwise", "dense"),
    )
]
B, N, M, D, C, O, K = 2, 130, 190, 19, 21, 13, 9


class Configuration:
    """A call of `forward` and its backward, with ties among the keys."""

    def __init__(self, number: int) -> None:
        dtype, self.metric, kind = CONFIGURATIONS[number]
        generator = torch.Generator().manual_seed(number)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        query, key, value = randn(B, N, D), randn(B, M, D), randn(B, M, C)
        key[:, 120:150] = key[:, :30]
        weight = randn(O, C, K) if kind == "dense" else randn(C, 1, K)
        self.leaves = [X.requires_grad_() for X in (query, key, value, weight)]
        outputs = O if kind == "dense" else C
        self.grads = [randn(B, N, outputs), randn(B, N, K).to(self.run_forward()[1].dtype)]
        self.expected: Sequence[Tensor] | None = None

    def run_forward(self) -> tuple[Tensor, ...]:
        query, key, value, weight = self.leaves
        return ops.forward(query, key, value, K, weight, metric=self.metric)

    def run(self) -> list[Tensor]:
        Y, s, I = self.run_forward()
        return [Y, s, I, *torch.autograd.grad((Y, s), self.leaves, self.grads)]


_made: dict[int, Configuration] = {}


def rerun(case: int) -> bool:
    """One run of a configuration, case modulo their number."""
    number = case % len(CONFIGURATIONS)
    if number not in _made:
        torch.set_num_threads(1)
        _made[number] = Configuration(number)
        _made[number].expected = _made[number].run()
    configuration = _made[number]
    threads = (1, 2, 3, 4)[case // len(CONFIGURATIONS) % 4]
    torch.set_num_threads(threads)
    for i, (found, expected) in enumerate(
        zip(configuration.run(), configuration.expected or (), strict=True)
    ):
        if not torch.equal(found, expected):
            raise AssertionError(f"{CONFIGURATIONS[number]}: result {i} with {threads} threads")
    return True
