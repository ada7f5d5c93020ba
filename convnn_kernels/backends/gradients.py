# SPDX-License-Identifier: MIT
"""The gradients in CUDA C++ on devices of compute capability 9.0: when they take Triton's place.

Where nothing is forced, ``convnn::forward_backward`` goes to the portable kernels
(csrc/cuda/gradients.cu) where `gradients_are_faster` in csrc/cuda/choice.cpp says so. On each
device they first run for each dtype on small calls, and their results are compared with those of
PyTorch in float64. If one is wrong, one line is logged, and that dtype is left to Triton.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnn_kernels import schemas
from convnn_kernels.backends import cuda, first_use, hopper
from convnn_kernels.triton import backend as triton

OPERATOR = "convnn::forward_backward"
DTYPES = (torch.float16, torch.bfloat16)
TAKES = "float16 and bfloat16, D and C up to 64, k up to 16"
_EPSILON = 1e-12


class Case(NamedTuple):
    """The gradients of one call."""

    metric: str
    rho: str
    D: int
    C: int
    k: int

    def __str__(self) -> str:
        return f"{self.metric}, {self.rho}, D = {self.D}, C = {self.C}, k = {self.k}"


# Whole 16 bytes a row, and not.
CASES = (
    Case("cosine", "softmax", 64, 64, 9),
    Case("dot", "similarity", 40, 64, 16),
    Case("euclidean", "softmax", 36, 20, 9),
    Case("cosine", "ones", 36, 20, 16),
)


def choice(name: str, device: torch.device, arguments: Any, forced: str | None) -> hopper.Choice:
    """What becomes of a call of ``name``; the first one of a dtype waits for the check."""
    if forced is not None or triton.unavailable() is not None or not can_run(name, device):
        return hopper.Choice()
    if not torch.ops.convnn_cuda.forward_backward_choice.default(*arguments):
        return hopper.Choice()
    right = passes(device, arguments.query.dtype)
    return hopper.Choice(is_faster=bool(right), is_final=right is not None)


def can_run(name: str, device: torch.device) -> bool:
    """Whether the kernels may be chosen for an operator on a device."""
    return (
        name == OPERATOR
        and device.type == "cuda"
        and cuda.unavailable() is None
        and torch.cuda.get_device_capability(device) == hopper.CAPABILITY
        and cuda.refuses(device) is None
    )


def passes(device: torch.device, dtype: torch.dtype) -> bool | None:
    """Whether the kernels are right for a dtype; None if that cannot be told yet."""
    kind = str(dtype).removeprefix("torch.")
    return first_use.passes(device, "CUDA C++ gradients", kind, lambda: faults(device, dtype))


def faults(device: torch.device, dtype: torch.dtype, rows: int = 2048) -> list[str]:
    """What comes out wrong; an exception ends the check."""
    names = ("query", "key", "value", "weight", "bias")
    wrong: list[str] = []
    case = CASES[0]
    try:
        for case in CASES:
            arguments = _arguments(case, device, dtype, rows)
            results, expected = run(arguments), _expected(arguments)
            wrong += [
                f"{of} of {case}"
                for of, X, E in zip(names, results, expected, strict=True)
                if not _are_close(X, E)
            ]
    except Exception as error:
        wrong.append(first_use.failure(str(case), error))
    return wrong


def run(arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.convnn_cuda.forward_backward.default(*arguments)


def _arguments(case: Case, device: torch.device, dtype: torch.dtype, rows: int) -> Any:
    """A call of two batch elements, of so many queries each, with half as many keys.

    All queries choose one key, none the last one. Some keys are equal, some neighbors missing, and
    a row of query and one of key are zero.
    """
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")  # whatever the default device is
    keys = rows // 2

    def random(*shape: int) -> Tensor:
        X = torch.randn(shape, generator=generator, device=cpu, dtype=torch.float32)
        return X.to(device, dtype)

    query, key, value = random(2, rows, case.D), random(2, keys, case.D), random(2, keys, case.C)
    key[:, 6:40] = key[:, 5:6]
    query[:, 3], key[:, 4] = 0, 0
    order = torch.rand((2, rows, keys), generator=generator, device=cpu, dtype=torch.float32)
    order[:, :, 5], order[:, :, -1] = 2, -1
    I = order.topk(case.k).indices.to(device)
    s = _similarities(query, key, I, case.metric).float()
    missing = torch.zeros_like(I, dtype=torch.bool)
    missing[:, 9], missing[:, 10:20, -3:] = True, True
    s, I = s.masked_fill(missing, -torch.inf), I.masked_fill(missing, 0)
    with_weight = case.metric == "cosine"
    direct = torch.randn(I.shape, generator=generator, device=cpu, dtype=torch.float32).to(device)
    return schemas.arguments(OPERATOR)(
        random(2, rows, case.C),
        direct if case.metric != "dot" else None,
        query,
        key,
        value,
        random(case.C, 1, case.k) if with_weight else None,
        s,
        I,
        with_weight,
        case.metric,
        case.rho,
        2.0 if case.rho == "softmax" else 1.0,
        *[True] * 5,
    )


def _rows(X: Tensor, I: Tensor) -> Tensor:
    """The rows of X [B, M, channels] that I [B, N, k] names, [B, N, k, channels] in float64."""
    return torch.stack([x[rows] for x, rows in zip(X.double(), I, strict=True)])


def _unit(X: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of norm 1, or of zeros, and the inverse of the norms."""
    norm = X.norm(dim=-1, keepdim=True)
    inverse = torch.where(norm > _EPSILON, 1 / norm, 0.0)
    return X * inverse, inverse


