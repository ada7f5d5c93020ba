# SPDX-License-Identifier: MIT
"""The CUDA C++ kernels for compute capability 9.0: when they run, and whether they are right.

Where nothing is forced, C++ stands on the CUDA key of ``convnn::forward`` and ``convnn::select``
(csrc/cuda/way_in.h) and runs these kernels without Python. It does so for the kinds of calls for
which it was told that they are right on a device. Any other call it hands over to selection.py,
which asks this module: on each device, the kernels first run for each `Kind` on small searches
whose results are known. If one is wrong, one line is logged, and this kind is left to other
kernels.
"""

import ctypes
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnn_kernels import known_searches, native
from convnn_kernels.backends import first_use
from convnn_kernels.known_searches import Case, Result
from convnn_kernels.triton import backend as triton
from convnn_kernels.triton.hardware import interpreted

# In the order of `Operator` in csrc/cuda/choice.h.
OPERATORS = ("convnn::forward", "convnn::select")
TAKES = (
    "float16 and bfloat16, cosine and dot, D from 16 to 128, k up to 64, no self indices, "
    "no key range, candidates shared by the batch"
)
CAPABILITY = (9, 0)
# `Routing` and `Verdict` there.
_CHOOSE, _TO_PYTHON = 1, 2
_RIGHT, _WRONG = 1, 2


class Kind(NamedTuple):
    """Calls that the same instances of the kernels serve; `D` and `k` are the most they take."""

    metric: str
    dtype: torch.dtype
    D: int
    k: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.metric} in {dtype}, D up to {self.D}, k up to {self.k}"


class Choice(NamedTuple):
    """What becomes of a call."""

    kind: Kind | None = None  # None if these kernels do not run it
    is_faster: bool = False  # whether they are predicted to be faster than Triton's
    is_final: bool = True  # False if the kernels could not be checked yet


def kind_of(number: int) -> Kind:
    """The kind that `hopper_kind` in csrc/cuda/choice.cpp gives this number."""
    rest, is_bfloat16 = divmod(number, 2)
    rest, is_dot = divmod(rest, 2)
    lists, is_wide = divmod(rest, 2)
    return Kind(
        "dot" if is_dot else "cosine",
        torch.bfloat16 if is_bfloat16 else torch.float16,
        128 if is_wide else 64,
        (10, 16, 32, 64)[lists],
    )


KINDS = 32


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(native.library("cuda")))


def unavailable() -> str | None:
    """Why no device can run the kernels; None if one of compute capability 9.0 can."""
    if reason := native.load()["cuda"]:
        return reason
    return None if _library().convnn_cuda_hopper_is_built() else "not built for sm_90a"


def is_in_front() -> bool:
    """Whether C++ stands on the CUDA key of OPERATORS."""
    return not native.load()["cuda"]


def route(is_forced: bool) -> None:
    """Tells C++ whether a backend is forced, so that every call is handed over.

    So it is where Triton's interpreter was asked for.
    """
    if is_in_front():
        to_python = is_forced or interpreted()
        _library().convnn_cuda_set_routing(_TO_PYTHON if to_python else _CHOOSE)


def choice(name: str, device: torch.device, arguments: Any, forced: str | None) -> Choice:
    """What becomes of a call of ``name``; the first one of a kind waits for the check."""
    if forced not in (None, "cuda") or not can_run(name, device):
        return Choice()
    number, is_faster, refusal = ask(name, arguments)
    is_left_to_triton = not is_faster and forced is None and triton.unavailable() is None
    if refusal or is_left_to_triton:
        return Choice()
    right = passes(device, number)
    if right is None:
        return Choice(is_final=False)
    verdict = _RIGHT if right else _WRONG
    _library().convnn_cuda_set_verdict(device.index or 0, OPERATORS.index(name), number, verdict)
    return Choice(kind_of(number), is_faster) if right else Choice()


def can_run(name: str, device: torch.device) -> bool:
    """Whether there are kernels for an operator on a device."""
    return (
        name in OPERATORS
        and device.type == "cuda"
        and unavailable() is None
        and torch.cuda.get_device_capability(device) == CAPABILITY
    )


