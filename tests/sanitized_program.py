# SPDX-License-Identifier: MIT
"""Random cases through PyTorch, printing a digest of each result: sanitized_program.py FIRST COUNT.

tests/test_sanitized.py runs this with the sanitized CPU library, in a process that has loaded the
sanitizer before.
"""

import hashlib
import sys

import torch
from cases import make_case

import convnn_kernels  # noqa: F401
from convnn_kernels import native

GRADIENTS = ("query", "key", "value", "weight", "bias")


def digest(X: torch.Tensor) -> str:
    """Of the elements, where all NaN are alike."""
    return hashlib.sha256(X.detach().double().nan_to_num(1e300).numpy().tobytes()).hexdigest()[:16]


def run(seed: int) -> list[str]:
    """The digests of what a case returns and of its gradients."""
    arguments = make_case(seed, restricted=seed % 2 == 1).arguments()
    for name in GRADIENTS:
        if arguments[name] is not None:
            arguments[name] = arguments[name].requires_grad_()
    leaves = [arguments[name] for name in GRADIENTS if arguments[name] is not None]
    output, s, I = torch.ops.convnn.forward(**arguments)
    grads = torch.autograd.grad(
        [output, s], leaves, [output.detach(), torch.ones_like(s)], allow_unused=True
    )
    return [digest(X) for X in (output, s, I, *grads) if X is not None]


def run_without_batch(k: int) -> None:
    """Forward and backward with as many neighbors as there may be; the tensors have no elements."""
    X = torch.ones(0, 5, 4, requires_grad=True)
    torch.ops.convnn.forward(X, X, X, k)
    similarities, _ = torch.ops.convnn.select(X, X, k)
    torch.autograd.grad(similarities, X, torch.ones_like(similarities))


def main() -> None:
    first, count = map(int, sys.argv[1:])
    run_without_batch(2**56 // 5)
    sets = native.usable_cpu_instruction_sets()
    for seed in range(first, first + count):
        torch.set_num_threads(1 + seed % 2)
        with native.use_cpu_instruction_set(sets[seed % len(sets)]):
            print(seed, *run(seed), flush=True)


if __name__ == "__main__":
    main()