def _similarities(query: Tensor, key: Tensor, I: Tensor, metric: str) -> Tensor:
    q, k = query.double()[:, :, None], _rows(key, I)
    if metric == "euclidean":
        return -(q - k).square().sum(-1)
    if metric == "cosine":
        q, k = _unit(q)[0], _unit(k)[0]
    return (q * k).sum(-1)


def _expected(call: Any) -> Iterator[Tensor]:
    """The gradients of query, key, value, weight and bias in float64.

    By their formulas: derivatives are not recorded within a kernel.
    """
    s, I = call.similarities.double(), call.indices
    softmax = (call.scale * s).softmax(2).nan_to_num(0.0)[..., None]  # [B, N, k, 1]
    present = (s != -torch.inf).double()[..., None]
    s = s.masked_fill(s == -torch.inf, 0.0)[..., None]
    g, v = call.grad_output.double()[:, :, None], _rows(call.value, I)
    w = 1.0 if call.weight is None else call.weight.double()[:, 0].mT  # [k, C]
    rho = {"softmax": softmax, "similarity": s, "ones": present}[call.rho]
    ds = torch.zeros_like(s)
    if call.rho != "ones":
        ds = (g * w * v).sum(-1, keepdim=True)
    if call.rho == "softmax":
        ds = call.scale * rho * (ds - (rho * ds).sum(2, keepdim=True))
    if call.grad_similarities is not None:
        ds = ds + call.grad_similarities.double()[..., None]
    ds = ds * present

    q, k = call.query.double()[:, :, None], _rows(call.key, I)
    if call.metric == "cosine":
        (q, inverse_q), (k, inverse_k) = _unit(q), _unit(k)
        of_q, of_k = (k - s * q) * inverse_q, (q - s * k) * inverse_k
    elif call.metric == "euclidean":
        of_q, of_k = 2 * (k - q), 2 * (q - k)
    else:
        of_q, of_k = k, q
    yield (ds * of_q).sum(2)
    yield _sum_by_key(ds * of_k, call.key, I)
    yield _sum_by_key(rho * w * g, call.value, I)
    if call.weight is not None:
        yield (rho * v * g).sum((0, 1)).mT[:, None]
        yield g.sum((0, 1, 2))
    else:
        yield from [s.new_empty(0)] * 2


def _sum_by_key(pairs: Tensor, like: Tensor, I: Tensor) -> Tensor:
    sums = torch.zeros_like(like, dtype=torch.float64)
    for total, rows, each in zip(sums, I, pairs, strict=True):
        total.index_add_(0, rows.flatten(), each.flatten(0, 1))
    return sums


def _are_close(X: Tensor, expected: Tensor) -> bool:
    if expected.numel() == 0:
        return X.numel() == 0
    atol = float(expected.abs().mean()) * 2**-8
    return X.shape == expected.shape and torch.allclose(X.double(), expected, rtol=2**-7, atol=atol)


def report() -> dict[str, str]:
    """For `info`: for each device on which the kernels may be chosen, the outcome of the checks."""
    if cuda.unavailable() is not None:
        return {}
    outcomes = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if not can_run(OPERATOR, device):
            continue
        with torch.cuda.device(device):
            outcomes[str(device)] = ", ".join(
                f"{str(dtype).removeprefix('torch.')} is {'right' if right else 'wrong'}"
                for dtype in DTYPES
                if (right := passes(device, dtype)) is not None
            )
    return outcomes