def ask(name: str, arguments: Any) -> tuple[int, bool, str]:
    """The number of a call's kind, whether the kernels are faster, and why they cannot run it."""
    op = getattr(torch.ops.convnn_cuda, f"{name.removeprefix('convnn::')}_choice")
    return op.default(*arguments)


def passes(device: torch.device, number: int) -> bool | None:
    """Whether the kernels are right for a kind, by its number; None if that cannot be told yet."""
    kind = kind_of(number)
    return first_use.passes(device, "Hopper kernels", kind, lambda: faults(device, kind))


def faults(device: torch.device, kind: Kind, rows: int = 4096, many: int = 20_000) -> list[str]:
    """The names of the cases that come out wrong; an exception ends the check."""
    wrong: list[str] = []
    name = "the first case"
    try:
        for case in _cases(device, kind, rows, many):
            name = case.name
            right = all(known_searches.is_right(case, result) for result in _results(case, kind.k))
            if not right and name not in wrong:
                wrong.append(name)
    except Exception as error:
        wrong.append(first_use.failure(name, error))
    return wrong


def _cases(device: torch.device, kind: Kind, rows: int, many: int) -> Iterator[Case]:
    search = device, kind.metric, kind.dtype
    few = min(200, rows)
    # The widest rows, and so many columns that they are divided among blocks, with 41 distinct keys
    # of which each is in each of the 128 columns of a tile; rows that are padded, and few columns.
    for D, M, distinct in ((kind.D, 42 * 128 + 1, 41), (kind.D - 24, 1300, 40)):
        yield from known_searches.cases(*search, D, M, distinct=distinct, queries=few, rows=rows)
    # 316 blocks of queries, the last of a batch element in part: more than fit into one launch, so
    # that the next one uses the workspace again, and up to k = 10 more than there are
    # multiprocessors in a launch, so that some take a second one.
    yield from known_searches.batches(*search, kind.D, 1301, many)


def _results(case: Case, k: int) -> Iterator[Result]:
    yield run_select(case, k)
    yield run_forward(case, k)
    if not case.is_exact:
        value = case.value.flatten(0, -2)
        weight = value[: 8 * k].reshape(8, k, -1).mT.contiguous()  # [O, D, k]
        yield run_forward(case, k, weight[0][:, None], value[0])
        yield run_forward(case, k, weight, value[0, :8])


def run_select(case: Case, k: int) -> Result:
    return Result(*torch.ops.convnn_cuda.hopper_select(*select_arguments(case, k)))


def run_forward(
    case: Case, k: int, weight: Tensor | None = None, bias: Tensor | None = None
) -> Result:
    args = forward_arguments(case, k, weight, bias)
    output, s, I = torch.ops.convnn_cuda.hopper_forward(*args)
    return Result(s, I, output, weight, bias)


def select_arguments(case: Case, k: int) -> tuple[Any, ...]:
    """Those of ``convnn::select``."""
    return (
        *(case.query, case.key, k, case.candidates, None, case.key_mask),
        *(case.metric, case.order),
    )


def forward_arguments(
    case: Case, k: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[Any, ...]:
    """Those of ``convnn::forward``."""
    return (
        *(case.query, case.key, case.value, k, weight, bias, case.candidates, None),
        *(case.key_mask, case.metric, "softmax", 1.0, case.order),
    )


def report() -> dict[str, str]:
    """For `info`: for each device of compute capability 9.0, the outcome of all checks."""
    if unavailable() is not None:
        return {}
    outcomes = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if torch.cuda.get_device_capability(device) != CAPABILITY:
            continue
        with torch.cuda.device(device):
            wrong = [str(kind_of(i)) for i in range(KINDS) if not passes(device, i)]
        right = KINDS - len(wrong)
        outcomes[str(device)] = f"{right} of {KINDS} kinds of calls are right" + "".join(
            f"; wrong: {kind}" for kind in wrong
        )
    return outcomes
